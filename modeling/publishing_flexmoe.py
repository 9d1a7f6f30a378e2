"""Folders on their way to the Hub: which files go, whether they may, and the upload.

A folder is an expert package, a composition, or a merged model. What goes is decided by its kind, not by what happens
to lie there; card, manifest and other short texts are looked through for what nobody wants to publish, weights,
vocabularies and the public sample are not. Not here: the connection (`hub_flexmoe`), and cards (`cards_flexmoe`).
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .configuration_flexmoe import FlexMoeConfig
from .folders_flexmoe import file_inside, open_regular_file, read_regular_file
from .hub_flexmoe import NEVER_DOWNLOADED, Pushed, push_folder
from .json_flexmoe import MAX_JSON_BYTES, read_json_object
from .manifest_flexmoe import MANIFEST_FILE
from .packages_flexmoe import CARD_FILE, CONFIG_FILE, PACKAGE_FILES, ExpertPackage
from .scan_flexmoe import Discovery, scan

SCANNED = (
    CARD_FILE,
    MANIFEST_FILE,
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template*",
    "LICENSE*",
    "USE_POLICY*",
)

_OF_EVERY_MODEL = (
    *(CONFIG_FILE, CARD_FILE, "generation_config.json", "LICENSE*", "USE_POLICY*", "*_flexmoe.py"),
    *("tokenizer*.json", "tokenizer*.model", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "chat_template*.json", "chat_template*.jinja"),
    *("spiece.model", "sentencepiece*.model", "*.spm", "*.tiktoken"),
)
_GOES = {
    "package": PACKAGE_FILES,
    "composition": ("router.safetensors", *_OF_EVERY_MODEL),
    "model": ("model*.safetensors", "model.safetensors.index.json", *_OF_EVERY_MODEL),
}
_NEVER = (".*", "*.pem", "*.key", *(pattern for pattern in NEVER_DOWNLOADED if pattern != "*.py"))
# No version takes these from a repository: the first is written anew, the others may be somebody's own.
_KEPT = (CARD_FILE, "LICENSE*", "USE_POLICY*")
_OURS = (MANIFEST_FILE, "*_flexmoe.py")  # one of these shows that what lies in a repository is FlexMoE's
_OUR_FILES = (*_GOES["package"], *_GOES["composition"], *_GOES["model"], "public_sample.jsonl")


class PrivateTextError(ValueError):
    """A text that would go holds what looks private; the message says where."""


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
        discoveries: what looks private in those of its files that are in `SCANNED`.
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
            nobody else has; the public sample is not what the config records; or it is a model of another kind.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} to push.")
    kind, hashes, sample = _kind_of(folder)
    entries = sorted(entry.name for entry in folder.iterdir())
    going = [name for name in entries if _goes(folder, kind, name, sample)]
    files = []
    for name in going:
        size, digest = _size_and_hash(file_inside(folder, name), hashes.get(name))
        files.append(PlannedFile(name, size, digest))
    _check_sample(folder, sample, files)
    found = [discovery for name in going if _fits(name, SCANNED) for discovery in _scan_file(folder, name)]
    left = tuple(name for name in entries if name not in going)
    return Upload(folder, kind, tuple(files), left, tuple(found))


def push(upload: Upload, repo: str, *, allow_private_text: bool = False, **options: Any) -> Pushed:
    """Sends what was planned as one commit, which takes away what an older version, or another kind, left there.

    Args:
        repo: the Hub id of a model repository, which is made if it is not there.
        allow_private_text: send texts although something in them looks private.
        options: `private`, `token`, `revision`, `create_pr`, `commit_message`, `commit_description`, as `push_folder`
            takes them.

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
    return push_folder(upload.folder, repo, files=names, outdated=_outdated, **options)


def _outdated(there: Sequence[str]) -> list[str]:
    """Of the names in a repository, those of what was pushed there before; none if that was not FlexMoE's."""
    if not any(_fits(name, _OURS) for name in there):
        return []
    return [name for name in there if _fits(name, _OUR_FILES) and not _fits(name, _KEPT)]


def _kind_of(folder: Path) -> tuple[str, Mapping[str, str], Mapping[str, Any]]:
    """The kind, hashes that were computed on the way, and what a model's config says of its public sample."""
    if (folder / MANIFEST_FILE).is_file():
        package = ExpertPackage.open(folder)
        for _ in package.tensors():  # to the end: every hash is compared, every number looked at
            pass
        return "package", package.manifest.sha256, {}
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
    recorded = config.get("public_sample")
    sample = recorded if isinstance(recorded, dict) else {}
    if config.get("composition") is None:
        return "model", {}, sample
    _refuse_folders(folder, config["composition"])
    return "composition", {}, sample


def _refuse_folders(folder: Path, composition: Any) -> None:
    parts = {"the anchor": composition.get("anchor"), **(composition.get("experts") or {})}
    local = {name: part["folder"] for name, part in parts.items() if isinstance(part, dict) and "folder" in part}
    if local:
        named = ", ".join(f"{name} in {place}" for name, place in local.items())
        raise ValueError(
            f"{folder} is a composition that names folders of this machine ({named}), which nobody else has. Push "
            "these first, then save it anew with their Hub ids (sources=, or `flexmoe compose --by-reference`)."
        )


def _goes(folder: Path, kind: str, name: str, sample: Mapping[str, Any]) -> bool:
    wanted = _fits(name, _GOES[kind]) or name == sample.get("file")
    return wanted and not _fits(name, _NEVER) and (folder / name).is_file()


def _check_sample(folder: Path, sample: Mapping[str, Any], files: Sequence[PlannedFile]) -> None:
    """A config may be a stranger's, so the hash has to show that the file it names is the sample and nothing else."""
    for file in files:
        if file.name == sample.get("file") and file.sha256 != sample.get("sha256"):
            raise ValueError(
                f"{folder / file.name} has SHA-256 {file.sha256}, but by config.json, which names it as the public "
                f"sample, {sample.get('sha256')}: the file was changed. Restore it, or take it out of the folder."
            )


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


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
