"""The work folder of a training run: what must be equal for the run to be resumed, and checkpoints that are whole.

Beside an output folder `math`, `.math.training` holds

    run.json                    what the run depends on (`identify`)
    router_rows.safetensors     the fitted rows
    checkpoint-<step>/          of Trainer, with the expert's parameters only
    checkpoint-<step>/complete  the SHA-256 of each of its files, written last

Does not cover the contents of a checkpoint (`flexmoe.training.trainer`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flexmoe.io.folders import write_file
from flexmoe.io.hashing import sha256_of
from flexmoe.io.strict_json import read_json_object

ROWS_FILE = "router_rows.safetensors"
RUN_FILE = "run.json"
COMPLETE = "complete"

_REASONS = {
    "model": "the model's configuration",
    "weights": "the model's weights",
    "text": "the documents",
    "tokenizer": "the tokenizer, which reads other tokens in the same documents",
}
_START_OVER = "resume=False (--no-resume) to start over"


def work_folder(out: Path) -> Path:
    """The folder of the run that writes `out`."""
    return out.parent / f".{out.name}.training"


def identify(
    folder: Path, *, name: str, text: str, tokens: str, processes: int, settings: Mapping[str, Any], main: bool
) -> dict[str, Any]:
    """What must be equal for a run to resume from a checkpoint and end as if it had never been interrupted.

    Args:
        folder: of the model.
        text, tokens: digests of the documents, and of their tokens.
        main: whether this is the main process; only that one reads the weights.
    """
    return {
        "name": name,
        "model": sha256_of(folder / "config.json")[1],
        **({"weights": _weights_sha256(folder)} if main else {}),
        "text": text,
        "tokenizer": tokens,
        "processes": processes,
        "settings": dict(settings),
    }


def open_work_folder(
    work: Path, identity: Mapping[str, Any], defaults: Mapping[str, Any], resume: bool, *, main: bool
) -> None:
    """Creates the folder of a new run, or checks that an existing one is this run's and drops other checkpoints.

    Args:
        identity: of this run; see `identify`.
        defaults: of the settings, for those that an older version did not record.
        main: whether this is the process that may change the folder; the others run afterwards and only check.

    Raises:
        FileNotFoundError: another process created the folder where this one does not see it.
        ValueError: the folder is another run's, its record or its last checkpoint is damaged.
    """
    record = work / RUN_FILE
    known = _known_run(record)
    if main and resume and known is None and (last := last_checkpoint(work)):
        raise ValueError(
            f"{record} is missing or damaged, so nothing tells whether {last.name} belongs to this run. Give "
            f"{_START_OVER}."
        )
    if main and (known is None or not resume):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_file(record, json.dumps(identity, indent=2).encode(), overwrite=True)
        return
    if known is None:
        raise FileNotFoundError(f"{record} is missing. The processes of a run must share one file system.")
    if changed := _changes(known, identity, defaults):
        raise ValueError(
            f"{work} holds an interrupted run with other values of: {', '.join(changed)}. Give the same command, with "
            f"the same files, to resume it (a newer FlexMoE may choose other values: give those of the run), or "
            f"{_START_OVER}."
        )
    if not main:
        return
    last = last_checkpoint(work)
    if last is not None:
        check_checkpoint(last)
    for folder in work.glob("checkpoint-*"):
        if folder != last:
            shutil.rmtree(folder)


def last_checkpoint(work: Path) -> Path | None:
    """The newest complete checkpoint in a folder; None if there is none."""
    complete = [path.parent for path in work.glob(f"checkpoint-*/{COMPLETE}")]
    return max(complete, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def seal_checkpoint(folder: Path) -> None:
    """Marks a checkpoint as complete, with the digest of each file; one without the mark is not resumed from."""
    files = {
        path.name: sha256_of(path)[1] for path in sorted(folder.iterdir()) if path.is_file() and path.name != COMPLETE
    }
    write_file(folder / COMPLETE, json.dumps(files, indent=2).encode(), overwrite=True)


def check_checkpoint(folder: Path) -> None:
    """Compares the files of a checkpoint with its mark.

    Raises:
        ValueError: one is missing or was changed; the message says how to go on.
    """
    fault = _fault(folder)
    if fault is None:
        return
    earlier = [path for path in folder.parent.glob("checkpoint-*") if step_of(path) < step_of(folder)]
    before = last_checkpoint_of(earlier)
    then = f"resume from {before.name}" if before else "start from step 0, with the same router rows"
    raise ValueError(
        f"The checkpoint {folder} is damaged: {fault}. Delete this folder and give the same command to {then}, or "
        f"give {_START_OVER}."
    )


def last_checkpoint_of(folders: list[Path]) -> Path | None:
    """The newest of these checkpoints that is complete and whole; None if there is none."""
    whole = [folder for folder in folders if (folder / COMPLETE).is_file() and _fault(folder) is None]
    return max(whole, key=step_of, default=None)


def save_rows(file: Path, rows: Mapping[str, torch.Tensor]) -> None:
    """Stores fitted rows with their digest, so that a resumed run has the same."""
    unfinished = file.with_suffix(".unfinished")
    save_file(dict(rows), unfinished, metadata={"sha256": _tensors_sha256(rows)})
    os.replace(unfinished, file)


def load_rows(file: Path) -> dict[str, torch.Tensor]:
    """The rows in a file of `save_rows`. ValueError: it is damaged."""
    try:
        rows = load_file(file)
        with safe_open(file, "pt") as opened:
            expected = (opened.metadata() or {}).get("sha256")
        fault = None if _tensors_sha256(rows) == expected else "their digest differs from the stored one"
    except Exception as error:  # of safetensors
        fault = str(error)
    if fault is not None:
        raise ValueError(f"The router rows {file} are damaged ({fault}). Give {_START_OVER}.")
    return rows


def _changes(known: Mapping[str, Any], identity: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    before = {**defaults, **known["settings"]}  # an older version had fewer settings
    settings = [f"settings.{key}" for key, value in identity["settings"].items() if before.get(key) != value]
    others = [key for key in identity if key != "settings" and known.get(key) != identity[key]]
    if "text" in others and "tokenizer" in others:
        others.remove("tokenizer")  # other documents have other tokens
    return sorted(settings) + [f"{key} ({_REASONS[key]})" if key in _REASONS else key for key in sorted(others)]


def _known_run(record: Path) -> dict[str, Any] | None:
    """The identity of the run in a folder; None if there is none, or it was interrupted before it was recorded."""
    try:
        known = read_json_object(record)
    except (FileNotFoundError, ValueError):  # of JSON and of UTF-8
        return None
    return known if isinstance(known, dict) and isinstance(known.get("settings"), dict) else None


def _fault(folder: Path) -> str | None:
    try:
        expected = read_json_object(folder / COMPLETE)
        items = sorted(expected.items())
    except (ValueError, AttributeError):
        return f"its file {COMPLETE!r} cannot be read"
    for name, digest in items:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of(path)[1] != digest:
            return f"{name} ({path.stat().st_size:,} bytes) is not what was written"
    return None


def _weights_sha256(folder: Path) -> str:
    lines = [f"{path.name} {sha256_of(path)[1]}" for path in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
