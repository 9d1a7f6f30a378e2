"""Moving the pins of a composition: its experts as their owners have them now.

Not here: other changes of a composition (`by_reference`), and the anchor, which is known by its fingerprint.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from flexmoe.conversion.newcomers import Newcomer, PolicyLike, with_experts
from flexmoe.conversion.pinned import judge_in_composition, open_pinned
from flexmoe.conversion.stored_composition import (
    StoredComposition,
    open_composition,
    open_part,
    read_whole,
    reference_to,
    rows_of,
    with_records,
    write_stored,
)
from flexmoe.modeling.folders_flexmoe import check_new_folder


@dataclass(frozen=True)
class Move:
    """An expert whose pin was moved: from which commit and version to which; None where nothing is recorded."""

    name: str
    old_revision: str | None
    new_revision: str | None
    old_version: str | None
    new_version: str | None

    def to_dict(self) -> dict[str, str | None]:
        """The fields by name, as `--json` prints them."""
        return asdict(self)


def update_composition(
    composition: str | Path,
    out: str | Path,
    *,
    experts: Mapping[str, str | None] | None = None,
    verify: bool = True,
    policy: PolicyLike = None,
    overwrite: bool = False,
) -> list[Move]:
    """Writes the composition with its pins moved to what its repositories, or folders, hold now.

    An expert whose files are others loses rows that were changed in the composition: they were made for the old ones.

    Args:
        composition: a folder or Hub id.
        out: where to; may be the composition's own folder, with `overwrite`.
        experts: the experts to move, and to which revision (None: the main branch); by default all of them.
        verify: refuse versions whose row or bias would take over the model, as `compose_by_reference` does. Those who
            stay are the measure, as far as their packages can be had; who is replaced is none.
        policy: whose packages are let in, as in `compose_by_reference`; asked of those that are to be moved.

    Returns:
        What moved; experts that are already up to date are not among them.

    Raises: as `compose_by_reference`; ValueError if `composition` is none, or has no expert of such a name.
    """
    target = check_new_folder(out, overwrite)
    start = open_composition(composition, target)
    if start.stored is not None:
        raise ValueError(f"{composition} is no composition: there are no pins to move in a model with weights.")
    wanted = dict.fromkeys(start.experts) if experts is None else dict(experts)
    if strangers := sorted(set(wanted) - set(start.experts)):
        raise ValueError(f"{composition} has no expert {strangers[0]!r}; it has {', '.join(start.experts)}.")
    moves: list[Move] = []
    newcomers: list[Newcomer] = []
    there: list[Newcomer] = []
    for name, revision in wanted.items():
        newcomer = _open_newest(start, name, revision, target, policy)
        has_other_files = newcomer.package.manifest.sha256 != start.sha256[name]
        if move := _move(start, newcomer, target):
            moves.append(move)
        (newcomers if has_other_files else there).append(newcomer)
    if verify and newcomers:
        there += [
            expert
            for name in start.experts
            if name not in wanted and (expert := _at_hand(start, name, target, policy))
        ]
        judge_in_composition(start, newcomers, there, target)
    write_stored(start, target, None, overwrite)
    return moves


def _open_newest(
    start: StoredComposition, name: str, revision: str | None, target: Path, policy: PolicyLike
) -> Newcomer:
    """The package of an expert as its owner has it now, or had it at a revision."""
    try:
        return open_part(start, name, target, policy, revision)
    except OSError as error:
        raise type(error)(
            f"Expert {name!r} of {start.source}: {error}. Move the pins of others with --expert (experts=)."
        ) from error


def _at_hand(start: StoredComposition, name: str, target: Path, policy: PolicyLike) -> Newcomer | None:
    """The package of an expert that stays; None, for no measure, if it can't be had, is another one or not let in."""
    try:
        return open_pinned(start, name, target, policy)
    except (OSError, ValueError):
        return None


def _move(start: StoredComposition, newcomer: Newcomer, target: Path) -> Move | None:
    """Moves the pin of an expert to the package that was opened; None if it is there already."""
    name = newcomer.name
    old, reference, digests = start.experts[name], reference_to(newcomer, target), newcomer.package.manifest.sha256
    if reference == old and digests == start.sha256[name]:
        return None
    read_whole(newcomer)
    public, position = start.config.expert_records[0], start.config.expert_names.index(name)
    records = start.config.expert_records
    (_, record) = with_experts(with_records(start.config, [public]), [newcomer]).expert_records
    start.config.experts = [*records[:position], record, *records[position + 1 :]]
    if digests != start.sha256[name] and (changed := rows_of(start.rows, name)):
        warnings.warn(
            f"The rows of {name!r} that were changed in {start.source} were made for its old version: dropped.",
            stacklevel=3,
        )
        start.rows = {row: value for row, value in start.rows.items() if row not in changed}
    start.experts[name], start.sha256[name] = reference, digests
    return Move(name, old.revision, reference.revision, records[position].get("version"), record.get("version"))


__all__ = ["Move", "update_composition"]
