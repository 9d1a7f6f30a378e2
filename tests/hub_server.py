"""The smallest honest Hub: repositories in memory, served on the loopback to the real `huggingface_hub` client.

    with HubServer().running() as hub:
        hub.tokens["secret"] = "alice"
        point_client_at(hub.url, monkeypatch, token="secret")
        HfApi().create_repo("alice/model")

Speaks what creating, uploading (LFS included), tagging, validating a card, downloading, resuming and deleting need.
No Xet, multipart uploads, pull requests, organizations, renames, or search. PyPI and npm have no Hub to use instead:
olah and aimirror only pass downloads on, and kohakuhub is not published there.
"""

from tests.hub.client import point_client_at
from tests.hub.faults import Fault
from tests.hub.repositories import File, Repository
from tests.hub.server import HubServer

__all__ = ["Fault", "File", "HubServer", "Repository", "point_client_at"]
