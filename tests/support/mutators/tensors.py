"""Wrong, missing and additional tensors, and numbers that are not finite, under valid headers.

Does not cover invalid headers (`headers`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.support.mutators.packages import (
    MayPass,
    Stored,
    any_entry,
    change_header,
    change_one,
    edit,
    manifest_of,
    read_file,
    read_tensors,
    seal,
    weight_files,
    write_file,
    write_tensors,
)


def wrong_shape(folder: Path, chance: random.Random) -> str:
    def change(tensor: Stored) -> list[Stored]:
        count = int(np.prod(tensor.shape))
        shapes = [[count], [1, count], [count, 1], [*tensor.shape, 1], [1] * 60 + [count], tensor.shape[::-1]]
        return [tensor._replace(shape=chance.choice([shape for shape in shapes if shape != tensor.shape]))]

    return f"of {change_one(folder, chance, change).name}"


def wrong_size(folder: Path, chance: random.Random) -> str:
    def change(tensor: Stored) -> list[Stored]:
        first, *rest = tensor.shape
        size = chance.choice([0, 2 * first, first + 1, 1000])
        data = (tensor.data * (size // first + 1))[: len(tensor.data) // first * size]
        return [tensor._replace(shape=[size, *rest], data=data)]

    return f"of {change_one(folder, chance, change).name}"


def wrong_dtype(folder: Path, chance: random.Random) -> str:
    codes = {"I32": 1, "U32": 1, "I64": 2, "I8": 0.25, "U8": 0.25, "BOOL": 0.25, "C64": 2, "F8_E8M0": 0.25}
    code = chance.choice(list(codes))

    def change(tensor: Stored) -> list[Stored]:
        more = 2 if codes[code] == 2 else 1
        shape = tensor.shape if more == 2 else [*tensor.shape[:-1], int(tensor.shape[-1] / codes[code])]
        return [tensor._replace(dtype=code, shape=shape, data=tensor.data * more)]

    tensor = change_one(folder, chance, change)
    edit(folder, dtype=chance.choice(["float32", "mixed", "float8_e8m0fnu"]))
    return f"{tensor.name} as {code}"


def unknown_dtype(folder: Path, chance: random.Random) -> str:
    code = chance.choice(["F4", "F64 ", "", None, 7, [], {}, "f32", "F32\0", "\u202e", "F" * 100_000, ["F32"], True])
    change_header(folder, chance, lambda header: any_entry(header, chance).update(dtype=code))
    return f"{code!r:.40}"


def wider_dtype(folder: Path, chance: random.Random) -> str:
    for path in weight_files(folder):
        wide = ((tensor, np.frombuffer(tensor.data, "<f4").astype("<f8").tobytes()) for tensor in read_tensors(path))
        write_tensors(path, [tensor._replace(dtype="F64", data=data) for tensor, data in wide])
    edit(folder, dtype="float64")
    seal(folder)
    return MayPass("the same numbers in 64 bits")


def too_large_a_number(folder: Path, chance: random.Random) -> str:
    number = chance.choice([1e300, -1e39, 1e308])

    def change(tensor: Stored) -> list[Stored]:
        values = np.frombuffer(tensor.data, "<f4").astype("<f8")
        values[chance.randrange(len(values))] = number
        return [tensor._replace(dtype="F64", data=values.tobytes())]

    tensor = change_one(folder, chance, change)
    edit(folder, dtype="float32" if ".router." in tensor.name else "mixed")
    return f"{number} in {tensor.name}, which 32 bits cannot hold"


def not_finite(folder: Path, chance: random.Random) -> str:
    number = chance.choice(["nan", "inf", "-inf"])

    def change(tensor: Stored) -> list[Stored]:
        values = np.frombuffer(tensor.data, "<f4").copy()
        values[chance.randrange(len(values))] = float(number)
        return [tensor._replace(data=values.tobytes())]

    return f"{number} in {change_one(folder, chance, change).name}"


def no_elements(folder: Path, chance: random.Random) -> str:
    shape = chance.choice(
        [
            [0],
            [0, 1 << 62],
            [0] * 64,
            [0] * 65,
            [0, 1 << 62, 1 << 62],
            [1 << 62, 0],
            [],
            [0, (1 << 63) - 1],
            [1 << 63, 0],
        ]
    )

    def change(tensor: Stored) -> list[Stored]:
        return [tensor._replace(shape=shape, data=b"" if shape else tensor.data[:4])]

    return f"{change_one(folder, chance, change).name} of shape {shape}"


def huge_tensor(folder: Path, chance: random.Random) -> str:
    """A sparse file, which costs its author nothing."""
    path = chance.choice([path for path in weight_files(folder) if ".ffn." in path.read_bytes().decode("latin-1")])
    tensors = read_tensors(path)
    grown = chance.choice([tensor for tensor in tensors if ".ffn." in tensor.name])
    write_tensors(path, [*(tensor for tensor in tensors if tensor != grown), grown])  # the last one in the file
    size, side = chance.choice([256, 512]) << 20, grown.shape[-1]
    header, data = read_file(path)
    begin, _ = header[grown.name]["data_offsets"]
    shape = chance.choice([[size // 4], [size // 4 // side, side]])
    header[grown.name] |= {"shape": shape, "data_offsets": [begin, begin + int(np.prod(shape)) * 4]}
    write_file(path, header, data[:begin])
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + int(np.prod(shape)) * 4)
    return f"{grown.name} of {size >> 20} MiB in {path.name}, without updating the hash"


FACTORS = ((3e38, 0.0), (-3e38, 0.0), (1e37, 1e-37), (1e-37, 1e37), (1e25, 1e25), (3e4, 3e4))


def factor_scales(folder: Path, chance: random.Random) -> str:
    """Numbers that are huge, or whose products are, in a network whose other tensors are ordinary."""
    if manifest_of(folder)["kind"] == "low_rank":
        layer, (a, b) = chance.choice([0, 1]), chance.choice(FACTORS)
        parts = {"lora_A.weight": a, "lora_B.weight": b}
        _change_all(
            folder,
            lambda tensor: next(
                (
                    tensor._replace(data=np.full(tensor.shape, value, "<f4").tobytes())
                    for part, value in parts.items()
                    if tensor.name.startswith(f"layers.{layer}.") and tensor.name.endswith(part)
                ),
                tensor,
            ),
        )
        return f"{a} and {b} in layer {layer}"
    factor = chance.choice([7.0, -20.0, 300.0, 1e6, 1e12, 1e30])

    def scale(tensor: Stored) -> Stored:
        if ".ffn." not in tensor.name or len(tensor.shape) < 2:
            return tensor
        with np.errstate(over="ignore"):
            return tensor._replace(data=(np.frombuffer(tensor.data, "<f4") * np.float32(factor)).tobytes())

    _change_all(folder, scale)
    return f"all matrices times {factor}"


def repeated_neurons(folder: Path, chance: random.Random) -> str:
    """The output of a network is a multiple, while all of its tensors have the size of public's."""
    if manifest_of(folder)["kind"] == "low_rank":
        return factor_scales(folder, chance)
    times = chance.choice([20, 50, 100])

    def repeat(tensor: Stored) -> Stored:
        values = np.frombuffer(tensor.data, "<f4").reshape(tensor.shape)
        inner = [side for side in range(values.ndim) if values.shape[side] in (64, 128)]  # the width, not 32
        if ".ffn." not in tensor.name or not inner:
            return tensor
        values = np.concatenate([values] * times, axis=inner[0])
        return tensor._replace(shape=list(values.shape), data=values.tobytes())

    _change_all(folder, repeat)
    ffn = manifest_of(folder)["ffn"]
    edit(folder, ffn={**ffn, "intermediate": [width * times for width in ffn["intermediate"]]})
    return f"{times} times"


