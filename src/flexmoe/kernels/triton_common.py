"""What the Triton kernels share: the layout of their pointer tables, loads through them, and activations.

Does not cover the tables' cache and updates (`pointers.py`), or the kernels themselves.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from flexmoe.kernels.experts.reference import ExpertTensors
from flexmoe.kernels.low_rank.reference import LowRankTensors
from flexmoe.kernels.pointers import TABLES

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("FlexMoE's kernels need Triton: pip install 'triton>=3.6'.") from error

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether kernels run in Triton's interpreter, on the CPU. Its bf16 arithmetic is wrong: kernels upcast first."""

ALIGNMENT = 16  # bytes: the widest load, which the compiler only emits for pointers that it knows to be aligned


def row_table(rows: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The table [2, E] for the router: the addresses of rows, and of biases."""
    return TABLES.get((_addresses(rows), _addresses(biases, 4)), rows[0].device)


GATE, UP, DOWN, GATE_BIAS, UP_BIAS, DOWN_BIAS, WIDTH = (tl.constexpr(row) for row in range(7))
"""Rows of an expert table: addresses of matrices [I, H], [I, H], [H, I] and of their biases, then I itself."""


def expert_table(experts: ExpertTensors) -> Tensor:
    """The table [7, E] for the experts of a layer. The rows of absent tensors (gate, biases) hold the width.

    Raises:
        ValueError: a matrix is not contiguous, or not aligned to 16 bytes.
    """
    widths = tuple(len(up) for up in experts.up)
    matrices = (experts.gate, experts.up, experts.down)
    biases = (experts.gate_bias, experts.up_bias, experts.down_bias)
    rows = (
        *(_addresses(tensors) if tensors else widths for tensors in matrices),
        *(_addresses(tensors, 2) if tensors else widths for tensors in biases),
        widths,
    )
    return TABLES.get(rows, experts.up[0].device)


A_GATE, A_UP, A_DOWN, B_GATE, B_UP, B_DOWN, B_GATE_BIAS, B_UP_BIAS, B_DOWN_BIAS, RANK, SCALE = (
    tl.constexpr(row) for row in range(11)
)
"""Rows of a table of low-rank experts: addresses of matrices [R, H], [R, H], [R, I], [I, R], [I, R], [H, R] and of the
last three's biases, then R, and the scale: its float32 bits in the lower half of a number that is never an address."""

PUBLIC_RANK = -8  # neither a rank, nor an address, nor 0 (a removed tensor); every RANK_STEP divides it


def low_rank_table(experts: LowRankTensors) -> Tensor:
    """The table [11, M] for low-rank experts. The rows of absent tensors (gate, biases) hold the rank.

    The column of the public network, if it is a member, holds `PUBLIC_RANK` in every row.

    Raises:
        ValueError: a matrix is not contiguous, or not aligned to 16 bytes.
    """
    a, b = experts.a, experts.b
    ranks = tuple(len(up) for up in a.up)
    rows = (
        *(_addresses(tensors) if tensors else ranks for tensors in (a.gate, a.up, a.down, b.gate, b.up, b.down)),
        *(_addresses(tensors, 2) if tensors else ranks for tensors in (b.gate_bias, b.up_bias, b.down_bias)),
        ranks,
        tuple(struct.unpack("<I", struct.pack("<f", scale))[0] - (1 << 63) for scale in experts.scales),
    )
    if (column := experts.public_column) is not None:
        rows = tuple((*row[:column], PUBLIC_RANK, *row[column:]) for row in rows)
    return TABLES.get(rows, experts.public.up[0].device)


def _addresses(tensors: Sequence[Tensor], alignment: int = ALIGNMENT) -> tuple[int, ...]:
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.data_ptr() % alignment:
            raise ValueError(
                f"A tensor {list(tensor.shape)} is not contiguous, or not aligned to {alignment} bytes, so no kernel "
                "can read it: clone() it."
            )
    return tuple(tensor.data_ptr() for tensor in tensors)


@functools.lru_cache
def device_limits(device: torch.device) -> tuple[int, int]:
    """The number of SMs of a device, and the bytes of shared memory that a program may use on it."""
    if INTERPRETED:
        return 1, 112 * 1024
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return properties["multiprocessor_count"], properties["max_shared_mem"]


@triton.jit
def expert_matrix(table, row: tl.constexpr, e, E, rows, DTYPE: tl.constexpr):
    """The pointer to a matrix of expert `e`, how many of its `rows` may be read, and the start value of sums over it.

    The latter are `rows` and 0.0; for a matrix that was removed they are 0 and NaN.
    """
    address = tl.load(table + row * E + e)
    # the compiler knows nothing about an address from a table, and would emit loads of 2 bytes
    pointer = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
    return pointer, tl.where(address != 0, rows, 0), tl.where(address != 0, 0.0, float("nan"))


@triton.jit
def expert_bias(table, row: tl.constexpr, e, E, at, length, DTYPE: tl.constexpr):
    """Elements `at` of the expert's bias as float32, NaN if it was removed."""
    address = tl.load(table + row * E + e)
    mask = at < tl.where(address != 0, length, 0)
    return tl.load(address.to(tl.pointer_type(DTYPE)) + at, mask=mask, other=float("nan")).to(tl.float32)


@triton.jit
def expert_width(table, e, E):
    """The expert's I. The hint that 8 divides it allows wide loads along I."""
    return tl.multiple_of(tl.load(table + WIDTH * E + e).to(tl.int32), 8)


@triton.jit
def product(a, b, sums, UPCAST: tl.constexpr):
    """`sums + a @ b` in float32."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """The activation of that name (a key of `ACTIVATIONS` in `experts/reference.py`) of `x`, in float32."""
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)  # NaN stays NaN, as in PyTorch
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-2.0 * inner))  # 0.5 * (1 + tanh(u)) is 1 / (1 + exp(-2u))


__all__ = [
    "A_DOWN",
    "A_GATE",
    "A_UP",
    "B_DOWN",
    "B_DOWN_BIAS",
    "B_GATE",
    "B_GATE_BIAS",
    "B_UP",
    "B_UP_BIAS",
    "DOWN",
    "DOWN_BIAS",
    "GATE",
    "GATE_BIAS",
    "INTERPRETED",
    "PUBLIC_RANK",
    "RANK",
    "SCALE",
    "UP",
    "UP_BIAS",
    "WIDTH",
    "activated",
    "device_limits",
    "expert_bias",
    "expert_matrix",
    "expert_table",
    "expert_width",
    "low_rank_table",
    "product",
    "row_table",
]
