"""The mix of experts for few tokens, as in decoding: every expert with tokens is read once, in two launches.

`decode` computes `reference.mix`. Its time is that of reading the weights, so the weights are the first operand of
every product (64 of their rows fill an instruction of the tensor cores, 16 tokens would not), and there is no sort and
no atomic. A token's bits do not depend on the batch: columns do not mix, and each sum runs over H or I in steps of 16
that do not depend on the number of tokens.

Shapes: T tokens (at most 64), H hidden, E experts (at most 64), I intermediate, which may differ between experts;
H and I are multiples of 8. fp32, fp16 or bf16: weights, biases and x of one dtype, products accumulated in fp32.

Does not cover more tokens (`prefill_kernel.py`), argument checks (`op.py`), or gradients.
"""

from __future__ import annotations

from typing import Any

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

HALF = tl.constexpr(128)  # the first half of I is a multiple of this in `down_kernel`; every DEPTH divides it


@triton.jit(do_not_specialize=["T"])
def gate_up_kernel(
    x_TH,  # [T, H], rows x_stride elements apart
    weights_TE,  # float32 [T, E]
    table,  # int64 [7, E], see expert_table
    h_ETI,  # [E, T, 8 * MAX_I8] of the dtype of x (float32 in the interpreter), written where an expert has tokens
    x_stride,
    T,
    H8,  # H / 8, so that the compiler knows that 8 divides H
    E,
    MAX_I8,
    GATED: tl.constexpr,
    UP_BIASED: tl.constexpr,
    GATE_BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`activation(gate x) * up x`: one program per ROWS of I and expert; those without tokens return at once."""
    DTYPE: tl.constexpr = x_TH.dtype.element_ty
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    e = tl.program_id(1).to(tl.int64)
    H = H8 * 8
    I = expert_width(table, e, E)  # noqa: E741
    t = tl.arange(0, BLOCK_T)
    routed_T = tl.load(weights_TE + t * E + e, mask=t < T, other=0.0) != 0.0
    if (first_row >= I) | (tl.max(routed_T.to(tl.int32), 0) == 0):
        return

    row = tl.arange(0, ROWS)
    i = first_row + row
    depth = tl.arange(0, DEPTH)
    up, up_rows, up_start = expert_matrix(table, UP, e, E, I, DTYPE)
    up += first_row * H
    up_IT = tl.full([ROWS, BLOCK_T], 0.0, tl.float32) + up_start
    if GATED:
        gate, gate_rows, gate_start = expert_matrix(table, GATE, e, E, I, DTYPE)
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
        up_IT += expert_bias(table, UP_BIAS, e, E, i, I, DTYPE)[:, None]
    if GATED:
        if GATE_BIASED:
            gate_IT += expert_bias(table, GATE_BIAS, e, E, i, I, DTYPE)[:, None]
        h_IT = activated(gate_IT, ACTIVATION) * up_IT
    else:
        h_IT = activated(up_IT, ACTIVATION)
    to = h_ETI + (e * T + t[None, :]) * (MAX_I8 * 8) + i[:, None]
    tl.store(to, h_IT.to(h_ETI.dtype.element_ty), mask=(i < I)[:, None] & routed_T[None, :])


@triton.jit
def _down_step(down, h, sums_HT, row, out, rows, i, I, routed_T, UPCAST: tl.constexpr):  # noqa: E741
    """Adds the products over elements `i` of I to the sums of the outputs `out`; `down` points to the first output."""
    down_HI = tl.load(down + row[:, None] * I + i[None, :], mask=(out < rows)[:, None] & (i < I)[None, :], other=0.0)
    h_IT = tl.load(h + i[:, None], mask=routed_T[None, :] & (i < I)[:, None], other=0.0)
    return product(down_HI, h_IT, sums_HT, UPCAST)


@triton.jit(do_not_specialize=["T"])
def down_kernel(
    h_ETI,  # of gate_up_kernel
    weights_TE,  # float32 [T, E]
    table,  # int64 [7, E], see expert_table
    y_TH,  # [T, H] of the dtype of h, written
    x_TH,  # only its dtype is used, which is that of the weights
    T,
    H8,
    E,
    MAX_I8,
    DOWN_BIASED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The weighted sum of `down h`: one program per ROWS of H, which loops over the experts with tokens."""
    DTYPE: tl.constexpr = x_TH.dtype.element_ty
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    H = H8 * 8
    row = tl.arange(0, ROWS)
    out = first_row + row
    depth = tl.arange(0, DEPTH)
    t = tl.arange(0, BLOCK_T)
    all_e = tl.arange(0, BLOCK_E)
    routed_TE = tl.load(
        weights_TE + t[:, None] * E + all_e[None, :], mask=(t < T)[:, None] & (all_e < E)[None, :], other=0.0
    )
    has_tokens_E = tl.max((routed_TE != 0.0).to(tl.int64), 0)
    has_tokens = tl.sum(
        has_tokens_E << all_e.to(tl.int64), 0
    )  # one bit per expert, so that experts without tokens are skipped

    y_HT = tl.zeros([ROWS, BLOCK_T], tl.float32)
    for e in range(E):
        if (has_tokens >> e) & 1 == 1:
            I = expert_width(table, e, E)  # noqa: E741
            weight_T = tl.load(weights_TE + t * E + e, mask=t < T, other=0.0)
            routed_T = weight_T != 0.0
            h = h_ETI + (tl.cast(e, tl.int64) * T + t[None, :]) * (MAX_I8 * 8)
            down, rows, sums_start = expert_matrix(table, DOWN, e, E, H, DTYPE)
            down += first_row * I
            # two sums, one per half of I: a single one is a chain in which each instruction waits for the last
            half = tl.cdiv(I, 2 * HALF) * HALF
            low_HT = tl.full([ROWS, BLOCK_T], 0.0, tl.float32) + sums_start
            high_HT = tl.zeros([ROWS, BLOCK_T], tl.float32)
            for start in range(0, half, DEPTH):
                low_HT = _down_step(down, h, low_HT, row, out, rows, start + depth, I, routed_T, UPCAST)
                high_HT = _down_step(down, h, high_HT, row, out, rows, half + start + depth, I, routed_T, UPCAST)
            output_HT = low_HT + high_HT
            if DOWN_BIASED:
                output_HT += expert_bias(table, DOWN_BIAS, e, E, out, H, DTYPE)[:, None]
            # where, not a product: NaN in an expert must not reach the tokens that are not routed to it
            y_HT += tl.where(routed_T[None, :], weight_T[None, :] * output_HT, 0.0)
    to = y_TH + t[None, :].to(tl.int64) * H + out[:, None]
    tl.store(to, y_HT.to(y_TH.dtype.element_ty), mask=(out < H)[:, None] & (t < T)[None, :])


MAX_TOKENS = 64
"""With more tokens an expert's weights are reused often enough to sort the tokens by expert."""

SHARED = 112 * 1024  # bytes per program for loads in flight: two programs share an SM, one loads while the other ends
MAX_STAGES = 7

# ROWS, DEPTH and warps by bytes per element, then by BLOCK_T. 64 rows and 4 warps are one wgmma of an H100. DEPTH is
# contiguous memory, the longer the better for DRAM, but x takes shared memory too. float32 is multiplied outside the
# tensor cores, where a thread holds its elements in registers: small tiles.
GATE_UP_TILES = {
    2: {16: (64, 128, 4), 32: (64, 64, 4), 64: (64, 64, 4)},
    4: {16: (32, 64, 4), 32: (32, 32, 4), 64: (32, 32, 4)},
}
# DEPTH of each half of I, and warps, by bytes per element, then by ROWS. A warp multiplies at least 16 rows. ROWS is
# the most that leaves hardly any SM idle: at H = 4096, 32 make 128 programs for the 132 SMs of an H100 or H200, and 64
# would leave half of them idle.
DOWN_TILES = {
    2: {64: (64, 4), 32: (64, 2), 16: (128, 2)},
    4: {16: (32, 4)},
}
IN_INTERPRETER = {"ROWS": 32, "DEPTH": 64}  # more than one step and program even in small tests


def block_of_tokens(tokens: int) -> int:
    """BLOCK_T for a number of tokens: a width that instructions of the tensor cores have."""
    return next(block for block in (16, 32, 64) if tokens <= block)


def gate_up_launch(itemsize: int, tokens: int, gated: bool, shared: int = SHARED) -> dict[str, Any]:
    """Constants of `gate_up_kernel` by bytes per element; `shared`: bytes of shared memory per program."""
    block_t = block_of_tokens(tokens)
    rows, depth, warps = GATE_UP_TILES[itemsize][block_t]
    bytes_per_stage = (rows * (2 if gated else 1) + block_t) * depth * itemsize
    return _launch(rows, depth, block_t, warps, min(shared, SHARED) // bytes_per_stage)


def down_launch(itemsize: int, tokens: int, hidden: int, sms: int, shared: int = SHARED) -> dict[str, Any]:
    """Constants of `down_kernel`; `sms`: number of SMs of the device, else as in `gate_up_launch`."""
    block_t = block_of_tokens(tokens)
    tiles = DOWN_TILES[itemsize]
    rows = next((rows for rows in tiles if triton.cdiv(hidden, rows) >= 0.9 * sms), min(tiles))
    depth, warps = tiles[rows]
    if block_t > 16:  # more of h: more warps for its columns, and shorter rows, so that several stages fit
        depth, warps = min(depth, 64), 4
    bytes_per_stage = 2 * (rows + block_t) * depth * itemsize
    return _launch(rows, depth, block_t, warps, min(shared, SHARED) // bytes_per_stage)


def _launch(rows: int, depth: int, block_t: int, warps: int, stages: int) -> dict[str, Any]:
    tile = {"ROWS": rows, "DEPTH": depth, **(IN_INTERPRETER if INTERPRETED else {})}
    options = {"num_warps": warps, "num_stages": max(1, min(MAX_STAGES, stages)), "enable_fp_fusion": True}
    return {**tile, "BLOCK_T": block_t, "UPCAST": INTERPRETED, **options}


def decode(x_TH: Tensor, weights_TE: Tensor, experts: ExpertTensors) -> Tensor:
    """Computes `reference.mix` for at most `MAX_TOKENS` tokens.

    Args:
        x_TH: [tokens, hidden]; rows may be strided, elements of a row are contiguous.
        weights_TE: float32 [tokens, experts], contiguous; 0 where a token is not routed to an expert.

    Returns:
        [tokens, hidden] in the dtype of `x_TH`.
    """
    tokens, hidden = x_TH.shape
    # the interpreter cannot store bf16
    dtype = torch.float32 if INTERPRETED else x_TH.dtype
    y_TH = torch.empty(tokens, hidden, dtype=dtype, device=x_TH.device)
    if not tokens:
        return y_TH.to(x_TH.dtype)
    n_experts = len(experts.up)
    max_i = max(map(len, experts.up))
    h_ETI = torch.empty(n_experts, tokens, max_i, dtype=dtype, device=x_TH.device)
    table = expert_table(experts)
    sms, shared = device_limits(x_TH.device)
    gate_up = gate_up_launch(x_TH.element_size(), tokens, bool(experts.gate), shared)
    down = down_launch(x_TH.element_size(), tokens, hidden, sms, shared)
    numbers = (tokens, hidden // 8, n_experts, max_i // 8)
    with torch.cuda.device_of(x_TH):
        gate_up_kernel[triton.cdiv(max_i, gate_up["ROWS"]), n_experts](
            x_TH,
            weights_TE,
            table,
            h_ETI,
            x_TH.stride(0),
            *numbers,
            GATED=bool(experts.gate),
            UP_BIASED=bool(experts.up_bias),
            GATE_BIASED=bool(experts.gate_bias),
            ACTIVATION=experts.activation,
            **gate_up,
        )
        down_kernel[(triton.cdiv(hidden, down["ROWS"]),)](
            h_ETI,
            weights_TE,
            table,
            y_TH,
            x_TH,
            *numbers,
            DOWN_BIASED=bool(experts.down_bias),
            BLOCK_E=triton.next_power_of_2(n_experts),
            **down,
        )
    return y_TH.to(x_TH.dtype)


__all__ = [
    "MAX_TOKENS",
    "decode",
    "down_kernel",
    "down_launch",
    "gate_up_kernel",
    "gate_up_launch",
]
