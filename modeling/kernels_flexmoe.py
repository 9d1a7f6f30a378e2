"""What the Triton kernels share: tables of pointers to separately stored tensors, what reads them, and activations.

A layer's experts lie wherever they were loaded, so kernels take a table [rows, experts] of addresses. Tables are kept:
one that a CUDA graph has captured is read again at every replay, and its address is baked into the graph. When an
expert is changed, its addresses are changed in the tables that have them (`redirect`): the graph then runs the new
expert, or, where there is none of the same shape, finds 0 and answers NaN. It never reads freed memory.

Does not cover the kernels themselves (`kernels_route_flexmoe`, `kernels_decode_flexmoe`, `kernels_prefill_flexmoe`),
nor when they are used (`implementations_flexmoe`).
"""

from __future__ import annotations

import functools
import os
import struct
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from .routing_flexmoe import ExpertTensors, LowRankTensors

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("FlexMoE's kernels need Triton: pip install 'triton>=3.6'.") from error

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether kernels run in Triton's interpreter, on the CPU. It gets bf16 arithmetic wrong: kernels then widen first."""

ALIGNMENT = 16  # bytes: what one load instruction can take, if the compiler is told that it may

Addresses = tuple[tuple[int, ...], ...]


class PointerTables:
    """Tables of addresses [rows, experts] on a device, each made once; a pure function of the addresses in it."""

    def __init__(self) -> None:
        self._tables: dict[tuple[torch.device, Addresses], Tensor] = {}
        # those that nobody will ask for again, but a graph may still read: it holds no reference to them
        self._left: list[tuple[tuple[torch.device, Addresses], Tensor]] = []
        self._lock = threading.Lock()

    def of(self, rows: Addresses, device: torch.device) -> Tensor:
        """The table int64 [rows, experts] of these numbers.

        Raises:
            RuntimeError: it would have to be made while a CUDA graph is captured.
        """
        key = (device, rows)
        with self._lock:
            table = self._tables.get(key)
            if table is None:
                table = self._tables[key] = _upload(rows, device)
            return table

    def redirect(self, moves: Mapping[int, int]) -> None:
        """Puts the new address in the place of an old one wherever it stands; 0: there is nothing any more.

        Whoever still reads such a table, as a captured CUDA graph does, reads it so from now on.
        """
        with self._lock:
            tables: dict[tuple[torch.device, Addresses], Tensor] = {}
            left: list[tuple[tuple[torch.device, Addresses], Tensor]] = []
            for (device, rows), table in [*self._tables.items(), *self._left]:
                moved = tuple(tuple(moves.get(address, address) for address in row) for row in rows)
                if moved != rows:
                    table.copy_(torch.tensor(moved, dtype=torch.int64, device="cpu"))
                if all(map(all, moved)) and (device, moved) not in tables:
                    tables[device, moved] = table
                else:
                    left.append(((device, moved), table))
            self._tables, self._left = tables, left


TABLES = PointerTables()
"""The tables of this process."""


def _upload(rows: Addresses, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.tensor(rows, dtype=torch.int64, device=device)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "A CUDA graph is being captured of experts that no kernel has seen together yet: run the model once "
            "before, under a mask that leaves out nobody. flexmoe.CapturedForward does."
        )

    def upload() -> Tensor:
        table = torch.tensor(rows, dtype=torch.int64).to(device)
        torch.cuda.current_stream(device).synchronize()
        return table

    # in another thread, because a graph that is being warmed up takes what this thread allocates into its own pool
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(upload).result()


