"""The mix of experts for many tokens, as in prefill: sorted by expert, then two grouped matrix products.

`prefill` computes `reference.mix` in six launches without a synchronisation with the host, so a CUDA graph can hold
it. A pair is a token and one of its slots. Pairs are sorted by expert, by counting and without atomics, so equal
inputs give equal bits; each expert's rows begin at a multiple of BLOCK_M, so that a program of a product works on one
expert. The slots of a token are summed in their order.

Shapes: T tokens, K slots per token, H hidden, E experts (at most 64), I intermediate, which may differ between
experts, R rows: pairs and their padding; H and I are multiples of 8. fp32, fp16 or bf16: weights, biases and x of one
dtype, products accumulated in fp32.

Does not cover few tokens (`decode_kernel.py` reads the weights faster), argument checks (`op.py`), or gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flexmoe.kernels.experts.reference import ExpertTensors
from flexmoe.kernels.triton_common import (
    DOWN,
    DOWN_BIAS,
    GATE,
    GATE_BIAS,
    INTERPRETED,
    UP,
    UP_BIAS,
    activated,
    device_limits,
    expert_bias,
    expert_matrix,
    expert_table,
    expert_width,
    product,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("FlexMoE's kernels need Triton: pip install 'triton>=3.6'.") from error


@triton.jit
def _pairs(ids_TK, program, step, steps, n_pairs, E, BLOCK_E: tl.constexpr, PAIRS: tl.constexpr):
    """A program's next pairs, their experts (E: none), and the one-hot matrix of pairs and experts, as integers."""
    pair = (program * steps + step) * PAIRS + tl.arange(0, PAIRS)
    e_P = tl.load(ids_TK + pair, mask=pair < n_pairs, other=E)
    return pair, e_P, (e_P[:, None] == tl.arange(0, BLOCK_E)[None, :]).to(tl.int32)


