"""The weighted mix of full experts as the operator `flexmoe::mix`: checks of its arguments, and its implementations.

On CUDA few tokens go through the decode kernel and more through the prefill kernels. No gradient: experts train
through PyTorch's modules.

Shapes: T tokens, H hidden, I intermediate, E experts, K slots. Does not cover when a model uses it
(`flexmoe.kernels.dispatch`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexmoe.kernels.experts import reference
from flexmoe.kernels.experts.reference import ACTIVATIONS, ExpertTensors
from flexmoe.kernels.operators import (
    check_hidden_states,
    check_kernel_limits,
    check_tensor,
    register,
    register_without_gradient,
)
from flexmoe.kernels.route.reference import Routing

SCHEMA = (
    "(Tensor x, Tensor weights, Tensor top_weights, Tensor top_ids, Tensor[] gate, Tensor[] up, Tensor[] down,"
    " Tensor[] gate_bias, Tensor[] up_bias, Tensor[] down_bias, str activation) -> Tensor"
)


def mix(x_TH: Tensor, routing: Routing, experts: ExpertTensors) -> Tensor:
    """Computes `reference.mix`, on CUDA by a kernel: the weighted sum [tokens, hidden] of the experts' outputs.

    Args:
        x_TH: in the dtype of the experts.
        routing: as returned by `route`, for the same experts.

    Raises:
        ValueError: shapes, devices or counts do not match, or the kernel does not take them.
        TypeError: dtypes do not match, or the kernel does not take them.
        RuntimeError: a gradient would be needed.
    """
    check_hidden_states(x_TH)
    tokens, n_experts = len(x_TH), len(experts.up)
    top_shape = tuple(routing.top_ids_TK.shape)
    check_tensor("routing.weights_TE", routing.weights_TE, (tokens, n_experts), torch.float32, x_TH)
    check_tensor("routing.top_weights_TK", routing.top_weights_TK, (tokens, *top_shape[1:]), torch.float32, x_TH)
    check_tensor("routing.top_ids_TK", routing.top_ids_TK, (tokens, *top_shape[1:]), torch.int32, x_TH)
    check_experts(experts, x_TH)
    if x_TH.is_cuda:
        sizes = {"hidden": x_TH.shape[1], **{f"intermediate of {e}": len(up) for e, up in enumerate(experts.up)}}
        check_kernel_limits(n_experts, sizes, x_TH.dtype)
    return MIX(x_TH, *routing[1:], *as_arguments(experts))


def check_experts(experts: ExpertTensors, x_TH: Tensor) -> None:
    """Checks that all tensors have the shapes that belong together, and the dtype and device of `x_TH`.

    Raises:
        ValueError: shapes, devices or counts do not match, or the activation is unknown.
        TypeError: dtypes do not match.
    """
    if experts.activation not in ACTIVATIONS:
        raise ValueError(f"The activation {experts.activation!r} is not one of {sorted(ACTIVATIONS)}.")
    if not experts.up:
        raise ValueError("There are no experts: pass at least one.")
    hidden = x_TH.shape[1]
    widths = [len(up) for up in experts.up]
    shapes: dict[str, list[tuple[int, ...]]] = {
        "gate": [(width, hidden) for width in widths],
        "up": [(width, hidden) for width in widths],
        "down": [(hidden, width) for width in widths],
        "gate_bias": [(width,) for width in widths],
        "up_bias": [(width,) for width in widths],
        "down_bias": [(hidden,) for _ in widths],
    }
    for name, expected in shapes.items():
        tensors = getattr(experts, name)
        if len(tensors) != len(widths) and (tensors or name == "down"):
            raise ValueError(f"{len(tensors)} of `{name}` for {len(widths)} experts: each has one, or none has.")
        for e, tensor in enumerate(tensors):
            check_tensor(f"{name}[{e}]", tensor, expected[e], x_TH.dtype, x_TH)


def as_arguments(experts: ExpertTensors) -> tuple[Any, ...]:
    """The tensors and the activation, in the order of the schema."""
    matrices = (experts.gate, experts.up, experts.down, experts.gate_bias, experts.up_bias, experts.down_bias)
    return *map(list, matrices), experts.activation


def from_arguments(
    gate: list[Tensor],
    up: list[Tensor],
    down: list[Tensor],
    gate_bias: list[Tensor],
    up_bias: list[Tensor],
    down_bias: list[Tensor],
    activation: str,
) -> ExpertTensors:
    """The inverse of `as_arguments`."""
    return ExpertTensors(
        gate=gate,
        up=up,
        down=down,
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=down_bias,
        activation=activation,
    )


def _mix_cpu(x_TH: Tensor, weights_TE: Tensor, top_weights_TK: Tensor, top_ids_TK: Tensor, *matrices: Any) -> Tensor:
    return reference.mix(x_TH, weights_TE, from_arguments(*matrices)).contiguous()


def _mix_cuda(x_TH: Tensor, weights_TE: Tensor, top_weights_TK: Tensor, top_ids_TK: Tensor, *matrices: Any) -> Tensor:
    from flexmoe.kernels.experts import decode_kernel, prefill_kernel

    experts = from_arguments(*matrices)
    x_TH = x_TH.contiguous()
    if len(x_TH) <= decode_kernel.MAX_TOKENS:
        return decode_kernel.decode(x_TH, weights_TE.contiguous(), experts)
    return prefill_kernel.prefill(x_TH, top_weights_TK.contiguous(), top_ids_TK.contiguous(), experts)


def _mix_fake(x_TH: Tensor, *rest: Any) -> Tensor:
    return x_TH.new_empty(x_TH.shape)


MIX = register("mix", SCHEMA, cpu=_mix_cpu, cuda=_mix_cuda, fake=_mix_fake)
register_without_gradient(
    "mix",
    MIX,
    "mix() has no gradient, and one of its tensors requires it: train experts with experts_implementation='eager', or "
    "call mix() under torch.no_grad().",
)

__all__ = ["MIX", "as_arguments", "check_experts", "from_arguments", "mix"]