def row_table(rows: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The table [2, E] for the router: addresses of rows, and of biases."""
    return TABLES.of((_addresses(rows), _addresses(biases, 4)), rows[0].device)


GATE, UP, DOWN, GATE_BIAS, UP_BIAS, DOWN_BIAS, WIDTH = (tl.constexpr(row) for row in range(7))
"""Rows of an expert table: addresses of matrices [I, H], [I, H], [H, I] and of their biases, then I itself."""


def expert_table(experts: ExpertTensors) -> Tensor:
    """The table [7, E] for the experts of a layer. What they don't have (a gate, biases) has the width in its place.

    Raises:
        ValueError: a matrix is not contiguous, or lies where it can't be read 16 bytes at a time.
    """
    widths = tuple(len(up) for up in experts.up)
    matrices = (experts.gate, experts.up, experts.down)
    biases = (experts.gate_bias, experts.up_bias, experts.down_bias)
    rows = (
        *(_addresses(tensors) if tensors else widths for tensors in matrices),
        *(_addresses(tensors, 2) if tensors else widths for tensors in biases),
        widths,
    )
    return TABLES.of(rows, experts.up[0].device)


A_GATE, A_UP, A_DOWN, B_GATE, B_UP, B_DOWN, B_GATE_BIAS, B_UP_BIAS, B_DOWN_BIAS, RANK, SCALE = (
    tl.constexpr(row) for row in range(11)
)
"""Rows of a table of low-rank experts: addresses of matrices [R, H], [R, H], [R, I], [I, R], [I, R], [H, R] and of the
latter's biases, then R, and the scale: its bits as a float32, in the lower half of a number that is no address."""

PUBLIC_RANK = -8  # no rank, no address and not 0, which would be what is gone; every step of a rank divides it


def low_rank_table(experts: LowRankTensors) -> Tensor:
    """The table [11, M] for low-rank experts. What they don't have (a gate, biases) has the rank in its place.

    The public network's column, if it is one of them, holds nothing but `PUBLIC_RANK`.

    Raises:
        ValueError: a matrix is not contiguous, or lies where it can't be read 16 bytes at a time.
    """
    a, b = experts.a, experts.b
    ranks = tuple(len(up) for up in a.up)
    rows = (
        *(_addresses(tensors) if tensors else ranks for tensors in (a.gate, a.up, a.down, b.gate, b.up, b.down)),
        *(_addresses(tensors, 2) if tensors else ranks for tensors in (b.gate_bias, b.up_bias, b.down_bias)),
        ranks,
        tuple(struct.unpack("<I", struct.pack("<f", scale))[0] - (1 << 63) for scale in experts.scales),
    )
    if (at := experts.public_column) is not None:
        rows = tuple((*row[:at], PUBLIC_RANK, *row[at:]) for row in rows)
    return TABLES.of(rows, experts.public.up[0].device)


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
    """A device's SMs, and the bytes of shared memory that a program may have there."""
    if INTERPRETED:
        return 1, 112 * 1024
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return properties["multiprocessor_count"], properties["max_shared_mem"]


@triton.jit
def expert_matrix(table, row: tl.constexpr, e, E, rows, DTYPE: tl.constexpr):
    """Where expert `e` has its matrix, how many of `rows` may be read there, and where a sum over it starts.

    That is `rows` and 0; or none and NaN, if there is no such matrix any more.
    """
    address = tl.load(table + row * E + e)
    # nothing is known of an address from a table, and loads would be 2 bytes wide
    pointer = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
    return pointer, tl.where(address != 0, rows, 0), tl.where(address != 0, 0.0, float("nan"))


@triton.jit
def expert_bias(table, row: tl.constexpr, e, E, at, length, DTYPE: tl.constexpr):
    """Elements `at` of the expert's bias as float32, NaN if there is none any more."""
    address = tl.load(table + row * E + e)
    mask = at < tl.where(address != 0, length, 0)
    return tl.load(address.to(tl.pointer_type(DTYPE)) + at, mask=mask, other=float("nan")).to(tl.float32)


@triton.jit
def expert_width(table, e, E):
    """The expert's I. (Without a word on what divides it, loads along I would have to end at any element.)"""
    return tl.multiple_of(tl.load(table + WIDTH * E + e).to(tl.int32), 8)


@triton.jit
def product(a, b, sums, UPCAST: tl.constexpr):
    """`sums + a @ b` in float32."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """`x` (float32) through the activation of that name, in `routing_flexmoe.ACTIVATIONS`."""
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)  # as PyTorch has it, NaN stays
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
    "TABLES",
    "UP",
    "UP_BIAS",
    "WIDTH",
    "PointerTables",
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
