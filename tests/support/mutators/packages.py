"""Reads and writes expert packages without any checks, as an attacker would, with valid SHA-256 if wanted."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

MANIFEST = "expert_config.json"


class MayPass(str):
    """The description of a mutation that may have no effect."""


class Stored(NamedTuple):
    """One tensor of a weight file."""

    name: str
    dtype: str
    shape: list[int]
    data: bytes


def manifest_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / MANIFEST).read_bytes()))


def edit(folder: Path, **changes: Any) -> None:
    write_manifest(folder, {**manifest_of(folder), **changes})


def write_manifest(folder: Path, values: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(values, indent=2))


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("expert*.safetensors"))


def seal(folder: Path) -> None:
    """Lists the existing weight files with their hashes in the manifest."""
    edit(folder, sha256={path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in weight_files(folder)})


def read_file(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_file(path: Path, header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def read_tensors(path: Path) -> list[Stored]:
    header, data = read_file(path)
    header.pop("__metadata__", None)
    return [
        Stored(name, entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    ]


def write_tensors(path: Path, tensors: Iterable[Stored]) -> None:
    entries, data = [], b""
    for tensor in tensors:
        offsets = [len(data), len(data) + len(tensor.data)]
        entries.append((tensor.name, {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}))
        data += tensor.data
    body = ",".join(f"{json.dumps(name)}:{json.dumps(entry)}" for name, entry in entries)  # a name may occur twice
    write_file(path, f"{{{body}}}".encode(), data)


def change_one(folder: Path, chance: random.Random, change: Callable[[Stored], Iterable[Stored]]) -> Stored:
    """Replaces a random tensor by the result of `change`; returns the original tensor."""
    path = chance.choice(weight_files(folder))
    tensors = read_tensors(path)
    at = chance.randrange(len(tensors))
    write_tensors(path, [*tensors[:at], *change(tensors[at]), *tensors[at + 1 :]])
    seal(folder)
    return tensors[at]


def change_header(folder: Path, chance: random.Random, change: Callable[[dict[str, Any]], Any]) -> None:
    path = chance.choice(weight_files(folder))
    header, data = read_file(path)
    change(header)
    write_file(path, header, data)
    seal(folder)


def any_entry(header: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    return dict.__getitem__(header, chance.choice([name for name in header if name != "__metadata__"]))


def flip(path: Path, at: int, chance: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
