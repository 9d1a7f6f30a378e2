"""Uploads of folders to the Hub: which files are selected, checks before the upload, and the upload.

A folder is an expert package, a composition, or a merged model. Its kind determines which files are uploaded. Cards,
manifests and other short texts are scanned for private text; weights, vocabularies and the public sample are not. Does
not cover the connection (`flexmoe.hub.client`) or cards (`flexmoe.cards`).
"""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexmoe.hub.client import NEVER_DOWNLOADED, Pushed, push_folder
from flexmoe.hub.privacy import Discovery, scan
from flexmoe.io.folders import file_inside, open_regular_file, read_regular_file
from flexmoe.io.strict_json import MAX_JSON_BYTES, read_json_object
from flexmoe.modeling.configuration_flexmoe import FlexMoeConfig
from flexmoe.packages.manifest import MANIFEST_FILE
from flexmoe.packages.package import CARD_FILE, CONFIG_FILE, PACKAGE_FILES, ExpertPackage

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

_OF_MODELS = (
    *(CONFIG_FILE, CARD_FILE, "generation_config.json", "LICENSE*", "USE_POLICY*", "*_flexmoe.py"),
    *("tokenizer*.json", "tokenizer*.model", "special_tokens_map.json", "added_tokens.json", "tekken.json"),
    *("vocab.json", "vocab.txt", "vocab.bpe", "merges.txt", "chat_template*.json", "chat_template*.jinja"),
    *("spiece.model", "sentencepiece*.model", "*.spm", "*.tiktoken"),
)
_UPLOADED = {
    "package": PACKAGE_FILES,
    "composition": ("router.safetensors", *_OF_MODELS),
    "model": ("model*.safetensors", "model.safetensors.index.json", *_OF_MODELS),
}
_NEVER_UPLOADED = (".*", "*.pem", "*.key", *(pattern for pattern in NEVER_DOWNLOADED if pattern != "*.py"))
# Never deleted from a repository: the first is overwritten, the others may be the owner's own.
_KEPT = (CARD_FILE, "LICENSE*", "USE_POLICY*")
_MARKERS = (MANIFEST_FILE, "*_flexmoe.py")  # a repository with one of these was uploaded by FlexMoE
_ALL_UPLOADED = (*_UPLOADED["package"], *_UPLOADED["composition"], *_UPLOADED["model"], "public_sample.jsonl")


class PrivateTextError(ValueError):
    """A file to be uploaded holds text that looks private; the message has its place."""


@dataclass(frozen=True)
class PlannedFile:
    """A file to be uploaded: its name, size in bytes, and SHA-256 (hex)."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Upload:
    """The plan of a push of `folder`.

    Attributes:
        kind: "package", "composition" or "model".
        files: the files to upload.
        left_out: names of the other files in the folder.
        discoveries: text that looks private, in the files of `SCANNED`.
    """

    folder: Path
    kind: str
    files: tuple[PlannedFile, ...]
    left_out: tuple[str, ...]
    discoveries: tuple[Discovery, ...]

    def to_dict(self) -> dict[str, Any]:
        """The plan as printed by `--json`."""
        return {
            "folder": str(self.folder),
            "kind": self.kind,
            "files": [vars(file) for file in self.files],
            "left_out": list(self.left_out),
            "private": [vars(found) for found in self.discoveries],
        }


def plan_upload(folder: str | Path) -> Upload:
    """Plans a push of this folder and checks its files; nothing is sent.

    Raises:
        FileNotFoundError: no such folder, or it is neither an expert package nor a FlexMoE model.
        ValueError: a package is invalid or damaged (`PackageError`); a composition refers to local folders; the public
            sample is not the recorded one; or it is a model of another kind.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} to push.")
    kind, hashes, sample = _kind_of(folder)
    entries = sorted(entry.name for entry in folder.iterdir())
    uploaded = [name for name in entries if _is_uploaded(folder, kind, name, sample)]
    files = []
    for name in uploaded:
        size, digest = _size_and_hash(file_inside(folder, name), hashes.get(name))
        files.append(PlannedFile(name, size, digest))
    _check_sample(folder, sample, files)
    found = [discovery for name in uploaded if _matches(name, SCANNED) for discovery in _scan_file(folder, name)]
    left_out = tuple(name for name in entries if name not in uploaded)
    return Upload(folder, kind, tuple(files), left_out, tuple(found))


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    allow_private_text: bool = False,
) -> Pushed:
    """Checks an expert package, a composition or a merged model and pushes it to the Hub as one commit.

    Args:
        folder: the folder; which of its files are uploaded depends on its kind (`plan_upload` lists them).
        repo_id: the Hub's model repository, created if necessary.
        private: visibility of a new repository; None is the account's default.
        revision: the branch, created if necessary.
        create_pr: open a pull request instead.
        allow_private_text: push even if its texts (card, manifest, configs, licence) look private.

    Returns:
        The repository, its page, and the new commit.

    Raises:
        FileNotFoundError: no such folder, or it is not FlexMoE's.
        ValueError: the folder is invalid; a composition refers to local folders; `repo_id` is not a Hub id; or a text
            holds an e-mail address, a token, a key or a local path (`PrivateTextError`).
        PermissionError, ConnectionError: the Hub rejects the push.

    Example:
        ```pycon
        >>> import flexmoe
        >>> pushed = flexmoe.push("math-expert", "hospital/math-expert", private=True)
        >>> pushed.repo
        'hospital/math-expert'
        ```
    """
    return push_upload(
        plan_upload(folder),
        repo_id,
        allow_private_text=allow_private_text,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
    )


