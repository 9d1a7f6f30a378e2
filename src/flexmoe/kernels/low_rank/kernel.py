"""The mix of low-rank experts for few tokens, as in decoding: the public network is read once, in four launches.

`decode_low_rank` computes `reference.mix_low_rank`. Its time is that of reading the public network's matrices, which
are streamed as in `experts/decode_kernel.py`; the members' own factors are small beside them:

    shrink   a_m = scale_m A_m x, of gate and up
    gate_up  h_m = act(gate x + B_m a_m) * (up x + B_m a_m), hidden = sum_m w_m h_m
    shrink   d_m = scale_m A_m h_m, of down
    down     y = down hidden + sum_m w_m B_m d_m

A member without tokens is not read. A shrink product has few rows and long sums, so each sum is split over programs,
and its readers add the parts in a fixed order: no atomics, and a token's bits do not depend on the batch.

Rows of A have H or I elements, so they can be loaded 16 bytes at a time; those of B have R, and can be if each rank is
a multiple of 8. With odd ranks a load is 2 bytes (RANK_STEP elements), which is acceptable for B, as it is small.

Shapes: T tokens (at most 64), H hidden, I intermediate, M members (at most 64; one may be the public network itself),
R rank, any number, which may differ between members; H and I are multiples of 8. fp32, fp16 or bf16: all of one
dtype, products accumulated in fp32; the inputs of B and of down are rounded to that dtype.

Source: "shrink" as in LoRA kernels (Punica, arXiv 2310.18547). Does not cover more tokens
(`modeling/low_rank_flexmoe.py`), argument checks (`op.py`), or gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexmoe.kernels.experts.decode_kernel import (
    HALF,
    MAX_STAGES,
    SHARED,
    block_of_tokens,
    down_launch,
    gate_up_launch,
)
from flexmoe.kernels.low_rank.reference import LowRankTensors
from flexmoe.kernels.triton_common import (
    A_DOWN,
    A_GATE,
    A_UP,
    B_DOWN,
    B_DOWN_BIAS,
    B_GATE,
    B_GATE_BIAS,
    B_UP,
    B_UP_BIAS,
    DOWN,
    DOWN_BIAS,
    GATE,
    GATE_BIAS,
    INTERPRETED,
    RANK,
    SCALE,
    UP,
    UP_BIAS,
    activated,
    device_limits,
    expert_bias,
    expert_matrix,
    expert_table,
    low_rank_table,
    product,
)

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("FlexMoE's kernels need Triton: pip install 'triton>=3.6'.") from error


@triton.jit
def _routed_members(weights_TM, t, T, M, BLOCK_M: tl.constexpr):
    """One bit per member that has tokens, and whether each token is routed to any member."""
    m = tl.arange(0, BLOCK_M)
    mask = (t < T)[:, None] & (m < M)[None, :]
    routed_TM = tl.load(weights_TM + t[:, None] * M + m[None, :], mask=mask, other=0.0) != 0.0
    has_tokens_M = tl.max(routed_TM.to(tl.int64), 0)
    return tl.sum(has_tokens_M << m.to(tl.int64), 0), tl.max(routed_TM.to(tl.int32), 1) != 0


@triton.jit
def _step(matrix, v, sums, row, valid, k, K, routed_T, UPCAST: tl.constexpr):
    """Adds the products over elements `k` of K to the sums of the `valid` rows; `matrix` points to the first row."""
    matrix_RK = tl.load(matrix + row[:, None] * K + k[None, :], mask=valid[:, None] & (k < K)[None, :], other=0.0)
    v_KT = tl.load(v + k[:, None], mask=routed_T[None, :] & (k < K)[:, None], other=0.0)
    return product(matrix_RK, v_KT, sums, UPCAST)


@triton.jit(do_not_specialize=["T"])
def shrink_kernel(
    v_TK,  # [T, K], rows v_stride elements apart; or [M, T, K], one per member
    weights_TM,  # float32 [T, M]
    table,  # int64 [11, M], see low_rank_table
    parts_MASTR,  # float32 [M, MATRICES, SPLITS, T, 8 * MAX_R8], written where a member has tokens, up to its rank
    x_TH,  # only its dtype is used, which is that of the matrices
    v_stride,
    T,
    K8,  # K / 8, so that the compiler knows that 8 divides K
    M,
    MAX_R8,
    FIRST: tl.constexpr,  # the row of the table with the first of the matrices
    MATRICES: tl.constexpr,
    PER_MEMBER: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`scale * A v`: one program per ROWS of the rank, matrix, part of the sum over K, and member."""
    DTYPE: tl.constexpr = x_TH.dtype.element_ty
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    part = tl.program_id(1).to(tl.int64)
    m = tl.program_id(2).to(tl.int64)
    K = K8 * 8
    t = tl.arange(0, BLOCK_T)
    routed_T = tl.load(weights_TM + t * M + m, mask=t < T, other=0.0) != 0.0
    rank = tl.load(table + RANK * M + m).to(tl.int32)
    if (first_row >= rank) | (tl.max(routed_T.to(tl.int32), 0) == 0):
        return

    row = tl.arange(0, ROWS)
    r = first_row + row
    depth = tl.arange(0, DEPTH)
    v = v_TK + ((m * T + t[None, :]) * K if PER_MEMBER else t[None, :].to(tl.int64) * v_stride)
    matrix, rows, sums_start = expert_matrix(table + part // SPLITS * M, FIRST, m, M, rank, DTYPE)
    matrix += first_row * K
    length = tl.cdiv(K, SPLITS * DEPTH) * DEPTH
    begin = (part % SPLITS).to(tl.int32) * length
    sums_RT = tl.full([ROWS, BLOCK_T], 0.0, tl.float32) + sums_start
    for start in range(0, length, DEPTH):
        sums_RT = _step(matrix, v, sums_RT, row, r < rows, begin + start + depth, K, routed_T, UPCAST)
    scale = tl.load(table + SCALE * M + m).to(tl.int32).to(tl.float32, bitcast=True)
    to = parts_MASTR + ((m * MATRICES * SPLITS + part) * T + t[None, :]) * (MAX_R8 * 8) + r[:, None]
    tl.store(to, scale * sums_RT, mask=(r < rank)[:, None] & routed_T[None, :])


@triton.jit
def _add_delta(
    sums_OT,
    table,
    matrix: tl.constexpr,
    bias: tl.constexpr,
    BIASED: tl.constexpr,
    parts,  # float32 [SPLITS, T, 8 * MAX_R8]
    m,
    M,
    out,
    OUT,
    t,
    T,
    routed_T,
    MAX_R8,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEP: tl.constexpr,
    DTYPE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Adds the member's `B parts` to the sums of elements `out` of OUT; the public network adds nothing."""
    rank = tl.multiple_of(tl.load(table + RANK * M + m).to(tl.int32), RANK_STEP)
    if rank > 0:
        b, valid, sums_start = expert_matrix(table, matrix, m, M, OUT, DTYPE)
        sums_OT += sums_start
        for start in range(0, rank, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            mask = (r < rank)[:, None] & routed_T[None, :]
            a_RT = tl.zeros([BLOCK_R, routed_T.shape[0]], tl.float32)
            for split in tl.static_range(SPLITS):
                at = (split * T + t[None, :]) * (MAX_R8 * 8) + r[:, None]
                a_RT += tl.load(parts + at, mask=mask, other=0.0)
            if not UPCAST:  # the interpreter keeps float32
                a_RT = a_RT.to(DTYPE)
            b_mask = (out < valid)[:, None] & (r < rank)[None, :]
            b_OR = tl.load(b + out[:, None] * rank + r[None, :], mask=b_mask, other=0.0)
            sums_OT = product(b_OR, a_RT, sums_OT, UPCAST)
        if BIASED:
            sums_OT += expert_bias(table, bias, m, M, out, OUT, DTYPE)[:, None]
    return sums_OT


@triton.jit(do_not_specialize=["T"])
def gate_up_kernel(
    x_TH,  # [T, H], rows x_stride elements apart
    weights_TM,  # float32 [T, M]
    public,  # int64 [7, 1], see expert_table
    table,  # int64 [11, M], see low_rank_table
    parts_MASTR,  # of shrink_kernel
    h_MTI,  # [M, T, I] of the dtype of x (float32 in the interpreter), written where a member has tokens
    hidden_TI,  # [T, I] of the dtype of h, written where a token is routed to any member
    x_stride,
    T,
    H8,
    I8,
    M,
    MAX_R8,
    GATED: tl.constexpr,
    UP_BIASED: tl.constexpr,
    GATE_BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The input of each member's down projection, and their weighted sum: one program per ROWS of I."""
    DTYPE: tl.constexpr = x_TH.dtype.element_ty
    MATRICES: tl.constexpr = 2 if GATED else 1
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    H = H8 * 8
    I = I8 * 8  # noqa: E741
    t = tl.arange(0, BLOCK_T)
    has_tokens, routed_T = _routed_members(weights_TM, t, T, M, BLOCK_M)
    if has_tokens == 0:
        return

    row = tl.arange(0, ROWS)
    i = first_row + row
    depth = tl.arange(0, DEPTH)
    up, up_rows, up_start = expert_matrix(public, UP, 0, 1, I, DTYPE)
    up += first_row * H
    up_IT = tl.full([ROWS, BLOCK_T], 0.0, tl.float32) + up_start
    if GATED:
        gate, gate_rows, gate_start = expert_matrix(public, GATE, 0, 1, I, DTYPE)
        gate += first_row * H
        gate_IT = tl.full([ROWS, BLOCK_T], 0.0, tl.float32) + gate_start
    for start in range(0, H, DEPTH):
        k = start + depth
        x_mask = routed_T[None, :] & (k < H)[:, None]
        x_HT = tl.load(x_TH + t[None, :].to(tl.int64) * x_stride + k[:, None], mask=x_mask, other=0.0)
        at = row[:, None] * H + k[None, :]
        up_IH = tl.load(up + at, mask=(i < up_rows)[:, None] & (k < H)[None, :], other=0.0)
        up_IT = product(up_IH, x_HT, up_IT, UPCAST)
        if GATED:
            gate_IH = tl.load(gate + at, mask=(i < gate_rows)[:, None] & (k < H)[None, :], other=0.0)
            gate_IT = product(gate_IH, x_HT, gate_IT, UPCAST)
    if UP_BIASED:
        up_IT += expert_bias(public, UP_BIAS, 0, 1, i, I, DTYPE)[:, None]
    if GATED and GATE_BIASED:
        gate_IT += expert_bias(public, GATE_BIAS, 0, 1, i, I, DTYPE)[:, None]

    hidden_IT = tl.zeros([ROWS, BLOCK_T], tl.float32)
    in_I = (i < I)[:, None]
    for member in range(M):
        if (has_tokens >> member) & 1 == 1:
            m = tl.cast(member, tl.int64)
            weight_T = tl.load(weights_TM + t * M + m, mask=t < T, other=0.0)
            member_T = weight_T != 0.0
            parts_of_gate = parts_MASTR + m * MATRICES * SPLITS * T * (MAX_R8 * 8)
            parts_of_up = parts_of_gate + (MATRICES - 1) * SPLITS * T * (MAX_R8 * 8)
            h_IT = _add_delta(
                up_IT, table, B_UP, B_UP_BIAS, UP_BIASED, parts_of_up, m, M, i, I, t, T, member_T,
                MAX_R8, SPLITS, BLOCK_R, RANK_STEP, DTYPE, UPCAST,
            )  # fmt: skip
            if GATED:
                own_gate_IT = _add_delta(
                    gate_IT, table, B_GATE, B_GATE_BIAS, GATE_BIASED, parts_of_gate, m, M, i, I, t, T, member_T,
                    MAX_R8, SPLITS, BLOCK_R, RANK_STEP, DTYPE, UPCAST,
                )  # fmt: skip
                h_IT = activated(own_gate_IT, ACTIVATION) * h_IT
            else:
                h_IT = activated(h_IT, ACTIVATION)
            to = h_MTI + (m * T + t[None, :]) * I + i[:, None]
            tl.store(to, h_IT.to(h_MTI.dtype.element_ty), mask=in_I & member_T[None, :])
            # where, not a product: NaN in a member must not reach the tokens that are not routed to it
            hidden_IT += tl.where(member_T[None, :], weight_T[None, :] * h_IT, 0.0)
    to = hidden_TI + t[None, :].to(tl.int64) * I + i[:, None]
    tl.store(to, hidden_IT.to(hidden_TI.dtype.element_ty), mask=in_I & routed_T[None, :])


@triton.jit(do_not_specialize=["T"])
def down_kernel(
    hidden_TI,  # of gate_up_kernel
    weights_TM,  # float32 [T, M]
    public,  # int64 [7, 1], see expert_table
    table,  # int64 [11, M], see low_rank_table
    parts_MSTR,  # of shrink_kernel
    y_TH,  # [T, H] of the dtype of hidden, written
    x_TH,  # only its dtype is used, which is that of the matrices
    T,
    H8,
    I8,
    M,
    MAX_R8,
    DOWN_BIASED: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_STEP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The public `down hidden` and the weighted sum of the members' deltas: one program per ROWS of H."""
    DTYPE: tl.constexpr = x_TH.dtype.element_ty
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    H = H8 * 8
    I = I8 * 8  # noqa: E741
    row = tl.arange(0, ROWS)
    out = first_row + row
    depth = tl.arange(0, DEPTH)
    t = tl.arange(0, BLOCK_T)
    has_tokens, routed_T = _routed_members(weights_TM, t, T, M, BLOCK_M)

    down, rows, sums_start = expert_matrix(public, DOWN, 0, 1, H, DTYPE)
    down += first_row * I
    hidden = hidden_TI + t[None, :].to(tl.int64) * I
    # two sums, one per half of I: a single one is a chain in which each instruction waits for the last
    half = tl.where(has_tokens != 0, tl.cdiv(I, 2 * HALF) * HALF, 0)
    low_HT = tl.full([ROWS, BLOCK_T], 0.0, tl.float32) + sums_start
    high_HT = tl.zeros([ROWS, BLOCK_T], tl.float32)
    for start in range(0, half, DEPTH):
        low_HT = _step(down, hidden, low_HT, row, out < rows, start + depth, I, routed_T, UPCAST)
        high_HT = _step(down, hidden, high_HT, row, out < rows, half + start + depth, I, routed_T, UPCAST)
    y_HT = tl.where(routed_T[None, :], low_HT + high_HT, 0.0)

    total_T = tl.zeros([BLOCK_T], tl.float32)
    for member in range(M):
        if (has_tokens >> member) & 1 == 1:
            m = tl.cast(member, tl.int64)
            weight_T = tl.load(weights_TM + t * M + m, mask=t < T, other=0.0)
            member_T = weight_T != 0.0
            total_T += weight_T
            delta_HT = _add_delta(
                tl.zeros([ROWS, BLOCK_T], tl.float32), table, B_DOWN, B_DOWN_BIAS, DOWN_BIASED,
                parts_MSTR + m * SPLITS * T * (MAX_R8 * 8), m, M, out, H, t, T, member_T,
                MAX_R8, SPLITS, BLOCK_R, RANK_STEP, DTYPE, UPCAST,
            )  # fmt: skip
            y_HT += tl.where(member_T[None, :], weight_T[None, :] * delta_HT, 0.0)
    if DOWN_BIASED:
        bias_H = expert_bias(public, DOWN_BIAS, 0, 1, out, H, DTYPE)
        y_HT += tl.where(routed_T[None, :], bias_H[:, None] * total_T[None, :], 0.0)
    to = y_TH + t[None, :].to(tl.int64) * H + out[:, None]
    tl.store(to, y_HT.to(y_TH.dtype.element_ty), mask=(out < H)[:, None] & (t < T)[None, :])


# DEPTH and warps of `shrink_kernel` by bytes per element, then by BLOCK_T. There are few programs, so each keeps many
# loads in flight. 16 rows are the least that instructions of the tensor cores take, and no rank is padded further.
SHRINK_ROWS = 16
SHRINK_TILES = {
    2: {16: (256, 4), 32: (128, 4), 64: (128, 4)},
    4: {16: (64, 4), 32: (32, 4), 64: (32, 4)},
}
SPLIT = 2048  # elements of a sum that justify a program
MAX_SPLITS = 4  # as many loads come before a product with B, and each takes registers
# Of gate_up and of down; more than in `experts/decode_kernel.py`, because the members' sums take registers too.
WARPS = {2: {16: (4, 4), 32: (8, 8), 64: (8, 8)}, 4: {16: (8, 4), 32: (8, 8), 64: (8, 8)}}
STAGES = 5  # the most for both: each stage has registers of its own
IN_INTERPRETER = {"SPLIT": 32, "DEPTH": 32}  # more than one step and part even in small tests


def shrink_launch(itemsize: int, tokens: int, length: int, shared: int = SHARED) -> dict[str, Any]:
    """Constants of `shrink_kernel` by bytes per element and length of the sums."""
    block_t = block_of_tokens(tokens)
    depth, warps = SHRINK_TILES[itemsize][block_t]
    stages = min(shared, SHARED) // ((SHRINK_ROWS + block_t) * depth * itemsize)
    return {
        "SPLITS": splits_of(length),
        "BLOCK_T": block_t,
        "ROWS": SHRINK_ROWS,
        "DEPTH": IN_INTERPRETER["DEPTH"] if INTERPRETED else depth,
        "UPCAST": INTERPRETED,
        "num_warps": warps,
        "num_stages": max(1, min(MAX_STAGES, stages)),
        "enable_fp_fusion": True,
    }


def splits_of(length: int) -> int:
    """The number of parts of a shrink product's sum; it must not depend on the tokens."""
    return min(MAX_SPLITS, triton.cdiv(length, IN_INTERPRETER["SPLIT"] if INTERPRETED else SPLIT))


def low_rank_gate_up_launch(
    itemsize: int, tokens: int, gated: bool, ranks: Sequence[int], members: int, shared: int = SHARED
) -> dict[str, Any]:
    """Constants of `gate_up_kernel` for members of these ranks, with or without the public network."""
    return _with_members(gate_up_launch(itemsize, tokens, gated, shared), itemsize, 0, ranks, members)


def low_rank_down_launch(
    itemsize: int, tokens: int, hidden: int, ranks: Sequence[int], members: int, sms: int, shared: int = SHARED
) -> dict[str, Any]:
    """Constants of `down_kernel`, as for `low_rank_gate_up_launch`, on a device with that many SMs."""
    return _with_members(down_launch(itemsize, tokens, hidden, sms, shared), itemsize, 1, ranks, members)


def _with_members(
    launch: dict[str, Any], itemsize: int, kernel: int, ranks: Sequence[int], members: int
) -> dict[str, Any]:
    step, warps = math.gcd(8, *ranks), WARPS[itemsize][launch["BLOCK_T"]][kernel]
    if step == 8:  # at most as many as have 16 bytes to load per thread; with odd ranks registers would spill
        warps = min(warps, launch["ROWS"] * launch["DEPTH"] * itemsize // (32 * 16))
    return {
        **launch,
        "BLOCK_M": triton.next_power_of_2(members),
        "BLOCK_R": 16,  # the least that a product takes: with more, registers would spill
        "RANK_STEP": step,
        "num_warps": warps,
        "num_stages": min(STAGES, launch["num_stages"]),
    }


def decode_low_rank(x_TH: Tensor, weights_TM: Tensor, experts: LowRankTensors) -> Tensor:
    """Computes `reference.mix_low_rank` for at most 64 tokens.

    Args:
        x_TH: [tokens, hidden]; rows may be strided, elements of a row are contiguous.
        weights_TM: float32 [tokens, members], contiguous; 0 where a token is not routed to a member.

    Returns:
        [tokens, hidden] in the dtype of `x_TH`.
    """
    tokens, hidden = x_TH.shape
    dtype = torch.float32 if INTERPRETED else x_TH.dtype  # the interpreter cannot store bf16
    y_TH = torch.empty(tokens, hidden, dtype=dtype, device=x_TH.device)
    if not tokens:
        return y_TH.to(x_TH.dtype)
    network, itemsize = experts.public, x_TH.element_size()
    gated, width, members = bool(network.gate), len(network.up[0]), weights_TM.shape[1]
    ranks = [len(a) for a in experts.a.up]
    max_r = triton.cdiv(max(ranks, default=1), SHRINK_ROWS) * SHRINK_ROWS
    public, table = expert_table(network), low_rank_table(experts)
    sms, shared = device_limits(x_TH.device)
    gate_up = low_rank_gate_up_launch(itemsize, tokens, gated, ranks, members, shared)
    down = low_rank_down_launch(itemsize, tokens, hidden, ranks, members, sms, shared)
    h_MTI = torch.empty(members, tokens, width, dtype=dtype, device=x_TH.device)
    hidden_TI = torch.empty(tokens, width, dtype=dtype, device=x_TH.device)
    numbers = (tokens, hidden // 8, width // 8, members, max_r // 8)
    with torch.cuda.device_of(x_TH):
        first, matrices = (A_GATE, 2) if gated else (A_UP, 1)
        into = _shrink(x_TH, weights_TM, table, x_TH, max_r, first, matrices, shared)
        gate_up_kernel[(triton.cdiv(width, gate_up["ROWS"]),)](
            x_TH,
            weights_TM,
            public,
            table,
            into,
            h_MTI,
            hidden_TI,
            x_TH.stride(0),
            *numbers,
            GATED=gated,
            UP_BIASED=bool(network.up_bias),
            GATE_BIASED=bool(network.gate_bias),
            ACTIVATION=network.activation,
            SPLITS=splits_of(hidden),
            **gate_up,
        )
        out_of = _shrink(h_MTI, weights_TM, table, x_TH, max_r, A_DOWN, 1, shared)
        down_kernel[(triton.cdiv(hidden, down["ROWS"]),)](
            hidden_TI,
            weights_TM,
            public,
            table,
            out_of,
            y_TH,
            x_TH,
            *numbers,
            DOWN_BIASED=bool(network.down_bias),
            SPLITS=splits_of(width),
            **down,
        )
    return y_TH.to(x_TH.dtype)


def _shrink(
    v: Tensor, weights_TM: Tensor, table: Tensor, x_TH: Tensor, max_r: int, first: Any, matrices: int, shared: int
) -> Tensor:
    """Runs `shrink_kernel` on `v` ([T, K], or [M, T, K]), with the matrices from row `first` of the table on."""
    tokens, members = weights_TM.shape
    length = v.shape[-1]
    launch = shrink_launch(x_TH.element_size(), tokens, length, shared)
    sums = matrices * launch["SPLITS"]
    parts = torch.empty(members, sums, tokens, max_r, dtype=torch.float32, device=v.device)
    arguments = (v, weights_TM, table, parts, x_TH, v.stride(-2), tokens, length // 8, members, max_r // 8)
    shrink_kernel[max_r // SHRINK_ROWS, sums, members](
        *arguments, FIRST=first.value, MATRICES=matrices, PER_MEMBER=v.ndim == 3, **launch
    )
    return parts


__all__ = [
    "decode_low_rank",
    "down_kernel",
    "gate_up_kernel",
    "low_rank_down_launch",
    "low_rank_gate_up_launch",
    "shrink_kernel",
    "shrink_launch",
    "splits_of",
]
