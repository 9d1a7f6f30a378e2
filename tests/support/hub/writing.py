"""The part of the Hub's API that writes: repositories, settings, commits, branches and tags.

Does not cover pull requests, renames, `.gitignore` rules, or files copied between repositories.
"""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tests.support.hub import cards
from tests.support.hub.access import key, known_user, own_namespace, visible, writable
from tests.support.hub.answers import Answer, Refused, Request, as_json
from tests.support.hub.repositories import GITATTRIBUTES, File, Repository

if TYPE_CHECKING:
    from tests.support.hub.server import HubServer


def create(hub: HubServer, request: Request) -> Answer:
    """Creates a repository with the Hub's initial commit."""
    user, body, request = known_user(request), request.json(), _named(request)
    name = key(request)
    own_namespace(request, name.split("/")[-2])
    where: dict[str, Any] = {"url": f"{hub.url}/{name}", "name": request.args["name"]}
    if name in hub.repositories:
        # The client reads the URL from this answer, too, when the repository may exist.
        raise Refused(409, "You already created this repo", extra=where)
    # A client before 2.0 sends "private", a later one "visibility".
    private = body.get("visibility") == "private" or bool(body.get("private"))
    hub.repositories[name] = Repository(name, private=private)
    hub.repositories[name].commit({".gitattributes": GITATTRIBUTES}, title="initial commit", author=user)
    return as_json(where)


def delete(hub: HubServer, request: Request) -> Answer:
    del hub.repositories[writable(hub, _named(request)).name]
    return Answer()


def settings(hub: HubServer, request: Request) -> Answer:
    repository, body = writable(hub, request), request.json()
    if "visibility" in body:
        repository.private = body["visibility"] == "private"
    for name in ("private", "gated"):
        setattr(repository, name, body.get(name, getattr(repository, name)))
    return as_json(body)


def preupload(hub: HubServer, request: Request) -> Answer:
    """Which files are to be stored in LFS, and the hashes of existing files in the branch."""
    repository = writable(hub, request)
    files = repository.files(request.args["revision"])
    attributes = files[".gitattributes"].body if ".gitattributes" in files else b""
    answers = []
    for item in request.json()["files"]:
        mode = "lfs" if repository.in_lfs(item["path"], item["size"], attributes) else "regular"
        answer = {"path": item["path"], "uploadMode": mode, "shouldIgnore": False}
        known = files.get(item["path"])
        answers.append(answer | ({"oid": known.etag} if known else {}))
    return as_json({"files": answers, "commitOid": repository.resolve(request.args["revision"])})


def commit(hub: HubServer, request: Request) -> Answer:
    """One commit from lines of JSON: a header, then the operations on the branch's tree."""
    repository, branch = writable(hub, request), request.args["revision"]
    if request.has_flag("create_pr"):
        raise Refused(400, "This Hub keeps no pull requests")
    if branch not in repository.refs:
        raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    header, *operations = [json.loads(line) for line in request.body.splitlines()]
    header_values = header["value"]
    parent = header_values.get("parentCommit")
    if parent and not repository.refs[branch].startswith(parent):
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    files = dict(repository.files(branch))
    for operation in operations:
        OPERATIONS[operation["key"]](repository, files, operation["value"])
    if "README.md" in files:
        _check_card(files["README.md"].body.decode(), request)
    title, message = header_values["summary"], header_values.get("description", "")
    digest = repository.commit(files, branch, title=title, message=message, author=request.user or "")
    url = f"{hub.url}/{repository.name}/commit/{digest}"
    return as_json({"success": True, "commitOid": digest, "commitUrl": url, "hookOutput": ""})


def _add(repository: Repository, files: dict[str, File], value: dict[str, Any]) -> None:
    files[value["path"]] = File(base64.b64decode(value["content"]))


def _add_lfs(repository: Repository, files: dict[str, File], value: dict[str, Any]) -> None:
    body = repository.objects.get(value["oid"])
    if body is None or value.get("size", len(body)) != len(body):
        raise Refused(
            400,
            "Your push was rejected because an LFS pointer pointed to a file that does not exist."
            f" Offending file: {value['path']}",
        )
    files[value["path"]] = File(body, lfs=True)


def _delete_file(repository: Repository, files: dict[str, File], value: dict[str, Any]) -> None:
    if files.pop(value["path"], None) is None:
        raise Refused(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")


def _delete_folder(repository: Repository, files: dict[str, File], value: dict[str, Any]) -> None:
    folder = value["path"].rstrip("/") + "/"
    inside = [path for path in files if path.startswith(folder)]
    if not inside:
        raise Refused(404, f"A folder with this name doesn't exist: {folder}", "EntryNotFound")
    for path in inside:
        del files[path]


OPERATIONS = {"file": _add, "lfsFile": _add_lfs, "deletedFile": _delete_file, "deletedFolder": _delete_folder}


def create_branch(hub: HubServer, request: Request) -> Answer:
    repository = writable(hub, request)
    start = repository.resolve(request.json().get("startingPoint", "main"))
    return _name_commit(repository.refs, request.args["branch"], start)


def delete_branch(hub: HubServer, request: Request) -> Answer:
    return _forget(writable(hub, request).refs, request.args["branch"])


def create_tag(hub: HubServer, request: Request) -> Answer:
    repository = writable(hub, request)
    return _name_commit(repository.tags, request.json()["tag"], repository.resolve(request.args["revision"]))


def delete_tag(hub: HubServer, request: Request) -> Answer:
    return _forget(writable(hub, request).tags, request.args["revision"])


def validate_yaml(hub: HubServer, request: Request) -> Answer:
    """The result of validating a card, as plain text if requested, else as JSON."""
    body = request.json()
    verdict = cards.check(body["content"], body.get("repoType", "model"))
    status = 400 if verdict.errors else 200
    if request.headers.get("Accept") == "text/plain":
        lines = [f"- Error: {error}" for error in verdict.errors] or [f"- Warning: {w}" for w in verdict.warnings]
        return Answer(status, "\n".join(lines).encode(), {"Content-Type": "text/plain; charset=utf-8"})
    lines_by_kind = {"errors": verdict.errors, "warnings": verdict.warnings}
    return as_json(
        {kind: [{"message": message} for message in messages] for kind, messages in lines_by_kind.items()}, status
    )


def no_xet(hub: HubServer, request: Request) -> Answer:
    visible(hub, request)
    raise Refused(
        404, "This Hub has no Xet storage: set HF_HUB_DISABLE_XET=1 (tests.support.hub.point_client_at does)"
    )


def _named(request: Request) -> Request:
    """The same request, for the repository named in its body."""
    body = request.json()
    name = f"{body.get('organization') or request.user}/{body['name']}"
    return replace(request, args={"kind": f"{body.get('type') or 'model'}s", "name": name})


def _name_commit(names: dict[str, str], name: str, commit: str) -> Answer:
    if name in names:
        raise Refused(409, f"Reference {name} exists already")
    names[name] = commit
    return Answer()


def _forget(names: dict[str, str], name: str) -> Answer:
    if names.pop(name, None) is None:
        raise Refused(404, f"Invalid rev id: {name}", "RevisionNotFound")
    return Answer()


def _check_card(content: str, request: Request) -> None:
    kind = request.args["kind"].rstrip("s")
    if errors := cards.check(content, kind).errors:
        raise Refused(400, "Invalid metadata in README.md: " + "; ".join(errors))