def push_upload(upload: Upload, repo_id: str, *, allow_private_text: bool = False, **options: Any) -> Pushed:
    """Uploads planned files as one commit, which also deletes files of an older version or of another kind.

    Args:
        repo_id: the Hub's model repository, created if necessary.
        allow_private_text: upload even if a text looks private.
        options: `private`, `token`, `revision`, `create_pr`, `commit_message`, `commit_description` of `push_folder`.

    Raises:
        PrivateTextError: a text looks private, and `allow_private_text` is False.
        PermissionError, FileNotFoundError, ConnectionError, ValueError: as `push_folder`.
    """
    if upload.discoveries and not allow_private_text:
        raise PrivateTextError(
            f"{upload.folder} holds text that looks private: {'; '.join(map(str, upload.discoveries))}. Change it, or "
            "push with --allow-private-text (allow_private_text=True) if all of it may be public."
        )
    if options.get("commit_message") is None:
        options["commit_message"] = f"Upload {upload.kind} with flexmoe"
    names = [file.name for file in upload.files]
    return push_folder(upload.folder, repo_id, files=names, outdated=_outdated, **options)


def _outdated(present: Sequence[str]) -> list[str]:
    """The files in a repository that an earlier push uploaded; none if that was not by FlexMoE."""
    if not any(_matches(name, _MARKERS) for name in present):
        return []
    return [name for name in present if _matches(name, _ALL_UPLOADED) and not _matches(name, _KEPT)]


def _kind_of(folder: Path) -> tuple[str, Mapping[str, str], Mapping[str, Any]]:
    """The kind, the hashes computed for it, and the public sample recorded in a model's config."""
    if (folder / MANIFEST_FILE).is_file():
        package = ExpertPackage.open(folder)
        for _ in package.tensors():  # verifies every hash and every number
            pass
        return "package", package.manifest.sha256, {}
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} is neither an expert package nor a model: it has no {MANIFEST_FILE} and no {CONFIG_FILE}."
        )
    config = read_json_object(folder / CONFIG_FILE)
    if config.get("model_type") != FlexMoeConfig.model_type:
        raise ValueError(
            f"{folder} holds a {config.get('model_type')!r} model, not a FlexMoE model: push it with `hf upload`, or "
            "convert it with `flexmoe graft`."
        )
    recorded = config.get("public_sample")
    sample = recorded if isinstance(recorded, dict) else {}
    if config.get("composition") is None:
        return "model", {}, sample
    if local := local_parts(config["composition"]):
        listed = ", ".join(f"{name} in {place}" for name, place in local.items())
        raise ValueError(
            f"{folder} is a composition that refers to local folders ({listed}), which are not on the Hub. Push these "
            "first, then save it again with their Hub ids (sources=, or `flexmoe compose --by-reference`)."
        )
    return "composition", {}, sample


def local_parts(composition: Any) -> dict[str, str]:
    """The local folders to which a composition refers, by part.

    Args:
        composition: the entry `composition` of a config.

    Raises:
        ValueError: it is not an object with `anchor` and `experts`.
    """
    experts = composition.get("experts") if isinstance(composition, dict) else None
    if not isinstance(experts, dict) or "anchor" not in composition:
        raise ValueError(
            f"composition: {str(composition)[:100]!r} must be an object with the keys anchor and experts."
        )
    parts = {"the anchor": composition["anchor"], **experts}
    return {name: str(part["folder"]) for name, part in parts.items() if isinstance(part, dict) and "folder" in part}


def _is_uploaded(folder: Path, kind: str, name: str, sample: Mapping[str, Any]) -> bool:
    is_listed = _matches(name, _UPLOADED[kind]) or name == sample.get("file")
    return is_listed and not _matches(name, _NEVER_UPLOADED) and (folder / name).is_file()


def _check_sample(folder: Path, sample: Mapping[str, Any], files: Sequence[PlannedFile]) -> None:
    """Checks the hash of the public sample: an untrusted config could name any file."""
    for file in files:
        if file.name == sample.get("file") and file.sha256 != sample.get("sha256"):
            raise ValueError(
                f"{folder / file.name} has SHA-256 {file.sha256}, but the public sample recorded in config.json has "
                f"{sample.get('sha256')}: the file was changed. Restore it, or remove it from the folder."
            )


def _matches(name: str, patterns: Sequence[str]) -> bool:
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


__all__ = ["PlannedFile", "PrivateTextError", "Upload", "local_parts", "plan_upload", "push", "push_upload"]
