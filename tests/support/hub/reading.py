"""The part of the Hub's API that reads: information, trees, refs, history and files of a repository.

Does not cover searching and listing repositories, `expand`, pagination, or pull requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from tests.support.hub import cards, lfs
from tests.support.hub.access import key, known_user, readable, visible, writable
from tests.support.hub.answers import Answer, Refused, Request, as_json
from tests.support.hub.repositories import File, folders

if TYPE_CHECKING:
    from tests.support.hub.server import HubServer


def whoami(hub: HubServer, request: Request) -> Answer:
    user = known_user(request)
    token = {"displayName": user, "role": "write"}
    facts = {"type": "user", "id": user, "name": user, "fullname": user, "email": f"{user}@example.org", "orgs": []}
    return as_json(facts | {"auth": {"type": "access_token", "accessToken": token}})


def info(hub: HubServer, request: Request) -> Answer:
    repository = visible(hub, request)
    commit = repository.resolve(request.args.get("revision", "main"))
    files = repository.commits[commit].files
    card = cards.metadata(files["README.md"].body.decode()) if "README.md" in files else {}
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in files]
    if request.has_flag("blobs"):
        siblings = [{"rfilename": path, **_blob(file)} for path, file in files.items()]
    facts = {
        "id": request.args["name"],
        "author": repository.owner,
        "sha": commit,
        "private": repository.private,
        "gated": "manual" if repository.gated is True else repository.gated,
        "disabled": False,
        "lastModified": repository.commits[commit].date,
        "cardData": card,
        "tags": card.get("tags") or [],
        "siblings": siblings,
    }
    return as_json(facts | {name: card[name] for name in ("library_name", "pipeline_tag") if name in card})


def auth_check(hub: HubServer, request: Request) -> Answer:
    (writable if request.path.endswith("/write") else readable)(hub, request)
    return Answer(headers={"Content-Type": "text/plain"}, body=b"OK")


def refs(hub: HubServer, request: Request) -> Answer:
    repository = visible(hub, request)
    kinds = {"branches": ("heads", repository.refs), "tags": ("tags", repository.tags)}
    named: dict[str, list[dict[str, str]]] = {
        kind: [{"name": name, "ref": f"refs/{where}/{name}", "targetCommit": commit} for name, commit in known.items()]
        for kind, (where, known) in kinds.items()
    }
    return as_json(named | {"converts": [], "pullRequests": []})


def commits(hub: HubServer, request: Request) -> Answer:
    history = visible(hub, request).history(request.args["revision"])
    return as_json(
        [
            {
                "id": digest,
                "title": commit.title,
                "message": commit.message,
                "date": commit.date,
                "authors": [{"user": commit.author}],
            }
            for digest, commit in history
        ]
    )


def tree(hub: HubServer, request: Request) -> Answer:
    """The entries of a folder, with `recursive` also of its subfolders."""
    files = visible(hub, request).files(request.args["revision"])
    folder = f"{request.args['path']}/" if request.args.get("path") else ""
    below = [path for path in [*sorted(folders(files)), *files] if path.startswith(folder)]
    if folder and not below:
        raise Refused(404, f"{folder} does not exist", "EntryNotFound")
    wanted = below if request.has_flag("recursive") else [path for path in below if "/" not in path[len(folder) :]]
    return as_json([_entry(path, files.get(path)) for path in wanted])


def paths_info(hub: HubServer, request: Request) -> Answer:
    """The entries of the existing ones among the form's `paths`."""
    files = visible(hub, request).files(request.args["revision"])
    known = {**dict.fromkeys(folders(files)), **files}
    requested = parse_qs(request.body.decode()).get("paths", [])
    return as_json([_entry(path, known[path]) for path in requested if path in known])


def resolve(hub: HubServer, request: Request) -> Answer:
    """A file's bytes, or a redirect to the storage."""
    repository = readable(hub, request)
    commit = repository.resolve(request.args["revision"])
    path, headers = request.args["path"], {"X-Repo-Commit": commit}
    if path not in repository.commits[commit].files:
        refused = Refused(404, "Entry not found", "EntryNotFound")
        refused.headers = headers
        raise refused
    file = repository.commits[commit].files[path]
    if not file.lfs:
        return Answer(200, file.body, {**headers, "ETag": f'"{file.etag}"'}, file=True)
    headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.body))}
    url = lfs.signed(hub, "GET", f"{key(request)}/{file.sha256}/{path}")
    return Answer(302, f"Found. Redirecting to {url}".encode(), {**headers, "Location": url})


def _blob(file: File) -> dict[str, Any]:
    lfs_facts = {"sha256": file.sha256, "size": len(file.body), "pointerSize": len(file.pointer)}
    return {"size": len(file.body), "blobId": file.blob_id} | ({"lfs": lfs_facts} if file.lfs else {})


def _entry(path: str, file: File | None) -> dict[str, Any]:
    """An entry of a tree; a folder if `file` is None, whose hash is never read."""
    if file is None:
        return {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
    entry = {"type": "file", "path": path, "oid": file.blob_id, "size": len(file.body)}
    lfs_facts = {"oid": file.sha256, "size": len(file.body), "pointerSize": len(file.pointer)}
    return entry | ({"lfs": lfs_facts} if file.lfs else {})