@triton.jit(do_not_specialize=["n_pairs", "steps"])
def count_kernel(
    ids_TK,  # int32 [T, K]; E in surplus slots
    counts_PE,  # int32 [programs, E], written
    n_pairs,
    E,
    steps,
    BLOCK_E: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Counts the pairs of each expert among those of a program, which are `steps` times PAIRS."""
    program = tl.program_id(0)
    counts_E = tl.zeros([BLOCK_E], tl.int32)
    for step in range(steps):
        _, _, one_hot_PE = _pairs(ids_TK, program, step, steps, n_pairs, E, BLOCK_E, PAIRS)
        counts_E += tl.sum(one_hot_PE, 0)
    e = tl.arange(0, BLOCK_E)
    tl.store(counts_PE + program.to(tl.int64) * E + e, counts_E, mask=e < E)


@triton.jit(do_not_specialize=["n_pairs", "steps", "T", "n_blocks"])
def place_kernel(
    ids_TK,  # int32 [T, K]; E in surplus slots
    counts_PE,  # int32 [programs, E], of count_kernel
    token_of_row,  # int32 [n_blocks * BLOCK_M], written up to the last block with an expert; T: padding
    row_of_slot_TK,  # int32 [T, K], written; -1 for surplus slots
    expert_of_block,  # int32 [n_blocks], written; E: none
    n_pairs,
    E,
    steps,
    T,
    K,
    n_blocks,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Places each pair: after all pairs of lower experts, and those of its own expert that come before it."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    e = tl.arange(0, BLOCK_E)
    total_E = tl.zeros([BLOCK_E], tl.int32)
    before_E = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, programs, PAIRS):
        p = start + tl.arange(0, PAIRS)
        mask = (p < programs)[:, None] & (e < E)[None, :]
        counts_PE_ = tl.load(counts_PE + p[:, None].to(tl.int64) * E + e[None, :], mask=mask, other=0)
        total_E += tl.sum(counts_PE_, 0)
        before_E += tl.sum(tl.where((p < program)[:, None], counts_PE_, 0), 0)
    blocks_E = tl.cdiv(total_E, BLOCK_M)
    end_E = tl.cumsum(blocks_E, 0)
    first_row_E = (end_E - blocks_E) * BLOCK_M

    next_E = first_row_E + before_E
    for step in range(steps):
        pair, e_P, one_hot_PE = _pairs(ids_TK, program, step, steps, n_pairs, E, BLOCK_E, PAIRS)
        earlier_PE = tl.cumsum(one_hot_PE, 0) - one_hot_PE
        row_P = tl.sum(one_hot_PE * (next_E[None, :] + earlier_PE), 1)
        tl.store(row_of_slot_TK + pair, tl.where(e_P < E, row_P, -1), mask=pair < n_pairs)
        tl.store(token_of_row + row_P, pair // K, mask=e_P < E)
        next_E += tl.sum(one_hot_PE, 0)

    # the padding of each expert's last block, each expert by one of the programs
    pad_EM = total_E[:, None] + tl.arange(0, BLOCK_M)[None, :]
    mask = (pad_EM < (blocks_E * BLOCK_M)[:, None]) & (e % programs == program)[:, None]
    tl.store(token_of_row + first_row_E[:, None] + pad_EM, tl.zeros_like(pad_EM) + T, mask=mask)
    for start in range(program * PAIRS, n_blocks, programs * PAIRS):
        block = start + tl.arange(0, PAIRS)
        behind_BE = (block[:, None] >= end_E[None, :]) & (e < E)[None, :]
        tl.store(expert_of_block + block, tl.sum(behind_BE.to(tl.int32), 1), mask=block < n_blocks)


@triton.jit
def _place_in_grid(n_blocks, columns, GROUP: tl.constexpr):
    """A program's block of rows and its column: GROUP blocks of rows at a time, so that operands stay in L2."""
    program = tl.program_id(0)
    first = program // (GROUP * columns) * GROUP
    within = program % (GROUP * columns)
    size = min(n_blocks - first, GROUP)
    return (first + within % size).to(tl.int64), (within // size).to(tl.int64)


@triton.jit(do_not_specialize=["T", "n_blocks"])
def gate_up_rows_kernel(
    x_TH,  # [T, H], rows x_stride elements apart
    token_of_row,  # int32 [R]; T: padding
    expert_of_block,  # int32 [n_blocks]; E: none
    table,  # int64 [7, E], see expert_table
    h_RI,  # [R, 8 * MAX_I8] of the dtype of x (float32 in the interpreter), written up to the expert's I
    x_stride,
    T,
    n_blocks,
    H8,  # H / 8, so that the compiler knows that 8 divides H
    E,
    MAX_I8,
    GATED: tl.constexpr,
    UP_BIASED: tl.constexpr,
    GATE_BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`activation(gate x) * up x` of BLOCK_M rows and BLOCK_N of I; programs beyond the expert's I return at once."""
    DTYPE: tl.constexpr = x_TH.dtype.element_ty
    block, column = _place_in_grid(n_blocks, tl.cdiv(MAX_I8 * 8, BLOCK_N), GROUP)
    e = tl.load(expert_of_block + block)
    if e >= E:
        return
    I = expert_width(table, e, E)  # noqa: E741
    first_i = column * BLOCK_N
    if first_i >= I:
        return

    H = H8 * 8
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = tl.load(token_of_row + row)  # written for every row of a block with an expert
    x = x_TH + token[:, None].to(tl.int64) * x_stride
    n = tl.arange(0, BLOCK_N)
    i = first_i + n
    depth = tl.arange(0, DEPTH)
    up, up_rows, up_start = expert_matrix(table, UP, e, E, I, DTYPE)
    up += first_i * H
    up_MI = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32) + up_start
    if GATED:
        gate, gate_rows, gate_start = expert_matrix(table, GATE, e, E, I, DTYPE)
        gate += first_i * H
        gate_MI = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32) + gate_start
    for start in range(0, H, DEPTH):
        k = start + depth
        x_MH = tl.load(x + k[None, :], mask=(token < T)[:, None] & (k < H)[None, :], other=0.0)
        at = n[None, :] * H + k[:, None]
        up_HI = tl.load(up + at, mask=(i < up_rows)[None, :] & (k < H)[:, None], other=0.0)
        up_MI = product(x_MH, up_HI, up_MI, UPCAST)
        if GATED:
            gate_HI = tl.load(gate + at, mask=(i < gate_rows)[None, :] & (k < H)[:, None], other=0.0)
            gate_MI = product(x_MH, gate_HI, gate_MI, UPCAST)

    if UP_BIASED:
        up_MI += expert_bias(table, UP_BIAS, e, E, i, I, DTYPE)[None, :]
    if GATED:
        if GATE_BIASED:
            gate_MI += expert_bias(table, GATE_BIAS, e, E, i, I, DTYPE)[None, :]
        h_MI = activated(gate_MI, ACTIVATION) * up_MI
    else:
        h_MI = activated(up_MI, ACTIVATION)
    to = h_RI + row[:, None] * (MAX_I8 * 8) + i[None, :]
    tl.store(to, h_MI.to(h_RI.dtype.element_ty), mask=(i < I)[None, :] & (token < T)[:, None])


@triton.jit(do_not_specialize=["T", "n_blocks"])
def down_rows_kernel(
    h_RI,  # of gate_up_rows_kernel
    token_of_row,  # int32 [R]; T: padding
    expert_of_block,  # int32 [n_blocks]; E: none
    table,  # int64 [7, E], see expert_table
    output_RH,  # [R, H] of the dtype of h, written where there is a token
    x_TH,  # only its dtype is used, which is that of the weights
    T,
    n_blocks,
    H8,
    E,
    MAX_I8,
    DOWN_BIASED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`down h` of BLOCK_M rows and BLOCK_N of H."""
    DTYPE: tl.constexpr = x_TH.dtype.element_ty
    H = H8 * 8
    block, column = _place_in_grid(n_blocks, tl.cdiv(H, BLOCK_N), GROUP)
    e = tl.load(expert_of_block + block)
    if e >= E:
        return

    I = expert_width(table, e, E)  # noqa: E741
    m = tl.arange(0, BLOCK_M)
    real_M = tl.load(token_of_row + block * BLOCK_M + m) < T
    h = h_RI + block * BLOCK_M * (MAX_I8 * 8)
    n = tl.arange(0, BLOCK_N)
    out = column * BLOCK_N + n
    depth = tl.arange(0, DEPTH)
    down, down_rows, start_sum = expert_matrix(table, DOWN, e, E, H, DTYPE)
    down += column * BLOCK_N * I
    output_MH = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32) + start_sum
    for start in range(0, I, DEPTH):
        i = start + depth
        h_at = m[:, None] * (MAX_I8 * 8) + i[None, :]
        h_MI = tl.load(h + h_at, mask=real_M[:, None] & (i < I)[None, :], other=0.0)
        down_at = n[None, :] * I + i[:, None]
        down_IH = tl.load(down + down_at, mask=(out < down_rows)[None, :] & (i < I)[:, None], other=0.0)
        output_MH = product(h_MI, down_IH, output_MH, UPCAST)
    if DOWN_BIASED:
        output_MH += expert_bias(table, DOWN_BIAS, e, E, out, H, DTYPE)[None, :]
    to = output_RH + (block * BLOCK_M + m[:, None]) * H + out[None, :]
    tl.store(to, output_MH.to(output_RH.dtype.element_ty), mask=real_M[:, None] & (out < H)[None, :])


@triton.jit(do_not_specialize=["T"])
def combine_kernel(
    output_RH,  # of down_rows_kernel
    row_of_slot_TK,  # int32 [T, K]; -1 for surplus slots
    top_weights_TK,  # float32 [T, K]
    y_TH,  # [T, H] of the dtype of h, written
    T,
    H8,
    K,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The weighted sum of each token, in the order of its slots."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    H = H8 * 8
    out = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    y = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for slot in range(K):
        row_T = tl.load(row_of_slot_TK + t * K + slot, mask=t < T, other=-1).to(tl.int64)
        weight_T = tl.load(top_weights_TK + t * K + slot, mask=t < T, other=0.0)
        used_T = (row_T >= 0) & (weight_T != 0.0)
        mask = used_T[:, None] & (out < H)[None, :]
        output = tl.load(output_RH + row_T[:, None] * H + out[None, :], mask=mask, other=0.0).to(tl.float32)
        y += tl.where(used_T[:, None], weight_T[:, None] * output, 0.0)
    to = y_TH + t[:, None] * H + out[None, :]
    tl.store(to, y.to(y_TH.dtype.element_ty), mask=(t < T)[:, None] & (out < H)[None, :])


MAX_PAIRS = 131072
"""More pairs are processed in chunks, so that intermediate results take 3 to 4 GB at I = 11008, for any K."""

PAIRS = 128  # per step of the sort: its one-hot matrix takes at most 64 registers of each of 128 threads
MAX_SORT_PROGRAMS = 256  # the most programs of the sort: each reads the counts of all

LARGE = 200 * 1024  # bytes of shared memory, which only GPUs with wgmma and later ones have

# BLOCK_N, DEPTH and warps by bytes per element, then by BLOCK_M. 128 x 256 sums take 128 registers of each of 256
# threads; mma.sync holds its operands in registers too, so half as many. 64 rows where experts have so few.
# float32 is multiplied outside the tensor cores, where a thread holds everything in registers.
TILES = {
    2: {128: (128, 64, 8), 64: (128, 64, 4)},
    4: {64: (128, 32, 8)},
}
LARGE_TILES = {**TILES, 2: {128: (256, 64, 8), 64: (256, 64, 4)}}
MAX_STAGES = 4
GROUP = 8  # blocks of rows: with as many columns as run at once, 8 MB of x and 33 MB of weights at H = 4096
IN_INTERPRETER = {"BLOCK_M": 32, "BLOCK_N": 32, "DEPTH": 64, "GROUP": 2}
OPTIONS = {"enable_fp_fusion": True}  # the default up to Triton 3.9


def sort_launch(experts: int) -> dict[str, Any]:
    """Constants of `count_kernel` and `place_kernel`."""
    pairs = 32 if INTERPRETED else PAIRS
    return {"BLOCK_E": triton.next_power_of_2(experts), "PAIRS": pairs, "num_warps": 4, **OPTIONS}


def gate_up_launch(itemsize: int, rows_each: float, gated: bool, shared: int) -> dict[str, Any]:
    """Constants of `gate_up_rows_kernel` by bytes per element.

    Args:
        rows_each: average number of rows per expert; determines BLOCK_M.
        shared: bytes of shared memory per program.
    """
    # half as many columns of gate and of up; also without a gate, because an activation needs registers
    return _launch(itemsize, rows_each, shared, halves=2, matrices=2 if gated else 1)


def down_launch(itemsize: int, rows_each: float, shared: int) -> dict[str, Any]:
    """Constants of `down_rows_kernel`; arguments as for `gate_up_launch`."""
    return _launch(itemsize, rows_each, shared, halves=1, matrices=1)


def _launch(itemsize: int, rows_each: float, shared: int, halves: int, matrices: int) -> dict[str, Any]:
    tiles = (LARGE_TILES if shared >= LARGE else TILES)[itemsize]
    block_m = 64 if rows_each <= 64 else max(tiles)
    block_n, depth, warps = tiles[block_m]
    block_n //= halves
    stages = min(MAX_STAGES, shared // ((block_m + block_n * matrices) * depth * itemsize))
    tile = {"BLOCK_M": block_m, "BLOCK_N": block_n, "DEPTH": depth, "GROUP": GROUP}
    options = {"num_warps": warps, "num_stages": max(1, stages), **OPTIONS}
    return {**tile, **(IN_INTERPRETER if INTERPRETED else {}), "UPCAST": INTERPRETED, **options}


def combine_launch(hidden: int) -> dict[str, Any]:
    """Constants of `combine_kernel`."""
    block_t = 64 if INTERPRETED else 2  # a thread has 8 numbers of each, which is one load
    return {"BLOCK_T": block_t, "BLOCK_H": min(1024, triton.next_power_of_2(hidden)), "num_warps": 4, **OPTIONS}


class Sorted(NamedTuple):
    """Pairs sorted by expert; the fields are those arguments of `place_kernel`."""

    token_of_row: Tensor
    row_of_slot_TK: Tensor
    expert_of_block: Tensor


def prefill(x_TH: Tensor, top_weights_TK: Tensor, top_ids_TK: Tensor, experts: ExpertTensors) -> Tensor:
    """Computes `reference.mix` for any number of tokens.

    Args:
        x_TH: [tokens, hidden]; rows may be strided, elements of a row are contiguous.
        top_weights_TK, top_ids_TK: float32 and int32 [tokens, K], contiguous, of `Routing`.

    Returns:
        [tokens, hidden] in the dtype of `x_TH`.
    """
    # the interpreter cannot store bf16
    dtype = torch.float32 if INTERPRETED else x_TH.dtype
    y_TH = torch.empty(x_TH.shape, dtype=dtype, device=x_TH.device)
    # a multiple of 16, so that each chunk is aligned to 16 bytes if the tensor is
    chunk_tokens = max(16, MAX_PAIRS // top_ids_TK.shape[1] // 16 * 16)
    with torch.cuda.device_of(x_TH):
        for start in range(0, len(x_TH), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            _prefill_chunk(x_TH[chunk], top_weights_TK[chunk], top_ids_TK[chunk], experts, y_TH[chunk])
    return y_TH.to(x_TH.dtype)


def _prefill_chunk(
    x_TH: Tensor, top_weights_TK: Tensor, top_ids_TK: Tensor, experts: ExpertTensors, y_TH: Tensor
) -> None:
    tokens, hidden = x_TH.shape
    n_experts, max_i = len(experts.up), max(map(len, experts.up))
    table = expert_table(experts)
    _, shared = device_limits(x_TH.device)
    rows_each = top_ids_TK.numel() / n_experts
    gate_up = gate_up_launch(x_TH.element_size(), rows_each, bool(experts.gate), shared)
    down = down_launch(x_TH.element_size(), rows_each, shared)
    by_expert = sort(top_ids_TK, n_experts, gate_up["BLOCK_M"])
    n_blocks, rows = len(by_expert.expert_of_block), len(by_expert.token_of_row)
    numbers = (tokens, n_blocks, hidden // 8, n_experts, max_i // 8)

    h_RI = torch.empty(rows, max_i, dtype=y_TH.dtype, device=x_TH.device)
    gate_up_rows_kernel[(n_blocks * triton.cdiv(max_i, gate_up["BLOCK_N"]),)](
        x_TH,
        by_expert.token_of_row,
        by_expert.expert_of_block,
        table,
        h_RI,
        x_TH.stride(0),
        *numbers,
        GATED=bool(experts.gate),
        UP_BIASED=bool(experts.up_bias),
        GATE_BIASED=bool(experts.gate_bias),
        ACTIVATION=experts.activation,
        **gate_up,
    )
    # in x's dtype, as an expert's output is in PyTorch; the sum over the slots is in float32
    output_RH = torch.empty(rows, hidden, dtype=y_TH.dtype, device=x_TH.device)
    down_rows_kernel[(n_blocks * triton.cdiv(hidden, down["BLOCK_N"]),)](
        h_RI,
        by_expert.token_of_row,
        by_expert.expert_of_block,
        table,
        output_RH,
        x_TH,
        *numbers,
        DOWN_BIASED=bool(experts.down_bias),
        **down,
    )
    combine = combine_launch(hidden)
    combine_kernel[triton.cdiv(tokens, combine["BLOCK_T"]), triton.cdiv(hidden, combine["BLOCK_H"])](
        output_RH, by_expert.row_of_slot_TK, top_weights_TK, y_TH, tokens, hidden // 8, top_ids_TK.shape[1], **combine
    )


def sort(top_ids_TK: Tensor, n_experts: int, block_m: int) -> Sorted:
    """Sorts at least one pair by expert; the pairs of an expert stay in the order of tokens and slots.

    Args:
        block_m: the first row of each expert is a multiple of it.
    """
    tokens, k = top_ids_TK.shape
    pairs = top_ids_TK.numel()
    launch = sort_launch(n_experts)
    steps = triton.cdiv(pairs, launch["PAIRS"] * MAX_SORT_PROGRAMS)
    programs = triton.cdiv(pairs, launch["PAIRS"] * steps)
    n_blocks = pairs // block_m + min(n_experts, pairs)  # each expert's last block may have a single pair

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=top_ids_TK.device)

    counts_PE = empty(programs, n_experts)
    by_expert = Sorted(empty(n_blocks * block_m), empty(tokens, k), empty(n_blocks))
    count_kernel[(programs,)](top_ids_TK, counts_PE, pairs, n_experts, steps, **launch)
    place_kernel[(programs,)](
        top_ids_TK, counts_PE, *by_expert, pairs, n_experts, steps, tokens, k, n_blocks, BLOCK_M=block_m, **launch
    )
    return by_expert


__all__ = [
    "combine_kernel",
    "combine_launch",
    "count_kernel",
    "down_launch",
    "down_rows_kernel",
    "gate_up_launch",
    "gate_up_rows_kernel",
    "place_kernel",
    "prefill",
    "sort",
    "sort_launch",
]
