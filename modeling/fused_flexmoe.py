"""How a layer runs on the operators of `ops_flexmoe`: tensors out of modules, and the choices of a call as an offset.

Shapes: T tokens, H hidden, A allowed experts, K slots. Does not cover whether the operators take a layer
(`implementations_flexmoe`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .implementations_flexmoe import FusedPlan, LowRankPlan
from .low_rank_flexmoe import LowRankDelta
from .ops_flexmoe import kernels_have_run, mix, mix_low_rank, redirect, route
from .routing_flexmoe import Routing


def fused_route(
    x_TH: Tensor, rows: Sequence[nn.Module], allowed_TA: Tensor | None, k: int, renormalize: bool
) -> Routing:
    """Where each token goes, in one launch. Which experts a sequence may use is data: a captured graph sees it change.

    Args:
        rows: the router row of each allowed expert.
        allowed_TA: bool [tokens, allowed], or None: all.
    """
    linears: list[Any] = list(rows)
    offset_TA = None
    if allowed_TA is not None:
        offset_TA = torch.zeros(allowed_TA.shape, device=x_TH.device).masked_fill(~allowed_TA, -math.inf)
    return route(x_TH, [r.weight for r in linears], [r.bias for r in linears], offset_TA, k, renormalize)


def fused_mix(
    x_TH: Tensor, routing: Routing, networks: Sequence[nn.Module], columns: Sequence[int], plan: FusedPlan
) -> Tensor:
    """The weighted sum [tokens, hidden] of what `networks` say.

    Args:
        routing: among all allowed experts.
        columns: which of those `networks` are.
    """
    if len(columns) < routing.weights_TE.shape[1]:
        routing = _among(routing, columns)
    return mix(x_TH, routing, plan.tensors(networks))


def fused_low_rank(
    x_TH: Tensor,
    routing: Routing,
    members: Sequence[nn.Module | None],
    columns: Sequence[int],
    public: nn.Module,
    plan: LowRankPlan,
) -> Tensor:
    """The weighted sum [tokens, hidden] of what low-rank experts say, and the public network: None among `members`.

    Args: as for `fused_mix`.
    """
    return mix_low_rank(x_TH, columns_of(routing.weights_TE, columns), plan.tensors(public, members))


@contextlib.contextmanager
def redirecting(block: Any) -> Iterator[None]:
    """Around a change of a layer: captured CUDA graphs, which still have the old addresses, are told the new ones.

    An expert in the slot of one of the same shapes is run from then on. Where nothing is any more, or something else,
    the kernels find 0 and say NaN, and freed memory is not read; `block.changes` counts these, and newcomers.
    """
    before = _places(block)
    try:
        yield
    finally:  # a change that fails half-way has moved some all the same
        _tell(block, before, _places(block))


def _tell(block: Any, before: dict[str, tuple[Any, ...]], after: dict[str, tuple[Any, ...]]) -> None:
    moves = {}
    for path, (address, *kind) in before.items():
        now, *kind_now = after.get(path, (0,))
        if now != address:
            moves[address] = now if kind_now == kind else 0
    if moves:
        redirect(moves)
    if before.keys() != after.keys() or 0 in moves.values():
        block.changes += 1


def _places(block: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Address, device, dtype, shape and scale of a layer's tensors by path; nothing as long as no kernel has run."""
    if not kernels_have_run():
        return {}
    plain = ((path, p) for path, p in block.named_parameters() if type(p) is nn.Parameter and not p.is_meta)
    # a table of low-rank experts holds their scales: with another one the new tensors would be run wrongly
    scales = {path: delta.scale for path, delta in block.named_modules() if isinstance(delta, LowRankDelta)}
    return {
        path: (p.data_ptr(), p.device, p.dtype, p.shape, scales.get(path.rpartition(".")[0].rpartition(".")[0]))
        for path, p in plain
    }


def _among(routing: Routing, columns: Sequence[int]) -> Routing:
    """The routing with no more experts than `columns`; the slots of the others are surplus."""
    everyone = routing.weights_TE.shape[1]
    place_E = routing.top_ids_TK.new_full((everyone + 1,), len(columns))
    for place, e in enumerate(columns):  # not from a list: a graph that is captured can't wait for a copy of it
        place_E[e].fill_(place)
    ids_TK = place_E[routing.top_ids_TK.long()]
    weights_TK = torch.where(ids_TK == len(columns), 0.0, routing.top_weights_TK)
    return Routing(columns_of(routing.logits_TE, columns), columns_of(routing.weights_TE, columns), weights_TK, ids_TK)


def columns_of(values_TE: Tensor, columns: Sequence[int]) -> Tensor:
    """`values_TE[:, columns]`, contiguous, without an index that would come from the host."""
    return torch.stack([values_TE[:, e] for e in columns], 1)


__all__ = ["columns_of", "fused_low_rank", "fused_mix", "fused_route", "redirecting"]
