"""A composition of stored parts, without a live model: of a graft and packages, or of compositions over one anchor.

Every package that comes in, also with another composition, is read once to its end, so what a composition names was
right when it was named; those that the base names are opened and are the ones that it means.

Not here: newer versions of experts (`pins`), and compositions of live models (`save_composition`).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from math import isfinite
from pathlib import Path

import torch

from flexmoe.conversion.newcomers import (
    Newcomer,
    PackageLike,
    PolicyLike,
    choose_prior,
    rename,
    with_experts,
)
from flexmoe.conversion.pinned import judge_in_composition, open_pinned
from flexmoe.conversion.stored_composition import (
    Rows,
    StoredComposition,
    is_composition,
    open_composition,
    read_whole,
    reference_to,
    rows_of,
    write_stored,
)
from flexmoe.modeling.configuration_flexmoe import PUBLIC, FlexMoeConfig
from flexmoe.modeling.folders_flexmoe import check_new_folder
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM


def compose_by_reference(
    base: str | Path,
    parts: Sequence[PackageLike],
    out: str | Path,
    *,
    names: Mapping[str, str] | None = None,
    public_prior: float | None = None,
    num_experts_per_tok: int | None = None,
    anchor: str | Path | None = None,
    verify: bool = True,
    policy: PolicyLike = None,
    overwrite: bool = False,
) -> Path:
    """Writes a composition of kilobytes that names its parts, and returns its folder.

    Args:
        base: folder or Hub id of a graft that has "public" only, or of a composition.
        parts: packages, in the order wanted; beside a base that is a composition also compositions over the same
            anchor, which bring all of their experts, with the rows that they have there. An expert that is in two of
            them with the same files counts once.
        names: what to call experts of `parts` here: {package as given, or its own name: name in the model}.
        public_prior: log prior odds of "public". By default the base composition's; over a graft, as in `compose`.
        num_experts_per_tok: k of the top-k; the base's by default.
        anchor: folder or Hub id of the dense checkpoint; needed where the base does not say where it is on the Hub.
            Its fingerprint is compared.
        verify: refuse experts of `parts` whose row or bias would take over the model: those of packages, as in
            `compose`, and those of compositions, with the rows that they have there. The base's are a measure.
        policy: whose packages are let in, the base's and those of compositions, too: a policy file, by default the
            one that FLEXMOE_POLICY names.

    Raises:
        FileExistsError: `out` exists and `overwrite` is False.
        FileNotFoundError, PermissionError, ConnectionError: a part can't be had, also one that a composition names.
        ValueError: a part is for another anchor, not what it says, not let in or refused; a composition names a
            package that is another one now; a name is taken; compositions that disagree in public's row, in k or in
            how weights are normalised; or nothing says where the anchor is.
        TypeError: `parts` is one package and no list.
    """
    if isinstance(parts, str | Path):
        raise TypeError(f"parts: one package ({parts!r}), want a list of them. Write [{parts!r}].")
    target = check_new_folder(out, overwrite)
    start = open_composition(base, target)
    brought = {index for index, part in enumerate(parts) if start.stored is None and is_composition(part)}
    packages = [part for index, part in enumerate(parts) if index not in brought]
    newcomers = [Newcomer.open(package, policy) for package in packages]
    compositions = [open_composition(str(parts[index]), target) for index in sorted(brought)]
    theirs = {name for other in compositions for name in other.config.expert_names}
    rename(newcomers, packages, {key: name for key, name in (names or {}).items() if key not in theirs})
    if start.stored is not None and not newcomers:
        raise ValueError("There is no package to compose with: give at least one.")
    _set_prior(start, newcomers, public_prior)
    if num_experts_per_tok is not None:
        start.config.num_experts_per_tok = num_experts_per_tok
    given = {"public_prior": public_prior, "num_experts_per_tok": num_experts_per_tok}
    decided = {key for key, value in given.items() if value is not None}
    to_merge, to_append = iter(compositions), iter(list(newcomers))
    there = [open_pinned(start, name, target, policy) for name in start.experts]
    for index in range(len(parts)):
        if index in brought:
            newcomers += _merge(start, next(to_merge), names or {}, decided, target, policy)
        else:
            _append(start, next(to_append), target)
    if verify and newcomers:
        judge_in_composition(start, newcomers, there, target, anchor)
    return write_stored(start, target, anchor, overwrite)


def _set_prior(start: StoredComposition, newcomers: Sequence[Newcomer], given: float | None) -> None:
    """Gives public's rows the prior that is given, or else that which `compose` would choose over a graft."""
    prior = given if start.stored is None else choose_prior(start.stored, newcomers, given)
    if prior is None:
        return
    if not isfinite(prior):
        raise ValueError(f"public_prior must be a finite number; it is {prior}.")
    for name in _public_biases(start.config):
        start.rows.pop(name, None)
        if prior:
            start.rows[name] = torch.tensor([prior], dtype=torch.float32)


