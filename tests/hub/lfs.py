"""Large files: what a client must send, where to, and whether it arrived whole.

The storage has an origin of its own, as the Hub's has, because the client treats a redirect to the Hub's own origin
as a move. Does not cover multipart uploads or Xet: every object is one PUT of the plain "basic" transfer.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING
from urllib.parse import quote

from tests.hub.access import key, readable, writable
from tests.hub.answers import Answer, Refused, Request, as_json

if TYPE_CHECKING:
    from tests.hub.server import HubServer


def batch(hub: HubServer, request: Request) -> Answer:
    """git-lfs' batch API: an object that is there already has no actions."""
    asked = request.json()
    writing = asked["operation"] == "upload"
    repository = writable(hub, request) if writing else readable(hub, request)
    objects = []
    for item in asked["objects"]:
        answer = {"oid": item["oid"], "size": item["size"]}
        there = item["oid"] in repository.objects
        if writing and not there:
            url = signed(hub, "PUT", f"{key(request)}/{item['oid']}/{item['size']}")
            verify = f"{hub.url}/{key(request)}.git/info/lfs/objects/verify"
            answer["actions"] = {"upload": {"href": url}, "verify": {"href": verify}}
        elif not writing and there:
            answer["actions"] = {"download": {"href": signed(hub, "GET", f"{key(request)}/{item['oid']}/object")}}
        elif not there:
            answer["error"] = {"code": 404, "message": "Object does not exist"}
        objects.append(answer)
    return as_json({"transfer": "basic", "objects": objects})


def verify(hub: HubServer, request: Request) -> Answer:
    repository, asked = writable(hub, request), request.json()
    if len(repository.objects.get(asked["oid"], b"")) != asked["size"]:
        raise Refused(404, f"No object {asked['oid']} of {asked['size']} bytes was uploaded")
    return as_json({"success": True})


def put(hub: HubServer, request: Request) -> Answer:
    """Keeps an object, once its size and SHA-256 are those that its URL was signed for."""
    check_signature(hub, request, "PUT")
    oid, size = request.args["oid"], int(request.args["file"])
    arrived = hashlib.sha256(request.body).hexdigest()
    if (arrived, len(request.body)) != (oid, size):
        raise Refused(
            400, f"BadDigest: {len(request.body)} bytes of SHA-256 {arrived} came, {size} of {oid} were named"
        )
    hub.repositories[key(request)].objects[oid] = request.body
    return Answer(headers={"ETag": f'"{oid}"'})


def get(hub: HubServer, request: Request) -> Answer:
    """An object; whoever has the signed URL may read it."""
    check_signature(hub, request, "GET")
    repository = hub.repositories.get(key(request))
    if repository is None or request.args["oid"] not in repository.objects:
        raise Refused(404, "NoSuchKey")
    return Answer(200, repository.objects[request.args["oid"]], {"ETag": f'"{request.args["oid"]}"'}, file=True)


def signed(hub: HubServer, method: str, path: str) -> str:
    """A URL of the storage that needs no token: it says itself that the Hub gave it out."""
    return f"{hub.storage_url}/{quote(path)}?signature={_signature(hub, method, '/' + path)}"


def check_signature(hub: HubServer, request: Request, method: str) -> None:
    given = request.query.get("signature", [""])[0]
    if not hmac.compare_digest(given, _signature(hub, method, request.path)):
        raise Refused(403, "SignatureDoesNotMatch")


def _signature(hub: HubServer, method: str, path: str) -> str:
    return hmac.new(hub.secret, f"{method} {path}".encode(), hashlib.sha256).hexdigest()
