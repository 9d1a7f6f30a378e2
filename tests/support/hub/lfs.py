"""Large files: uploads to and downloads from a separate storage, verified by size and SHA-256.

The storage has an origin of its own, like the Hub's, because the client treats a redirect to the Hub's origin as a
moved repository. Does not cover multipart uploads or Xet: every object is one PUT of the "basic" transfer.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING
from urllib.parse import quote

from tests.support.hub.access import key, readable, writable
from tests.support.hub.answers import Answer, Refused, Request, as_json

if TYPE_CHECKING:
    from tests.support.hub.server import HubServer


def batch(hub: HubServer, request: Request) -> Answer:
    """The batch API of git-lfs: an existing object has no actions."""
    body = request.json()
    writing = body["operation"] == "upload"
    repository = writable(hub, request) if writing else readable(hub, request)
    objects = []
    for item in body["objects"]:
        answer = {"oid": item["oid"], "size": item["size"]}
        exists = item["oid"] in repository.objects
        if writing and not exists:
            url = signed(hub, "PUT", f"{key(request)}/{item['oid']}/{item['size']}")
            verify = f"{hub.url}/{key(request)}.git/info/lfs/objects/verify"
            answer["actions"] = {"upload": {"href": url}, "verify": {"href": verify}}
        elif not writing and exists:
            answer["actions"] = {"download": {"href": signed(hub, "GET", f"{key(request)}/{item['oid']}/object")}}
        elif not exists:
            answer["error"] = {"code": 404, "message": "Object does not exist"}
        objects.append(answer)
    return as_json({"transfer": "basic", "objects": objects})


def verify(hub: HubServer, request: Request) -> Answer:
    repository, body = writable(hub, request), request.json()
    if len(repository.objects.get(body["oid"], b"")) != body["size"]:
        raise Refused(404, f"No object {body['oid']} of {body['size']} bytes was uploaded")
    return as_json({"success": True})


def put(hub: HubServer, request: Request) -> Answer:
    """Stores an object if its size and SHA-256 are those for which its URL was signed."""
    check_signature(hub, request, "PUT")
    oid, size = request.args["oid"], int(request.args["file"])
    arrived = hashlib.sha256(request.body).hexdigest()
    if (arrived, len(request.body)) != (oid, size):
        raise Refused(
            400, f"BadDigest: received {len(request.body)} bytes of SHA-256 {arrived}, expected {size} of {oid}"
        )
    hub.repositories[key(request)].objects[oid] = request.body
    return Answer(headers={"ETag": f'"{oid}"'})


def get(hub: HubServer, request: Request) -> Answer:
    """An object; the signed URL grants access."""
    check_signature(hub, request, "GET")
    repository = hub.repositories.get(key(request))
    if repository is None or request.args["oid"] not in repository.objects:
        raise Refused(404, "NoSuchKey")
    return Answer(200, repository.objects[request.args["oid"]], {"ETag": f'"{request.args["oid"]}"'}, file=True)


def signed(hub: HubServer, method: str, path: str) -> str:
    """A URL of the storage with a signature by the Hub in place of a token."""
    return f"{hub.storage_url}/{quote(path)}?signature={_signature(hub, method, '/' + path)}"


def check_signature(hub: HubServer, request: Request, method: str) -> None:
    given = request.query.get("signature", [""])[0]
    if not hmac.compare_digest(given, _signature(hub, method, request.path)):
        raise Refused(403, "SignatureDoesNotMatch")


def _signature(hub: HubServer, method: str, path: str) -> str:
    return hmac.new(hub.secret, f"{method} {path}".encode(), hashlib.sha256).hexdigest()
