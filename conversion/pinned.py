"""The packages that a composition names, opened and judged: let in by the policy, and those that were saved.

Not here: the files of a composition (`stored_composition`), and newer versions of its experts (`pins`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from flexmoe.conversion.judging import anchor_matrices, judge_rows_of, places, public_matrices
from flexmoe.conversion.newcomers import Newcomer, PolicyLike
from flexmoe.conversion.stored_composition import Rows, StoredComposition, absolute, open_part
from flexmoe.modeling.configuration_flexmoe import PUBLIC
from flexmoe.modeling.fitting_flexmoe import check_anchor, naming
from flexmoe.modeling.hub_flexmoe import resolve_folder
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM


def open_pinned(start: StoredComposition, name: str, target: Path, policy: PolicyLike = None) -> Newcomer:
    """Opens the package of the expert `name`, fetched if need be; it is not read to its end.

    Args:
        target: where the composition will be written.
        policy: whose packages are let in.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: it can't be had.
        PackageError: it is not what its manifest says, or not let in.
        ValueError: it is not the one that the composition was saved with, or was made for another anchor.
    """
    newcomer = open_part(start, name, target, policy, start.experts[name].revision)
    manifest = newcomer.package.manifest
    with naming(newcomer.package):
        if manifest.sha256 != start.sha256[name]:
            raise ValueError(
                f"This package is not the one of the expert {name!r} that a composition was saved with: its weights "
                f"have the SHA-256 {manifest.sha256}, the composition says {dict(start.sha256[name])}. Get that "
                "version, or move the pin to this one first (flexmoe compose --update)."
            )
        check_anchor(start.config, manifest)
    return newcomer


def judge_in_composition(
    start: StoredComposition,
    newcomers: Sequence[Newcomer],
    there: Sequence[Newcomer],
    target: Path,
    anchor: str | Path | None = None,
) -> None:
    """Holds rows and biases of newcomers against those of a composition, which they are part of already.

    All count as they are in the composition: a row that was changed there, and public's with its prior. Lengths are
    also held against public's matrices, of the graft or of the anchor, where that is at hand without a download.

    Args:
        there: the experts that count as a measure.
        target: where the composition will be written.
        anchor: the dense checkpoint, if it is not where `start` says.

    Raises:
        AdmissionError: a row or a bias would take over the model.
        ValueError: an expert has other layers than the model.
    """
    with torch.device("meta"):
        model = FlexMoeForCausalLM(copy.deepcopy(start.config))
    rows, shapes = {key: at for key, at in places(model).items() if ".router." in at[1]}, model.state_dict()
    zeros = {inside: torch.zeros(shapes[key].shape) for key, (owner, inside) in rows.items() if owner == PUBLIC}

    def in_force(name: str, own: Rows) -> Rows:
        return {**own, **{at[1]: start.rows[key] for key, at in rows.items() if at[0] == name and key in start.rows}}

    for newcomer in (*newcomers, *there):
        if newcomer.rows.keys() != zeros.keys():
            layers = newcomer.package.manifest.layers
            raise ValueError(f"{newcomer.package.folder} has the layers {layers}; this model has {len(zeros) // 2}.")
    hidden_size = start.config.get_text_config().hidden_size
    judge_rows_of(
        [replace(newcomer, rows=in_force(newcomer.name, newcomer.rows)) for newcomer in newcomers],
        {PUBLIC: in_force(PUBLIC, zeros), **{expert.name: in_force(expert.name, expert.rows) for expert in there}},
        _matrices_at_hand(start, model, hidden_size, target, anchor),
    )


def _matrices_at_hand(
    start: StoredComposition, model: FlexMoeForCausalLM, hidden_size: int, target: Path, anchor: str | Path | None
) -> list[torch.Tensor | None] | None:
    if start.stored is not None:
        return public_matrices(start.stored, model)
    reference = start.anchor
    try:
        if anchor is not None:
            folder = resolve_folder(anchor).path
        elif reference is not None and reference.folder is not None:
            folder = absolute(reference.folder, target)
        elif reference is not None:
            found = resolve_folder(
                str(reference.repo), revision=reference.revision, local_files_only=True, is_repo=True
            )
            folder = found.path
        else:
            return None
        matrices = anchor_matrices(folder, hidden_size)
    except OSError:  # not here, or not all of it
        return None
    return matrices if len(matrices) == len(model.flexmoe_blocks()) else None  # else another one, as writing will say


__all__ = ["judge_in_composition", "open_pinned"]
