"""Damage to complete files: bits, lengths, names.

Does not cover damage within the format (`tensors`, `headers`, `manifests`).
"""

from __future__ import annotations

import random
from pathlib import Path

from tests.support.mutators.packages import MANIFEST, MayPass, flip, read_file, seal, weight_files
from tests.support.stray_files import stray_name


def bit_flip_in_weights(folder: Path, chance: random.Random) -> str:
    path = chance.choice(weight_files(folder))
    _, data = read_file(path)
    at = path.stat().st_size - 1 - chance.randrange(len(data))
    flip(path, at, chance)
    return f"byte {at} of {path.name}, without updating the hash"


def bit_flip_in_header(folder: Path, chance: random.Random) -> str:
    path = chance.choice(weight_files(folder))
    _, data = read_file(path)
    at = chance.randrange(path.stat().st_size - len(data))
    flip(path, at, chance)
    seal(folder)
    return MayPass(f"byte {at} of {path.name}")


def bit_flip_in_manifest(folder: Path, chance: random.Random) -> str:
    text = (folder / MANIFEST).read_bytes()
    start = text.index(b'"name": "')
    end = text.index(b"\n", start)
    # not in the name, where a flip may give another valid one: the same package, renamed
    at = chance.choice([at for at in range(len(text)) if not start <= at < end])
    flip(folder / MANIFEST, at, chance)
    return MayPass(f"byte {at} of {MANIFEST}")


def bit_flip_in_another_file(folder: Path, chance: random.Random) -> str:
    path = folder / chance.choice(["README.md", "config.json"])
    flip(path, chance.randrange(path.stat().st_size), chance)
    return MayPass(path.name)


def truncation(folder: Path, chance: random.Random) -> str:
    path = chance.choice([*weight_files(folder), folder / MANIFEST])
    size = chance.choice([0, 1, 7, 8, 9, chance.randrange(path.stat().st_size)])
    path.write_bytes(path.read_bytes()[:size])
    if path.name != MANIFEST:
        seal(folder)
    return f"{path.name} after {size} bytes"


def extension(folder: Path, chance: random.Random) -> str:
    path = chance.choice([*weight_files(folder), folder / MANIFEST])
    more = chance.choice([b"\0", b"{}", b"x" * 4096, chance.randbytes(64)])
    path.write_bytes(path.read_bytes() + more)
    if path.name != MANIFEST:
        seal(folder)
    return f"{path.name} by {len(more)} bytes"


def swapped_files(folder: Path, chance: random.Random) -> str:
    one, other = chance.sample(sorted(path for path in folder.iterdir() if path.suffix != ".md"), 2)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    if MANIFEST not in (one.name, other.name):
        seal(folder)
    return MayPass(f"{one.name} and {other.name}")


def missing_file(folder: Path, chance: random.Random) -> str:
    path = chance.choice([*weight_files(folder), folder / MANIFEST])
    path.unlink()
    return path.name


def renamed_weights(folder: Path, chance: random.Random) -> str:
    path = chance.choice(weight_files(folder))
    name = chance.choice(
        ["expert-00009-of-00009.safetensors", "Expert.safetensors", "expert.bin", "expert.safetensors ", "x"]
    )
    path.rename(folder / name)
    return f"{path.name} to {name}"


def unknown_weight_file(folder: Path, chance: random.Random) -> str:
    path = chance.choice(weight_files(folder))
    (folder / "expert-00009-of-00009.safetensors").write_bytes(path.read_bytes())
    return "weights that the manifest does not name"


def harmless_files(folder: Path, chance: random.Random) -> str:
    known = ["pytorch_model.bin", "modeling.py", "tokenizer.json", ".hidden", "expert.safetensors.part"]
    name = chance.choice([*known, stray_name(chance), stray_name(chance)])
    (folder / name).write_bytes(chance.randbytes(100))
    return MayPass(name)
