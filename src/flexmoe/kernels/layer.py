"""Calls the operators for the modules of a layer: takes the tensors out of the modules, and turns masks into offsets.

Shapes: T tokens, H hidden, A allowed experts, K slots. Does not cover whether the operators take a layer
(`dispatch.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flexmoe.kernels.experts.op import mix
from flexmoe.kernels.low_rank.op import mix_low_rank
from flexmoe.kernels.plans import FusedPlan, LowRankPlan
from flexmoe.kernels.route.op import route
from flexmoe.kernels.route.reference import Routing


def fused_route(
    x_TH: Tensor,
    rows: Mapping[str, nn.Module],
    allowed_TA: Tensor | None,
    k: int,
    renormalize: bool,
    evidence: Mapping[str, Tensor] | None = None,
) -> Routing:
    """Routes each token in one launch. The mask is data: a captured graph sees it change.

    Args:
        rows: the router row of each allowed expert, by name.
        allowed_TA: bool [tokens, allowed], or None: all.
        evidence: the features [tokens, F] of the experts that have it, which offset their logits.
    """
    weights, biases, offset_TA = [], [], None
    if evidence:
        offset_TA = torch.zeros(len(x_TH), len(rows), device=x_TH.device)
    for column, (name, row) in enumerate(rows.items()):
        linear: Any = row
        weight, bias = linear.weight, linear.bias
        if evidence and name in evidence:
            assert offset_TA is not None, "made above"
            factor, factors_F = linear.calibration[:1], linear.calibration[1:-1]
            weight, bias = weight * factor, bias * factor + linear.calibration[-1:]
            offset_TA[:, column] = (evidence[name].to(x_TH.device) * factors_F).sum(-1)  # read on the first device
        weights.append(weight)
        biases.append(bias)
    if allowed_TA is not None:
        offset_TA = torch.zeros(allowed_TA.shape, device=x_TH.device) if offset_TA is None else offset_TA
        offset_TA = offset_TA.masked_fill(~allowed_TA, -math.inf)
    return route(x_TH, weights, biases, offset_TA, k, renormalize)


def fused_mix(
    x_TH: Tensor, routing: Routing, networks: Sequence[nn.Module], columns: Sequence[int], plan: FusedPlan
) -> Tensor:
    """The weighted sum [tokens, hidden] of the outputs of `networks`.

    Args:
        routing: among all allowed experts.
        columns: the indices of `networks` among them.
    """
    if len(columns) < routing.weights_TE.shape[1]:
        routing = _select_experts(routing, columns)
    return mix(x_TH, routing, plan.tensors(networks))


def fused_low_rank(
    x_TH: Tensor,
    routing: Routing,
    members: Sequence[nn.Module | None],
    columns: Sequence[int],
    public: nn.Module,
    plan: LowRankPlan,
) -> Tensor:
    """The weighted sum [tokens, hidden] of the outputs of low-rank experts, and of public: None among `members`.

    Args: as for `fused_mix`.
    """
    return mix_low_rank(x_TH, select_columns(routing.weights_TE, columns), plan.tensors(public, members))


def _select_experts(routing: Routing, columns: Sequence[int]) -> Routing:
    """The routing restricted to the experts in `columns`; the slots of the others become surplus."""
    n_experts = routing.weights_TE.shape[1]
    new_id_E = routing.top_ids_TK.new_full((n_experts + 1,), len(columns))
    for new_id, e in enumerate(columns):  # not from a list, which would be copied from the host: a graph cannot wait
        new_id_E[e].fill_(new_id)
    ids_TK = new_id_E[routing.top_ids_TK.long()]
    weights_TK = torch.where(ids_TK == len(columns), 0.0, routing.top_weights_TK)
    return Routing(
        select_columns(routing.logits_TE, columns), select_columns(routing.weights_TE, columns), weights_TK, ids_TK
    )


def select_columns(values_TE: Tensor, columns: Sequence[int]) -> Tensor:
    """`values_TE[:, columns]`, contiguous, without an index that is copied from the host."""
    return torch.stack([values_TE[:, e] for e in columns], 1)


__all__ = ["fused_low_rank", "fused_mix", "fused_route", "select_columns"]
