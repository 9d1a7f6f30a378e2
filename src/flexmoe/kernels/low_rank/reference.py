"""The weighted mix of low-rank experts in plain PyTorch: the reference for the kernel, and the operator's CPU version.

Deliberately simple, and shares no code with the kernel: it computes each expert separately.

Shapes: T tokens, N tokens of one member, H hidden, I intermediate, R rank, M members: low-rank experts, and the public
network where it is one of them.

Source: FlexMoRE, arXiv 2602.08818. Does not cover low-rank experts of networks without a known structure, which run as
modules (`modeling/low_rank_flexmoe.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoe.kernels.experts.reference import ACTIVATIONS, ExpertTensors


@dataclass(frozen=True)
class LowRankTensors:
    """Experts given by their deltas to one public network: `W + scale * B A` for each of its matrices.

    Attributes:
        public: the matrices of one network.
        a: up and gate [R, H] and down [R, I] of each expert; the rank R may differ between experts. No biases.
        b: up and gate [I, R] and down [H, R] of each expert; a bias delta where the public network has a bias.
        scales: one per expert.
        public_column: the index of the public network among the members; None if it is not one of them.
    """

    public: ExpertTensors
    a: ExpertTensors
    b: ExpertTensors
    scales: Sequence[float]
    public_column: int | None = None


def mix_low_rank(x_TH: Tensor, weights_TM: Tensor, experts: LowRankTensors) -> Tensor:
    """Computes the weighted sum [tokens, hidden] of the members' outputs, in the dtype of `x_TH`.

    Args:
        weights_TM: [tokens, members]. A member is computed for the tokens whose weight is not 0.
    """
    y_TH = torch.zeros_like(x_TH)
    indices = iter(range(len(experts.scales)))
    for m in range(weights_TM.shape[1]):
        index = None if m == experts.public_column else next(indices)
        tokens = weights_TM[:, m].nonzero().squeeze(-1)
        output_NH = _member(index, x_TH[tokens], experts)
        y_TH = y_TH.index_add(0, tokens, output_NH * weights_TM[tokens, m, None].to(output_NH.dtype))
    return y_TH


def _member(index: int | None, x_NH: Tensor, experts: LowRankTensors) -> Tensor:
    """The output of the low-rank expert `index`; of the public network if it is None."""
    activation = ACTIVATIONS[experts.public.activation]
    up_NI = _linear("up", index, x_NH, experts)
    gated_NI = activation(_linear("gate", index, x_NH, experts)) * up_NI if experts.public.gate else activation(up_NI)
    return _linear("down", index, gated_NI, experts)


def _linear(name: str, index: int | None, v: Tensor, experts: LowRankTensors) -> Tensor:
    public_biases, bias_deltas = getattr(experts.public, f"{name}_bias"), getattr(experts.b, f"{name}_bias")
    product = F.linear(v, getattr(experts.public, name)[0], public_biases[0] if public_biases else None)
    if index is None:
        return product
    projected = F.linear(v, getattr(experts.a, name)[index]) * experts.scales[index]
    return product + F.linear(projected, getattr(experts.b, name)[index], bias_deltas[index] if bias_deltas else None)


__all__ = ["LowRankTensors", "mix_low_rank"]
