"""Editing compositions on disk, without a live model: compose stored parts, merge compositions, move pins.

Every package that is added, also with another composition, is read completely once, so it is verified when it is
pinned. Packages that the base pins already are only opened, and must be the pinned ones.

Does not cover checkpoints with weights (`flexmoe.conversion.compose`), live models (`save`) or updates of the anchor.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flexmoe.admission.incoming import (
    IncomingExpert,
    PackageLike,
    PolicyLike,
    check_public_prior,
    choose_prior,
    read_public_rows,
    rename_incoming,
    with_experts,
)
from flexmoe.admission.router_inputs import RouterInput, inputs_of_anchor, inputs_of_stored
from flexmoe.admission.stored_outputs import PublicNetworks
from flexmoe.admission.stored_rows import check_composed_rows
from flexmoe.companions import GENERATION_FILE, copy_companions
from flexmoe.composition.format import (
    CONFIG_FILE,
    Composition,
    Pin,
    Reference,
    Rows,
    check_has_fingerprint,
    is_composition,
    read_router,
    rows_of,
    write_composition,
)
from flexmoe.composition.load import Sources, check_pin
from flexmoe.foreign_code import copy_companion
from flexmoe.hub.client import HubAccess, ResolvedFolder, resolve_folder
from flexmoe.hub.contents import check_others, composition_files
from flexmoe.hub.stored_model import StoredModel
from flexmoe.io.dense import DenseCheckpoint
from flexmoe.io.folders import atomic_folder, check_apart, check_new_folder, file_inside
from flexmoe.io.strict_json import read_json_object
from flexmoe.modeling.configuration_flexmoe import PUBLIC, FlexMoeConfig, check_top_k
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM
from flexmoe.packages.checks import errors_naming
from flexmoe.tokenization import check_tokenizer


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
    """Writes a composition, kilobytes that reference an anchor and packages, and returns its folder.

    Args:
        base: folder or Hub id of a graft that has "public" only, or of a composition.
        parts: packages, in the order wanted. If `base` is a composition, also compositions over the same anchor, which
            contribute all of their experts with the rows that they have there; an expert that is in two of them with
            the same files is added once.
        names: new names for experts of `parts`: {package as given, or its own name: name in the model}.
        public_prior: log prior odds of "public". Default: the base composition's; over a graft, as in `compose`.
        num_experts_per_tok: k of the top-k. Default: the base's.
        anchor: folder or Hub id of the dense checkpoint, needed if the base records no Hub repository of it. Its
            fingerprint is compared.
        verify: refuse experts of `parts` whose router row or bias would dominate the routing, or whose networks the
            outputs: those of packages as in `compose`, those of compositions with the rows that they have there. The
            base's experts are the reference for rows; public's networks that for outputs, if the anchor is available
            without a download.
        policy: which packages are trusted, also those of the base and of compositions: a policy file; default: the one
            that FLEXMOE_POLICY names.
        overwrite: replace an existing `out`.

    Raises:
        FileExistsError: `out` exists and `overwrite` is False.
        FileNotFoundError, PermissionError, ConnectionError: a part, or a package that it pins, is not available.
        ValueError: a part is for another anchor, does not match its manifest, is not trusted or not admitted; a
            composition pins a package that has changed; a name is taken; compositions differ in public's row, in k or
            in how weights are normalised; or the anchor's location is unknown.
        TypeError: `parts` is one package instead of a list.

    Example:
        ```pycon
        >>> import flexmoe
        >>> from transformers import AutoModelForCausalLM
        >>> folder = flexmoe.compose_by_reference("grafted", ["hospital/derm-expert"], "by-reference", anchor="anchor")
        >>> AutoModelForCausalLM.from_pretrained(folder).expert_names
        ['public', 'derm']
        ```
    """
    if isinstance(parts, str | Path):
        raise TypeError(f"parts: one package ({parts!r}), expected a list of them. Write [{parts!r}].")
    if num_experts_per_tok is not None:
        check_top_k(num_experts_per_tok)
    if public_prior is not None:
        check_public_prior(public_prior)
    target = check_new_folder(out, overwrite)
    draft = Draft.open(base, target)
    draft.given_anchor = anchor
    to_merge = {
        i: Draft.open(part, target) for i, part in enumerate(parts) if not draft.graft and is_composition(part)
    }
    packages = [part for i, part in enumerate(parts) if i not in to_merge]
    incoming = [IncomingExpert.open(package, draft.config, policy) for package in packages]
    merged_names = {name for other in to_merge.values() for name in other.config.expert_names}
    rename_incoming(incoming, packages, {key: name for key, name in (names or {}).items() if key not in merged_names})
    if draft.graft and not incoming:
        raise ValueError("There is no package to compose with: give at least one.")
    _set_prior(draft, incoming, public_prior)
    if num_experts_per_tok is not None:
        draft.config.num_experts_per_tok = num_experts_per_tok
    given = {"public_prior": public_prior, "num_experts_per_tok": num_experts_per_tok}
    decided = {key for key, value in given.items() if value is not None}
    present = [draft.open_pinned(name, policy) for name in draft.experts]
    to_append, merged = iter(incoming), []
    for i in range(len(parts)):
        if i in to_merge:
            merged += _merge(draft, to_merge[i], names or {}, decided, policy, verify)
        else:
            draft.append(next(to_append), verify)
    if verify and (incoming or merged):
        draft.check_rows([*incoming, *merged], present)
    return draft.write(overwrite)


@dataclass(frozen=True)
class Move:
    """An expert whose pin was moved: commits and versions before and after; None where nothing is recorded."""

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
    """Writes the composition with its pins moved to the current packages of its repositories or folders.

    An expert whose weights have changed loses the rows that were changed in the composition: they were made for the
    old weights.

    Args:
        composition: a folder or Hub id.
        out: where to write; may be the composition's own folder, with `overwrite`.
        experts: the experts to move and the revision to move to (None: the main branch). Default: all experts.
        verify: refuse versions whose row or bias would dominate the routing, or whose networks the outputs, as
            `compose_by_reference` does. The reference for rows are the experts that stay, if their packages are
            available, not those that are replaced.
        policy: which packages are trusted, as in `compose_by_reference`; applies to those that are to be moved.
        overwrite: replace an existing `out`.

    Returns:
        What was moved; experts that are up to date are not listed.

    Raises: as `compose_by_reference`; ValueError if `composition` is not one, or has no expert of a given name.

    Example:
        ```pycon
        >>> import flexmoe
        >>> flexmoe.update_composition("composition", "newer")  # nothing to update
        []
        ```
    """
    target = check_new_folder(out, overwrite)
    draft = Draft.open(composition, target)
    if draft.graft:
        raise ValueError(f"{composition} is not a composition: a model with weights has no pins to move.")
    wanted = dict.fromkeys(draft.experts) if experts is None else dict(experts)
    if unknown := sorted(set(wanted) - set(draft.experts)):
        raise ValueError(f"{composition} has no expert {unknown[0]!r}; it has {', '.join(draft.experts)}.")
    moves: list[Move] = []
    incoming, present = list[IncomingExpert](), list[IncomingExpert]()
    for name, revision in wanted.items():
        try:
            newest = draft.open_package(name, policy, revision)
        except OSError as error:
            raise type(error)(
                f"Expert {name!r} of {draft.source}: {error}. Move the pins of others with --expert (experts=)."
            ) from error
        has_other_weights = newest.package.manifest.sha256 != draft.experts[name].sha256
        (incoming if has_other_weights else present).append(newest)
        if move := _move_pin(draft, newest, verify and has_other_weights):
            moves.append(move)
    if verify and incoming:
        for name in (name for name in draft.experts if name not in wanted):
            with suppress(OSError, ValueError):  # not available, changed or not trusted: no reference
                present.append(draft.open_pinned(name, policy))
        draft.check_rows(incoming, present)
    draft.write(overwrite)
    return moves


@dataclass
class Draft:
    """A composition that is being edited: opened from disk, changed, and written to another folder.

    A graft counts as a composition without experts.

    Attributes:
        source: what was opened, for messages.
        folder: where it lies.
        target: the folder to write to; relative folders of references start there.
        config: the model's, with a record of each expert.
        rows: router rows and biases that differ from the sources'.
        experts: pins by name.
        anchor: where the dense checkpoint is; None for a graft, which holds its weights.
        graft: the opened graft; None for a composition.
        given_anchor: the dense checkpoint, a folder or a Hub id, if it is not where `anchor` says.
    """

    source: str
    folder: Path
    target: Path
    config: FlexMoeConfig
    rows: Rows
    experts: dict[str, Pin]
    anchor: Reference | None = None
    graft: StoredModel | None = None
    given_anchor: str | Path | None = None

    @classmethod
    def open(cls, source: str | Path, target: Path) -> Draft:
        """Opens a composition, or a graft that has "public" only: a folder or a Hub id.

        Raises:
            ValueError: it is a model with experts in its weights, or not a FlexMoE model.
        """
        found = resolve_folder(source)
        if not is_composition(source):
            graft = StoredModel(source)
            if len(graft.config.expert_names) > 1:
                raise ValueError(
                    f"{source} has the experts {graft.config.expert_names} in its weights: compose from the grafted "
                    "anchor, or from a composition (save_composition)."
                )
            rows = {name: row.float() for name, row in read_public_rows(graft).items() if bool(row.any())}
            return cls(str(source), found.path, target, copy.deepcopy(graft.config), rows, {}, graft=graft)
        config = FlexMoeConfig.from_pretrained(found.path)
        composition = Composition.from_config(config)
        return cls(
            source=str(source),
            folder=found.path,
            target=target,
            config=config,
            rows=read_router(found.path, composition.router_sha256, config),
            experts={name: pin.moved(found, target) for name, pin in composition.experts.items()},
            anchor=composition.anchor.moved(found, target),
        )

    def open_package(self, name: str, policy: PolicyLike = None, revision: str | None = None) -> IncomingExpert:
        """Opens the package of the expert `name` at a revision of its repository (None: the main branch)."""
        wanted = self.experts[name].wanted(ResolvedFolder(self.target), ())
        expert = IncomingExpert.open(wanted.source, self.config, policy, revision, is_repo=wanted.is_repo)
        expert.name = name
        return expert

    def open_pinned(self, name: str, policy: PolicyLike = None) -> IncomingExpert:
        """Opens the package of the expert `name` at its pin.

        Raises: as `IncomingExpert.open`; ValueError: it is not the pinned one.
        """
        pin = self.experts[name]
        expert = self.open_package(name, policy, pin.revision)
        check_pin(name, expert.package, pin)
        return expert

    def append(self, expert: IncomingExpert, verify: bool) -> None:
        """Adds the expert of a package, which is read to its end first; `verify` checks what it computes."""
        self.config = with_experts(self.config, [expert])
        self.read_completely(expert, verify)
        self.experts[expert.name] = self.pin_of(expert)

    def read_completely(self, expert: IncomingExpert, verify: bool, config: FlexMoeConfig | None = None) -> None:
        """Reads a package to its end, so its hashes are compared and its values are known to be finite.

        Args:
            verify: check what its networks compute.
            config: that has its record; by default the draft's.

        Raises:
            AdmissionError: the outputs would dominate, or damage, the model.
            ValueError: the package is damaged, or its tensors do not fit the model.
        """
        expert.expect(config or self.config, self._publics, verify=verify)
        with errors_naming(expert.package):
            for _ in expert.verified_tensors():
                pass

    def pin_of(self, expert: IncomingExpert) -> Pin:
        """The pin of a package as it is now."""
        source = expert.source or {}
        found = ResolvedFolder(expert.package.folder, source.get("repo"), source.get("revision"))
        return Reference.of(found, self.target).pinned(expert.package.manifest.sha256)

    def check_rows(self, incoming: Sequence[IncomingExpert], present: Sequence[IncomingExpert]) -> None:
        """Checks the rows and biases of incoming experts, which are in the draft already, against those of others.

        Rows count as they are in the composition: those that were changed there, and public's with its prior. Norms
        are also compared with public's matrices, of the graft or of the anchor, if it is available without a download.

        Args:
            present: the experts that are the reference.

        Raises:
            AdmissionError: a row or a bias would dominate the routing.
            ValueError: an expert has other layers than the model.
        """
        model = _meta_model(self.config)
        check_composed_rows(model, self.rows, incoming, present, self._router_inputs(model))

    def _router_inputs(self, model: FlexMoeForCausalLM) -> list[RouterInput] | None:
        """What is known of the router's input in each layer; None if the anchor is not available."""
        if self.graft is not None:
            return inputs_of_stored(self.graft, model)
        if (dense := self._dense) is None:
            return None
        inputs = inputs_of_anchor(dense, self.config.get_text_config().hidden_size)
        # of another depth: another anchor, which `write` reports
        return inputs if len(inputs) == len(model.flexmoe_blocks()) else None

    @cached_property
    def _publics(self) -> PublicNetworks:
        if self.graft is not None:
            return PublicNetworks.of_model(self.graft)
        return PublicNetworks.of_anchor(self.config, self._dense)

    @cached_property
    def _dense(self) -> DenseCheckpoint | None:
        """The anchor, if it is available without a download."""
        try:
            if self.given_anchor is not None:
                found = resolve_folder(self.given_anchor)
            else:
                assert self.anchor is not None  # a composition records it
                wanted = self.anchor.wanted(ResolvedFolder(self.target), ())
                found = HubAccess(local_files_only=True).resolve(
                    wanted.source, wanted.revision, is_repo=wanted.is_repo
                )
            return DenseCheckpoint(found.path)
        except OSError:  # missing or incomplete
            return None

    def write(self, overwrite: bool) -> Path:
        """Writes the composition to `target` and returns it. The fingerprint of `given_anchor` is compared.

        Raises:
            ValueError: the anchor's location is unknown, or it is another anchor; or a part lies in `target`.
        """
        check_has_fingerprint(self.config)
        composition = Composition(self._anchor_reference(self.given_anchor), self.experts)
        raw = read_json_object(file_inside(self.folder, CONFIG_FILE))
        if self.graft is None:
            check_others(self.folder, self.target, composition_files(self.folder, raw))
        tokenizer = check_tokenizer(self.folder)
        parts = composition.references.values()
        check_apart(self.target, *(part.path_from(self.target) for part in parts if part.folder))
        self.config.architectures = self.config.architectures or [FlexMoeForCausalLM.__name__]
        with atomic_folder(self.target, overwrite) as temporary:
            if self.graft is None:
                copy_companions(
                    self.folder,
                    temporary,
                    self.config,
                    public_sample=self.config.public_sample,
                    tokenizer=tokenizer,
                )
            elif (self.folder / GENERATION_FILE).is_file():
                copy_companion(file_inside(self.folder, GENERATION_FILE), temporary / GENERATION_FILE)
            FlexMoeForCausalLM.save_code(temporary)
            write_composition(temporary, self.config, composition, self.rows)
        return self.target

    def _anchor_reference(self, given: str | Path | None) -> Reference:
        if given is not None:
            found = resolve_folder(given)
            for _ in Sources(self.config, found.path, {}).tensors(rows_of(self.rows, PUBLIC)):
                pass  # to the end, where the fingerprint is compared
            return Reference.of(found, self.target)
        if self.anchor is not None:
            return self.anchor
        recorded = self.config.anchor or {}
        if recorded.get("repo"):
            repo, revision = str(recorded["repo"]), recorded.get("revision")
            if revision is None:  # pin the current commit; loading compares the fingerprint
                revision = resolve_folder(repo, allow_patterns=(CONFIG_FILE,), is_repo=True).revision
            return Reference(repo, revision)
        raise ValueError(
            "The location of this graft's dense anchor is not recorded: give the checkpoint that was grafted, a "
            "folder or a Hub id, with --anchor (anchor=)."
        )


