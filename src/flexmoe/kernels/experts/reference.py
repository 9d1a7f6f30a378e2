"""The weighted mix of full experts in plain PyTorch: the reference for the kernels, and the operator's CPU version.

Deliberately simple, and shares no code with the kernels.

Shapes: T tokens, N tokens of one expert, H hidden, I intermediate (it may differ between experts), E experts.

Does not cover experts that are more than plain matrices: those are called as modules (`modeling/experts_flexmoe.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
"""The supported activations, by their name in `ExpertTensors`."""


@dataclass(frozen=True)
class ExpertTensors:
    """The matrices of a layer's experts, one of each per expert: `down(activation(gate x) * up x)`.

    Attributes:
        up: [I, H] each; I may differ between experts.
        down: [H, I] each.
        gate: [I, H] each, or empty: `down(activation(up x))`.
        up_bias, gate_bias: [I] each, or empty.
        down_bias: [H] each, or empty.
        activation: a key of `ACTIVATIONS`.
    """

    up: Sequence[Tensor]
    down: Sequence[Tensor]
    gate: Sequence[Tensor] = ()
    up_bias: Sequence[Tensor] = ()
    down_bias: Sequence[Tensor] = ()
    gate_bias: Sequence[Tensor] = ()
    activation: str = "silu"


def mix(x_TH: Tensor, weights_TE: Tensor, experts: ExpertTensors) -> Tensor:
    """Computes the weighted sum [tokens, hidden] of the experts' outputs, in the dtype of `x_TH`.

    Args:
        weights_TE: of `Routing`. An expert is computed for the tokens whose weight is not 0; NaN in an expert does not
            reach the other tokens.
    """
    y_TH = torch.zeros_like(x_TH)
    for e in range(len(experts.up)):
        tokens = weights_TE[:, e].nonzero().squeeze(-1)
        output_NH = _expert(x_TH[tokens], e, experts)
        y_TH = y_TH.index_add(0, tokens, output_NH * weights_TE[tokens, e, None].to(output_NH.dtype))
    return y_TH


def _expert(x_NH: Tensor, e: int, experts: ExpertTensors) -> Tensor:
    activation = ACTIVATIONS[experts.activation]
    up_NI = F.linear(x_NH, experts.up[e], experts.up_bias[e] if experts.up_bias else None)
    if experts.gate:
        gate_NI = F.linear(x_NH, experts.gate[e], experts.gate_bias[e] if experts.gate_bias else None)
        h_NI = activation(gate_NI) * up_NI
    else:
        h_NI = activation(up_NI)
    return F.linear(h_NI, experts.down[e], experts.down_bias[e] if experts.down_bias else None)


__all__ = ["ACTIVATIONS", "ExpertTensors", "mix"]
