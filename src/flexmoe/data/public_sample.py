"""The public sample that a graft stores with its model.

Does not cover choosing it (`flexmoe.conversion.graft`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .documents import texts_of_json_lines
from .files import DataFile


def read_public_sample(folder: str | Path, record: Mapping[str, Any] | None) -> list[str]:
    """The documents of the public sample that a graft stores with its model; the parsed bytes are those hashed.

    Args:
        folder: the model's.
        record: the config's `public_sample`.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the model has no sample, the record names a file elsewhere, the file has changed, or a line of it
            is not a JSON object.
        TypeError: a line has no text.
    """
    if not record:
        raise ValueError(
            f"No public sample is stored with {folder}. Graft it, or call this, with --public-data (public_data=...)."
        )
    name = record["file"]
    # the record is untrusted: it must not choose which file of this machine is read
    if not isinstance(name, str) or name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
        raise ValueError(f"{folder}: the config's public_sample names {name!r}, which is not a plain file name.")
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the model's public sample is missing here. Restore it, or give public text.")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != record["sha256"]:
        raise ValueError(
            f"{path} has sha256 {found}, but the model was grafted with {record['sha256']}: the file was changed. "
            "Restore it, or choose other public text with --public-data (public_data=...)."
        )
    return texts_of_json_lines(DataFile(path, ".jsonl"), content)
