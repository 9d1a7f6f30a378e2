"""The weighted mix of low-rank experts as the operator `flexmoe::mix_low_rank`: checks, and its implementations.

No gradient: experts train through PyTorch's modules.

Shapes: T tokens, H hidden, I intermediate, M members (low-rank experts, and public where it is one of them), R rank.
Does not cover when a model uses it (`flexmoe.kernels.dispatch`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flexmoe.kernels.experts.op import as_arguments, check_experts, from_arguments
from flexmoe.kernels.experts.reference import ExpertTensors
from flexmoe.kernels.low_rank import reference
from flexmoe.kernels.low_rank.reference import LowRankTensors
from flexmoe.kernels.operators import (
    check_hidden_states,
    check_kernel_limits,
    check_tensor,
    register,
    register_without_gradient,
)

MAX_TOKENS = 64
"""The most tokens that the operator takes at once."""

SCHEMA = (
    "(Tensor x, Tensor weights, Tensor[] gate, Tensor[] up, Tensor[] down,"
    " Tensor[] gate_bias, Tensor[] up_bias, Tensor[] down_bias, str activation,"
    " Tensor[] a_gate, Tensor[] a_up, Tensor[] a_down, Tensor[] b_gate, Tensor[] b_up, Tensor[] b_down,"
    " Tensor[] b_gate_bias, Tensor[] b_up_bias, Tensor[] b_down_bias, float[] scales, int? public_column) -> Tensor"
)


def mix_low_rank(x_TH: Tensor, weights_TM: Tensor, experts: LowRankTensors) -> Tensor:
    """Computes `reference.mix_low_rank`, on CUDA by a kernel: the weighted sum [tokens, hidden] of the outputs.

    Args:
        x_TH: at most `MAX_TOKENS` tokens, in the dtype of the experts.
        weights_TM: float32 [tokens, members]: low-rank experts, and the public network where it is one of them.

    Raises:
        ValueError: shapes, devices or counts do not match, or the kernel does not take them.
        TypeError: dtypes do not match, or the kernel does not take them.
        RuntimeError: a gradient would be needed.
    """
    check_hidden_states(x_TH)
    if len(x_TH) > MAX_TOKENS:
        raise ValueError(f"{len(x_TH)} tokens: mix_low_rank() takes {MAX_TOKENS} at most. Call it in parts.")
    public, a, b, column = experts.public, experts.a, experts.b, experts.public_column
    members = len(experts.scales) + (column is not None)
    if column is not None and not 0 <= column < members:
        raise ValueError(f"public_column is {column}, must be one of the {members} members, or None.")
    check_experts(public, x_TH)
    _check_deltas(experts, x_TH)
    check_tensor("weights_TM", weights_TM, (len(x_TH), members), torch.float32, x_TH)
    if x_TH.is_cuda:
        check_kernel_limits(members, {"hidden": x_TH.shape[1], "intermediate": len(public.up[0])}, x_TH.dtype)
    deltas = (a.gate, a.up, a.down, b.gate, b.up, b.down, b.gate_bias, b.up_bias, b.down_bias)
    return MIX_LOW_RANK(x_TH, weights_TM, *as_arguments(public), *map(list, deltas), list(experts.scales), column)


def _check_deltas(experts: LowRankTensors, x_TH: Tensor) -> None:
    public, hidden, width = experts.public, x_TH.shape[1], len(experts.public.up[0])
    if len(public.up) != 1 or not experts.scales:
        raise ValueError(
            f"{len(public.up)} public networks and {len(experts.scales)} low-rank experts: pass one public network, "
            "and at least one low-rank expert."
        )
    ranks = [len(up) for up in experts.a.up]
    if not all(ranks):
        raise ValueError(f"Ranks are {ranks}: each must be 1 at least.")
    shapes: dict[str, list[tuple[int, ...]]] = {
        "a.gate": [(rank, hidden) for rank in ranks],
        "a.up": [(rank, hidden) for rank in ranks],
        "a.down": [(rank, width) for rank in ranks],
        "b.gate": [(width, rank) for rank in ranks],
        "b.up": [(width, rank) for rank in ranks],
        "b.down": [(hidden, rank) for rank in ranks],
        "b.gate_bias": [(width,) for _ in ranks],
        "b.up_bias": [(width,) for _ in ranks],
        "b.down_bias": [(hidden,) for _ in ranks],
    }
    for path, expected in shapes.items():
        factor, name = path.split(".")
        tensors = getattr(getattr(experts, factor), name)
        count = len(experts.scales) if getattr(public, name) else 0
        if len(tensors) != count:
            raise ValueError(
                f"{len(tensors)} of `{path}`, must be {count}: one per scale, if the public network has it."
            )
        for e, tensor in enumerate(tensors):
            check_tensor(f"{path}[{e}]", tensor, expected[e], x_TH.dtype, x_TH)


def _from_arguments(*fields: Any) -> LowRankTensors:
    public, activation = from_arguments(*fields[:7]), fields[6]
    a = ExpertTensors(gate=fields[7], up=fields[8], down=fields[9])
    b = from_arguments(*(*fields[10:16], activation))
    scales, public_column = fields[16:]
    return LowRankTensors(public, a, b, scales, public_column)


def _mix_low_rank_cpu(x_TH: Tensor, weights_TM: Tensor, *matrices: Any) -> Tensor:
    return reference.mix_low_rank(x_TH, weights_TM, _from_arguments(*matrices)).contiguous()


def _mix_low_rank_cuda(x_TH: Tensor, weights_TM: Tensor, *matrices: Any) -> Tensor:
    from flexmoe.kernels.low_rank import kernel

    return kernel.decode_low_rank(x_TH.contiguous(), weights_TM.contiguous(), _from_arguments(*matrices))


def _mix_low_rank_fake(x_TH: Tensor, *rest: Any) -> Tensor:
    return x_TH.new_empty(x_TH.shape)


MIX_LOW_RANK = register(
    "mix_low_rank", SCHEMA, cpu=_mix_low_rank_cpu, cuda=_mix_low_rank_cuda, fake=_mix_low_rank_fake
)
register_without_gradient(
    "mix_low_rank",
    MIX_LOW_RANK,
    "mix_low_rank() has no gradient, and one of its tensors requires it: train experts with "
    "experts_implementation='eager', or call mix_low_rank() under torch.no_grad().",
)

__all__ = ["MAX_TOKENS", "MIX_LOW_RANK", "mix_low_rank"]
