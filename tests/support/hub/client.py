"""Points the real client at a server on the loopback, in this process or in a fresh one.

Does not cover other libraries with their own setting of the Hub's address, or `ModelCard.validate` of a client before
2.0, which ignores HF_ENDPOINT.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any
from urllib.request import getproxies

import pytest
from huggingface_hub import close_session, constants, file_download, hf_api
from huggingface_hub.utils import _http


def settings(url: str, token: str | None) -> dict[str, str]:
    """The client's environment variables; existing ones of a token and a cache must be removed."""
    values = {
        "HF_ENDPOINT": url,
        "HF_HUB_OFFLINE": "0",
        # From 2.0 on, a client with hf_xet uploads large files by Xet regardless of the server's answer.
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",  # of the `hf` command, at PyPI
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        # The server speaks plain HTTP. To read the system's certificates takes a client longer than most tests.
        "SSL_CERT_FILE": "",
        "SSL_CERT_DIR": os.devnull,
    }
    return values | ({"HF_TOKEN": token} if token else {})


def environment(url: str, home: Path, *, token: str | None = None) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {**inherited, **settings(url, token), "HF_HOME": str(home)}


class _FastTime:
    """The module `time` with short sleeps."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def sleep(self, seconds: float) -> None:
        time.sleep(min(seconds, 0.01))


def point_client_at(url: str, monkeypatch: pytest.MonkeyPatch, *, token: str | None = None) -> None:
    """Points this process's client at `url`, as the user of `token`, or logged out.

    The client reads its environment once, on import, so its constants are patched too, and the instance of `HfApi`
    behind its functions (`create_repo`, `upload_file`, ...).
    """
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings(url, token).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for module in (_http, file_download):  # it retries for up to 23 seconds if a server is down
        monkeypatch.setattr(module, "time", _FastTime())
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    if getproxies():
        close_session()  # an open one has read NO_PROXY before
