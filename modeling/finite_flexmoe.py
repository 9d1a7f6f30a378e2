"""Whether numbers are finite, seen in their bytes: of NaN and infinities, all bits of the exponent are set.

At the speed of memory, in one thread, and without torch, whose threads would be in the way of those that write files.
Little-endian machines only, as safetensors itself. Does not cover complex numbers.

Source: IEEE 754; the eight-bit formats of arXiv 2209.05433, and of arXiv 2206.02915 (FNUZ), where one code is NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .tensors_flexmoe import DTYPE_CODES, Chunk, tensor_bytes

PIECE_BYTES = 256 << 10  # of numbers looked at together: what is made of them stays in the cache

_NOT_FINITE: dict[str, tuple[Any, int, int]] = {
    "F64": (np.uint64, 0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0000),
    "F32": (np.uint32, 0x7F80_0000, 0x7F80_0000),
    "F16": (np.uint16, 0x7C00, 0x7C00),
    "BF16": (np.uint16, 0x7F80, 0x7F80),
    "F8_E5M2": (np.uint8, 0x7C, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F, 0x7F),
    "F8_E5M2FNUZ": (np.uint8, 0xFF, 0x80),
    "F8_E4M3FNUZ": (np.uint8, 0xFF, 0x80),
    "F8_E8M0": (np.uint8, 0xFF, 0xFF),
}
"""By dtype, as safetensors calls it: whole numbers of its size, bits to look at, what they are if it is not finite."""


def bytes_are_finite(chunk: Chunk, dtype: str) -> bool:
    """Whether whole numbers of this floating-point dtype, given as bytes, are all finite.

    Raises:
        ValueError: the bytes end within a number.
    """
    kind, bits, pattern = _NOT_FINITE[dtype]
    numbers = np.frombuffer(chunk, kind)
    count = PIECE_BYTES // numbers.itemsize
    pieces = (numbers[start : start + count] for start in range(0, len(numbers), count))
    return not any(bool((np.bitwise_and(piece, kind(bits)) == pattern).any()) for piece in pieces)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no number of a floating-point tensor is NaN or an infinity."""
    return bytes_are_finite(tensor_bytes(tensor.detach()), DTYPE_CODES[tensor.dtype])


__all__ = ["all_finite", "bytes_are_finite"]
