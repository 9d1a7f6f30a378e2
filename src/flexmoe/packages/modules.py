"""The modules of an expert: built without weights, copied from the public network, or loaded from a package.

New modules are instances of the anchor's own class, built from its config, because the live ones may carry hooks,
adapters or quantised weights; only a copy of a quantised public network is quantised. Nothing here changes a model.

Shapes: H hidden size. A router row is an `nn.Linear(H, 1)`.

Does not cover adding the modules to a model (`flexmoe.admission.live`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flexmoe.io.finite import cast_finite
from flexmoe.meta import build_on_meta
from flexmoe.modeling.adapters_flexmoe import beneath_adapter
from flexmoe.modeling.configuration_flexmoe import PUBLIC, FlexMoeConfig
from flexmoe.modeling.distributed_flexmoe import full_tensor
from flexmoe.modeling.experts_flexmoe import (
    FlexMoeBlock,
    floating_dtype,
    has_quantized_weights,
    make_expert,
    router_row,
)
from flexmoe.modeling.low_rank_flexmoe import LowRankDelta, is_low_rank
from flexmoe.packages.checks import check_shapes, expected_shapes, name_in_package
from flexmoe.packages.package import ExpertPackage
from flexmoe.packages.quantization import copy_quantized

ExpertPart = tuple[nn.Module, nn.Linear]
"""An expert in one layer: its network and its router row."""


def fresh_networks(config: FlexMoeConfig) -> list[nn.Module]:
    """The anchor's networks without weights (on the meta device), one per layer."""
    dense, sites = build_on_meta(config.anchor_config)
    return [site.ffn(dense) for site in sites]


def fresh_experts(
    config: FlexMoeConfig, record: Mapping[str, Any], networks: Sequence[nn.Module] | None = None
) -> list[nn.Module]:
    """An expert's networks without weights, one per layer.

    Args:
        record: the expert's record in the config.
        networks: the anchor's networks; by default `fresh_networks`.
    """
    hidden_size = config.get_text_config().hidden_size
    networks = fresh_networks(config) if networks is None else networks
    return [make_expert(ffn, record, layer=layer, hidden_size=hidden_size) for layer, ffn in enumerate(networks)]


def fresh_row(block: FlexMoeBlock, evidence: Mapping[str, Any] | None = None) -> nn.Linear:
    """A router row of zeros, on the device and in the dtype of the block's public row; `evidence` of its record."""
    like: dict[str, Any] = {"device": execution_device(block), "dtype": floating_dtype(block.router[PUBLIC])}
    return router_row(block.hidden_size, evidence, block.layer_index, **like)


def parts_from_public(
    blocks: Sequence[FlexMoeBlock], networks: Sequence[nn.Module], evidence: Mapping[str, Any] | None = None
) -> list[ExpertPart]:
    """An expert that computes what the public networks compute, with router rows of zeros.

    Args:
        networks: the expert's, without weights (`fresh_experts`). Full networks become copies of the public ones;
            low-rank ones are initialised without a difference.
        evidence: of the expert's record.
    """
    parts = []
    for block, network in zip(blocks, networks, strict=True):
        public = block.experts[PUBLIC]
        if is_low_rank(network):
            _initialize_low_rank(network, execution_device(block), floating_dtype(public))
        elif has_quantized_weights(public):
            network = copy_quantized(public, network)
        else:
            state = {key: read_tensor(public, key).clone() for key in network.state_dict()}
            network.load_state_dict(state, assign=True)
        parts.append((network, fresh_row(block, evidence)))
    return parts


def parts_from_package(
    blocks: Sequence[FlexMoeBlock], networks: Sequence[nn.Module], package: ExpertPackage
) -> list[ExpertPart]:
    """The networks and rows of a package, on the devices and in the dtypes of the public ones.

    Args:
        networks: the expert's, without weights, made from the package's record (`fresh_experts`); they are filled.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape, or overflows in the model's dtype; or the package
            is damaged (`PackageError`).
    """
    record = package.manifest.record()
    evidence = record.get("evidence")
    parts = [(network, fresh_row(block, evidence)) for block, network in zip(blocks, networks, strict=True)]
    by_layer = {block.layer_index: network for block, network in zip(blocks, networks, strict=True)}
    check_shapes(package, expected_shapes(by_layer, record, blocks[0].hidden_size))
    targets: dict[str, tuple[FlexMoeBlock, nn.Module, nn.Module, str]] = {}  # block, public's part, module, key
    for block, (network, row) in zip(blocks, parts, strict=True):
        at = f"layers.{block.layer_index}"
        for key in network.state_dict():
            name = f"{at}.ffn.{name_in_package(network, key)}"
            targets[name] = (block, block.experts[PUBLIC], network, key)
        targets |= {f"{at}.router.{key}": (block, block.router[PUBLIC], row, key) for key in row.state_dict()}
    for name, tensor in package.tensors():
        block, public, module, key = targets[name]
        dtype = floating_dtype(public) or tensor.dtype  # a quantised public network has none
        cast = cast_finite(tensor, dtype, f"{package.folder}: {name!r}")
        _set_tensor(module, key, cast.to(execution_device(block)))
    return parts


def read_tensor(module: nn.Module, key: str) -> Tensor:
    """The tensor `key` of a live module: gathered from its shards, beneath adapters, computed if parametrised.

    Raises:
        ValueError: the module has no such tensor, or its data cannot be read.
    """
    owner_name, _, leaf = key.rpartition(".")
    owner = module
    try:
        for name in owner_name.split(".") if owner_name else ():
            owner = beneath_adapter(getattr(owner, name))
        owner = beneath_adapter(owner)
        value = getattr(owner, leaf).detach()
    except AttributeError as error:
        raise ValueError(
            f"{type(module).__name__} no longer has a tensor {key!r}: remove the wrapper around it."
        ) from error
    if not value.is_meta:
        return full_tensor(value)
    for hook in _offload_hooks(owner):  # an offloaded tensor is in its hook's map
        if leaf in (hook.weights_map or ()):
            return hook.weights_map[leaf].to(hook.execution_device)
    raise ValueError(f"{type(module).__name__}: {key!r} is on the meta device and cannot be read.")


def execution_device(block: FlexMoeBlock) -> torch.device:
    """The device on which the block computes; offloaded parameters are on the meta device between calls."""
    device = next(block.parameters()).device
    if device.type != "meta":
        return device
    devices = (hook.execution_device for module in block.modules() for hook in _offload_hooks(module))
    return torch.device(next((device for device in devices if device is not None), device))


def _initialize_low_rank(network: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    network.to_empty(device=device)
    if dtype is not None:
        network.to(dtype)
    for delta in network.modules():
        if isinstance(delta, LowRankDelta):
            delta.reset_parameters()


def _offload_hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks on a module that load its tensors for the duration of a call."""
    hook = getattr(module, "_hf_hook", None)
    return [part for part in getattr(hook, "hooks", (hook,)) if hasattr(part, "weights_map")]


def _set_tensor(module: nn.Module, key: str, tensor: Tensor) -> None:
    owner_name, _, leaf = key.rpartition(".")
    owner = module.get_submodule(owner_name)
    is_parameter = isinstance(getattr(owner, leaf), nn.Parameter)
    setattr(owner, leaf, nn.Parameter(tensor) if is_parameter else tensor)


__all__ = [
    "ExpertPart",
    "execution_device",
    "fresh_experts",
    "fresh_networks",
    "fresh_row",
    "parts_from_package",
    "parts_from_public",
    "read_tensor",
]
