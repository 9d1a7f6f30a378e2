"""Uploads of folders to the Hub: which files are selected, checks before the upload, and the upload.

A folder is an expert package, a composition, or a merged model. Its kind determines which files are uploaded
(`flexmoe.hub.contents`); FlexMoE's own code is sent as the installed version has it. All of them are scanned for
private text, the headers of weights included, and the public sample for secrets. Does not cover the connection
(`flexmoe.hub.client`) or cards (`flexmoe.cards`).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexmoe.companions import is_companion, is_terms
from flexmoe.foreign_code import MAY_NAME_CODE, foreign_code
from flexmoe.hub.client import Pushed, push_files
from flexmoe.hub.contents import (
    CODE_FILES,
    composition_files,
    left_out,
    model_files,
    package_files,
)
from flexmoe.hub.privacy import SECRETS, Discovery, scan_file
from flexmoe.io.hashing import sha256_of
from flexmoe.io.strict_json import read_json_object
from flexmoe.modeling.configuration_flexmoe import FlexMoeConfig
from flexmoe.packages.manifest import MANIFEST_FILE
from flexmoe.packages.package import CONFIG_FILE, ExpertPackage
from flexmoe.tokenization import is_tokenizer_file

MAX_LISTED = 20  # discoveries in an error message

# What pushes have uploaded, in this version and earlier ones, beside `companions`: deleted from a repository with its
# next push.
_ONCE_UPLOADED = (
    *("expert*.safetensors", "expert.safetensors.index.json", MANIFEST_FILE, "model.sig"),
    *("model*.safetensors", "model.safetensors.index.json", "router.safetensors", "public_sample.jsonl"),
    *(CONFIG_FILE, "*_flexmoe.py", "tokenizer*.json", "tokenizer*.model", "sentencepiece*.model", "*.spm"),
    *("chat_template*.json", "chat_template*.jinja"),
)
_MARKERS = (MANIFEST_FILE, "*_flexmoe.py")  # a repository with one of these was uploaded by FlexMoE


class PrivateTextError(ValueError):
    """A file to be uploaded holds text that looks private; the message has its place."""


@dataclass(frozen=True)
class PlannedFile:
    """A file to be uploaded: its path in the repository, size in bytes, SHA-256 (hex), and where it is read from."""

    name: str
    nbytes: int
    sha256: str
    path: Path


@dataclass(frozen=True)
class Upload:
    """The plan of a push of `folder`.

    Attributes:
        kind: "package", "composition" or "model".
        files: the files to upload.
        left_out: names of the other files in the folder; of code, those that differ from FlexMoE's own.
        discoveries: text in the files that looks private.
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
            "files": [{"name": file.name, "nbytes": file.nbytes, "sha256": file.sha256} for file in self.files],
            "left_out": list(self.left_out),
            "private": [vars(found) for found in self.discoveries],
        }


def plan_upload(folder: str | Path) -> Upload:
    """Plans a push of this folder and checks its files; nothing is sent.

    Raises:
        FileNotFoundError: no such folder, or it is neither an expert package nor a FlexMoE model.
        ValueError: a package is invalid or damaged (`PackageError`); a composition refers to local folders; a file is
            not the one that the config records; a JSON file names code of others; weights hold tensors of an expert
            that the config does not list; a file is a link out of the folder; or it is a model of another kind.
        ImportError: the scanner is not installed.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} to push.")
    kind, files, hashes, sample = _contents(folder)
    _check_code(files)
    other = left_out(folder, files)
    found = [discovery for name, path in files.items() for discovery in _scan(path, name, sample)]
    if kind != "package":
        files |= CODE_FILES
        other = tuple(name for name in other if not _is_own_code(folder, name))
    planned = []
    for name, path in sorted(files.items()):
        size, digest = (path.stat().st_size, hashes[name]) if name in hashes else sha256_of(path)
        planned.append(PlannedFile(name, size, digest, path))
    return Upload(folder, kind, tuple(planned), other, tuple(found))


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    allow_private_text: bool | Collection[str] = False,
) -> Pushed:
    """Checks an expert package, a composition or a merged model and pushes it to the Hub as one commit.

    Args:
        folder: the folder; which of its files are uploaded depends on its kind (`plan_upload` lists them).
        repo_id: the Hub's model repository, created if necessary.
        private: visibility of a new repository; None is the account's default.
        revision: the branch, created if necessary.
        create_pr: open a pull request instead.
        allow_private_text: push even if text in its files looks private: in all of them, or in files of these names.

    Returns:
        The repository, its page, and the new commit.

    Raises:
        FileNotFoundError: no such folder, or it is not FlexMoE's.
        ValueError: as `plan_upload`; `repo_id` is not a Hub id; or a file holds an e-mail address, a token, a key or a
            local path (`PrivateTextError`).
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


