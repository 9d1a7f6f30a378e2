"""Stages of a pipeline that are cached, and run again only if their inputs have changed.

A stage is a folder with a record of its inputs: the settings, the source code of the modules that do the work, the
versions of libraries, and the *contents* of the input stages. It is reused if these and its own files are unchanged;
an input stage that runs again with the same result does not invalidate it. Outdated folders are deleted, so the root
must be a new or empty folder, or one of an earlier run.

Does not cover sharing a cache between machines, or concurrent runs in one folder.
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
    """A finished stage: its folder, whether it was reused, the seconds it took, and a hash of its files."""

    folder: Path
    reused: bool
    seconds: float
    digest: str


@dataclass(frozen=True)
class Stages:
    """The stages in a root folder; `announce` is called with the name of each stage and whether it is reused."""

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
        """Runs a stage with `make(folder)`, which gets an empty folder, unless it can be reused.

        `settings` must be JSON values, `code` lists modules or packages, `inputs` are the stages that it reads.

        Raises:
            FileExistsError: `root` has files that are not from an earlier run.
        """
        _claim(self.root)
        folder = self.root / name
        key = self._key(settings, code, inputs)
        cached = self._reusable(folder, key)
        self.announce(name, cached is not None)
        if cached:
            return cached
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        start = time.perf_counter()
        make(folder)
        seconds = time.perf_counter() - start
        digest = folder_digest(folder)
        # written last, so that an interrupted stage has no record and runs again
        (folder / RECORD).write_text(
            json.dumps({"key": key, "digest": digest, "seconds": round(seconds, 2)}) + "\n", encoding="utf-8"
        )
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
            record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            if record["key"] != key or record["digest"] != folder_digest(folder):
                return None
            return Stage(folder, True, record["seconds"], record["digest"])
        except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
            return None  # it never ran, or was interrupted


def _claim(root: Path) -> None:
    """Creates a marker in a new or empty folder, which allows stages to delete files there; others must have it."""
    marker = root / MARKER
    if marker.is_file():
        return
    if root.exists() and any(root.iterdir()):
        raise FileExistsError(
            f"{root} holds files that are not from an earlier run (there is no {MARKER}), and stages would be written "
            "over them. Choose a new or empty folder."
        )
    root.mkdir(parents=True, exist_ok=True)
    marker.write_text("The stages in this folder are created again when their inputs change.\n", encoding="utf-8")


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of the files in a folder, except hidden ones."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            digest.update(f"{relative.as_posix()}\0".encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())  # the files of the demo are small
    return digest.hexdigest()


@functools.cache  # edits of the source while this process runs do not affect it
def source_digest(module: str) -> str:
    """SHA-256 over the source code of a module, or of all modules of a package."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"no module {module!r} to hash")
    origin = Path(spec.origin)
    files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
