"""The header of a GGUF file: its metadata and the table of its tensors, read in one pass.

The gguf package reads them too, through an array for each token of the vocabulary: seconds to a minute. transformers
reads with it; `write_outline` writes a file that both read in milliseconds. Does not cover what the entries mean
(`flexmoe.io.gguf`), or files in big-endian byte order.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
VERSIONS = (2, 3)

_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MOST_DIMENSIONS = 8
_NO_WEIGHTS = struct.pack("<IQIQ", 1, 0, 0, 0)  # of a tensor: one dimension of size 0, F32, the first offset


class GgufError(ValueError):
    """A GGUF file that is damaged, incomplete or not one; the message says which."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in the file.

    Attributes:
        name: llama.cpp's name.
        shape: in torch's order.
        type: the number of its ggml type.
        start: where its bytes begin in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    start: int

    @property
    def count(self) -> int:
        """The number of weights."""
        return prod(self.shape)


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file states before its weights.

    Attributes:
        version: of the format.
        metadata: its entries.
        tensors: the table of its tensors.
        spans: where the bytes of each entry begin and end, its name included.
    """

    version: int
    metadata: dict[str, Any]
    tensors: list[GgufTensor]
    spans: dict[str, tuple[int, int]]


def read_header(path: Path) -> GgufHeader:
    """The metadata and the tensors of a GGUF file.

    Raises:
        GgufError: it is not a GGUF file, of an unknown version, cut off, or damaged.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(len(MAGIC))
        if start != MAGIC:
            raise GgufError(f"{path} is not a GGUF file: it starts with {start!r}, not {MAGIC!r}.")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _parse(_Cursor(data, len(MAGIC)))
            except (struct.error, IndexError, UnicodeDecodeError) as error:
                raise GgufError(
                    f"{path} is cut off or damaged: its {size:,} bytes end within its table of contents ({error}). "
                    "Download it again."
                ) from error
            except GgufError as error:
                raise GgufError(f"{path}: {error}") from None


def check_complete(path: Path, tensors: list[GgufTensor], block_sizes: Mapping[int, tuple[int, int]]) -> None:
    """Checks that the file holds all bytes of its tensors.

    Args:
        block_sizes: type -> (weights, bytes) of a block.

    Raises:
        GgufError: it does not, or a type is unknown.
    """
    size = path.stat().st_size
    for tensor in tensors:
        if tensor.type not in block_sizes:
            raise GgufError(
                f"{path}: {tensor.name} is of the ggml type {tensor.type}, which the installed gguf package does not "
                "know. Update it: pip install --upgrade gguf."
            )
        weights, nbytes = block_sizes[tensor.type]
        end = tensor.start + tensor.count // weights * nbytes
        if end > size:
            raise GgufError(
                f"{path} is cut off: {tensor.name} ends at byte {end:,}, and the file at {size:,}. Download it again."
            )


def write_outline(path: Path, header: GgufHeader, out: Path) -> None:
    """Writes what a config is built from, as a GGUF file: the header without vocabulary, merges and weights.

    The other entries and the names of the tensors are the file's, byte by byte; the tensors are empty. The list of
    tokens becomes one text of as many characters: where no entry states the size of the vocabulary, transformers takes
    the length of that entry.

    Args:
        header: what `read_header` returned for `path`.
    """
    entries = []
    with open(path, "rb") as file:
        for name, (start, end) in header.spans.items():
            value = header.metadata[name]
            if name == "tokenizer.ggml.tokens":
                entries.append(_packed(name) + struct.pack("<I", _STRING) + _packed(" " * len(value)))
            elif not (name.startswith("tokenizer.") and isinstance(value, list)):
                file.seek(start)
                entries.append(file.read(end - start))
    tensors = [_packed(tensor.name) + _NO_WEIGHTS for tensor in header.tensors]
    counts = struct.pack("<IQQ", header.version, len(tensors), len(entries))
    out.write_bytes(b"".join([MAGIC, counts, *entries, *tensors]))


def _packed(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


class _Cursor:
    """Reads values one after the other."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self.data, self.position = data, position

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.position)
        self.position += struct.calcsize(f"<{code}")
        return value

    def numbers(self, code: str, count: int) -> list[Any]:
        width = struct.calcsize(f"<{code}")
        if count * width > len(self.data) - self.position:  # before memory for a damaged count is taken
            raise IndexError(f"an array of {count:,} entries")
        values = struct.unpack_from(f"<{count}{code}", self.data, self.position)
        self.position += count * width
        return list(values)

    def string(self) -> str:
        length = self.number("Q")
        if length > len(self.data) - self.position:
            raise IndexError(f"a string of {length:,} bytes")
        text = self.data[self.position : self.position + length].decode("utf-8")
        self.position += length
        return text

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise GgufError(f"damaged: an entry of the unknown type {kind}. Download it again.")
        kind, count = self.number("I"), self.number("Q")
        if kind in _NUMBERS:
            return self.numbers(_NUMBERS[kind], count)
        return [self.value(kind) for _ in range(count)]


def _parse(cursor: _Cursor) -> GgufHeader:
    version = cursor.number("I")
    if version not in VERSIONS:
        raise GgufError(f"it is of GGUF version {version}; versions {' and '.join(map(str, VERSIONS))} are read.")
    tensor_count, entry_count = cursor.number("Q"), cursor.number("Q")
    metadata, spans = {}, {}
    for _ in range(entry_count):
        begin, name = cursor.position, cursor.string()
        if name in metadata:
            raise GgufError(f"damaged: it has two entries {name!r}. Download it again.")
        metadata[name] = cursor.value(cursor.number("I"))
        spans[name] = (begin, cursor.position)
    entries = []
    for _ in range(tensor_count):
        name, dimensions = cursor.string(), cursor.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise GgufError(f"damaged: {name!r} has {dimensions} dimensions. Download it again.")
        shape = tuple(reversed(cursor.numbers("Q", dimensions)))  # ggml's order is the reverse of torch's
        entries.append((name, shape, cursor.number("I"), cursor.number("Q")))
    alignment = int(metadata.get("general.alignment", 32))
    start = -(-cursor.position // alignment) * alignment
    tensors = [GgufTensor(name, shape, kind, start + offset) for name, shape, kind, offset in entries]
    return GgufHeader(version, metadata, tensors, spans)


__all__ = ["MAGIC", "GgufError", "GgufHeader", "GgufTensor", "check_complete", "read_header", "write_outline"]
