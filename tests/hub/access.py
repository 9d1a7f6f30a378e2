"""Who may see, read and write a repository, refused in the Hub's words and codes.

Without a token the Hub answers 401 where it answers 404 or 403 to a stranger who has one. Does not cover
organizations, roles of a token, or asking for access: a test lets a token in by `Repository.tokens`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.hub.answers import Refused, Request
from tests.hub.repositories import Repository

if TYPE_CHECKING:
    from tests.hub.server import HubServer

LOG_IN = "Invalid username or password."


def key(request: Request) -> str:
    """What `HubServer.repositories` calls the repository of this request: a dataset has its prefix, as in URLs."""
    kind = (request.args.get("kind") or "models").rstrip("/")
    return request.args["name"] if kind == "models" else f"{kind}/{request.args['name']}"


def is_inside(repository: Repository, request: Request) -> bool:
    """Whether this is the owner, or somebody whose token was let in."""
    return request.token in repository.tokens or request.user == repository.owner


def visible(hub: HubServer, request: Request) -> Repository:
    """The repository, if it is there for this user.

    Raises:
        Refused: RepoNotFound, a private repository being as good as none.
    """
    repository = hub.repositories.get(key(request))
    if repository is None or (repository.private and not is_inside(repository, request)):
        raise _stranger(request, 404, "Repository not found", "RepoNotFound")
    return repository


def readable(hub: HubServer, request: Request) -> Repository:
    """The repository, if its files may be read.

    Raises:
        Refused: as `visible`; GatedRepo.
    """
    repository = visible(hub, request)
    if repository.gated and not is_inside(repository, request):
        raise _stranger(request, 403, f"Access to {repository.name} is restricted: ask for access", "GatedRepo")
    return repository


def writable(hub: HubServer, request: Request) -> Repository:
    """The repository, if this user may write to it.

    Raises:
        Refused: 401 without a token; as `visible`; 403 if it is somebody else's.
    """
    known_user(request)
    repository = visible(hub, request)
    own_namespace(request, repository.owner)
    return repository


def known_user(request: Request) -> str:
    if request.user is None:
        raise Refused(401, LOG_IN)
    return request.user


def own_namespace(request: Request, owner: str) -> None:
    if owner != request.user:
        raise Refused(403, f'You don\'t have the rights to write under the namespace "{owner}"')


def _stranger(request: Request, status: int, message: str, code: str) -> Refused:
    return Refused(status, message, code) if request.token else Refused(401, message, code)
