"""All checks of an expert that need no text, on a live model: router rows, biases, and what its networks compute.

Does not cover stored models (`flexmoe.admission.stored_rows`, `flexmoe.admission.stored_outputs`), text
(`flexmoe.admission.verification`), files (`flexmoe.packages.package`) or signatures (`flexmoe.packages.trust`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flexmoe.admission.evidence import check_evidence, routed_row
from flexmoe.admission.findings import Finding, not_checked
from flexmoe.admission.measures import unreadable_reason
from flexmoe.admission.outputs import EMPTY, NOT_FINITE, OUTPUT, OutputCheck, Probes, Reference, filled, zeros
from flexmoe.admission.router_inputs import inputs_of_live
from flexmoe.admission.rows import Row, check_rows
from flexmoe.modeling.adapters_flexmoe import beneath_adapter
from flexmoe.modeling.configuration_flexmoe import PUBLIC, FlexMoeConfig
from flexmoe.modeling.experts_flexmoe import FlexMoeBlock, floating_dtype, has_quantized_weights
from flexmoe.packages.modules import execution_device, fresh_networks, read_tensor


def check_expert(
    model: Any,
    parts: Sequence[tuple[nn.Module, nn.Module]],
    *,
    replaced: str | None = None,
    evidence: Mapping[str, Any] | None = None,
) -> list[Finding]:
    """Checks an expert before it is added to a model, which does not change; the expert is put in eval mode.

    Args:
        model: a FlexMoE model.
        parts: the expert's network and router row in each of its blocks.
        replaced: the expert that it replaces, which is no reference for it.
        evidence: of its record.
    """
    blocks = model.flexmoe_blocks()
    names = [name for name in blocks[0].router if name not in (PUBLIC, replaced)]
    rows: list[Any] = [beneath_adapter(row) for _, row in parts]
    return [
        *check_rows(
            [_live_row(row) for _, row in parts],
            public=[_live_row(block.router[PUBLIC]) for block in blocks],
            others={name: [_live_row(block.router[name]) for block in blocks] for name in names},
            inputs=inputs_of_live(model),
        ),
        *([check_evidence(rows[0].table, [row.calibration.detach() for row in rows], evidence)] if evidence else ()),
        *_check_outputs(blocks, [network for network, _ in parts], model.config),
    ]


def _check_outputs(
    blocks: Sequence[FlexMoeBlock], networks: Sequence[nn.Module], config: FlexMoeConfig
) -> list[Finding]:
    tensors = [tensor for network in networks for tensor in network.parameters()]
    if reason := next((why for tensor in tensors if (why := unreadable_reason(tensor))), None):
        return [not_checked(check, f"the expert's network {reason}") for check in (OUTPUT, EMPTY)]
    dtype = floating_dtype(networks[0]) or torch.get_default_dtype()
    if dtype.itemsize == 1:  # beside a quantised public network, whose dtype an expert cannot take
        return [not_checked(check, f"the expert's network is {dtype}") for check in (OUTPUT, EMPTY)]
    check = OutputCheck()
    for block, network, fresh in zip(blocks, networks, fresh_networks(config), strict=True):
        device = next((tensor.device for tensor in network.parameters()), execution_device(block))
        probes = Probes(block.layer_index, block.hidden_size, dtype, device)
        public, reference, unread = _public_of(block, fresh, probes)
        check.add(block.layer_index, network.eval(), public, reference, probes, unread=unread)
    return check.findings()


def _public_of(block: FlexMoeBlock, fresh: nn.Module, probes: Probes) -> tuple[nn.Module, Reference | None, str]:
    """Public's network without hooks and adapters, what it computes, and the reason if that is not known.

    Args:
        fresh: the anchor's network of this layer without weights; it is filled.
    """
    live = block.experts[PUBLIC]
    is_quantized = has_quantized_weights(live)  # then it is called as it is
    try:
        if any(hasattr(tensor, "full_tensor") for tensor in live.parameters()):  # gathering would need all ranks
            raise ValueError("public's network is sharded over several ranks")
        public = live if is_quantized else filled(fresh, {key: read_tensor(live, key) for key in fresh.state_dict()})
        reference, unread = Reference.of(public, probes), NOT_FINITE
    except (ValueError, RuntimeError, TypeError) as error:
        reference = None
        unread = f"public's network is quantised, and cannot be called here: {error}" if is_quantized else str(error)
    if reference is None:
        return zeros(fresh, probes.dtype, probes.device), None, unread
    return public, reference, ""


def _live_row(row: nn.Module) -> Row:
    unwrapped: Any = beneath_adapter(row)
    calibration = getattr(unwrapped, "calibration", None)
    return routed_row(
        unwrapped.weight.detach(), unwrapped.bias.detach(), None if calibration is None else calibration.detach()
    )


__all__ = ["check_expert"]
