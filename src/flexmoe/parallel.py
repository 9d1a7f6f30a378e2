"""The plans by which transformers distributes a FlexMoE: tensor-parallel rules for every expert, as for public.

Distribution itself is done by transformers (`DistributedConfig`); this module tells it about experts that are added or
removed. Does not cover pipeline parallelism, or launching processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard

from flexmoe.modeling.anchors_flexmoe import ANCHOR_PREFIX, NameMap
from flexmoe.modeling.configuration_flexmoe import PUBLIC

Plan = dict[str, str]
"""Styles by module or parameter, `*` for a layer number: {"anchor.model.layers.*.self_attn.q_proj": "colwise"}."""

PLANS = ("_tp_plan", "_ep_plan", "_fsdp_plan")
"""Attributes of a transformers model that hold such plans."""

_EXPERTS = ".experts."


def extend_plans(model: Any) -> None:
    """Extends the anchor's plans for its FFNs to every expert of a model."""
    public = {f"{name}.experts.{PUBLIC}": block.experts[PUBLIC] for name, block in model.named_blocks().items()}
    for kind in PLANS:
        setattr(model, kind, plan_of_public(getattr(model, kind), public, model.anchor_names))
    update_plans(model)


def update_plans(model: Any) -> None:
    """Brings the plans of a model in line with its experts."""
    records = {record["name"]: record for record in model.config.expert_records}
    for kind in PLANS:
        setattr(model, kind, _plan_for(model, records, kind))


def shard_expert(model: Any, records: Mapping[str, Any], name: str, networks: Sequence[nn.Module]) -> None:
    """Shards the networks of an expert, complete and equal on every rank, as the model is sharded.

    Args:
        records: of the model's experts, with that of the new one.
        networks: one per block.
    """
    plan, mesh = _plan_for(model, records, "_tp_plan"), tensor_parallel_mesh(model)
    for block, network in zip(model.named_blocks(), networks, strict=True):
        shard_by_plan(network, f"{block}.experts.{name}", plan, mesh)


def _plan_for(model: Any, records: Mapping[str, dict[str, Any]], kind: str) -> Plan:
    kinds = {name: record["kind"] for name, record in records.items()}
    return plan_of_experts(getattr(model, kind), list(model.named_blocks()), kinds)


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


__all__ = [
    "extend_plans",
    "plan_of_experts",
    "plan_of_public",
    "shard_by_plan",
    "shard_expert",
    "tensor_parallel_mesh",
    "update_plans",
]
