"""Saves an expert of a live model as a package: its tensors, gathered and unwrapped, and its manifest.

Does not cover writing the files (`flexmoe.packages.package`), or experts of stored models (`flexmoe.conversion`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexmoe.modeling.configuration_flexmoe import FlexMoeConfig
from flexmoe.modeling.distributed_flexmoe import is_sharded
from flexmoe.modeling.experts_flexmoe import FlexMoeBlock, has_quantized_weights
from flexmoe.packages.checks import name_in_package, public_widths
from flexmoe.packages.manifest import ExpertManifest
from flexmoe.packages.modules import fresh_experts, fresh_networks, fresh_row, read_tensor
from flexmoe.packages.package import write_package


def save_expert(model: Any, name: str, folder: str | Path, *, overwrite: bool = False, **manifest_fields: Any) -> Path:
    """Writes one expert of a model as a package; returns its folder.

    Of a sharded model, every rank calls this, and rank 0 writes.

    Args:
        model: a FlexMoE model.
        name: the expert.
        folder: must not exist, unless `overwrite`.
        manifest_fields: `version`, `license`, `data_statement` or `training`, in place of those in the expert's
            record.

    Raises:
        ValueError: the expert is quantised, or an adapter is around it.
        FileExistsError: `folder` exists and `overwrite` is False.
    """
    record = next(record for record in model.config.expert_records if record["name"] == name)
    networks = fresh_networks(model.config)
    tensors = dict(expert_tensors(model.flexmoe_blocks(), record, fresh_experts(model.config, record, networks)))
    manifest = expert_manifest(model.config, networks, {**record, **manifest_fields}, tensors)
    if is_sharded(model):
        _on_rank_zero(lambda: write_package(folder, manifest, tensors.items(), overwrite=overwrite))
        return Path(folder)
    return write_package(folder, manifest, tensors.items(), overwrite=overwrite)


def expert_tensors(
    blocks: Sequence[FlexMoeBlock], record: Mapping[str, Any], networks: Sequence[nn.Module]
) -> Iterator[tuple[str, Tensor]]:
    """Yields (name in a package, CPU tensor) of the expert with this record, gathered from shards; rows in float32.

    Args:
        networks: the expert's, without weights, made from the same record (`flexmoe.packages.modules.fresh_experts`).

    Raises:
        ValueError: the expert is quantised, or has other tensors than these (an adapter or a parametrisation).
    """
    name = record["name"]
    for block, network in zip(blocks, networks, strict=True):
        at = f"layers.{block.layer_index}"
        if has_quantized_weights(block.experts[name]):
            raise ValueError(
                f"Expert {name!r} is quantised: its weights are rounded, and a package must hold its owner's original "
                "weights. Load the model without quantization_config, and save the expert from there."
            )
        row = fresh_row(block, record.get("evidence"))
        for part, expected in ((block.experts[name], network), (block.router[name], row)):
            if differing := sorted(set(part.state_dict()) ^ set(expected.state_dict())):
                raise ValueError(
                    f"Expert {name!r} has other tensors than its class, such as {differing[:3]}: it has an adapter or "
                    "a parametrisation. Merge or remove it before saving (PEFT: merge_and_unload)."
                )
        for key in network.state_dict():
            tensor = read_tensor(block.experts[name], key)
            yield f"{at}.ffn.{name_in_package(network, key)}", tensor.cpu().contiguous()
        for key in block.router[name].state_dict():
            yield f"{at}.router.{key}", read_tensor(block.router[name], key).float().cpu()


def expert_manifest(
    config: FlexMoeConfig, networks: Sequence[nn.Module], record: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> ExpertManifest:
    """The manifest of an expert with this record and these tensors.

    Args:
        networks: the anchor's, one per layer; an expert of another width has its widths in its record.
        tensors: by their names in the package.
    """
    anchor_config: Any = config.anchor_config
    anchor = {**(config.anchor or {}), "model_type": anchor_config.model_type}
    dtypes = {str(value.dtype).removeprefix("torch.") for name, value in tensors.items() if ".ffn." in name}
    return ExpertManifest(
        **{key: value for key, value in record.items() if key not in ("sha256", "source", "intermediate")},
        layers=list(range(len(networks))),
        ffn={
            "class": type(networks[0]).__name__,
            "hidden": config.get_text_config().hidden_size,
            "intermediate": record.get("intermediate") or public_widths(config, networks),
        },
        dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
        anchor={key: anchor.get(key) for key in ("repo", "revision", "fingerprint", "model_type")},
    )


def _on_rank_zero(act: Callable[[], object]) -> None:
    """Runs `act` on rank 0 while the others wait. Every rank must call this."""
    try:
        if torch.distributed.get_rank() == 0:
            act()
    finally:
        torch.distributed.barrier()


__all__ = ["expert_manifest", "expert_tensors", "save_expert"]
