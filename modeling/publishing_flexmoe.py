"""Folders on their way to the Hub: which files go, whether they may, and the upload.

A folder is an expert package, a composition, or a merged model. What goes is decided by its kind, not by what happens
to lie there; card and manifest are looked through for what nobody wants to publish. Not here: the connection
(`hub_flexmoe`), and cards (`cards_flexmoe`).
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .configuration_flexmoe import FlexMoeConfig
from .folders_flexmoe import file_inside, open_regular_file, read_regular_file
from .hub_flexmoe import NEVER_DOWNLOADED, PACKAGE_FILES, Pushed, push_folder
from .json_flexmoe import MAX_JSON_BYTES, read_json_object
from .manifest_flexmoe import MANIFEST_FILE
from .packages_flexmoe import CARD_FILE, CONFIG_FILE, ExpertPackage
from .scan_flexmoe import Discovery, scan

SCANNED = (CARD_FILE, MANIFEST_FILE, CONFIG_FILE)

_REPLACED = {
    # what an older version in the repository may have that the new one has not
    "package": ("expert*.safetensors", "expert.safetensors.index.json", "model.sig"),
    "composition": ("router.safetensors", "*_flexmoe.py"),
    "model": ("model*.safetensors", "model.safetensors.index.json", "router.safetensors", "*_flexmoe.py"),
}


class PrivateTextError(ValueError):
    """Card or manifest hold what looks private; the message says where."""


@dataclass(frozen=True)
class PlannedFile:
    """A file that would go: its name, size in bytes, and SHA-256 (hex)."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Upload:
    """What a push of `folder` would send.

    Attributes:
        kind: "package", "composition" or "model".
        files: what goes.
        left_out: names of what else lies there and stays.
        discoveries: what looks private in card and manifest.
    """

    folder: Path
    kind: str
    files: tuple[PlannedFile, ...]
    left_out: tuple[str, ...]
    discoveries: tuple[Discovery, ...]

    def to_dict(self) -> dict[str, Any]:
        """The plan as `--json` prints it."""
        return {
            "folder": str(self.folder),
            "kind": self.kind,
            "files": [vars(file) for file in self.files],
            "left_out": list(self.left_out),
            "private": [vars(found) for found in self.discoveries],
        }


def plan_upload(folder: str | Path) -> Upload:
    """What a push of this folder would send, everything checked that can be checked here; nothing is sent.

    Raises:
        FileNotFoundError: no such folder, or it is neither an expert package nor a FlexMoE model.
        ValueError: a package is not what its manifest says (`PackageError`); a composition names folders, which
            nobody else has; or it is a model of another kind.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} to push.")
    kind, hashes = _kind_of(folder)
    entries = sorted(entry.name for entry in folder.iterdir())
    going = [name for name in entries if _goes(folder, kind, name)]
    files = []
    for name in going:
        size, digest = _size_and_hash(file_inside(folder, name), hashes.get(name))
        files.append(PlannedFile(name, size, digest))
    found = [discovery for name in SCANNED if name in going for discovery in _scan_file(folder, name)]
    left = tuple(name for name in entries if name not in going)
    return Upload(folder, kind, tuple(files), left, tuple(found))


def push(upload: Upload, repo: str, *, allow_private_text: bool = False, **options: Any) -> Pushed:
    """Sends what was planned as one commit.

    Args:
        repo: the Hub id of a model repository, which is made if it is not there.
        allow_private_text: send card and manifest although something in them looks private.
        options: `private`, `token`, `revision`, `create_pr`, `commit_message`, as `push_folder` takes them.

    Raises:
        PrivateTextError: something looks private, and `allow_private_text` is False.
        PermissionError, FileNotFoundError, ConnectionError, ValueError: as `push_folder`.
    """
    if upload.discoveries and not allow_private_text:
        raise PrivateTextError(
            f"{upload.folder}: before it is public, look at {'; '.join(map(str, upload.discoveries))}. Change the "
            "text, or push with --allow-private-text (allow_private_text=True) if everybody may read all of it."
        )
    if options.get("commit_message") is None:
        options["commit_message"] = f"Upload {upload.kind} with flexmoe"
    names = [file.name for file in upload.files]
    return push_folder(upload.folder, repo, files=names, replaced=_REPLACED[upload.kind], **options)


def _kind_of(folder: Path) -> tuple[str, Mapping[str, str]]:
    """The kind, and hashes that were computed while it was checked."""
    if (folder / MANIFEST_FILE).is_file():
        package = ExpertPackage.open(folder)
        for _ in package.tensors():  # to the end: every hash is compared, every number looked at
            pass
        return "package", package.manifest.sha256
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} is neither an expert package nor a model: it has no {MANIFEST_FILE} and no {CONFIG_FILE}."
        )
    config = read_json_object(folder / CONFIG_FILE)
    if config.get("model_type") != FlexMoeConfig.model_type:
        raise ValueError(
            f"{folder} holds a {config.get('model_type')!r} model, not one of FlexMoE: push it with "
            "`hf upload`, or make one of it with `flexmoe graft`."
        )
    if config.get("composition") is None:
        return "model", {}
    _refuse_folders(folder, config["composition"])
    return "composition", {}


def _refuse_folders(folder: Path, composition: Any) -> None:
    parts = {"the anchor": composition.get("anchor"), **(composition.get("experts") or {})}
    local = {name: part["folder"] for name, part in parts.items() if isinstance(part, dict) and "folder" in part}
    if local:
        named = ", ".join(f"{name} in {place}" for name, place in local.items())
        raise ValueError(
            f"{folder} is a composition that names folders of this machine ({named}), which nobody else has. Push "
            "these first, then save it anew with their Hub ids (sources=, or `flexmoe compose --by-reference`)."
        )


def _goes(folder: Path, kind: str, name: str) -> bool:
    if kind == "package":
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in PACKAGE_FILES)
    unwanted = [pattern for pattern in NEVER_DOWNLOADED if pattern != "*.py"]
    return (
        not name.startswith(".")
        and (folder / name).is_file()
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in unwanted)
    )


def _size_and_hash(path: Path, known: str | None) -> tuple[int, str]:
    if known is not None:
        return path.stat().st_size, known
    with open(open_regular_file(path), "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return file.tell(), digest.hexdigest()


def _scan_file(folder: Path, name: str) -> list[Discovery]:
    data = read_regular_file(file_inside(folder, name), max_bytes=MAX_JSON_BYTES)
    return list(scan(data.decode("utf-8", errors="replace"), name))


__all__ = ["PlannedFile", "PrivateTextError", "Upload", "plan_upload", "push"]