def push_upload(
    upload: Upload, repo_id: str, *, allow_private_text: bool | Collection[str] = False, **options: Any
) -> Pushed:
    """Uploads planned files as one commit, which also deletes files of an older version or of another kind.

    Args:
        repo_id: the Hub's model repository, created if necessary.
        allow_private_text: as in `push`.
        options: `private`, `token`, `revision`, `create_pr`, `commit_message`, `commit_description` of `push_files`.

    Raises:
        PrivateTextError: a text looks private, and `allow_private_text` does not cover it.
        PermissionError, FileNotFoundError, ConnectionError, ValueError: as `push_files`.
    """
    _check_private(upload, allow_private_text)
    if options.get("commit_message") is None:
        options["commit_message"] = f"Upload {upload.kind} with flexmoe"
    files = {file.name: file.path for file in upload.files}
    return push_files(files, repo_id, outdated=_outdated, **options)


def _check_private(upload: Upload, allowed: bool | Collection[str]) -> None:
    if isinstance(allowed, str):
        raise TypeError(f"allow_private_text={allowed!r}: expected a boolean or a list of file names, [{allowed!r}].")
    if not isinstance(allowed, bool) and (unknown := set(allowed) - {file.name for file in upload.files}):
        raise ValueError(f"allow_private_text names {min(unknown)!r}, which is not among the files to be pushed.")
    if allowed is True:
        return
    found = [str(item) for item in upload.discoveries if not allowed or item.file not in allowed]
    if found:
        more = f"; and {len(found) - MAX_LISTED} more" if len(found) > MAX_LISTED else ""
        raise PrivateTextError(
            f"{upload.folder} holds text that looks private: {'; '.join(found[:MAX_LISTED])}{more}. Change it. If it "
            "may be public: --allow-private-text-in FILE or --allow-private-text (allow_private_text=, a list of file "
            "names or True)."
        )


def _outdated(present: Sequence[str]) -> list[str]:
    """The files in a repository that an earlier push uploaded; none if that was not by FlexMoE.

    A licence and terms stay: a person may have put them there.
    """
    if not any(_matches(name, _MARKERS) for name in present):
        return []
    beside = {name for name in present if is_companion(name) and not is_terms(name)}
    return [name for name in present if name in beside or _matches(name, _ONCE_UPLOADED)]


def _contents(folder: Path) -> tuple[str, dict[str, Path], Mapping[str, str], str | None]:
    """The kind, its files, the hashes that were computed for it, and the name of the public sample."""
    if (folder / MANIFEST_FILE).is_file():
        package = ExpertPackage.open(folder)
        for _ in package.tensors():  # verifies every hash and every number
            pass
        return "package", package_files(package), package.manifest.sha256, None
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
    sample = config.get("public_sample")
    name = sample.get("file") if isinstance(sample, dict) else None
    if config.get("composition") is None:
        return "model", model_files(folder, config), {}, name
    if local := local_parts(config["composition"]):
        listed = ", ".join(f"{name} in {place}" for name, place in local.items())
        raise ValueError(
            f"{folder} is a composition that refers to local folders ({listed}), which are not on the Hub. Push these "
            "first, then save it again with their Hub ids (sources=, or `flexmoe compose --by-reference`)."
        )
    return "composition", composition_files(folder, config), {}, name


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


def _check_code(files: Mapping[str, Path]) -> None:
    """Checks that the files name FlexMoE's own code, or none: whoever loads them may run it."""
    for name, path in files.items():
        if name in MAY_NAME_CODE and (named := foreign_code(read_json_object(path))):
            raise ValueError(
                f"{path} names code of others ({'; '.join(named)}), which would run for whoever loads the repository "
                "with trust_remote_code=True. Delete these entries; or load the model and save it again, which leaves "
                "them out."
            )


def _is_own_code(folder: Path, name: str) -> bool:
    if name not in CODE_FILES or not (folder / name).is_file():
        return False
    return (folder / name).read_bytes() == CODE_FILES[name].read_bytes()


def _scan(path: Path, name: str, sample: str | None) -> list[Discovery]:
    found = scan_file(path, name, is_vocabulary=is_tokenizer_file(name))
    # public text may name people and paths; secrets are in it by mistake
    return found if name != sample else [discovery for discovery in found if discovery.kind in SECRETS]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


__all__ = ["PlannedFile", "PrivateTextError", "Upload", "local_parts", "plan_upload", "push", "push_upload"]
