"""The router as one kernel launch: logits, masks, softmax, top-k and the slots, with its gradient.

It says what `routing_flexmoe.route` says, case by case. Up to `MOST_FEW` tokens, each token is a program of its own
that multiplies and adds in float32: a token's bits don't depend on how many there are. More tokens go through the
tensor cores, 16 or 32 a program, each float32 split in three products of TF32, which keeps 22 bits of each factor.

The sums of a softmax are made of integers, in units of 2^-40 of the largest term. Integers add up to the same in any
order, so an expert that is masked, or isn't there, changes no bit of the others' weights.

Shapes: T tokens, H hidden, E experts, K = min(k, E) slots, P parts of H that are summed apart; `EXPERTS_P` is E
rounded up to a power of two.

Does not cover the experts (`kernels_decode_flexmoe`, `kernels_prefill_flexmoe`), more than 64 of them, or logits of
-inf without a mask: an infinite number in `x` or in a row gives -inf or NaN, as the order of additions has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .kernels_flexmoe import INTERPRETED, row_table
from .routing_flexmoe import Routing

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("FlexMoE's kernels need Triton: pip install 'triton>=3.6'.") from error

MOST_FEW = 64
"""Tokens that each get a program of their own."""

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""What rows may be made of, in Triton's words."""

OPTIONS = {"enable_fp_fusion": True}  # what was the default up to Triton 3.9

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
TAKEN = tl.constexpr(-(2**63) + 1)
UNIT = tl.constexpr(2.0**40)


def few_launch(experts: int, row_dtype: torch.dtype) -> dict[str, Any]:
    """Constants of `route_few`. All of one set of `experts`: the same bits for any number of tokens."""
    padded = triton.next_power_of_2(experts)
    return {
        "ROW": DTYPES[row_dtype],
        "EXPERTS_P": padded,
        "CHUNK": min(padded, 8),  # 8 x 1024 numbers are 32 registers of each of 256 threads, and as many on the way
        "BLOCK_H": 1024,
        "num_warps": 8,
        **OPTIONS,
    }


def many_launch(experts: int, row_dtype: torch.dtype, tokens: int) -> dict[str, Any]:
    """Constants of `route_many`."""
    padded = max(16, triton.next_power_of_2(experts))
    return {
        "ROW": DTYPES[row_dtype],
        "EXPERTS_P": padded,
        "BLOCK_T": 16 if tokens <= 2048 and padded <= 32 else 32,  # each reads all rows: larger once all SMs have one
        "PARTS": 8,  # one for each warp, because products that are added to one sum wait for each other
        "BLOCK_H": 32 if padded <= 32 else 16,
        "PRECISION": "tf32x3",
        "num_warps": 8,
        "num_stages": 4,
        **OPTIONS,
    }


def backward_launch(experts: int, row_dtype: torch.dtype) -> dict[str, Any]:
    """Constants of `backward_kernel`."""
    return {
        "ROW": DTYPES[row_dtype],
        "EXPERTS_P": triton.next_power_of_2(experts),
        "BLOCK_T": 16,
        "BLOCK_H": 512,
        "num_warps": 4,
        **OPTIONS,
    }


