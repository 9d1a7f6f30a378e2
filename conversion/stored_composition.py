"""A composition on disk, opened to be changed and written again; a graft counts as one that has no experts yet.

Not here: the files of a composition (`flexmoe.modeling.composition_flexmoe`), and what is changed (`by_reference`,
`pins`).
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from flexmoe.conversion.newcomers import Newcomer, PackageLike, PolicyLike
from flexmoe.conversion.stored import CONFIG_FILE, StoredModel
from flexmoe.modeling.composition_flexmoe import (
    GENERATION_FILE,
    Composition,
    Reference,
    read_router,
    write_composition,
)
from flexmoe.modeling.configuration_flexmoe import PUBLIC, FlexMoeConfig
from flexmoe.modeling.fitting_flexmoe import naming
from flexmoe.modeling.folders_flexmoe import atomic_folder, check_apart
from flexmoe.modeling.hub_flexmoe import ResolvedFolder, resolve_folder
from flexmoe.modeling.json_flexmoe import read_json_object
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM
from flexmoe.modeling.packages_flexmoe import PackageError
from flexmoe.modeling.sources_flexmoe import Sources

Rows = dict[str, torch.Tensor]
"""Router rows and biases that are not what the sources say, by their names in the model, float32."""


@dataclass
class StoredComposition:
    """What a composition grows from: config, where its parts are, rows that differ from theirs.

    `stored` is the graft; of a composition there is none, and `anchor` says where the dense checkpoint is.
    """

    source: str
    folder: Path
    config: FlexMoeConfig
    rows: Rows
    stored: StoredModel | None = None
    anchor: Reference | None = None
    experts: dict[str, Reference] = field(default_factory=dict)
    sha256: dict[str, Mapping[str, str]] = field(default_factory=dict)


def is_composition(source: PackageLike) -> bool:
    """Whether a folder or Hub id is a composition; of a repository only its config.json is fetched."""
    if not isinstance(source, str | Path):
        return False
    config = resolve_folder(source, allow_patterns=(CONFIG_FILE,)).path / CONFIG_FILE
    return config.is_file() and read_json_object(config).get("composition") is not None


def open_composition(source: str | Path, target: Path) -> StoredComposition:
    """Opens a composition, or a graft that has "public" only: a folder or a Hub id.

    Args:
        target: where it will be written; folders that it names are named from there.

    Raises:
        ValueError: it is a model with experts in its weights, or no FlexMoE.
    """
    folder = resolve_folder(source)
    if not is_composition(source):
        stored = StoredModel(source)
        if len(stored.config.expert_names) > 1:
            raise ValueError(
                f"{source} has the experts {stored.config.expert_names} in its weights: compose from the grafted "
                "anchor, or from a composition (save_composition)."
            )
        rows = {name: stored.tensors.read(name) for name in stored.tensors.infos if f".router.{PUBLIC}." in name}
        rows = {name: row.float() for name, row in rows.items() if bool(row.any())}
        return StoredComposition(str(source), folder.path, copy.deepcopy(stored.config), rows, stored)
    config = FlexMoeConfig.from_pretrained(folder.path)
    composition = Composition.from_config(config)
    return StoredComposition(
        str(source),
        folder.path,
        config,
        read_router(folder.path, composition.router_sha256, config),
        anchor=_from_here(composition.anchor, folder, target),
        experts={name: _from_here(entry, folder, target) for name, entry in composition.experts.items()},
        sha256=dict(composition.sha256),
    )


def _from_here(reference: Reference, composition: ResolvedFolder, target: Path) -> Reference:
    """A reference of one composition as another, in the folder `target`, has to write it."""
    if reference.folder is None:
        return reference
    source = reference.wanted(composition, ()).source
    return Reference.of(ResolvedFolder(Path(source)), target)


def write_stored(start: StoredComposition, target: Path, anchor: str | Path | None, overwrite: bool) -> Path:
    """Writes it as a composition into the folder `target`.

    Args:
        anchor: the dense checkpoint, a folder or a Hub id, whose fingerprint is compared; None: where `start` says.

    Raises:
        ValueError: nothing says where the anchor is, or it is another one; or a part lies in `target`.
    """
    reference = _anchor_reference(start, target, anchor)
    start.config.architectures = start.config.architectures or [FlexMoeForCausalLM.__name__]
    composition = Composition(reference, start.experts, start.sha256, None)
    settings = start.folder / GENERATION_FILE
    check_apart(target, *(absolute(e.folder, target) for e in (reference, *start.experts.values()) if e.folder))
    with atomic_folder(target, overwrite) as folder:
        if settings.is_file():
            shutil.copyfile(settings, folder / GENERATION_FILE)
        FlexMoeForCausalLM.save_code(folder)
        write_composition(folder, start.config, composition, start.rows)
    return target


def _anchor_reference(start: StoredComposition, target: Path, given: str | Path | None) -> Reference:
    recorded = start.config.anchor or {}
    if not recorded.get("fingerprint"):
        raise ValueError(
            "The anchor of this model has no fingerprint, so nobody could tell whether it is the right one: graft it "
            "with `flexmoe graft`, which makes one."
        )
    if given is not None:
        found = resolve_folder(given)
        alone = with_records(start.config, start.config.expert_records[:1])
        for _ in Sources(alone, found.path, {}).tensors(rows_of(start.rows, PUBLIC)):
            pass  # to the end, where the fingerprint is compared
        return Reference.of(found, target)
    if start.anchor is not None:
        return start.anchor
    if recorded.get("repo"):
        repo, revision = str(recorded["repo"]), recorded.get("revision")
        if revision is None:  # only a commit is a reference: what is there now, if loading finds the fingerprint
            revision = resolve_folder(repo, allow_patterns=(CONFIG_FILE,), is_repo=True).revision
        return Reference(repo, revision)
    raise ValueError(
        "Nothing says where the dense anchor of this graft is: give the checkpoint that was grafted, a folder or a "
        "Hub id, with --anchor (anchor=)."
    )


def reference_to(newcomer: Newcomer, target: Path) -> Reference:
    """How a composition in the folder `target` names a package."""
    source = newcomer.source or {}
    return Reference.of(ResolvedFolder(newcomer.package.folder, source.get("repo"), source.get("revision")), target)


def open_part(
    start: StoredComposition, name: str, target: Path, policy: PolicyLike = None, revision: str | None = None
) -> Newcomer:
    """Opens the package that the composition names as `name`, fetched if need be; it is not read to its end.

    Args:
        target: where the composition will be written.
        policy: whose packages are let in.
        revision: of a repository; None is the main branch.

    Raises: as `Newcomer.open`.
    """
    reference = start.experts[name]
    if reference.folder is not None:
        newcomer = Newcomer.open(absolute(reference.folder, target), policy, revision)
    else:
        newcomer = Newcomer.open(str(reference.repo), policy, revision, is_repo=True)
    newcomer.name = name
    return newcomer


def read_whole(newcomer: Newcomer) -> None:
    """Reads a package to its end: its hashes are right, its numbers finite, before somebody relies on it.

    Raises:
        PackageError: it is not what its manifest says, or its rows are not those that were read first.
    """
    with naming(newcomer.package):
        for name, tensor in newcomer.package.tensors():
            if name in newcomer.rows and not torch.equal(newcomer.rows[name], tensor):
                raise PackageError(f"{newcomer.package.folder}: {name!r} changed while the package was read.")


def absolute(folder: str, target: Path) -> Path:
    """The folder that a reference of a composition in `target` names."""
    return Path(os.path.normpath(target / folder))


def with_records(config: FlexMoeConfig, records: list[dict[str, Any]]) -> FlexMoeConfig:
    """The config with these experts, all of them active."""
    config = copy.deepcopy(config)
    config.active_experts, config.experts = None, records
    return config


def rows_of(rows: Rows, name: str) -> Rows:
    """Those of the expert `name`."""
    return {row: value for row, value in rows.items() if f".router.{name}." in row}


__all__ = [
    "Rows",
    "StoredComposition",
    "absolute",
    "is_composition",
    "open_composition",
    "open_part",
    "read_whole",
    "reference_to",
    "rows_of",
    "with_records",
    "write_stored",
]
