"""Stages of a pipeline that run again only when what they depend on has changed.

A stage is a folder with a record of what it was made from: its settings, the source code of the modules that do the
work, the versions of the libraries below, and the *content* of the folders it reads. If all of that and the stage's
own files are as recorded, it is reused; so an upstream stage that runs again and comes out the same disturbs nothing.
What is not as recorded is deleted, so stages only work in a folder that was empty when they first came there.

Does not cover: sharing a cache between machines, or concurrent runs into one folder.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD = ".stage.json"
MARKER = ".flexmoe-stages"
_LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "datasets", "numpy")


@dataclass(frozen=True)
class Stage:
    """A finished stage: where its files are, whether they were reused, how long making them took, a hash of them."""

    folder: Path
    reused: bool
    seconds: float
    digest: str


@dataclass(frozen=True)
class Stages:
    """Stages below one folder; `announce` is told each stage's name and whether it is reused."""

    root: Path
    announce: Callable[[str, bool], None] = lambda name, reused: None

    def run(
        self,
        name: str,
        make: Callable[[Path], object],
        *,
        settings: Mapping[str, Any],
        code: Sequence[str],
        inputs: Sequence[Stage] = (),
    ) -> Stage:
        """The stage's folder, made by `make(folder)` (folder exists and is empty) unless it can be reused.

        `settings` must be JSON; `code` names modules or packages; `inputs` are the stages read.

        Raises: FileExistsError (`root` holds files, and stages never were in it).
        """
        _claim(self.root)
        folder = self.root / name
        key = self._key(settings, code, inputs)
        found = self._reusable(folder, key)
        self.announce(name, found is not None)
        if found:
            return found
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        start = time.perf_counter()
        make(folder)
        seconds = time.perf_counter() - start
        digest = folder_digest(folder)
        # written last: a stage that was interrupted has no record and runs again
        (folder / RECORD).write_text(json.dumps({"key": key, "digest": digest, "seconds": round(seconds, 2)}) + "\n")
        return Stage(folder, False, seconds, digest)

    def _key(self, settings: Mapping[str, Any], code: Sequence[str], inputs: Sequence[Stage]) -> str:
        versions = {library: importlib.metadata.version(library) for library in _LIBRARIES}
        parts = {
            "settings": settings,
            "code": {module: source_digest(module) for module in code},
            "inputs": [stage.digest for stage in inputs],
            "versions": versions,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _reusable(self, folder: Path, key: str) -> Stage | None:
        try:
            record = json.loads((folder / RECORD).read_text())
            if record["key"] != key or record["digest"] != folder_digest(folder):
                return None
            return Stage(folder, True, record["seconds"], record["digest"])
        except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
            return None  # never made, or cut short: make it


def _claim(root: Path) -> None:
    """Marks a new or empty folder as one whose contents are stages' to delete; any other must have the mark."""
    marker = root / MARKER
    if marker.is_file():
        return
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(
            f"{root} holds files that are not from an earlier run (there is no {MARKER}), and stages would be written "
            "over them. Choose a new or empty folder."
        )
    root.mkdir(parents=True, exist_ok=True)
    marker.write_text("The folders beside this file are made anew when what they depend on changes.\n")


def folder_digest(folder: Path) -> str:
    """sha256 over the names and contents of a folder's files, hidden ones aside."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            digest.update(f"{relative.as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())  # the demo's files are megabytes
    return digest.hexdigest()


@functools.cache  # what this process runs is what it found first, whatever is edited meanwhile
def source_digest(module: str) -> str:
    """sha256 over the source of a module, or of every module of a package."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"no module {module!r} to take the source of")
    origin = Path(spec.origin)
    files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