def _public_biases(config: FlexMoeConfig) -> list[str]:
    with torch.device("meta"):
        model = FlexMoeForCausalLM(copy.deepcopy(config))
    return [name for name in model.state_dict() if name.endswith(f".router.{PUBLIC}.bias")]


def _append(start: StoredComposition, newcomer: Newcomer, target: Path) -> None:
    """Adds the expert of a package to `start`, read to its end before."""
    start.config = with_experts(start.config, [newcomer])
    read_whole(newcomer)
    start.experts[newcomer.name] = reference_to(newcomer, target)
    start.sha256[newcomer.name] = newcomer.package.manifest.sha256


def _merge(
    start: StoredComposition,
    other: StoredComposition,
    names: Mapping[str, str],
    decided: Collection[str],
    target: Path,
    policy: PolicyLike,
) -> list[Newcomer]:
    """Adds the experts of another composition to `start`, with the rows that they have there; returns who is new.

    Args:
        decided: what of "public_prior" and "num_experts_per_tok" was said, so that the two need not agree in it.
    """
    _check_agreement(start, other, decided)
    added: list[Newcomer] = []
    everyone, active = list(start.config.expert_names), _active(start.config)
    for record in other.config.expert_records[1:]:
        own = record["name"]
        name = names.get(own, own)
        rows = _renamed(rows_of(other.rows, own), own, name)
        if name in everyone:
            if other.sha256[own] != start.sha256.get(name) or not _equal(rows, rows_of(start.rows, name)):
                raise ValueError(
                    f"{other.source} has an expert {name!r}, and so has the base, with other weights or rows: give "
                    f"that of {other.source} another name (--name {own}=NAME)."
                )
            continue
        start.config.experts = [*start.config.expert_records, {**record, "name": name}]
        start.experts[name], start.sha256[name] = other.experts[own], other.sha256[own]
        start.rows |= rows
        added.append(open_pinned(start, name, target, policy))
        read_whole(added[-1])
        everyone.append(name)
        active += [name] if own in _active(other.config) else []
    start.config.active_experts = None if set(active) == set(everyone) else active
    return added


def _check_agreement(start: StoredComposition, other: StoredComposition, decided: Collection[str]) -> None:
    def check(what: str, ours: object, theirs: object, way_out: str) -> None:
        if ours != theirs:
            raise ValueError(
                f"{other.source} and {start.source} can't be merged: {what} is {theirs} there, {ours} here. {way_out}"
            )

    ours, theirs = start.config, other.config
    check("the anchor's fingerprint", _fingerprint(ours), _fingerprint(theirs), "Experts fit one anchor only.")
    check("norm_topk_prob", ours.norm_topk_prob, theirs.norm_topk_prob, "Compose one of them anew.")
    if "num_experts_per_tok" not in decided:
        k, other_k = ours.num_experts_per_tok, theirs.num_experts_per_tok
        check("num_experts_per_tok", k, other_k, "Say which: --num-experts-per-tok (num_experts_per_tok=).")
    if "public_prior" not in decided and not _equal(rows_of(start.rows, PUBLIC), rows_of(other.rows, PUBLIC)):
        raise ValueError(
            f"{other.source} and {start.source} can't be merged: they differ in public's prior or rows. Say which "
            "prior is meant: --public-prior (public_prior=)."
        )


def _fingerprint(config: FlexMoeConfig) -> str | None:
    return (config.anchor or {}).get("fingerprint")


def _active(config: FlexMoeConfig) -> list[str]:
    return list(config.expert_names if config.active_experts is None else config.active_experts)


def _renamed(rows: Rows, old: str, new: str) -> Rows:
    return {name.replace(f".router.{old}.", f".router.{new}."): row for name, row in rows.items()}


def _equal(ours: Rows, theirs: Rows) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(row, theirs[name]) for name, row in ours.items())


__all__ = ["compose_by_reference"]
