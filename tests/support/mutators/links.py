"""Links, pipes, folders and sockets in place of files.

Does not cover file names that lead out of the folder (`manifests`).
"""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

from tests.support.mutators.packages import MANIFEST, MayPass, weight_files


def targets(folder: Path, chance: random.Random) -> Path:
    return chance.choice([*weight_files(folder), folder / MANIFEST])


def link_out(folder: Path, chance: random.Random) -> str:
    path = targets(folder, chance)
    outside = folder.parent / "outside.bin"
    path.rename(outside)
    path.symlink_to(chance.choice([outside, Path("..") / "outside.bin"]))
    return path.name


def link_to_nothing(folder: Path, chance: random.Random) -> str:
    path = targets(folder, chance)
    path.unlink()
    path.symlink_to(chance.choice(["nowhere", "../nowhere", "/nowhere/at/all", "x" * 250]))
    return path.name


def link_in_a_circle(folder: Path, chance: random.Random) -> str:
    path = targets(folder, chance)
    path.unlink()
    if chance.random() < 0.5:
        path.symlink_to(path.name)
    else:
        path.symlink_to("circle")
        (folder / "circle").symlink_to(path.name)
    return path.name


def link_to_a_device(folder: Path, chance: random.Random) -> str:
    path = targets(folder, chance)
    path.unlink()
    device = chance.choice(
        ["/dev/zero", "/dev/null", "/dev/random", "/dev/stdin", "/proc/self/mem", "/proc/self/environ"]
    )
    path.symlink_to(device)
    return f"{path.name} to {device}"


def link_within(folder: Path, chance: random.Random) -> str:
    path = targets(folder, chance)
    path.rename(folder / "really.bin")
    path.symlink_to("really.bin")
    return MayPass(path.name)


def pipe(folder: Path, chance: random.Random) -> str:
    path = targets(folder, chance)
    path.unlink()
    if chance.random() < 0.5:
        os.mkfifo(path)
        return f"{path.name} is one"
    os.mkfifo(folder / "pipe")
    path.symlink_to("pipe")
    return f"{path.name} links to one"


def not_a_file(folder: Path, chance: random.Random) -> str:
    path = targets(folder, chance)
    path.unlink()
    if chance.random() < 0.5 or len(str(path)) > 100:  # the longest name that a socket may have
        path.mkdir()
        return f"{path.name} is a folder"
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
    return f"{path.name} is a socket"


def invalid_index(folder: Path, chance: random.Random) -> str:
    """The manifest determines the weight files; an index is only for other readers."""
    path = folder / "expert.safetensors.index.json"
    path.unlink(missing_ok=True)
    kind = chance.choice(["absent", "folder", "pipe", "link", "rubbish", "escape", "deep"])
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/dev/zero")
    elif kind != "absent":
        texts = {"rubbish": b"\xff{", "escape": b'{"weight_map": {"x": "../../x"}}', "deep": b"[" * 100_000}
        path.write_bytes(texts[kind])
    return MayPass(kind)
