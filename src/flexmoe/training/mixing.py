"""`experts_implementation="flexmoe_training"`: the block as it is trained on a CPU, where products take most time.

- A token whose gate is decided, so that one of its experts has nearly all of the weight, is computed by that expert
  alone. Fitted rows decide most tokens, so this leaves out almost half of the networks' products.
- Activations are computed again in the backward pass instead of being kept. They take no products.
- The routing weight scales the input of a network's last matrix, so its output is not kept for the gradient either.

Networks of an unknown structure are called as modules, on the tokens that they are left with. Router rows that are
trained need the gradients of all gates, so no token is decided then. Without gradients, as in validation, and in
compiled code, "auto" runs.

Does not cover GPUs, where it was not measured: choosing the tokens waits for the device in every layer.

Shapes: T tokens, N tokens of one expert, H hidden, I intermediate, A allowed experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from flexmoe.implementations import auto_experts_forward
from flexmoe.modeling.configuration_flexmoe import PUBLIC
from flexmoe.modeling.experts_flexmoe import FlexMoeBlock, mix_modules, names_sharing_public
from flexmoe.modeling.low_rank_flexmoe import FfnStructure, LowRankDelta, is_unwrapped
from flexmoe.modeling.masking_flexmoe import ForwardContext, is_capturing
from flexmoe.structures import structure_in_any_mode

IMPLEMENTATION = "flexmoe_training"

DECIDED = 0.02
"""An expert with less than this share of a token's weight is left out; measured in docs/training.md."""

_AFFINE = (nn.Linear, Conv1D, LowRankDelta)


def training_experts_forward(
    block: FlexMoeBlock, x_TH: Tensor, names: Sequence[str], context: ForwardContext, zeros: Sequence[Tensor] = ()
) -> Tensor:
    """Arguments and result as those of `eager_experts_forward`."""
    if not (block.training and torch.is_grad_enabled()) or len(names) == 1 or is_capturing():
        return auto_experts_forward(block, x_TH, names, context, zeros)
    weights_TA = block.route(x_TH, names, context)
    if not any(row.requires_grad for row in block.router.parameters()):
        weights_TA = decide(weights_TA)
    weights_TA = weights_TA.to(x_TH.dtype)
    columns = dict(zip(names, weights_TA.split(1, -1), strict=True))
    sharing = names_sharing_public(block.experts, names)
    if not zeros and context.row_mask is None:
        if set(sharing) == set(names) and _shares_affine_parts(block, sharing):
            return _mix_low_rank(block, x_TH, columns)
        structures = {name: None if name in sharing else _structure_of(block.experts[name]) for name in names}
        if all(structures.values()):
            return _mix_networks(block, x_TH, columns, structures)
    # k = 1 of several: experts are called on the tokens where their weight is not 0
    return mix_modules(block, x_TH, names, weights_TA, replace(context, top_k=1), zeros)


def decide(weights_TA: Tensor) -> Tensor:
    """The routing weights without those below `DECIDED` of a token's sum; the others keep that sum."""
    total_T1 = weights_TA.sum(-1, keepdim=True)
    kept_TA = weights_TA.masked_fill(weights_TA < DECIDED * total_T1, 0.0)
    return kept_TA * (total_T1 / kept_TA.sum(-1, keepdim=True))


def _mix_networks(
    block: FlexMoeBlock, x_TH: Tensor, columns: Mapping[str, Tensor], structures: Mapping[str, FfnStructure | None]
) -> Tensor:
    """The weighted sum [T, H] of networks of known structures."""
    mixed_TH = torch.zeros_like(x_TH)
    for name, weight_T1 in columns.items():
        structure, parts = structures[name], block.experts[name]._modules
        assert structure is not None
        tokens_N = _tokens_of(weight_T1)
        x_NH, weight_N1 = _rows(x_TH, tokens_N), _rows(weight_T1, tokens_N)
        inputs = [_part(parts, part)(x_NH) for part in (structure.gate, structure.up) if part is not None]
        h_NI = _hidden(_part(parts, structure.activation), inputs, weight_N1)
        mixed_TH = _add(mixed_TH, _down(_part(parts, structure.down), h_NI, weight_N1), tokens_N)
    return mixed_TH