def row_widths(folder: Path, chance: random.Random) -> str:
    """Router rows of any width, in a sparse file, with and without a manifest that agrees."""
    width = chance.choice([31, 33, 1 << 16, 1 << 20, (1 << 20) + 1, 10**9, 1 << 31])
    agrees = chance.random() < 0.7
    if agrees:
        edit(folder, ffn={**manifest_of(folder)["ffn"], "hidden": width})
    for path in weight_files(folder):
        entries, end, begins = {}, 0, []
        for tensor in read_tensors(path):
            shape = [1, width] if tensor.name.endswith(".router.weight") else tensor.shape
            begin, end = end, end + 4 * int(np.prod(shape))
            begins.append((begin, tensor.data))
            entries[tensor.name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
        write_file(path, entries, b"")
        start = path.stat().st_size
        with path.open("r+b") as file:
            for begin, data in begins:
                file.seek(start + begin)
                file.write(data[: end - begin])
            file.truncate(start + end)
    return f"rows of {width}{', as the manifest says' if agrees else ''}, without updating the hash"


def _change_all(folder: Path, change: Callable[[Stored], Stored]) -> None:
    for path in weight_files(folder):
        write_tensors(path, [change(tensor) for tensor in read_tensors(path)])
    seal(folder)


def missing_tensor(folder: Path, chance: random.Random) -> str:
    return change_one(folder, chance, lambda _: []).name


def extra_tensor(folder: Path, chance: random.Random) -> str:
    name = chance.choice(
        [
            "layers.9.ffn.up_proj.weight",
            "layers.0.ffn.extra.weight",
            "layers.0.router.scale",
            "layers.00.ffn.up_proj.weight",
            "layers.0.attention.weight",
            "anchor.model.embed_tokens.weight",
            "layers.0.ffn.up_proj.weight.",
            "layers.0.ffn.__class__",
            "layers.0.ffn.experts.math.weight",
        ]
    )
    change_one(folder, chance, lambda tensor: [tensor, tensor._replace(name=name)])
    return name


NAMES = (
    *("", ".", "../x", "layers.0.ffn..", "layers.-1.ffn.x", "layers.1e3.ffn.x.weight", "__metadata__"),
    *("layers.0.ffn.forward", "layers.0.ffn.up_proj", "layers.0.router.weight\n", "layers.0.ffn.\0"),
    *("layers.0.ffn.\u00fcp", "\x1b[2J", "a" * 10_000, "layers.0.ffn." + "a" * 10_000),
    "layers.0.ffn." + "a." * 5000 + "weight",
)


def renamed_tensor(folder: Path, chance: random.Random) -> str:
    name = chance.choice(NAMES)
    old = change_one(folder, chance, lambda tensor: [tensor._replace(name=name)]).name
    return f"{old} to {name!r:.40}"


def swapped_tensors(folder: Path, chance: random.Random) -> str:
    path = chance.choice(weight_files(folder))
    tensors = read_tensors(path)
    pairs = [(a, b) for a in tensors for b in tensors if a.shape != b.shape]
    if not pairs:  # a shard of one tensor
        return missing_tensor(folder, chance)
    one, other = chance.choice(pairs)
    names = {one.name: other.name, other.name: one.name}
    write_tensors(path, [tensor._replace(name=names.get(tensor.name, tensor.name)) for tensor in tensors])
    seal(folder)
    return f"{one.name} and {other.name}"


def tensor_in_two_files(folder: Path, chance: random.Random) -> str:
    tensors = read_tensors(chance.choice(weight_files(folder)))
    write_tensors(folder / "expert-00009-of-00009.safetensors", [chance.choice(tensors)])
    seal(folder)
    return "in an additional file that the manifest lists"


def missing_layer(folder: Path, chance: random.Random) -> str:
    """Tensors and manifest agree; the model has one more layer."""
    for path in weight_files(folder):
        kept = [tensor for tensor in read_tensors(path) if tensor.name.startswith("layers.0.")]
        if kept:
            write_tensors(path, kept)
        else:
            path.unlink()
    values = manifest_of(folder)
    ffn, rank = values["ffn"], values.get("rank")
    edit(folder, layers=[0], ffn={**ffn, "intermediate": ffn["intermediate"][:1]}, rank=rank and rank[:1])
    seal(folder)
    return "layer 1"


def extra_layer(folder: Path, chance: random.Random) -> str:
    for path in weight_files(folder):
        more = [
            tensor._replace(name=tensor.name.replace("layers.1.", "layers.2."))
            for tensor in read_tensors(path)
            if tensor.name.startswith("layers.1.")
        ]
        write_tensors(path, [*read_tensors(path), *more])
    values = manifest_of(folder)
    widths, rank = values["ffn"]["intermediate"], values.get("rank")
    more_ranks = rank and [*rank, rank[-1]]
    edit(folder, layers=[0, 1, 2], ffn={**values["ffn"], "intermediate": [*widths, widths[-1]]}, rank=more_ranks)
    seal(folder)
    return "layer 2"
