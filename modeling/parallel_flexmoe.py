"""FlexMoE on several processes: tensor-parallel plans by expert, what other processes wait for, tensors out of shards.

Distributing is the library's (`DistributedConfig`) and torch's own work (`fully_shard`, DistributedDataParallel); this
is what they need to know about experts that come and go. Does not cover pipelines, or starting processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
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
"""Styles by module or parameter, `*` for a layer's number: {"anchor.model.layers.*.self_attn.q_proj": "colwise"}."""

PLANS = ("_tp_plan", "_ep_plan", "_fsdp_plan")
"""Attributes under which a model of the library keeps plans of this kind."""

_EXPERTS = ".experts."


# Plans


def plan_of_public(plan: Plan, public: dict[str, nn.Module], names: NameMap) -> Plan:
    """The plan of a dense anchor, its rules for the feed-forward networks under the names of the public ones.

    Args:
        plan: the anchor's rules, with the prefix that the anchor has in a FlexMoE.
        public: the public networks by their names.
        names: the tensor names of this anchor.
    """
    moved: dict[str, str] = {}
    for network_name, network in public.items():
        for part, _ in itertools.chain(network.named_modules(), network.named_parameters()):
            name = f"{network_name}.{part}" if part else network_name
            dense_name = names.to_dense(f"{name}.")  # the map is one of prefixes
            if dense_name is not None:
                rule = _wildcard(ANCHOR_PREFIX + dense_name.removesuffix("."))
                if rule in plan:
                    moved[rule] = _wildcard(name)
    return {moved.get(rule, rule): style for rule, style in plan.items()}


def plan_of_experts(plan: Plan, blocks: Sequence[str], experts: Mapping[str, str]) -> Plan:
    """`plan` with the public network's rules for each expert of the named blocks, and for no other.

    Args:
        experts: the kind of each expert, by its name.
    """
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
    """Which part of an expert is sharded as the public network's `part` is; None if none is.

    A low-rank difference B(A x) is cut as its matrix is: B by its rows, A by its columns.
    """
    if kind != "low_rank":
        return part
    side = "A" if "rowwise" in style else "B" if "colwise" in style else None
    return f"{part}.{side}" if part and side else None


def shard_by_plan(network: nn.Module, name: str, plan: Plan, mesh: Any) -> None:
    """Shards `network`, whole and equal in every process, as the plan has it under this name in the model.

    Every process keeps its part; nothing is sent.
    """
    for path, module in network.named_modules():
        rule = _wildcard(f"{name}.{path}" if path else name)
        for parameter, _ in list(module.named_parameters(recurse=False)):
            style = plan.get(f"{rule}.{parameter}") or plan.get(rule)
            if style is not None:
                ALL_PARALLEL_STYLES[style].shard_param(module, parameter, mesh)
        if rule in plan:
            ALL_PARALLEL_STYLES[plan[rule]].install_forward(module, mesh)


def agree_on(module: nn.Module, mesh: Any) -> None:
    """Gives every process of the mesh the numbers that its first one has in the parameters of `module`."""
    group = mesh.get_group()
    for parameter in module.parameters():
        torch.distributed.broadcast(parameter.data, group_src=0, group=group)


def tensor_parallel_mesh(model: Any) -> Any | None:
    """The device mesh over which the library sharded the model's matrices; None if it did not."""
    if (getattr(model, "_tp_size", None) or 1) == 1:
        return None
    mesh = model._device_mesh
    return mesh["tp"] if mesh.ndim > 1 else mesh


def _wildcard(name: str) -> str:
    return replace_layer_number_by_wildcard(name)


# What other processes wait for


def class_without_fsdp(cls: type) -> type:
    """The class that `fully_shard` made `cls` from, or `cls` itself: the one that stands in a file."""
    return next(base for base in cls.__mro__ if not issubclass(base, _FSDP))


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 manages the module or one inside it."""
    return any(isinstance(part, _FSDP) for part in module.modules())


def is_awaited(*modules: nn.Module) -> bool:
    """Whether other processes wait until the modules are called here, though there is nothing for them to do.

    DDP and FSDP2 reduce gradients once every process has some, and a module of its own under FSDP2 is gathered when it
    is called.
    """
    if torch.is_grad_enabled() and any(p.requires_grad for module in modules for p in module.parameters()):
        return True
    return has_company() and any(map(is_fully_sharded, modules))


def has_company() -> bool:
    """Whether this process belongs to a group of several."""
    return (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


# Tensors out of shards


def whole(tensor: Tensor) -> Tensor:
    """The tensor in one piece: itself, or gathered from its shards, for which every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, _SHARDED) else tensor


def is_sharded(module: nn.Module) -> bool:
    """Whether a parameter of the module lies in shards on several processes."""
    return any(isinstance(parameter, _SHARDED) for parameter in module.parameters())


def in_first_process(act: Callable[[], object]) -> None:
    """Runs `act` in the first process of the group; the others wait until it is done. Every process must call this."""
    try:
        if torch.distributed.get_rank() == 0:
            act()
    finally:
        torch.distributed.barrier()


__all__ = [
    "PLANS",
    "Plan",
    "agree_on",
    "class_without_fsdp",
    "has_company",
    "in_first_process",
    "is_awaited",
    "is_fully_sharded",
    "is_sharded",
    "plan_of_experts",
    "plan_of_public",
    "shard_by_plan",
    "tensor_parallel_mesh",
    "whole",
]
