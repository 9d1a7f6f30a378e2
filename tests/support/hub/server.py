"""The Hub as an HTTP server: its routes, its two origins, and its faults.

Does not cover TLS, compression, or rate limits.
"""

from __future__ import annotations

import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.hub import lfs, reading, writing
from tests.support.hub.answers import Answer, Refused, Request
from tests.support.hub.client import environment
from tests.support.hub.faults import Fault
from tests.support.hub.repositories import Repository

Route = Callable[["HubServer", Request], Answer]

NAME = r"(?P<name>[^/]+/[^/]+)"
REPOSITORY = rf"/api/(?P<kind>models|datasets|spaces)/{NAME}"
REVISION = r"/(?P<revision>[^/]+)"
PAGE = rf"/(?P<kind>(?:datasets|spaces)/)?{NAME}"

# Matched against the raw path: a slash inside a revision or a branch is quoted there.
HUB_ROUTES: dict[tuple[str, str], Route] = {
    ("GET", "/api/whoami-v2"): reading.whoami,
    ("POST", "/api/validate-yaml"): writing.validate_yaml,
    ("POST", "/api/repos/create"): writing.create,
    ("DELETE", "/api/repos/delete"): writing.delete,
    ("GET", REPOSITORY): reading.info,
    ("GET", f"{REPOSITORY}/revision{REVISION}"): reading.info,
    ("GET", f"{REPOSITORY}/tree{REVISION}(?:/(?P<path>.+))?"): reading.tree,
    ("POST", f"{REPOSITORY}/paths-info{REVISION}"): reading.paths_info,
    ("GET", f"{REPOSITORY}/commits{REVISION}"): reading.commits,
    ("GET", f"{REPOSITORY}/refs"): reading.refs,
    ("GET", f"{REPOSITORY}/auth-check(?:/write)?"): reading.auth_check,
    ("PUT", f"{REPOSITORY}/settings"): writing.settings,
    ("POST", f"{REPOSITORY}/preupload{REVISION}"): writing.preupload,
    ("POST", f"{REPOSITORY}/commit{REVISION}"): writing.commit,
    ("POST", f"{REPOSITORY}/branch/(?P<branch>[^/]+)"): writing.create_branch,
    ("DELETE", f"{REPOSITORY}/branch/(?P<branch>[^/]+)"): writing.delete_branch,
    ("POST", f"{REPOSITORY}/tag{REVISION}"): writing.create_tag,
    ("DELETE", f"{REPOSITORY}/tag{REVISION}"): writing.delete_tag,
    ("GET", f"{REPOSITORY}/xet-(?:read|write)-token.*"): writing.no_xet,
    ("POST", rf"{PAGE}\.git/info/lfs/objects/batch"): lfs.batch,
    ("POST", rf"{PAGE}\.git/info/lfs/objects/verify"): lfs.verify,
    ("GET", f"{PAGE}/resolve{REVISION}/(?P<path>.+)"): reading.resolve,
}
STORAGE_ROUTES: dict[tuple[str, str], Route] = {
    ("GET", rf"{PAGE}/(?P<oid>[0-9a-f]{{64}})/(?P<file>.+)"): lfs.get,
    ("PUT", rf"{PAGE}/(?P<oid>[0-9a-f]{{64}})/(?P<file>\d+)"): lfs.put,
}