def _set_prior(draft: Draft, incoming: Sequence[IncomingExpert], given: float | None) -> None:
    """Sets the biases of public's rows to the prior that is given, else over a graft to `compose`'s default."""
    prior = given if draft.graft is None else choose_prior(draft.graft, incoming, given)
    if prior is None:
        return
    for name in _meta_model(draft.config).state_dict():
        if name.endswith(f".router.{PUBLIC}.bias"):
            draft.rows.pop(name, None)
            if prior:
                draft.rows[name] = torch.tensor([prior], dtype=torch.float32)


def _merge(
    draft: Draft,
    other: Draft,
    names: Mapping[str, str],
    decided: Collection[str],
    policy: PolicyLike,
    verify: bool,
) -> list[IncomingExpert]:
    """Adds the experts of `other` to `draft`, with the rows that they have there; returns those that are new.

    Args:
        names: new names by name in `other`.
        decided: of "public_prior" and "num_experts_per_tok", those that the caller gave: the two may differ in them.
    """
    _check_compatible(draft, other, decided)
    added: list[IncomingExpert] = []
    all_names, active, active_there = list(draft.config.expert_names), _active(draft.config), _active(other.config)
    for record in other.config.expert_records[1:]:
        theirs = record["name"]
        name, pin = names.get(theirs, theirs), other.experts[theirs]
        rows = {
            key.replace(f".router.{theirs}.", f".router.{name}."): row
            for key, row in rows_of(other.rows, theirs).items()
        }
        if name in all_names:
            ours = draft.experts.get(name)
            if ours is None or ours.sha256 != pin.sha256 or not _equal(rows, rows_of(draft.rows, name)):
                raise ValueError(
                    f"{other.source} has an expert {name!r}, and so has the base, with other weights or rows: give "
                    f"that of {other.source} another name: --name {theirs}=NAME (names=)."
                )
            continue
        draft.config.experts = [*draft.config.expert_records, {**record, "name": name}]
        draft.experts[name] = pin
        draft.rows |= rows
        added.append(draft.open_pinned(name, policy))
        draft.read_completely(added[-1], verify)
        all_names.append(name)
        active += [name] if theirs in active_there else []
    draft.config.active_experts = None if set(active) == set(all_names) else active
    return added