def _mix_low_rank(block: FlexMoeBlock, x_TH: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
    """The weighted sum [T, H] of public and experts that differ from it by low-rank matrices: products are shared."""
    experts: dict[str, Any] = dict(block.experts._modules)
    parts: Any = experts[PUBLIC]._modules
    structure: FfnStructure = next(experts[name].structure for name in columns if name != PUBLIC)
    products_TI = {part: parts[part](x_TH) for part in (structure.gate, structure.up) if part is not None}
    hidden_TI = torch.zeros_like(products_TI[structure.up])
    mixed_TH = torch.zeros_like(x_TH)
    for name, weight_T1 in columns.items():
        tokens_N = _tokens_of(weight_T1)
        inputs = {part: _rows(product_TI, tokens_N) for part, product_TI in products_TI.items()}
        if name != PUBLIC:
            x_NH = _rows(x_TH, tokens_N)
            inputs = {part: product_NI + experts[name].delta(part)(x_NH) for part, product_NI in inputs.items()}
        weight_N1 = _rows(weight_T1, tokens_N)
        h_NI = _hidden(parts[structure.activation], list(inputs.values()), weight_N1)
        hidden_TI = _add(hidden_TI, h_NI, tokens_N)
        if name != PUBLIC:
            mixed_TH = _add(mixed_TH, _down(experts[name].delta(structure.down), h_NI, weight_N1), tokens_N)
    total_T1 = torch.cat(list(columns.values()), -1).sum(-1, keepdim=True)
    return mixed_TH + _down(parts[structure.down], hidden_TI, total_T1)


def _hidden(activation: nn.Module, inputs: Sequence[Tensor], weight_N1: Tensor) -> Tensor:
    """The input [N, I] of a network's last matrix times the routing weight, computed again in the backward pass."""
    return checkpoint(_weighted, activation, weight_N1, *inputs, use_reentrant=False, preserve_rng_state=False)


def _weighted(activation: nn.Module, weight_N1: Tensor, gate_NI: Tensor, *up_NI: Tensor) -> Tensor:
    h_NI = activation(gate_NI)
    for factor_NI in up_NI:
        h_NI = h_NI * factor_NI
    return h_NI * weight_N1


def _down(part: Any, h_NI: Tensor, weight_N1: Tensor) -> Tensor:
    """`weight * part(h)` of an affine `part`, given `weight * h`: its bias was not scaled yet."""
    y_NH = part(h_NI)
    bias_H = part.B.bias if isinstance(part, LowRankDelta) else part.bias
    return y_NH if bias_H is None else y_NH + bias_H * (weight_N1 - 1)


def _tokens_of(weight_T1: Tensor) -> Tensor | None:
    """The tokens [N] with a weight; None for all."""
    tokens_N = weight_T1.squeeze(-1).nonzero().squeeze(-1)
    return None if len(tokens_N) == len(weight_T1) else tokens_N


def _rows(x: Tensor, tokens_N: Tensor | None) -> Tensor:
    return x if tokens_N is None else x.index_select(0, tokens_N)  # its gradient is faster than that of x[tokens]


def _add(total: Tensor, y: Tensor, tokens_N: Tensor | None) -> Tensor:
    y = y.to(total.dtype)  # under autocast the dtypes differ
    return total + y if tokens_N is None else total.index_add(0, tokens_N, y)


def _part(parts: Mapping[str, Any], name: str | None) -> Any:
    return parts[name or ""]


def _structure_of(network: nn.Module) -> FfnStructure | None:
    """The structure of a network that may run in parts; None if it has another one, hooks, or a random activation."""
    structure = structure_in_any_mode(network)
    return structure if structure is not None and _runs_in_parts(network, structure) else None


def _runs_in_parts(network: nn.Module, structure: FfnStructure) -> bool:
    parts: dict[str, Any] = network._modules
    activation, down = parts[structure.activation], parts[structure.down]
    is_fixed = not any(True for _ in activation.parameters()) and not isinstance(activation, nn.RReLU)
    return is_fixed and _is_affine(down)


def _shares_affine_parts(block: FlexMoeBlock, names: Sequence[str]) -> bool:
    experts: dict[str, Any] = block.experts._modules
    structure: FfnStructure = next(experts[name].structure for name in names if name != PUBLIC)
    deltas = [experts[name].delta(structure.down) for name in names if name != PUBLIC]
    return _runs_in_parts(experts[PUBLIC], structure) and all(map(_is_affine, deltas))


def _is_affine(part: nn.Module) -> bool:
    """Whether `part` computes a product and adds its bias, and nothing else."""
    return type(part) in _AFFINE and is_unwrapped(part)


__all__ = ["DECIDED", "IMPLEMENTATION", "decide", "training_experts_forward"]
