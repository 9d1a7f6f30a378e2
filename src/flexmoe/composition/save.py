"""Saving a live model as a composition: its tensors are compared with those of its sources, which are then referenced.

Does not cover the files of a composition (`format`), or compositions of stored parts without a model (`edit`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexmoe.composition.format import Composition, Reference, Rows, check_has_fingerprint, write_composition
from flexmoe.composition.load import Sources
from flexmoe.hub.client import DOWNLOADED, HubAccess, ResolvedFolder, Wanted
from flexmoe.io.folders import atomic_folder, check_apart, check_new_folder
from flexmoe.modeling.configuration_flexmoe import PUBLIC, FlexMoeConfig
from flexmoe.packages.package import PACKAGE_FILES


def save_composition(
    model: Any,
    folder: str | Path,
    *,
    sources: Mapping[str, str | Path] | None = None,
    overwrite: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Writes `model` by reference and returns the folder; see `FlexMoePreTrainedModel.save_composition`.

    Args:
        model: a live FlexMoE model, of the package or of remote code.
        folder: where to write.
        sources: folders or Hub ids by name, for "public" the dense anchor, for experts their packages; by default
            those that the config records.
        overwrite: replace an existing folder.
        token, cache_dir: for sources on the Hub.

    Raises:
        FileExistsError: `folder` exists and `overwrite` is False.
        FileNotFoundError, PermissionError, ConnectionError: a source is not available (see `resolve_folder`).
        ValueError: a source is unknown or not the model's, or a tensor other than a router row differs from it.
    """
    target = check_new_folder(folder, overwrite)
    found = _resolve_sources(model.config, sources or {}, HubAccess(token=token, cache_dir=cache_dir))
    check_apart(target, *(source.path for source in found.values()))
    anchor, packages = found.pop(PUBLIC), found
    opened = Sources(model.config, anchor.path, {name: package.path for name, package in packages.items()})
    rows = _changed_rows(model, opened)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    pins = {
        name: Reference.of(package, target).pinned(opened.packages[name].manifest.sha256)
        for name, package in packages.items()
    }
    with atomic_folder(target, overwrite) as temporary:
        if model.can_generate():
            model.generation_config.save_pretrained(temporary)
        model.save_code(temporary)
        write_composition(temporary, config, Composition(Reference.of(anchor, target), pins), rows)
    return target


def _resolve_sources(
    config: FlexMoeConfig, given: Mapping[str, str | Path], hub: HubAccess
) -> dict[str, ResolvedFolder]:
    """The folders of "public" (the dense anchor) and of every expert: as given, else as the config records."""
    if unknown := [name for name in given if name not in config.expert_names]:
        raise ValueError(f"sources names {unknown}, which this model does not have: it has {config.expert_names}.")
    check_has_fingerprint(config)
    known = {record["name"]: record.get("source") for record in config.expert_records} | {PUBLIC: config.anchor}
    wanted: dict[str, Wanted] = {}
    for name in config.expert_names:
        recorded, owned = known[name] or {}, name != PUBLIC
        patterns = PACKAGE_FILES if owned else DOWNLOADED
        if name in given:
            wanted[name] = Wanted(given[name], None, patterns, owned=owned)
        elif recorded.get("repo"):
            wanted[name] = Wanted(recorded["repo"], recorded.get("revision"), patterns, is_repo=True, owned=owned)
    if missing := [name for name in config.expert_names if name not in wanted]:
        raise ValueError(
            f"No source is recorded for {missing}, and a composition only references its parts. Give folders or Hub "
            f'ids, sources={{"{missing[-1]}": ...}}: for "{PUBLIC}" the dense checkpoint that was grafted, for an '
            "expert its package (save_expert writes one). Or save all weights with save_pretrained."
        )
    found = {}
    for name, source in hub.resolve_all(wanted).items():
        if isinstance(source, OSError):
            raise source
        found[name] = source
    return found


@torch.no_grad()
def _changed_rows(model: Any, sources: Sources) -> Rows:
    """The router rows of `model` that differ from its sources'.

    Raises:
        ValueError: another tensor differs from its source, so a reference to it would be another model.
    """
    live = _dense_tensors(model)
    headless = model.get_output_embeddings() is None
    public_rows = {name: live[name].float().cpu() for name in sources.public_rows() if name in live}
    changed: Rows = {}
    modified: dict[str, str] = {}  # an example by owner
    zeros = ((PUBLIC, name, row) for name, row in sources.public_rows().items())
    for stream in (zeros, sources.tensors(public_rows)):
        for owner, name, tensor in stream:
            ours = live.pop(name, None)
            if ours is None and headless and owner == PUBLIC:
                continue
            if f".router.{owner}." in name and ours is not None:
                if not torch.equal(ours.float().cpu(), tensor):
                    changed[name] = ours.float().cpu()
            elif ours is None or not torch.equal(tensor.to(ours.dtype), ours.cpu()):
                modified.setdefault(owner, name)
    computed = {name for name, _ in model.named_buffers()} | set(model.all_tied_weights_keys)
    if unknown := sorted(set(live) - computed):
        modified.setdefault("the model", unknown[0])
    if modified:
        raise ValueError(
            f"{', '.join(modified)}: the tensors differ from those of the sources (such as "
            f"{next(iter(modified.values()))!r}), so a composition would be another model. If an expert was trained "
            "further, write a package of it with save_expert (and push it) and name that in sources=; merge adapters "
            "first. If the anchor was changed, or the model was loaded in a dtype in which the sources lose "
            "precision, save all weights with save_pretrained."
        )
    return changed


def _dense_tensors(model: Any) -> dict[str, Tensor]:
    """The state dict. ValueError: a tensor is quantised, sharded or offloaded."""
    state = dict(model.state_dict())
    for name, tensor in state.items():
        if type(tensor) is not Tensor or tensor.device.type == "meta":
            raise ValueError(
                f"{name!r} is a {type(tensor).__name__} on {tensor.device}: a quantised, sharded or offloaded model "
                "cannot be compared with its sources. Load it unquantised on one device and save the composition of "
                "that."
            )
    return state


__all__ = ["save_composition"]
