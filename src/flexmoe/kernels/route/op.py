"""The router as the operator `flexmoe::route`: checks of its arguments, autograd, and its implementations.

Differentiable once, in the hidden states, rows, biases and offset.

Shapes: T tokens, H hidden, E experts, K = min(k, E) slots. Does not cover when a model uses it
(`flexmoe.kernels.dispatch`), or second derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexmoe.kernels.operators import (
    NAMESPACE,
    check_hidden_states,
    check_kernel_limits,
    check_tensor,
    register,
    register_without_gradient,
)
from flexmoe.kernels.route import reference
from flexmoe.kernels.route.reference import Routing

SCHEMA = (
    "(Tensor x, Tensor[] rows, Tensor[] biases, Tensor? offset, int k, bool renormalize)"
    " -> (Tensor logits, Tensor weights, Tensor top_weights, Tensor top_ids)"
)
BACKWARD_SCHEMA = (
    "(Tensor? d_logits, Tensor? d_weights, Tensor? d_top_weights, Tensor x, Tensor[] rows,"
    " Tensor logits, Tensor weights, Tensor top_weights, Tensor top_ids, int k, bool renormalize)"
    " -> (Tensor dx, Tensor d_offset)"
)


def route(
    x_TH: Tensor, rows: Sequence[Tensor], biases: Sequence[Tensor], offset_TE: Tensor | None, k: int, renormalize: bool
) -> Routing:
    """Computes `reference.route`, on CUDA by a kernel; same arguments and results.

    Raises:
        ValueError: shapes, devices or counts do not match, or the kernel does not take them.
        TypeError: dtypes do not match, or the kernel does not take them.
    """
    check_hidden_states(x_TH)
    if not rows or len(rows) != len(biases):
        raise ValueError(f"{len(rows)} rows and {len(biases)} biases: each expert has one of each, and one must be.")
    if k < 1:
        raise ValueError(f"k is {k}: a token keeps at least one expert.")
    tokens, hidden = x_TH.shape
    for e, (row, bias) in enumerate(zip(rows, biases, strict=True)):
        check_tensor(f"rows[{e}]", row, (1, hidden), rows[0].dtype, x_TH)
        check_tensor(f"biases[{e}]", bias, (1,), rows[0].dtype, x_TH)
    if not rows[0].is_floating_point():
        raise TypeError(f"rows are {rows[0].dtype}: only floating-point rows have products.")
    if offset_TE is not None:
        check_tensor("offset_TE", offset_TE, (tokens, len(rows)), torch.float32, x_TH)
    if x_TH.is_cuda:
        check_kernel_limits(len(rows), {"hidden": hidden}, x_TH.dtype, rows[0].dtype)
    return Routing(*ROUTE(x_TH, list(rows), list(biases), offset_TE, k, renormalize))


def _route_cpu(*args: Any) -> tuple[Tensor, ...]:
    return tuple(reference.route(*args))


def _route_cuda(*args: Any) -> tuple[Tensor, ...]:
    from flexmoe.kernels.route import kernel

    return tuple(kernel.route(*args))


def _route_fake(
    x_TH: Tensor, rows: list[Tensor], biases: list[Tensor], offset_TE: Tensor | None, k: int, renormalize: bool
) -> tuple[Tensor, ...]:
    tokens, experts = x_TH.shape[0], len(rows)
    dtypes = (torch.float32, torch.float32, torch.float32, torch.int32)
    widths = (experts, experts, min(k, experts), min(k, experts))
    return tuple(x_TH.new_empty(tokens, n, dtype=dtype) for n, dtype in zip(widths, dtypes, strict=True))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TH, rows, biases, _, ctx.k, ctx.renormalize = inputs
    ctx.bias_dtypes = [bias.dtype for bias in biases]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_TH, *output, *rows)


def _backward(
    ctx: Any, d_logits_TE: Tensor | None, d_weights_TE: Tensor | None, d_top_weights_TK: Tensor | None, _: None
) -> tuple[Any, ...]:
    x_TH, *saved = ctx.saved_tensors
    routing, rows = saved[:4], saved[4:]
    needs_x, needs_rows, needs_biases, needs_offset = ctx.needs_input_grad[:4]
    gradients = (d_logits_TE, d_weights_TE, d_top_weights_TK)
    dx_TH, d_offset_TE = ROUTE_BACKWARD(*gradients, x_TH, rows, *routing, ctx.k, ctx.renormalize)
    d_rows: list[Tensor | None] = [None] * len(rows)
    if any(needs_rows):
        with torch.autocast(x_TH.device.type, enabled=False):
            d_rows_EH = d_offset_TE.t() @ x_TH.float()
        d_rows = [
            d_1H.to(row.dtype) if needed else None
            for d_1H, row, needed in zip(d_rows_EH.split(1), rows, needs_rows, strict=True)
        ]
    d_biases = [
        d_T1.sum(0).to(dtype) if needed else None
        for d_T1, dtype, needed in zip(d_offset_TE.split(1, -1), ctx.bias_dtypes, needs_biases, strict=True)
    ]
    return dx_TH if needs_x else None, d_rows, d_biases, d_offset_TE if needs_offset else None, None, None


def _backward_cpu(*args: Any) -> tuple[Tensor, Tensor]:
    *gradients, x_TH, rows, logits_TE, weights_TE, top_weights_TK, top_ids_TK, _, renormalize = args
    routing = Routing(logits_TE, weights_TE, top_weights_TK, top_ids_TK)
    return reference.input_gradients(gradients, x_TH, rows, routing, renormalize)


def _backward_cuda(*args: Any) -> tuple[Tensor, Tensor]:
    from flexmoe.kernels.route import kernel

    *gradients, x_TH, rows, logits_TE, weights_TE, top_weights_TK, top_ids_TK, k, renormalize = args
    routing = Routing(logits_TE, weights_TE, top_weights_TK, top_ids_TK)
    return kernel.input_gradients(gradients, x_TH, rows, routing, k, renormalize)


def _backward_fake(
    d_logits_TE: Tensor | None,
    d_weights_TE: Tensor | None,
    d_top_weights_TK: Tensor | None,
    x_TH: Tensor,
    rows: list[Tensor],
    logits_TE: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    return x_TH.new_empty(x_TH.shape), logits_TE.new_empty(logits_TE.shape)


ROUTE = register("route", SCHEMA, cpu=_route_cpu, cuda=_route_cuda, fake=_route_fake)
ROUTE_BACKWARD = register(
    "route_backward", BACKWARD_SCHEMA, cpu=_backward_cpu, cuda=_backward_cuda, fake=_backward_fake
)
register_without_gradient(
    "route_backward", ROUTE_BACKWARD, "route() has no second derivative: call backward() without create_graph."
)
torch.library.register_autograd(f"{NAMESPACE}::route", _backward, setup_context=_setup_context)

__all__ = ["ROUTE", "ROUTE_BACKWARD", "route"]