class HubServer:
    """A Hub on the loopback; `.url` is the value for HF_ENDPOINT, `.requests` lists "METHOD path" of every request.

    `.tokens` maps a token to its user, who owns the namespace of that name. `.ranges` lists the received Range
    headers, `.faults` the faults to inject. The keys of datasets in `.repositories` are "datasets/owner/name".
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.tokens: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.ranges: list[str] = []
        self.leaked: list[str] = []  # tokens that reached the storage, which is not the Hub
        self.secret = secrets.token_bytes(16)
        self.lock = threading.Lock()
        self._servers = [self._listen(HUB_ROUTES, is_hub=True), self._listen(STORAGE_ROUTES, is_hub=False)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def push_folder(
        self, repo: str, folder: Path, *, gated: Literal["auto", "manual"] | bool = False, branch: str = "main"
    ) -> str:
        """Commits every file under `folder` and nothing else, as its owner; returns the commit hash."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        repository = self.repositories.setdefault(repo, Repository(repo))
        repository.gated = gated
        return repository.commit(files, branch, author=repository.owner)

    def environment(self, home: Path, *, token: str | None = None) -> dict[str, str]:
        """The environment of a fresh process whose client speaks to this server and keeps its files in `home`."""
        return environment(self.url, home, token=token)

    @contextmanager
    def running(self) -> Iterator[HubServer]:
        with ExitStack() as stack:
            for server in self._servers:
                thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
                thread.start()
                stack.callback(thread.join)
                stack.callback(server.server_close)
                stack.callback(server.shutdown)
            yield self

    def user(self, token: str) -> str | None:
        """The owner of the token; "" if it has none but access to a repository.

        Raises:
            Refused: 401, the token is unknown.
        """
        if not token or token in self.tokens:
            return self.tokens.get(token)
        if any(token in repository.tokens for repository in self.repositories.values()):
            return ""
        raise Refused(401, "Invalid credentials in Authorization header")

    def faults_of(self, path: str, *, is_file: bool) -> list[Fault]:
        with self.lock:
            return [fault for fault in self.faults if fault.applies(path, is_file=is_file)]

    def _listen(self, routes: dict[tuple[str, str], Route], *, is_hub: bool) -> _Listener:
        handler = type("Handler", (_Handler,), {"hub": self, "routes": routes, "is_hub": is_hub})
        return _Listener(("127.0.0.1", 0), handler)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignores closed connections; anything else is a bug of this server, and printed on stderr."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    routes: dict[tuple[str, str], Route]
    is_hub: bool
    protocol_version = "HTTP/1.1"
    # Headers and body go out in two writes: without this the second waits for the client's delayed acknowledgement.
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: `HubServer.requests` is the log."""

    def answer(self) -> None:
        path = urlsplit(self.path).path
        body = self._body()
        self.hub.requests.append(f"{self.command} {unquote(path)}")
        if "Range" in self.headers:
            self.hub.ranges.append(self.headers["Range"])
        for fault in self.hub.faults_of(unquote(path), is_file=False):
            if fault.kind == "status":
                return self._send(Answer(fault.status, b"fault"))
            time.sleep(fault.seconds)
        try:
            answer = self._route(path, body)
        except Refused as refused:
            answer = refused.answer()
        if answer.file and self.command == "GET":
            return self._send_file(unquote(path), answer)
        self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def _route(self, path: str, body: bytes) -> Answer:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and not self.is_hub:
            self.hub.leaked.append(token)
        method = "GET" if self.command == "HEAD" else self.command
        query = parse_qs(urlsplit(self.path).query)
        request = Request(method, unquote(path), query, self.headers, body, token, self.hub.user(token))
        for (allowed, pattern), route in self.routes.items():
            found = re.fullmatch(pattern, path) if allowed == method else None
            if found:
                args = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
                return route(self.hub, replace(request, args=args))
        raise Refused(404, f"This Hub has no {method} {path}")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send_file(self, path: str, answer: Answer) -> None:
        """Sends a stored file or the requested range, with faults."""
        body, size = answer.body, len(answer.body)
        faults = {fault.kind: fault.at for fault in self.hub.faults_of(path, is_file=True)}
        if (at := faults.get("flip")) is not None:
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        requested = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        first, last = _span(requested[1], requested[2], size) if requested else (0, size - 1)
        if requested and not 0 <= first <= last:
            return self._send(Answer(416, b"", {"Content-Range": f"bytes */{size}"}))
        headers = {**answer.headers, "Accept-Ranges": "bytes"}
        if requested:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        part = body[first : min(last + 1, faults.get("short", size))]
        stop = max(faults["cut"] - first, 0) if "cut" in faults else None
        self._send(Answer(206 if requested else 200, part, headers), stop)

    def _send(self, answer: Answer, stop: int | None = None) -> None:
        """Sends an answer; with `stop`, closes the connection after so many bytes of its body."""
        self.send_response(answer.status)
        for key, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(key, value.encode("latin-1", "replace").decode("latin-1"))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:stop])
        if stop is not None:
            self.close_connection = True


def _span(first: str, last: str, size: int) -> tuple[int, int]:
    """The first and the last byte of a Range header: "5-9", "5-", or "-5" for the last five."""
    if not first:
        return max(size - int(last or 0), 0), size - 1
    return int(first), min(int(last), size - 1) if last else size - 1
