"""Saving a live model by reference: its tensors are compared with those of its sources, which are then only named.

Not here: the files of a composition (`composition_flexmoe`), and compositions made of stored parts without a model
(`flexmoe.conversion`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .composition_flexmoe import Composition, Reference, write_composition
from .configuration_flexmoe import PUBLIC, FlexMoeConfig
from .folders_flexmoe import atomic_folder, check_apart, check_new_folder
from .hub_flexmoe import DOWNLOADED, HubAccess, ResolvedFolder, Wanted
from .packages_flexmoe import PACKAGE_FILES
from .sources_flexmoe import Sources


def save_composition(
    model: Any,
    out: str | Path,
    *,
    sources: Mapping[str, str | Path] | None = None,
    overwrite: bool = False,
    hub: HubAccess | None = None,
) -> Path:
    """Writes `model` by reference; see `FlexMoePreTrainedModel.save_composition`."""
    target = check_new_folder(out, overwrite)
    found = _find_sources(model.config, sources or {}, hub or HubAccess())
    check_apart(target, *(source.path for source in found.values()))
    opened = Sources(
        model.config, found[PUBLIC].path, {name: source.path for name, source in found.items() if name != PUBLIC}
    )
    rows = _changed_rows(model, opened)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    composition = Composition(
        Reference.of(found[PUBLIC], target),
        {name: Reference.of(source, target) for name, source in found.items() if name != PUBLIC},
        {name: package.manifest.sha256 for name, package in opened.packages.items()},
        None,
    )
    with atomic_folder(target, overwrite) as folder:
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        model.save_code(folder)
        write_composition(folder, config, composition, rows)
    return target


def _find_sources(config: FlexMoeConfig, given: Mapping[str, str | Path], hub: HubAccess) -> dict[str, ResolvedFolder]:
    """Where "public" (the dense anchor) and every expert come from: as given, else as the config records."""
    if strangers := [name for name in given if name not in config.expert_names]:
        raise ValueError(f"sources names {strangers}, which this model has not: it has {config.expert_names}.")
    if not (config.anchor or {}).get("fingerprint"):
        raise ValueError(
            "The anchor of this model has no fingerprint, so nobody could tell whether it is the right one: graft it "
            "with `flexmoe graft`, which makes one, or save the whole model with save_pretrained."
        )
    known = {record["name"]: record.get("source") for record in config.expert_records} | {PUBLIC: config.anchor}
    wanted: dict[str, Wanted] = {}
    for name in config.expert_names:
        recorded, owned = known[name] or {}, name != PUBLIC
        patterns = PACKAGE_FILES if owned else DOWNLOADED
        if name in given:
            wanted[name] = Wanted(given[name], None, patterns, owned=owned)
        elif recorded.get("repo"):
            wanted[name] = Wanted(recorded["repo"], recorded.get("revision"), patterns, is_repo=True, owned=owned)
    lacking = [name for name in config.expert_names if name not in wanted]
    if lacking:
        raise ValueError(
            f"Nothing says where {lacking} come from, and a composition only names its parts. Give folders or Hub "
            f'ids, sources={{"{lacking[-1]}": ...}}: for "{PUBLIC}" the dense checkpoint that was grafted, for an '
            "expert its package (save_expert makes one). Or save the whole model with save_pretrained."
        )
    found = {}
    for name, source in hub.resolve_all(wanted).items():
        if isinstance(source, OSError):
            raise source
        found[name] = source
    return found


@torch.no_grad()
def _changed_rows(model: Any, sources: Sources) -> dict[str, Tensor]:
    """The router rows of `model` that are not what its sources say.

    Raises:
        ValueError: another tensor is not what its source says, so a reference to it would be another model.
    """
    live = _plain_tensors(model)
    headless = model.get_output_embeddings() is None
    public_rows = {name: live[name].float().cpu() for name in sources.rows() if name in live}
    changed: dict[str, Tensor] = {}
    modified: dict[str, str] = {}
    zeros = ((PUBLIC, name, row) for name, row in sources.rows().items())
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
    if strange := sorted(set(live) - computed):
        modified.setdefault("the model", strange[0])
    if modified:
        raise ValueError(
            f"{', '.join(modified)}: not what their sources hold (such as {next(iter(modified.values()))!r}), so a "
            "composition by reference would be another model. If an expert was trained on, make a package of it with "
            "save_expert (and push it) and name that in sources=; merge adapters first. If the anchor was changed, or "
            "all was loaded in a dtype in which the sources lose bits, save the whole model with save_pretrained."
        )
    return changed


def _plain_tensors(model: Any) -> dict[str, Tensor]:
    state = dict(model.state_dict())
    for name, tensor in state.items():
        if type(tensor) is not Tensor or tensor.device.type == "meta":
            raise ValueError(
                f"{name!r} is a {type(tensor).__name__} on {tensor.device}: a quantised, sharded or offloaded model "
                "can't be compared with its sources. Load it plainly and save the composition of that."
            )
    return state


__all__ = ["save_composition"]