@triton.jit(do_not_specialize=["E", "K"])
def route_few(
    x,  # [T, H] fp32, fp16 or bf16, rows `x_stride` apart
    table,  # [2, E] int64: addresses of rows [H] and biases [1] of type ROW; 0: nothing there
    offset,  # [T, E] fp32, rows `offset_stride` apart, or None
    logits,  # [T, E] fp32, written; so are the next three
    weights,  # [T, E] fp32
    top_weights,  # [T, K] fp32
    top_ids,  # [T, K] int32
    E,
    K,
    H_8,  # H / 8: so the compiler knows that 8 divides H
    x_stride,
    offset_stride,
    ROW: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EXPERTS_P: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A program for each token: rows are read as tiles, and added up once at the end."""
    t = tl.program_id(0).to(tl.int64)
    H = H_8 * 8
    t_T = t + tl.arange(0, 1)
    bias_E, offset_TE = _addends(table, offset, t_T, t_T >= 0, E, offset_stride, ROW, EXPERTS_P)
    h_1H = tl.arange(0, BLOCK_H)[None, :]
    chunks_C1 = tl.arange(0, EXPERTS_P // CHUNK)[:, None]
    products_CJ = tl.zeros([EXPERTS_P // CHUNK, CHUNK], tl.float32)
    for chunk in range(EXPERTS_P // CHUNK):
        e_J = chunk * CHUNK + tl.arange(0, CHUNK)
        address_J = tl.load(table + e_J, mask=e_J < E, other=0)
        there_J1 = (address_J != 0)[:, None]
        row_J1 = tl.multiple_of(address_J.to(tl.pointer_type(ROW)), 16)[:, None]
        x_1H = tl.load(x + t * x_stride + h_1H, mask=h_1H < H, other=0.0)
        w_JH = tl.load(row_J1 + h_1H, mask=there_J1 & (h_1H < H), other=0.0)
        sum_JH = tl.zeros([CHUNK, BLOCK_H], tl.float32)
        for start in range(BLOCK_H, H + BLOCK_H, BLOCK_H):
            next_1H = start + h_1H  # on its way while this block is multiplied; past the end nothing is read
            next_x_1H = tl.load(x + t * x_stride + next_1H, mask=next_1H < H, other=0.0)
            next_w_JH = tl.load(row_J1 + next_1H, mask=there_J1 & (next_1H < H), other=0.0)
            sum_JH += w_JH.to(tl.float32) * x_1H.to(tl.float32)
            x_1H, w_JH = next_x_1H, next_w_JH
        products_CJ = tl.where(chunks_C1 == chunk, tl.sum(sum_JH, 1)[None, :], products_CJ)
    products_TE = tl.reshape(products_CJ, [1, EXPERTS_P])
    _settle(
        products_TE,
        bias_E,
        offset_TE,
        t_T,
        t_T >= 0,
        logits,
        weights,
        top_weights,
        top_ids,
        E,
        K,
        RENORMALIZE,
        EXPERTS_P,
    )


@triton.jit(do_not_specialize=["T", "E", "K"])
def route_many(
    x,  # as in route_few, and so are all to top_ids
    table,
    offset,
    logits,
    weights,
    top_weights,
    top_ids,
    T,
    E,
    K,
    H_8,
    x_stride,
    offset_stride,
    ROW: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EXPERTS_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program for `BLOCK_T` tokens, on the tensor cores; each of `PARTS` warps sums a part of H."""
    t_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    H = H_8 * 8
    e_E = tl.arange(0, EXPERTS_P)
    address_E = tl.load(table + e_E, mask=e_E < E, other=0)
    there_E = address_E != 0
    row_E = tl.multiple_of(address_E.to(tl.pointer_type(ROW)), 16)
    h_PH = tl.arange(0, PARTS)[:, None] * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    bias_E, offset_TE = _addends(table, offset, t_T, t_T < T, E, offset_stride, ROW, EXPERTS_P)
    sum_PTE = tl.zeros([PARTS, BLOCK_T, EXPERTS_P], tl.float32)
    for start in range(0, H, PARTS * BLOCK_H):
        h_P1H = (start + h_PH)[:, None, :]
        x_PTH = tl.load(
            x + (t_T * x_stride)[None, :, None] + h_P1H, mask=(t_T < T)[None, :, None] & (h_P1H < H), other=0.0
        )
        w_PEH = tl.load(row_E[None, :, None] + h_P1H, mask=there_E[None, :, None] & (h_P1H < H), other=0.0)
        sum_PTE = tl.dot(
            x_PTH.to(tl.float32),
            tl.permute(w_PEH.to(tl.float32), (0, 2, 1)),
            sum_PTE,
            input_precision=PRECISION,
        )
    # All warps hold all sums then, and each would do all that follows. Read again, they are spread over the threads.
    at_TE = (t_T * E)[:, None] + e_E[None, :]
    real_TE = (t_T < T)[:, None] & (e_E < E)[None, :]
    tl.store(logits + at_TE, tl.sum(sum_PTE, 0), mask=real_TE)
    tl.debug_barrier()
    products_TE = tl.load(logits + at_TE, mask=real_TE, other=0.0)
    tl.debug_barrier()  # nobody writes the logits there while another still reads
    _settle(
        products_TE,
        bias_E,
        offset_TE,
        t_T,
        t_T < T,
        logits,
        weights,
        top_weights,
        top_ids,
        E,
        K,
        RENORMALIZE,
        EXPERTS_P,
    )


@triton.jit
def _addends(table, offset, t_T, real_T, E, offset_stride, ROW: tl.constexpr, N: tl.constexpr):
    """Biases [E], NaN where there is none any more, and offsets [T, E]: read early, because it takes long."""
    e_E = tl.arange(0, N)
    address_E = tl.load(table + E + e_E, mask=e_E < E, other=0)
    there_E = address_E != 0
    bias_E = tl.load(address_E.to(tl.pointer_type(ROW)), mask=there_E, other=0.0).to(tl.float32)
    there_E = there_E & (tl.load(table + e_E, mask=e_E < E, other=0) != 0)
    bias_E = tl.where(there_E, bias_E, float("nan"))
    offset_TE = tl.zeros([t_T.shape[0], N], tl.float32)
    if offset is not None:
        real_TE = real_T[:, None] & (e_E < E)[None, :]
        offset_TE = tl.load(offset + (t_T * offset_stride)[:, None] + e_E[None, :], mask=real_TE, other=0.0)
    return bias_E, offset_TE


@triton.jit
def _settle(
    products_TE,
    bias_E,
    offset_TE,
    t_T,
    real_T,
    logits,
    weights,
    top_weights,
    top_ids,
    E,
    K,
    RENORMALIZE: tl.constexpr,
    N: tl.constexpr,
):
    """Logits, softmax and top-k from products of tokens and rows, stored."""
    e_1E = tl.arange(0, N)[None, :]
    real_TE = real_T[:, None] & (e_1E < E)
    logits_TE = products_TE + bias_E[None, :] + offset_TE
    logits_TE = tl.where((offset_TE == float("-inf")) | (e_1E >= E), float("-inf"), logits_TE)
    tl.store(logits + (t_T * E)[:, None] + e_1E, logits_TE, mask=real_TE)
    no_number_TE = (logits_TE != logits_TE) | (logits_TE == float("inf"))
    odd_T1 = (tl.max(no_number_TE.to(tl.int32), 1) > 0)[:, None]
    logits_TE = tl.where(odd_T1 & (e_1E < E), 0.0, logits_TE)  # no order: slots are the first
    rank_TE = _ranks(logits_TE, e_1E, E, K, N)
    kept_TE = rank_TE < K
    exp_TE = _exp(logits_TE)
    counted_TE = exp_TE
    if RENORMALIZE:
        counted_TE = tl.where(kept_TE, exp_TE, 0.0)
    total_T = _sum(counted_TE)
    weights_TE = tl.where(kept_TE, tl.div_rn(exp_TE, tl.broadcast_to(total_T[:, None], exp_TE.shape)), 0.0)
    weights_TE = tl.where(odd_T1, float("nan"), weights_TE)
    ids_TE = tl.where(weights_TE == 0.0, E, tl.broadcast_to(e_1E, weights_TE.shape))
    tl.store(weights + (t_T * E)[:, None] + e_1E, weights_TE, mask=real_TE)
    slots_TE = (t_T * K)[:, None] + rank_TE
    tl.store(top_weights + slots_TE, weights_TE, mask=real_TE & kept_TE)
    tl.store(top_ids + slots_TE, ids_TE, mask=real_TE & kept_TE)


@triton.jit
def _ranks(logits_TE, e_1E, E, K, N: tl.constexpr):
    """0 for the largest logit of a row, 1 for the next, to K - 1, then N; equal ones in the order of the experts."""
    bits_TE = tl.where(logits_TE == 0.0, 0.0, logits_TE).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    bits_TE = tl.where(bits_TE < 0, bits_TE ^ 0x7FFFFFFF, bits_TE)  # integers in the order of the numbers
    key_TE = (bits_TE.to(tl.int64) << 32) | (N - 1 - e_1E).to(tl.int64)
    key_TE = tl.where(e_1E < E, key_TE, TAKEN)
    rank_TE = tl.zeros_like(bits_TE) + N
    for slot in range(K):
        is_next_TE = key_TE == tl.max(key_TE, 1)[:, None]
        rank_TE = tl.where(is_next_TE, slot, rank_TE)
        key_TE = tl.where(is_next_TE, TAKEN, key_TE)
    return rank_TE


@triton.jit
def _exp(logits_TE):
    """The exponentials of logits from which the row's largest is taken, so that its own is 1."""
    return tl.exp(logits_TE - tl.maximum(tl.max(logits_TE, 1), LOWEST)[:, None])


@triton.jit
def _sum(exp_TE):
    """At least 1, as the largest term is 1, unless there is none."""
    return tl.maximum(tl.sum((exp_TE * UNIT).to(tl.int64), 1).to(tl.float32) * (1.0 / UNIT), 1.0)


@triton.jit(do_not_specialize=["T", "E", "K"])
def backward_kernel(
    d_logits,  # [T, E] fp32 or None
    d_weights,  # [T, E] fp32 or None
    d_top_weights,  # [T, K] fp32 or None
    table,  # [., E] int64: addresses of rows [H] of type ROW; 0: nothing there
    logits,  # [T, E] fp32
    weights,  # [T, E] fp32
    top_ids,  # [T, K] int32
    dz,  # [T, E] fp32, written: the gradient of the logits before the offset is added
    dx,  # [T, H], written
    T,
    E,
    K,
    H_8,
    ROW: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EXPERTS_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Gradients of logits from those of the results, and of x from those: `dx = dz @ rows`."""
    t_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e_1E = tl.arange(0, EXPERTS_P)[None, :]
    real_TE = (t_T < T)[:, None] & (e_1E < E)
    at_TE = (t_T * E)[:, None] + e_1E
    logits_TE = tl.load(logits + at_TE, mask=real_TE, other=float("-inf"))
    dz_TE = tl.zeros([BLOCK_T, EXPERTS_P], tl.float32)
    if d_weights is not None or d_top_weights is not None:
        dw_TE = tl.zeros([BLOCK_T, EXPERTS_P], tl.float32)
        if d_weights is not None:
            dw_TE = tl.load(d_weights + at_TE, mask=real_TE, other=0.0)
        if d_top_weights is not None:
            for slot in range(K):
                id_T = tl.load(top_ids + t_T * K + slot, mask=t_T < T, other=E)
                dw_T = tl.load(d_top_weights + t_T * K + slot, mask=t_T < T, other=0.0)
                dw_TE += tl.where(e_1E == id_T[:, None], dw_T[:, None], 0.0)
        weights_TE = tl.load(weights + at_TE, mask=real_TE, other=0.0)
        shares_TE = weights_TE
        if not RENORMALIZE:
            exp_TE = _exp(logits_TE)
            shares_TE = exp_TE / _sum(exp_TE)[:, None]
        dz_TE = tl.where(weights_TE == 0.0, 0.0, weights_TE * dw_TE)
        dz_TE -= shares_TE * tl.sum(dz_TE, 1)[:, None]
    if d_logits is not None:
        dz_TE += tl.load(d_logits + at_TE, mask=real_TE, other=0.0)
    dz_TE = tl.where(logits_TE == float("-inf"), 0.0, dz_TE)
    if tl.program_id(1) == 0:
        tl.store(dz + at_TE, dz_TE, mask=real_TE)

    H = H_8 * 8
    h_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dx_TH = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for e in range(E):
        address_1 = tl.load(table + e + tl.arange(0, 1))  # a block, as the interpreter's masks can't be scalars
        row_1 = tl.multiple_of(address_1.to(tl.pointer_type(ROW)), 16)
        w_H = tl.load(row_1 + h_H, mask=(h_H < H) & (address_1 != 0), other=float("nan")).to(tl.float32)
        dz_T1 = tl.sum(tl.where(e_1E == e, dz_TE, 0.0), 1)[:, None]
        dx_TH += tl.where(dz_T1 == 0.0, 0.0, dz_T1 * w_H[None, :])  # a masked expert may hold NaN
    H64 = H.to(tl.int64)
    tl.store(
        dx + (t_T * H64)[:, None] + h_H[None, :],
        dx_TH.to(dx.dtype.element_ty),
        mask=(t_T < T)[:, None] & (h_H < H)[None, :],
    )


def route(
    x_TH: Tensor, rows: Sequence[Tensor], biases: Sequence[Tensor], offset_TE: Tensor | None, k: int, renormalize: bool
) -> Routing:
    """`routing_flexmoe.route` in one launch; arguments and results as there.

    Args:
        x_TH: float32, bfloat16 or float16, H a multiple of 8.
        rows, biases: 1 to 64, contiguous, all of one of these dtypes, rows at addresses that 16 divides.
    """
    tokens, hidden = x_TH.shape
    experts = len(rows)
    slots = min(k, experts)
    logits_TE, weights_TE = (x_TH.new_empty(tokens, experts, dtype=torch.float32) for _ in range(2))
    top_weights_TK = x_TH.new_empty(tokens, slots, dtype=torch.float32)
    top_ids_TK = x_TH.new_empty(tokens, slots, dtype=torch.int32)
    routing = Routing(logits_TE, weights_TE, top_weights_TK, top_ids_TK)
    if not tokens:
        return routing
    x_TH = _rows_contiguous(x_TH)
    offset_TE = None if offset_TE is None else _rows_contiguous(offset_TE)
    inputs = (x_TH, row_table(rows, biases), offset_TE)
    strides = (x_TH.stride(0), 0 if offset_TE is None else offset_TE.stride(0))
    with torch.cuda.device_of(x_TH):
        if tokens <= MOST_FEW:
            launch = few_launch(experts, rows[0].dtype)
            route_few[(tokens,)](
                *inputs, *routing, experts, slots, hidden // 8, *strides, RENORMALIZE=renormalize, **launch
            )
        else:
            launch = many_launch(experts, rows[0].dtype, tokens)
            grid = (triton.cdiv(tokens, launch["BLOCK_T"]),)
            route_many[grid](
                *inputs, *routing, tokens, experts, slots, hidden // 8, *strides, RENORMALIZE=renormalize, **launch
            )
    return routing


def route_backward(
    d_logits_TE: Tensor | None,
    d_weights_TE: Tensor | None,
    d_top_weights_TK: Tensor | None,
    x_TH: Tensor,
    rows: Sequence[Tensor],
    routing: Routing,
    k: int,
    renormalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `route` from those of its results.

    Returns:
        dx_TH in the dtype of `x_TH`; in float32 d_rows_EH, d_biases_E and d_offset_TE.
    """
    gradients = (d_logits_TE, d_weights_TE, d_top_weights_TK)
    dx_TH, dz_TE = input_gradients(*gradients, x_TH, rows, routing, k, renormalize)
    return dx_TH, dz_TE.t() @ x_TH.float(), dz_TE.sum(0), dz_TE


def input_gradients(
    d_logits_TE: Tensor | None,
    d_weights_TE: Tensor | None,
    d_top_weights_TK: Tensor | None,
    x_TH: Tensor,
    rows: Sequence[Tensor],
    routing: Routing,
    k: int,
    renormalize: bool,
) -> tuple[Tensor, Tensor]:
    """Those of x and of the offset, in one launch. Of the latter, those of rows and biases are sums.

    An expert that is masked for a token, or that the token does not keep, adds nothing to the token's gradient, even
    if its row holds NaN.
    """
    tokens, hidden = x_TH.shape
    experts = len(rows)
    dz_TE = x_TH.new_empty(tokens, experts, dtype=torch.float32)
    # the interpreter can't store bfloat16
    dx_TH = x_TH.new_empty(tokens, hidden, dtype=torch.float32 if INTERPRETED else x_TH.dtype)
    if tokens:
        gradients = (None if d is None else d.contiguous() for d in (d_logits_TE, d_weights_TE, d_top_weights_TK))
        launch = backward_launch(experts, rows[0].dtype)
        grid = (triton.cdiv(tokens, launch["BLOCK_T"]), triton.cdiv(hidden, launch["BLOCK_H"]))
        with torch.cuda.device_of(x_TH):
            backward_kernel[grid](
                *gradients,
                row_table(rows, rows),  # biases are not read here
                routing.logits_TE,
                routing.weights_TE,
                routing.top_ids_TK,
                dz_TE,
                dx_TH,
                tokens,
                experts,
                min(k, experts),
                hidden // 8,
                RENORMALIZE=renormalize,
                **launch,
            )
    return dx_TH.to(x_TH.dtype), dz_TE


def _rows_contiguous(values: Tensor) -> Tensor:
    return values if values.stride(-1) == 1 else values.contiguous()


__all__ = [
    "MOST_FEW",
    "backward_kernel",
    "backward_launch",
    "few_launch",
    "input_gradients",
    "many_launch",
    "route",
    "route_backward",
    "route_few",
    "route_many",
]
