"""Adds experts to a live model: from packages, or as copies of the public network.

The model's methods of the same names delegate here, after their own refusals (a running `generate`, FSDP2, unknown
names, adapters). Everything is prepared first; `model.insert_expert` then makes the change, so a failure leaves the
model as it was. The model may be a remote-code copy of the class.

Does not cover the same changes on disk (`flexmoe.conversion.compose`), or pushing to the Hub (`flexmoe.hub.model`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flexmoe.admission.checks import check_expert
from flexmoe.admission.findings import refuse_unless_admitted
from flexmoe.hub.client import HubAccess
from flexmoe.hub.fetch import open_package
from flexmoe.modeling.configuration_flexmoe import expert_record
from flexmoe.packages.checks import (
    check_anchor,
    check_config_size,
    check_layers,
    check_position,
    errors_naming,
    package_record,
    public_widths,
)
from flexmoe.packages.modules import ExpertPart, fresh_experts, fresh_networks, parts_from_package, parts_from_public
from flexmoe.packages.package import ExpertPackage
from flexmoe.packages.quantization import quantize_like
from flexmoe.packages.trust import TrustPolicy
from flexmoe.parallel import tensor_parallel_mesh


def add_expert(
    model: Any,
    source: str | Path | ExpertPackage,
    name: str | None = None,
    *,
    revision: str | None = None,
    verify: bool = True,
    policy: str | Path | TrustPolicy | None = None,
    position: int | None = None,
    **hub: Any,
) -> str:
    """Adds the expert of a package to a model; returns its name there.

    The expert is quantised like the model. If an active set is in force, it does not change.

    Args:
        model: a FlexMoE model.
        source: the package: a folder, a Hub id, or an opened package.
        name: the expert's name in the model; by default the package's own.
        revision: branch, tag or commit, for a Hub id.
        verify: check the expert's router rows, biases and the outputs of its networks, and refuse it if it would take
            over the routing or dominate the outputs. `flexmoe.verify` also measures the effect on text.
        policy: the trust policy: an opened policy or a file, by default the file in FLEXMOE_POLICY.
        position: the expert's index in `expert_names`; 0 is public's. None: the last. An expert that was removed and
            is added at its old position gives the model that there was.
        hub: `token`, `cache_dir`, `local_files_only` and `force_download`, as in `from_pretrained`.

    Raises:
        ValueError: the name is taken, there is no such position, the expert was made for another anchor, its kind is
            unknown, its files are invalid or damaged (`PackageError`); it is refused (`UntrustedPackageError`,
            `AdmissionError`); or the model's quantiser needs calibration data.
        FileNotFoundError, PermissionError, ConnectionError: there is no such package, or no access to it.
    """
    package, origin = open_package(source, revision, hub=HubAccess(**hub), policy=policy)
    with errors_naming(package):
        name = model.free_name(name or package.manifest.name)
    check_position(position, model.expert_names)
    _insert_package(model, package, name, origin, verify, position=position)
    return name


def replace_expert(
    model: Any,
    name: str,
    source: str | Path | ExpertPackage,
    *,
    revision: str | None = None,
    verify: bool = True,
    policy: str | Path | TrustPolicy | None = None,
    **hub: Any,
) -> None:
    """Replaces the expert `name` with that of a package; name and position stay.

    Args:
        model, source, revision, verify, policy, hub: as in `add_expert`. The replaced expert is no reference for the
            checks.

    Raises:
        ValueError, FileNotFoundError, PermissionError, ConnectionError: as `add_expert`.
    """
    package, origin = open_package(source, revision, hub=HubAccess(**hub), policy=policy)
    _insert_package(model, package, name, origin, verify, replaces=True)


def add_expert_copy(
    model: Any,
    name: str,
    rank: int | None = None,
    alpha: float | None = None,
    evidence: Mapping[str, Any] | None = None,
) -> str:
    """Adds an expert that computes what the public network computes, with router rows of zeros; returns its name.

    Args:
        model: a FlexMoE model.
        name: of the new expert.
        rank: None adds a copy of the public network; a number adds a low-rank expert of this rank in every layer,
            whose difference from public is zero.
        alpha: the difference is scaled by `alpha / rank`; None is a scale of 1.
        evidence: of its record; its scores are zero.

    Raises:
        ValueError: the name is taken or invalid, the rank is not a positive integer, or `alpha` without `rank`.
    """
    blocks = model.flexmoe_blocks()
    values: dict[str, Any] = {"name": model.free_name(name)}
    if rank is None and alpha is not None:
        raise ValueError(f"alpha={alpha} scales the difference of a low-rank expert: pass its rank, too.")
    if rank is not None:
        values |= {"kind": "low_rank", "rank": [rank] * len(blocks), "alpha": alpha}
    record = expert_record({**values, "evidence": evidence})
    parts = parts_from_public(blocks, fresh_experts(model.config, record), evidence)
    if rank is not None and (mesh := tensor_parallel_mesh(model)) is not None:
        for network, _ in parts:
            _broadcast_parameters(network, mesh)  # each rank has drawn its own
    model.insert_expert(record, parts)
    return name


def _insert_package(
    model: Any,
    package: ExpertPackage,
    name: str,
    origin: dict[str, str | None] | None,
    verify: bool,
    replaces: bool = False,
    position: int | None = None,
) -> None:
    blocks = model.flexmoe_blocks()
    with errors_naming(package):
        check_anchor(model.config, package.manifest)
        check_layers([block.layer_index for block in blocks], package.manifest)
        networks = fresh_networks(model.config)
        record = package_record(package.manifest, public_widths(model.config, networks))
        record = expert_record({**record, "name": name, "source": origin})
        check_config_size(model.config, record)
        parts = parts_from_package(blocks, fresh_experts(model.config, record, networks), package)
    if verify:
        refuse_unless_admitted(
            name, check_expert(model, parts, replaced=name, evidence=record.get("evidence")), package.folder
        )
    model.insert_expert(record, _quantize(model, name, parts), replaces, position)


def _quantize(model: Any, name: str, parts: list[ExpertPart]) -> list[ExpertPart]:
    """The parts with their networks quantised like the model."""
    paths = [f"{block}.experts.{name}" for block in model.named_blocks()]
    networks = quantize_like(model, dict(zip(paths, (network for network, _ in parts), strict=True)))
    return [(networks[path], row) for path, (_, row) in zip(paths, parts, strict=True)]


def _broadcast_parameters(module: nn.Module, mesh: Any) -> None:
    """Broadcasts the parameters of `module` from the first rank of the mesh to the others."""
    group = mesh.get_group()
    for parameter in module.parameters():
        torch.distributed.broadcast(parameter.data, group_src=0, group=group)


__all__ = ["add_expert", "add_expert_copy", "replace_expert"]