def _check_compatible(draft: Draft, other: Draft, decided: Collection[str]) -> None:
    configs = (draft.config, other.config)
    fingerprints = [(config.anchor or {}).get("fingerprint") for config in configs]
    settings: list[tuple[str, list[Any], str]] = [
        ("the anchor's fingerprint", fingerprints, "Experts fit one anchor only."),
        ("norm_topk_prob", [config.norm_topk_prob for config in configs], "Compose one of them anew."),
    ]
    if "num_experts_per_tok" not in decided:
        remedy = "Choose one: --num-experts-per-tok (num_experts_per_tok=)."
        settings.append(("num_experts_per_tok", [config.num_experts_per_tok for config in configs], remedy))
    differences = [
        f"{name} is {theirs} there, {ours} here. {remedy}"
        for name, (ours, theirs), remedy in settings
        if ours != theirs
    ]
    if "public_prior" not in decided and not _equal(rows_of(draft.rows, PUBLIC), rows_of(other.rows, PUBLIC)):
        differences.append("public's prior or rows differ. Choose the prior: --public-prior (public_prior=).")
    if differences:
        raise ValueError(f"{other.source} and {draft.source} cannot be merged: {differences[0]}")


def _move_pin(draft: Draft, expert: IncomingExpert, verify: bool) -> Move | None:
    """Moves the pin of an expert to the package that was opened; None if it is up to date."""
    name = expert.name
    old, new = draft.experts[name], draft.pin_of(expert)
    if new == old:
        return None
    records, position = draft.config.expert_records, draft.config.expert_names.index(name)
    public_alone = copy.deepcopy(draft.config)
    public_alone.active_experts, public_alone.experts = None, records[:1]
    with_new = with_experts(public_alone, [expert])
    (_, record) = with_new.expert_records
    draft.read_completely(expert, verify, with_new)
    draft.config.experts = [*records[:position], record, *records[position + 1 :]]
    if new.sha256 != old.sha256 and (changed := rows_of(draft.rows, name)):
        warnings.warn(
            f"The rows of {name!r} that were changed in {draft.source} were made for its old version: dropped.",
            stacklevel=3,
        )
        draft.rows = {row: value for row, value in draft.rows.items() if row not in changed}
    draft.experts[name] = new
    return Move(name, old.revision, new.revision, records[position].get("version"), record.get("version"))


def _meta_model(config: FlexMoeConfig) -> FlexMoeForCausalLM:
    with torch.device("meta"):
        return FlexMoeForCausalLM(copy.deepcopy(config))


def _active(config: FlexMoeConfig) -> list[str]:
    return list(config.expert_names if config.active_experts is None else config.active_experts)


def _equal(ours: Rows, theirs: Rows) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(row, theirs[name]) for name, row in ours.items())


__all__ = ["Draft", "Move", "compose_by_reference", "update_composition"]
