"""FlexMoE on several ranks: tensor-parallel plans per expert, calls that every rank must make, gathering shards.

Distribution itself is done by transformers (`DistributedConfig`) and torch (`fully_shard`, DistributedDataParallel);
this module tells them about experts that are added and removed. Does not cover pipeline parallelism, or launching
processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard

from .anchors_flexmoe import ANCHOR_PREFIX, NameMap
from .configuration_flexmoe import PUBLIC

_FSDP: tuple[type[Any], ...] = ()
_SHARDED: tuple[type[Any], ...] = ()
if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    _FSDP, _SHARDED = (FSDPModule,), (DTensor,)

Plan = dict[str, str]
"""Styles by module or parameter, `*` for a layer number: {"anchor.model.layers.*.self_attn.q_proj": "colwise"}."""

PLANS = ("_tp_plan", "_ep_plan", "_fsdp_plan")
"""Attributes of a transformers model that hold such plans."""

_EXPERTS = ".experts."


# Plans


def plan_of_public(plan: Plan, public: dict[str, nn.Module], names: NameMap) -> Plan:
    """The plan of a dense anchor with its rules for the FFNs moved to the public experts.

    Args:
        plan: the anchor's rules, with the prefix that the anchor has in a FlexMoE.
        public: the public networks by name.
        names: the tensor names of this anchor.
    """
    moved: dict[str, str] = {}
    for network_name, network in public.items():
        for part, _ in itertools.chain(network.named_modules(), network.named_parameters()):
            name = f"{network_name}.{part}" if part else network_name
            dense_name = names.to_dense(f"{name}.")  # the map works on prefixes
            if dense_name is not None:
                rule = _wildcard(ANCHOR_PREFIX + dense_name.removesuffix("."))
                if rule in plan:
                    moved[rule] = _wildcard(name)
    return {moved.get(rule, rule): style for rule, style in plan.items()}


def plan_of_experts(plan: Plan, blocks: Sequence[str], experts: Mapping[str, str]) -> Plan:
    """`plan` with the public network's rules repeated for each of `experts` (kinds by name) in the named blocks."""
    here = {_wildcard(block) for block in blocks}
    rules: Plan = {}
    for rule, style in plan.items():
        block, _, inside = rule.partition(_EXPERTS)
        owner, dot, part = inside.partition(".")
        if not owner or block not in here:
            rules[rule] = style
        elif owner == PUBLIC:
            parts = {name: _part_of_kind(kind, part, style) for name, kind in experts.items()}
            rules |= {f"{block}{_EXPERTS}{name}{dot}{part}": style for name, part in parts.items() if part is not None}
    return rules


def _part_of_kind(kind: str, part: str, style: str) -> str | None:
    """The part sharded like public's `part`, or None. A difference B(A x) is sharded like its matrix: B by rows, A by
    columns."""
    if kind != "low_rank":
        return part
    side = "A" if "rowwise" in style else "B" if "colwise" in style else None
    return f"{part}.{side}" if part and side else None


def shard_by_plan(network: nn.Module, name: str, plan: Plan, mesh: Any) -> None:
    """Shards `network`, complete and equal on every rank, by the plan's rules for `name`; nothing is communicated."""
    for path, module in network.named_modules():
        rule = _wildcard(f"{name}.{path}" if path else name)
        for parameter, _ in list(module.named_parameters(recurse=False)):
            style = plan.get(f"{rule}.{parameter}") or plan.get(rule)
            if style is not None:
                ALL_PARALLEL_STYLES[style].shard_param(module, parameter, mesh)
        if rule in plan:
            ALL_PARALLEL_STYLES[plan[rule]].install_forward(module, mesh)


def tensor_parallel_mesh(model: Any) -> Any | None:
    """The device mesh over which transformers sharded the model; None if it did not."""
    if (getattr(model, "_tp_size", None) or 1) == 1:
        return None
    mesh = model._device_mesh
    return mesh["tp"] if mesh.ndim > 1 else mesh


def _wildcard(name: str) -> str:
    return replace_layer_number_by_wildcard(name)


# Calls that every rank must make


def class_without_fsdp(cls: type) -> type:
    """The class that `fully_shard` derived `cls` from, or `cls` itself: the one with a source file."""
    return next(base for base in cls.__mro__ if not issubclass(base, _FSDP))


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 manages the module or a submodule."""
    return any(isinstance(part, _FSDP) for part in module.modules())


def must_run_on_all_ranks(*modules: nn.Module) -> bool:
    """Whether the modules must be called on this rank even if no token is routed to them.

    DDP and FSDP2 reduce gradients once every rank has some, and FSDP2 gathers a module of its own when it is called.
    """
    if torch.is_grad_enabled() and any(p.requires_grad for module in modules for p in module.parameters()):
        return True
    return is_distributed() and any(map(is_fully_sharded, modules))


def is_distributed() -> bool:
    """Whether this process is one of several ranks."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


# Shards


def full_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or gathered from its shards; every rank must call this for a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, _SHARDED) else tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether a parameter of the module is sharded over several ranks."""
    return any(isinstance(parameter, _SHARDED) for parameter in module.parameters())
