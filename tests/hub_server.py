"""The smallest honest Hub: model repositories in memory, served on the loopback to the real `huggingface_hub` client.

Speaks what a download needs: repository info, the file tree, and HEAD / GET of files with ETag and X-Repo-Commit,
errors named in X-Error-Code as the Hub names them. No uploads, datasets, LFS redirects or Xet.
"""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants


@dataclass
class Repository:
    """A model repository: `commits` maps a hash to its files, `refs` a branch to a hash; a gate lets in `tokens`."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    tokens: set[str] = field(default_factory=set)

    def commit(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        digest = hashlib.sha1(repr(sorted(files.items())).encode() + str(len(self.commits)).encode()).hexdigest()
        self.commits[digest] = dict(files)
        self.refs[branch] = digest
        return digest


class HubServer:
    """`.url` goes into HF_ENDPOINT; `.requests` lists "METHOD path" of everything that was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def push_folder(self, repo: str, folder: Path, *, gated: bool = False, branch: str = "main") -> str:
        """Commits every file under `folder`; returns the commit hash."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        repository = self.repositories.setdefault(repo, Repository())
        repository.gated = gated
        return repository.commit(files, branch)

    @contextmanager
    def running(self) -> Iterator["HubServer"]:
        thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()
            thread.join()


def point_client_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets HF_ENDPOINT; the client reads it once, on import, so in this process its constants change too."""
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: `HubServer.requests` is the log."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            self._route(path)
        except _Refused as refused:
            body = json.dumps({"error": str(refused)}).encode()
            self._send(refused.status, body, {"X-Error-Code": refused.code, "X-Error-Message": str(refused)})

    def _route(self, path: str) -> None:
        if path.startswith("/api/models/"):
            name, marker, rest = _split(path.removeprefix("/api/models/"), ("/revision/", "/tree/"))
            repository = self._repository(name)
            commit = self._commit(repository, rest or "main")
            self._send_json(_tree(repository, commit) if marker == "/tree/" else _info(name, repository, commit))
            return
        name, _, rest = _split(path.removeprefix("/"), ("/resolve/",))
        repository = self._repository(name)
        revision, _, file = rest.partition("/")
        commit = self._commit(repository, revision)
        if repository.gated and self.headers.get("Authorization", "").removeprefix("Bearer ") not in repository.tokens:
            raise _Refused(403, "GatedRepo", f"Access to model {name} is restricted")
        if file not in repository.commits[commit]:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        body = repository.commits[commit][file]
        self._send(200, body, {"ETag": f'"{_blob_id(body)}"', "X-Repo-Commit": commit})

    def _repository(self, name: str) -> Repository:
        if name not in self.hub.repositories:
            raise _Refused(404, "RepoNotFound", "Repository not found")
        return self.hub.repositories[name]

    def _commit(self, repository: Repository, revision: str) -> str:
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _split(path: str, markers: tuple[str, ...]) -> tuple[str, str, str]:
    """`path` cut at the first marker it holds: repository name, marker, the rest."""
    for marker in markers:
        name, found, rest = path.partition(marker)
        if found:
            return name, found, rest
    return path, "", ""


def _blob_id(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()  # git's own, as the Hub answers for small files


def _info(name: str, repository: Repository, commit: str) -> dict[str, object]:
    files = repository.commits[commit]
    return {
        "id": name,
        "sha": commit,
        "private": False,
        "gated": "manual" if repository.gated else False,
        "tags": [],
        "siblings": [{"rfilename": file} for file in files],
    }


def _tree(repository: Repository, commit: str) -> list[dict[str, object]]:
    files = repository.commits[commit].items()
    return [{"type": "file", "path": file, "size": len(body), "oid": _blob_id(body)} for file, body in files]
