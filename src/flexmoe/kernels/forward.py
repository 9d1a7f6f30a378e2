"""The implementation "flexmoe_triton" of a layer: fused operators for the parts that they take, modules for the rest.

An entry of `EXPERTS_FORWARDS`; the reference is `eager_experts_forward` (`modeling/experts_flexmoe.py`).

Shapes: T tokens, H hidden, A allowed experts, M members: low-rank experts, and public with them. Does not cover which
parts the operators take (`dispatch.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flexmoe.kernels.dispatch import Inputs, LayerPath, auto_takes_triton, choose_path
from flexmoe.kernels.layer import fused_low_rank, fused_mix, fused_route, select_columns
from flexmoe.kernels.route.reference import Routing
from flexmoe.modeling.configuration_flexmoe import PUBLIC
from flexmoe.modeling.experts_flexmoe import (
    FlexMoeBlock,
    eager_experts_forward,
    mix_low_rank,
    mix_modules,
    names_sharing_public,
)
from flexmoe.modeling.masking_flexmoe import ForwardContext


def triton_experts_forward(
    block: FlexMoeBlock, x_TH: Tensor, names: Sequence[str], context: ForwardContext, zeros: Sequence[Tensor] = ()
) -> Tensor:
    """Runs a layer as `eager_experts_forward` does, with the same arguments and result, to rounding.

    A layer that the operators do not take runs eagerly. FFNs that take a residual (`zeros`) are among those.
    """
    names = tuple(names)
    if zeros:
        return eager_experts_forward(block, x_TH, names, context, zeros)
    sharing = names_sharing_public(block.experts, names)
    path = choose_path(block, names, Inputs.of(x_TH), sharing)
    if not path.fuses_router:
        return eager_experts_forward(block, x_TH, names, context)
    rows = {name: block.router[name] for name in names}
    allowed_TA, k = block.allowed(context, x_TH), block.num_chosen(context)
    routing = fused_route(x_TH, rows, allowed_TA, k, block.renormalizes(context), context.evidence)
    block.record(context, names, routing.logits_TE, routing.weights_TE)
    if path.fuses_experts:
        return _mix_fused(block, x_TH, names, routing, sharing, path)
    return mix_modules(block, x_TH, names, routing.weights_TE.to(x_TH.dtype), context)


def _mix_fused(
    block: FlexMoeBlock,
    x_TH: Tensor,
    names: Sequence[str],
    routing: Routing,
    sharing: Sequence[str],
    path: LayerPath,
) -> Tensor:
    """The full experts through `mix`; those of `sharing` through `mix_low_rank`, or as modules."""
    mixed_TH: Tensor | None = None
    if path.plan is not None:
        columns = [i for i, name in enumerate(names) if name not in sharing]
        networks = [block.experts[names[i]] for i in columns]
        mixed_TH = fused_mix(x_TH, routing, networks, columns, path.plan)
    if sharing:
        columns = [names.index(name) for name in sharing]
        if path.low_rank is not None:
            members = [None if name == PUBLIC else block.experts[name] for name in sharing]
            y_TH = fused_low_rank(x_TH, routing, members, columns, block.experts[PUBLIC], path.low_rank)
        else:
            weights_TM = select_columns(routing.weights_TE, columns).to(x_TH.dtype)
            y_TH = mix_low_rank(block, x_TH, sharing, weights_TM, "masked")
        mixed_TH = y_TH if mixed_TH is None else mixed_TH + y_TH
    assert mixed_TH is not None
    return mixed_TH


__all__ = ["auto_takes_triton", "triton_experts_forward"]
