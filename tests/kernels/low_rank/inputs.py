"""Random low-rank experts for the tests of their kernels, and their mix in float64, which shares nothing with them.

The float64 reference computes full matrices, `W + scale B A`, which no kernel does.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexmoe.kernels.experts.reference import ExpertTensors
from flexmoe.kernels.low_rank.reference import LowRankTensors
from tests.kernels.experts.inputs import ACTIVATIONS, DEVICE, Experts


@dataclass(frozen=True)
class LowRank:
    """A distribution of random low-rank experts, one for each rank; `public` is the column of that network."""

    ranks: Sequence[int]
    hidden: int
    width: int
    public: int | None = None
    dtype: torch.dtype = torch.float32
    gated: bool = True
    biases: Sequence[str] = ()
    activation: str = "silu"

    @property
    def members(self) -> int:
        """The number of columns of the weights."""
        return len(self.ranks) + (self.public is not None)

    def draw(self, generator: torch.Generator) -> LowRankTensors:
        """Experts that differ from the public network by about half of it, with several scales."""

        def tensors(*shape: int | None) -> list[Tensor]:
            shapes = [[rank if size is None else size for size in shape] for rank in self.ranks]
            drawn = [torch.randn(sizes, generator=generator) / math.sqrt(sizes[-1]) for sizes in shapes]
            return [tensor.to(DEVICE, self.dtype) for tensor in drawn]

        hidden, width = self.hidden, self.width
        public = Experts([width], hidden, self.dtype, self.gated, self.biases, self.activation).draw(generator)
        a = ExpertTensors(
            gate=tensors(None, hidden) if self.gated else (), up=tensors(None, hidden), down=tensors(None, width)
        )
        b = ExpertTensors(
            gate=tensors(width, None) if self.gated else (),
            up=tensors(width, None),
            down=tensors(hidden, None),
            gate_bias=tensors(width) if "gate_bias" in self.biases else (),
            up_bias=tensors(width) if "up_bias" in self.biases else (),
            down_bias=tensors(hidden) if "down_bias" in self.biases else (),
        )
        return LowRankTensors(public, a, b, [(1 + i % 3) / 4 for i in range(len(self.ranks))], self.public)


def mix_low_rank_in_float64(x_TH: Tensor, weights_TM: Tensor, experts: LowRankTensors) -> Tensor:
    """The expected result, float64 [tokens, hidden], on the CPU: one token and one member at a time."""
    y_TH = torch.zeros(x_TH.shape, dtype=torch.float64)
    low_rank = [m for m in range(weights_TM.shape[1]) if m != experts.public_column]

    @functools.cache
    def full_matrix(name: str, m: int) -> tuple[Tensor, Tensor | float]:
        """The full matrix of a member, and its bias."""
        biases = getattr(experts.public, f"{name}_bias")
        matrix = getattr(experts.public, name)[0].double().cpu()
        bias = biases[0].double().cpu() if biases else 0.0
        if m in low_rank:
            e = low_rank.index(m)
            a, b = (getattr(factor, name)[e].double().cpu() for factor in (experts.a, experts.b))
            matrix = matrix + experts.scales[e] * (b @ a)
            bias = bias + getattr(experts.b, f"{name}_bias")[e].double().cpu() if biases else bias
        return matrix, bias

    for t, m in (weights_TM != 0).nonzero().tolist():
        x_H = x_TH[t].double().cpu()

        def linear(name: str, values: Tensor, m: int = m) -> Tensor:
            matrix, bias = full_matrix(name, m)
            return matrix @ values + bias

        activation = ACTIVATIONS[experts.public.activation]
        up_I = linear("up", x_H)
        h_I = activation(linear("gate", x_H)) * up_I if experts.public.gate else activation(up_I)
        y_TH[t] += weights_TM[t, m].double().cpu() * linear("down", h_I)
    return y_TH
