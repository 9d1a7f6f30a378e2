"""Invalid headers of weight files.

Does not cover valid headers of invalid tensors (`tensors`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.mutators.json_texts import BIG_VALUES, HOSTILE_TEXTS, depths, nested
from tests.support.mutators.packages import any_entry, change_header, read_file, seal, weight_files, write_file


def huge_header(folder: Path, chance: random.Random) -> str:
    path = chance.choice(weight_files(folder))
    header, data = read_file(path)
    size = path.stat().st_size
    length = chance.choice([size, size - 7, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 100_000_001])
    write_file(path, header, data, length)
    seal(folder)
    return f"{length} bytes claimed by {path.name}"


def header_over_the_limit(folder: Path, chance: random.Random) -> str:
    path = chance.choice(weight_files(folder))
    header, data = read_file(path)
    text = json.dumps(header).encode()
    write_file(path, text + b" " * chance.choice([33 << 20, (32 << 20) + 1]), data)
    seal(folder)
    return "mostly spaces"


def bad_offsets(folder: Path, chance: random.Random) -> str:
    path = chance.choice(weight_files(folder))
    header, data = read_file(path)
    size = len(data)
    changes: list[Callable[[int, int], Any]] = [
        lambda a, b: [b, a],
        lambda a, b: [a - 4, b - 4],
        lambda a, b: [a + 4, b + 4],
        lambda a, b: [-(b - a), 0],
        lambda a, b: [float(a), float(b)],
        lambda a, b: [str(a), str(b)],
        lambda a, b: [a, b, b],
        lambda a, b: [a],
        lambda a, b: [True, b],
        lambda a, b: [None, b],
        lambda a, b: [[a], b],
        lambda a, b: {"begin": a, "end": b},
        lambda a, b: [a + (1 << 64), b + (1 << 64)],
        lambda a, b: [a, b + (1 << 63)],
        lambda a, b: [a, 10**400],
        lambda a, b: [size, size + b - a],
        lambda a, b: [a, size + 1],
        lambda a, b: None,
    ]
    number = chance.randrange(len(changes))
    entry = any_entry(header, chance)
    entry["data_offsets"] = changes[number](*entry["data_offsets"])
    write_file(path, header, data)
    seal(folder)
    return f"number {number}"


def overlapping_tensors(folder: Path, chance: random.Random) -> str:
    """Two tensors share their bytes; the unused bytes stay in the file or are removed."""
    path = chance.choice(weight_files(folder))
    header, data = read_file(path)
    names = [name for name in header if name != "__metadata__"]
    one, other = chance.choice(names), chance.choice(names)
    if one == other:
        return bad_offsets(folder, chance)
    a, b = header[one]["data_offsets"], header[other]["data_offsets"]
    shared = min(a[1] - a[0], b[1] - b[0])
    header[one] |= {"data_offsets": [b[0], b[0] + shared], "shape": [shared // 4]}
    write_file(path, header, data if chance.random() < 0.5 else data[: len(data) - shared])
    seal(folder)
    return f"{one} upon {other}"


def bad_entry(folder: Path, chance: random.Random) -> str:
    entry = chance.choice(
        [None, [], "x", 1, True, {}, {"dtype": "F32"}, {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": 1}]
        + [{"shape": [1], "data_offsets": [0, 4]}, {"dtype": "F32", "shape": None, "data_offsets": [0, 4]}]
        + [{"dtype": "F32", "shape": [shape], "data_offsets": [0, 4]} for shape in (-1, 1.0, "1", None, True, [1])]
        + [{"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}, {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}]
    )

    def change(header: dict[str, Any]) -> None:
        name = chance.choice([name for name in header if name != "__metadata__"])
        header[name] = entry

    change_header(folder, chance, change)
    return f"{entry!r:.60}"


def bad_metadata(folder: Path, chance: random.Random) -> str:
    value = chance.choice([None, [], "pt", 1, {"format": 1}, {"format": None}, {"a": {}}, {"a": ["b"]}, True])
    change_header(folder, chance, lambda header: header.update(__metadata__=value))
    return f"{value!r}"


def hostile_header(folder: Path, chance: random.Random) -> str:
    path = chance.choice(weight_files(folder))
    header, data = read_file(path)
    text = json.dumps(header).encode()
    what = chance.choice(list(HOSTILE_TEXTS))
    write_file(path, HOSTILE_TEXTS[what](text, chance), data)
    seal(folder)
    return what


def nested_header(folder: Path, chance: random.Random) -> str:
    depth = depths(chance)
    key = chance.choice(["shape", "dtype", "data_offsets", "entry", "__metadata__"])
    path = chance.choice(weight_files(folder))
    header, data = read_file(path)
    name = chance.choice([name for name in header if name != "__metadata__"])
    if key in ("entry", "__metadata__"):
        header[name if key == "entry" else key] = "DEEP"
    else:
        header[name][key] = "DEEP"
    write_file(path, json.dumps(header).encode().replace(b'"DEEP"', nested(depth, chance)), data)
    seal(folder)
    return f"{key}, {depth} deep"


def big_header(folder: Path, chance: random.Random) -> str:
    path = chance.choice(weight_files(folder))
    header, data = read_file(path)
    what = chance.choice(list(BIG_VALUES))
    text = json.dumps(header).encode()
    write_file(path, text[:-1] + b',"x":' + BIG_VALUES[what]() + b"}", data)
    seal(folder)
    return what
