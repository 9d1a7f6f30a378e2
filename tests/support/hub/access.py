"""Access to repositories: refusals with the Hub's messages and codes.

Without a token the Hub returns 401 where it returns 404 or 403 to other users. Does not cover organisations, roles of
a token, or access requests: a test grants access by `Repository.tokens`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.support.hub.answers import Refused, Request
from tests.support.hub.repositories import Repository

if TYPE_CHECKING:
    from tests.support.hub.server import HubServer

LOG_IN = "Invalid username or password."


def key(request: Request) -> str:
    """The key of the requested repository in `HubServer.repositories`: datasets have a prefix, as in URLs."""
    kind = (request.args.get("kind") or "models").rstrip("/")
    return request.args["name"] if kind == "models" else f"{kind}/{request.args['name']}"


def has_access(repository: Repository, request: Request) -> bool:
    """Whether the request is from the owner, or has a token with access."""
    return request.token in repository.tokens or request.user == repository.owner


def visible(hub: HubServer, request: Request) -> Repository:
    """The repository, if it is visible to this user.

    Raises:
        Refused: RepoNotFound, also for a private repository.
    """
    repository = hub.repositories.get(key(request))
    if repository is None or (repository.private and not has_access(repository, request)):
        raise _no_access(request, 404, "Repository not found", "RepoNotFound")
    return repository


def readable(hub: HubServer, request: Request) -> Repository:
    """The repository, if its files are readable.

    Raises:
        Refused: as `visible`; GatedRepo.
    """
    repository = visible(hub, request)
    if repository.gated and not has_access(repository, request):
        raise _no_access(request, 403, f"Access to {repository.name} is restricted: ask for access", "GatedRepo")
    return repository


def writable(hub: HubServer, request: Request) -> Repository:
    """The repository, if this user has write access.

    Raises:
        Refused: 401 without a token; as `visible`; 403 if it has another owner.
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


def _no_access(request: Request, status: int, message: str, code: str) -> Refused:
    return Refused(status, message, code) if request.token else Refused(401, message, code)
