"""The router as one kernel launch: logits, mask, softmax, top-k and the slots, with its gradient.

Results are those of `reference.route`, case by case. Up to `MAX_FEW` tokens, each token is a program of its own that
multiplies and adds in float32, so a token's bits do not depend on the batch. More tokens go through the tensor cores,
16 or 32 per program, each float32 split into three TF32 products, which keeps 22 bits of each factor.

The sums of the softmax are sums of integers, in units of 2^-40 of the largest term. Integer addition is associative,
so an expert that is masked or absent changes no bit of the others' weights.

Shapes: T tokens, H hidden, E experts, K = min(k, E) slots, P parts of H that are summed separately; `EXPERTS_P` is E
rounded up to a power of two.

Does not cover more than 64 experts, or logits of -inf without a mask: an infinite number in `x` or in a row gives -inf
or NaN, depending on the order of additions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexmoe.kernels.route.reference import Routing
from flexmoe.kernels.triton_common import INTERPRETED, row_table

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("FlexMoE's kernels need Triton: pip install 'triton>=3.6'.") from error

MAX_FEW = 64
"""Up to so many tokens, each token gets a program of its own."""

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""The dtypes of rows, as Triton names them."""

OPTIONS = {"enable_fp_fusion": True}  # the default up to Triton 3.9

LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
USED = tl.constexpr(-(2**63) + 1)
UNIT = tl.constexpr(2.0**40)


