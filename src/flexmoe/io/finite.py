"""Checks that floating-point numbers are finite, on their bytes: in NaN and infinities all exponent bits are set.

Runs at memory bandwidth in one thread and without torch, whose thread pool would compete with the threads that write
files. Little-endian machines only, as safetensors itself. Does not cover complex numbers.

Source: IEEE 754; the eight-bit formats of arXiv 2209.05433, and of arXiv 2206.02915 (FNUZ), where one code is NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from flexmoe.io.tensors import Chunk
from flexmoe.modeling.fingerprint_flexmoe import DTYPE_CODES, tensor_bytes

PIECE_BYTES = 256 << 10
"""Bytes that are checked at a time, so that intermediate arrays stay in the processor's cache."""

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
"""By safetensors dtype code: an integer type of the same size, a bit mask, and the masked value if not finite."""


def bytes_are_finite(chunk: Chunk, dtype: str) -> bool:
    """Whether all numbers of this floating-point dtype, given as bytes, are finite.

    Raises:
        ValueError: the bytes end within a number.
    """
    kind, mask, pattern = _NOT_FINITE[dtype]
    numbers = np.frombuffer(chunk, kind)
    count = PIECE_BYTES // numbers.itemsize
    pieces = (numbers[start : start + count] for start in range(0, len(numbers), count))
    return not any(bool((np.bitwise_and(piece, kind(mask)) == pattern).any()) for piece in pieces)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no number of a floating-point tensor is NaN or infinite."""
    return bytes_are_finite(tensor_bytes(tensor.detach()), DTYPE_CODES[tensor.dtype])


def cast_finite(tensor: torch.Tensor, dtype: torch.dtype, what: str) -> torch.Tensor:
    """Casts a tensor of finite numbers to another floating-point dtype.

    Raises:
        ValueError: a number overflows in that dtype; `what` names the tensor.
    """
    cast = tensor.to(dtype)
    if cast.dtype != tensor.dtype and not all_finite(cast):
        raise ValueError(f"{what} holds numbers too large for {dtype}, the dtype of this anchor.")
    return cast


__all__ = ["all_finite", "bytes_are_finite", "cast_finite"]
