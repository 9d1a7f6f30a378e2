"""Manifests with false values, in valid JSON.

Does not cover values of wrong types (`json_texts`).
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

from tests.support.mutators.packages import MayPass, edit, manifest_of, weight_files


def false_layers(folder: Path, chance: random.Random) -> str:
    layers = chance.choice(
        [[0], [1], [1, 2], [0, 1, 2], [0, 999_999], list(range(100_000)), [0, 0], [1, 0], [0, 10**9]]
    )
    values = manifest_of(folder)
    fitting = chance.random() < 0.5
    if fitting:
        width, rank = values["ffn"]["intermediate"][0], values.get("rank")
        edit(folder, ffn={**values["ffn"], "intermediate": [width] * len(layers)})
        edit(folder, rank=rank and [rank[0]] * len(layers))
    edit(folder, layers=layers)
    return f"{str(layers)[:40]}{', with as many widths' if fitting else ''}"


def false_rank(folder: Path, chance: random.Random) -> str:
    rank = chance.choice(
        [[1, 1], [2**31 - 1] * 2, [2**31] * 2, [3, 5], [0, 0], [-1, 4], [4], [4] * 3, 4, None, [4.0, 4.0]]
    )
    if repr(rank) == repr(manifest_of(folder).get("rank")):
        rank = [5, 5]
    edit(folder, rank=rank)
    return f"{rank}"


def false_alpha(folder: Path, chance: random.Random) -> str:
    if manifest_of(folder)["kind"] == "low_rank":
        alpha: Any = chance.choice(["1", [], True, {}])
    else:
        alpha = chance.choice([1, 0.5, "1", [], True])
    edit(folder, alpha=alpha)
    return f"{alpha!r}"


def false_widths(folder: Path, chance: random.Random) -> str:
    ffn = manifest_of(folder)["ffn"]
    hidden = chance.choice([ffn["hidden"], ffn["hidden"], 1, 33, 2**31 - 1, 2**31])
    width = chance.choice([1, 32, 63, 65, 1024, 2**31 - 1, [64, 65], [2**31 - 1] * 2, [64] * 3, 0, [], [2**31] * 2])
    edit(folder, ffn={**ffn, "hidden": hidden, "intermediate": width})
    # the widths of a low-rank expert are not used: its tensors must have the shapes of public's
    text = f"hidden {hidden}, intermediate {width}"
    return MayPass(text) if manifest_of(folder)["kind"] == "low_rank" else text


def false_dtype(folder: Path, chance: random.Random) -> str:
    dtype = chance.choice(
        ["float16", "bfloat16", "float64", "mixed", "int8", "", "torch.float32", "F32", "x" * 100_000]
    )
    edit(folder, dtype=dtype)
    return f"{dtype:.40}"


def false_anchor(folder: Path, chance: random.Random) -> str:
    fingerprint = chance.choice(["0" * 64, "f" * 64, None, "A" * 64, "", "x" * 64, 7, "0" * 65])
    edit(folder, anchor={**manifest_of(folder)["anchor"], "fingerprint": fingerprint})
    return f"{fingerprint!r}"


def false_kind(folder: Path, chance: random.Random) -> str:
    values = manifest_of(folder)
    if values["kind"] == "full":
        kind, rank = chance.choice(
            [("low_rank", [4, 4]), ("low_rank", None), ("Full", None), ("full", [4, 4]), ("", None)]
        )
    else:
        kind, rank = chance.choice([("full", None), ("full", values["rank"]), ("low-rank", values["rank"])])
    edit(folder, kind=kind, rank=rank, alpha=values["alpha"] if kind == values["kind"] else None)
    return f"{kind!r} with rank {rank}"


def false_version(folder: Path, chance: random.Random) -> str:
    version = chance.choice([0, 2, -1, True, 1.0, "1", None, [], 10**300, "x" * 100_000, {"a": "b" * 10_000}])
    edit(folder, format_version=version)
    return f"{version!r:.40}"


NAMES = (
    # reserved, taken, too long, or invalid
    *("public", "keys", "default", "base_layer", "__class__"),
    *("", "a" * 65, "a" * 10_000, "a.b", "../math", "a/b", "Math", "0a", "a b", "a--b", "-a", "a-"),
    *("m\u00e4th", "\u202ea", "a\n", "a\0", "a\x1b[2J"),
)

FILE_NAMES = (
    # some of which exist
    *("../expert.safetensors", "inner/expert.safetensors", "./expert.safetensors", "inner", "README.md"),
    *("/etc/passwd", "~/expert.safetensors", "https://example.org/expert.safetensors", "..\\expert.safetensors"),
    *("", ".", "..", "expert.safetensors/", "EXPERT.SAFETENSORS", "e" * 5000),
    *("expert.safetensors\0", "expert.safetensors\n", "expert-0000\u0661-of-00002.safetensors"),
)


def hostile_name(folder: Path, chance: random.Random) -> str:
    name = chance.choice(NAMES)
    edit(folder, name=name)
    return f"{name!r:.40}"


def escaping_files(folder: Path, chance: random.Random) -> str:
    """The manifest names files in other folders, some of which exist."""
    path = chance.choice(weight_files(folder))
    (folder.parent / "expert.safetensors").write_bytes(path.read_bytes())
    (folder / "inner").mkdir()
    (folder / "inner" / "expert.safetensors").write_bytes(path.read_bytes())
    name = chance.choice([*FILE_NAMES, str(folder.parent / "expert.safetensors")])
    hashes = manifest_of(folder)["sha256"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if chance.random() < 0.5:
        edit(folder, sha256={**hashes, name: digest})
    else:
        edit(folder, sha256={key: value for key, value in hashes.items() if key != path.name} | {name: digest})
    return f"{name!r:.60}"


def wrong_hash(folder: Path, chance: random.Random) -> str:
    hashes = manifest_of(folder)["sha256"]
    name = chance.choice(list(hashes))
    digest = hashes[name]
    hashes[name] = chance.choice(
        [
            digest.upper() + " ",
            digest[:-1],
            "0x" + digest,
            digest[::-1],
            "",
            None,
            0,
            "0" * 64,
            [digest],
            digest + "\n",
        ]
    )
    edit(folder, sha256=hashes)
    return f"{hashes[name]!r:.80}"