def few_launch(experts: int, row_dtype: torch.dtype) -> dict[str, Any]:
    """Constants of `route_few`; they do not depend on the number of tokens, so neither do a token's bits."""
    padded = triton.next_power_of_2(experts)
    return {
        "ROW": DTYPES[row_dtype],
        "EXPERTS_P": padded,
        "CHUNK": min(padded, 8),  # 8 x 1024 numbers are 32 registers per thread, twice because the next are in flight
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
        "BLOCK_T": 16
        if tokens <= 2048 and padded <= 32
        else 32,  # each reads all rows: larger once every SM has a program
        "PARTS": 8,  # one per warp, because products that accumulate into one sum are a dependency chain
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
    table,  # [2, E] int64: addresses of rows [H] and biases [1] of type ROW; 0: removed
    offset,  # [T, E] fp32, rows `offset_stride` apart, or None
    logits,  # [T, E] fp32, written; so are the next three
    weights,  # [T, E] fp32
    top_weights,  # [T, K] fp32
    top_ids,  # [T, K] int32
    E,
    K,
    H_8,  # H / 8, so that the compiler knows that 8 divides H
    x_stride,
    offset_stride,
    ROW: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    EXPERTS_P: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One program per token: rows are read as tiles, and summed once at the end."""
    t = tl.program_id(0).to(tl.int64)
    H = H_8 * 8
    t_T = t + tl.arange(0, 1)
    bias_E, offset_TE = _load_terms(table, offset, t_T, t_T >= 0, E, offset_stride, ROW, EXPERTS_P)
    h_1H = tl.arange(0, BLOCK_H)[None, :]
    chunks_C1 = tl.arange(0, EXPERTS_P // CHUNK)[:, None]
    products_CJ = tl.zeros([EXPERTS_P // CHUNK, CHUNK], tl.float32)
    for chunk in range(EXPERTS_P // CHUNK):
        e_J = chunk * CHUNK + tl.arange(0, CHUNK)
        address_J = tl.load(table + e_J, mask=e_J < E, other=0)
        present_J1 = (address_J != 0)[:, None]
        row_J1 = tl.multiple_of(address_J.to(tl.pointer_type(ROW)), 16)[:, None]
        x_1H = tl.load(x + t * x_stride + h_1H, mask=h_1H < H, other=0.0)
        w_JH = tl.load(row_J1 + h_1H, mask=present_J1 & (h_1H < H), other=0.0)
        sum_JH = tl.zeros([CHUNK, BLOCK_H], tl.float32)
        for start in range(BLOCK_H, H + BLOCK_H, BLOCK_H):
            next_1H = start + h_1H  # in flight while this block is multiplied; past the end nothing is read
            next_x_1H = tl.load(x + t * x_stride + next_1H, mask=next_1H < H, other=0.0)
            next_w_JH = tl.load(row_J1 + next_1H, mask=present_J1 & (next_1H < H), other=0.0)
            sum_JH += w_JH.to(tl.float32) * x_1H.to(tl.float32)
            x_1H, w_JH = next_x_1H, next_w_JH
        products_CJ = tl.where(chunks_C1 == chunk, tl.sum(sum_JH, 1)[None, :], products_CJ)
    products_TE = tl.reshape(products_CJ, [1, EXPERTS_P])
    _finish(
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
    """One program per `BLOCK_T` tokens, on the tensor cores; each of `PARTS` warps sums a part of H."""
    t_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    H = H_8 * 8
    e_E = tl.arange(0, EXPERTS_P)
    address_E = tl.load(table + e_E, mask=e_E < E, other=0)
    present_E = address_E != 0
    row_E = tl.multiple_of(address_E.to(tl.pointer_type(ROW)), 16)
    h_PH = tl.arange(0, PARTS)[:, None] * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    bias_E, offset_TE = _load_terms(table, offset, t_T, t_T < T, E, offset_stride, ROW, EXPERTS_P)
    sum_PTE = tl.zeros([PARTS, BLOCK_T, EXPERTS_P], tl.float32)
    for start in range(0, H, PARTS * BLOCK_H):
        h_P1H = (start + h_PH)[:, None, :]
        x_PTH = tl.load(
            x + (t_T * x_stride)[None, :, None] + h_P1H, mask=(t_T < T)[None, :, None] & (h_P1H < H), other=0.0
        )
        w_PEH = tl.load(row_E[None, :, None] + h_P1H, mask=present_E[None, :, None] & (h_P1H < H), other=0.0)
        sum_PTE = tl.dot(
            x_PTH.to(tl.float32),
            tl.permute(w_PEH.to(tl.float32), (0, 2, 1)),
            sum_PTE,
            input_precision=PRECISION,
        )
    # All warps hold all sums now, and each would repeat the rest. Loading them again spreads them over the threads.
    at_TE = (t_T * E)[:, None] + e_E[None, :]
    real_TE = (t_T < T)[:, None] & (e_E < E)[None, :]
    tl.store(logits + at_TE, tl.sum(sum_PTE, 0), mask=real_TE)
    tl.debug_barrier()
    products_TE = tl.load(logits + at_TE, mask=real_TE, other=0.0)
    tl.debug_barrier()  # no thread writes the logits there while another still reads
    _finish(
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
def _load_terms(table, offset, t_T, real_T, E, offset_stride, ROW: tl.constexpr, N: tl.constexpr):
    """Biases [E], NaN where the expert was removed, and offsets [T, E]: loaded early, because loads take long."""
    e_E = tl.arange(0, N)
    address_E = tl.load(table + E + e_E, mask=e_E < E, other=0)
    present_E = address_E != 0
    bias_E = tl.load(address_E.to(tl.pointer_type(ROW)), mask=present_E, other=0.0).to(tl.float32)
    present_E = present_E & (tl.load(table + e_E, mask=e_E < E, other=0) != 0)
    bias_E = tl.where(present_E, bias_E, float("nan"))
    offset_TE = tl.zeros([t_T.shape[0], N], tl.float32)
    if offset is not None:
        real_TE = real_T[:, None] & (e_E < E)[None, :]
        offset_TE = tl.load(offset + (t_T * offset_stride)[:, None] + e_E[None, :], mask=real_TE, other=0.0)
    return bias_E, offset_TE


@triton.jit
def _finish(
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
    """Computes and stores logits, softmax and top-k from the products of tokens and rows."""
    e_1E = tl.arange(0, N)[None, :]
    real_TE = real_T[:, None] & (e_1E < E)
    logits_TE = products_TE + bias_E[None, :] + offset_TE
    logits_TE = tl.where((offset_TE == float("-inf")) | (e_1E >= E), float("-inf"), logits_TE)
    tl.store(logits + (t_T * E)[:, None] + e_1E, logits_TE, mask=real_TE)
    invalid_TE = (logits_TE != logits_TE) | (logits_TE == float("inf"))
    nan_T1 = (tl.max(invalid_TE.to(tl.int32), 1) > 0)[:, None]
    logits_TE = tl.where(nan_T1 & (e_1E < E), 0.0, logits_TE)  # NaN has no order: the slots are the first K experts
    rank_TE = _ranks(logits_TE, e_1E, E, K, N)
    kept_TE = rank_TE < K
    exp_TE = _exp(logits_TE)
    summed_TE = exp_TE
    if RENORMALIZE:
        summed_TE = tl.where(kept_TE, exp_TE, 0.0)
    total_T = _sum(summed_TE)
    weights_TE = tl.where(kept_TE, tl.div_rn(exp_TE, tl.broadcast_to(total_T[:, None], exp_TE.shape)), 0.0)
    weights_TE = tl.where(nan_T1, float("nan"), weights_TE)
    ids_TE = tl.where(weights_TE == 0.0, E, tl.broadcast_to(e_1E, weights_TE.shape))
    tl.store(weights + (t_T * E)[:, None] + e_1E, weights_TE, mask=real_TE)
    slots_TE = (t_T * K)[:, None] + rank_TE
    tl.store(top_weights + slots_TE, weights_TE, mask=real_TE & kept_TE)
    tl.store(top_ids + slots_TE, ids_TE, mask=real_TE & kept_TE)


@triton.jit
def _ranks(logits_TE, e_1E, E, K, N: tl.constexpr):
    """The rank of each logit in its row, 0 for the largest, N from rank K on; of equal logits the first is larger."""
    bits_TE = tl.where(logits_TE == 0.0, 0.0, logits_TE).to(tl.int32, bitcast=True)  # -0.0 equals 0.0
    bits_TE = tl.where(bits_TE < 0, bits_TE ^ 0x7FFFFFFF, bits_TE)  # integers that sort as the floats do
    key_TE = (bits_TE.to(tl.int64) << 32) | (N - 1 - e_1E).to(tl.int64)
    key_TE = tl.where(e_1E < E, key_TE, USED)
    rank_TE = tl.zeros_like(bits_TE) + N
    for slot in range(K):
        is_next_TE = key_TE == tl.max(key_TE, 1)[:, None]
        rank_TE = tl.where(is_next_TE, slot, rank_TE)
        key_TE = tl.where(is_next_TE, USED, key_TE)
    return rank_TE


@triton.jit
def _exp(logits_TE):
    """The exponentials of the logits minus the row's largest, so that the largest is 1."""
    return tl.exp(logits_TE - tl.maximum(tl.max(logits_TE, 1), LOWEST)[:, None])


@triton.jit
def _sum(exp_TE):
    """The sum of a row, at least 1: the largest term is 1, unless no expert is allowed."""
    return tl.maximum(tl.sum((exp_TE * UNIT).to(tl.int64), 1).to(tl.float32) * (1.0 / UNIT), 1.0)


@triton.jit(do_not_specialize=["T", "E", "K"])
def backward_kernel(
    d_logits,  # [T, E] fp32 or None
    d_weights,  # [T, E] fp32 or None
    d_top_weights,  # [T, K] fp32 or None
    table,  # [., E] int64: addresses of rows [H] of type ROW; 0: removed
    logits,  # [T, E] fp32
    weights,  # [T, E] fp32
    top_ids,  # [T, K] int32
    dz,  # [T, E] fp32, written: the gradient of the offset, and of the logits before it
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
    """The gradient of the logits from those of the results, and that of x from it: `dx = dz @ rows`."""
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
        softmax_TE = weights_TE
        if not RENORMALIZE:
            exp_TE = _exp(logits_TE)
            softmax_TE = exp_TE / _sum(exp_TE)[:, None]
        dz_TE = tl.where(weights_TE == 0.0, 0.0, weights_TE * dw_TE)
        dz_TE -= softmax_TE * tl.sum(dz_TE, 1)[:, None]
    if d_logits is not None:
        dz_TE += tl.load(d_logits + at_TE, mask=real_TE, other=0.0)
    dz_TE = tl.where(logits_TE == float("-inf"), 0.0, dz_TE)
    if tl.program_id(1) == 0:
        tl.store(dz + at_TE, dz_TE, mask=real_TE)

    H = H_8 * 8
    h_H = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dx_TH = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    for e in range(E):
        address_1 = tl.load(
            table + e + tl.arange(0, 1)
        )  # a block, because masks must not be scalars in the interpreter
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
    """Computes `reference.route` in one launch; same arguments and results.

    Args:
        x_TH: float32, bfloat16 or float16, H a multiple of 8.
        rows, biases: 1 to 64 each, contiguous, all of one of these dtypes, rows aligned to 16 bytes.
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
        if tokens <= MAX_FEW:
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


def input_gradients(
    gradients: Sequence[Tensor | None],
    x_TH: Tensor,
    rows: Sequence[Tensor],
    routing: Routing,
    k: int,
    renormalize: bool,
) -> tuple[Tensor, Tensor]:
    """Computes `reference.input_gradients` in one launch; those of rows and biases are sums of the offset's.

    Args:
        gradients: of logits, weights and weights of the slots; None means zero.

    Returns:
        dx_TH in the dtype of `x_TH`; d_offset_TE in float32.
    """
    tokens, hidden = x_TH.shape
    experts = len(rows)
    dz_TE = x_TH.new_empty(tokens, experts, dtype=torch.float32)
    # the interpreter cannot store bfloat16
    dx_TH = x_TH.new_empty(tokens, hidden, dtype=torch.float32 if INTERPRETED else x_TH.dtype)
    if tokens:
        gradients = [None if gradient is None else gradient.contiguous() for gradient in gradients]
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
    "MAX_FEW",
    "backward_kernel",
    "backward_launch",
    "few_launch",
    "input_gradients",
    "many_launch",
    "route",
    "route_few",
    "route_many",
]
