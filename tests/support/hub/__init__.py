"""A fake Hub: repositories in memory, served on the loopback to the real `huggingface_hub` client.

    with HubServer().running() as hub:
        hub.tokens["secret"] = "alice"
        point_client_at(hub.url, monkeypatch, token="secret")
        HfApi().create_repo("alice/model")

Supports creating, uploading (with LFS), tagging, validating a card, downloading, resuming and deleting. Does not cover
Xet, multipart uploads, pull requests, organisations, renames, or search.
"""

from tests.support.hub.client import point_client_at
from tests.support.hub.faults import Fault
from tests.support.hub.repositories import File, Repository
from tests.support.hub.server import HubServer

__all__ = ["Fault", "File", "HubServer", "Repository", "point_client_at"]
