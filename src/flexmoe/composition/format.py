"""Compositions on disk: a model stored by reference, in kilobytes, as a lockfile of its parts.

    config.json         the model's configuration; its entry `composition` pins the anchor and the experts' packages
    router.safetensors  router rows and biases that differ from the sources' (of public: from zero); absent if none do
    README.md           the card

A part is a Hub repository at a commit, or a folder. The anchor is identified by its fingerprint, an expert by the
SHA-256 of its weight files, so a composition loads as the model that was saved, or not at all. The user's guide is
`docs/composition.md`.

Covers the format. Does not cover loading (`load`), saving a live model (`save`), edits without a model (`edit`),
signatures (`flexmoe.packages.trust`) or uploads (`flexmoe.hub`).
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from torch import Tensor

from flexmoe.cards.facts import composition_facts
from flexmoe.cards.rendering import render
from flexmoe.hub.client import ResolvedFolder, Wanted, resolve_folder
from flexmoe.io.finite import all_finite
from flexmoe.io.folders import file_inside
from flexmoe.io.hub_ids import HUB_ID
from flexmoe.io.strict_json import read_json_object
from flexmoe.io.tensors import TensorFile, TensorInfo, empty_tensor
from flexmoe.io.writer import source_from_tensor, write_checkpoint
from flexmoe.modeling.configuration_flexmoe import PUBLIC, FlexMoeConfig
from flexmoe.modeling.evidence_flexmoe import row_shapes
from flexmoe.modeling.fingerprint_flexmoe import TORCH_DTYPES
from flexmoe.packages.package import CARD_FILE, CONFIG_FILE

FORMAT_VERSION = 1
ROUTER_FILE = "router.safetensors"

Rows = dict[str, Tensor]
"""Router rows [1, H] and biases [1], float32, by their names in the model."""

_ReferenceT = TypeVar("_ReferenceT", bound="Reference")
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_MAX_ITEM_BYTES = 8  # float64
_KEYS = {"format_version", "anchor", "experts", "router_sha256"}


@dataclass(frozen=True)
class Reference:
    """Where a part comes from: the Hub repository `repo` at the commit `revision`, or else `folder`.

    A folder that lies beside the composition is recorded relative to it, so both can be moved together.
    """

    repo: str | None = None
    revision: str | None = None
    folder: str | None = None

    @classmethod
    def of(cls, found: ResolvedFolder, composition: Path) -> Reference:
        """The reference to `found` in a composition that is written to the folder `composition`."""
        if found.repo is not None:
            return cls(found.repo, found.revision)
        real = Path(os.path.realpath(found.path))
        beside = real.is_relative_to(composition.parent)
        return cls(folder=Path(os.path.relpath(real, composition)).as_posix() if beside else str(real))

    @classmethod
    def from_dict(cls, values: Any, what: str) -> Reference:
        """The reference in a config; `what` names it in errors.

        Raises:
            ValueError: `values` is not a reference.
        """
        texts = isinstance(values, dict) and all(isinstance(value, str) for value in values.values())
        if not texts or set(values) not in ({"repo", "revision"}, {"folder"}):
            raise ValueError(
                f"{what}: {values!r} is not a reference; expected {{'repo': ..., 'revision': ...}} or "
                "{'folder': ...}."
            )
        if "repo" in values and not (HUB_ID.fullmatch(values["repo"]) and _COMMIT.fullmatch(values["revision"])):
            raise ValueError(f"{what}: {values!r} must name a Hub repository and a commit of 40 hexadecimal digits.")
        return cls(**values)

    def to_dict(self) -> dict[str, str]:
        """The fields that are set, as a config holds them."""
        values = {"repo": self.repo, "revision": self.revision, "folder": self.folder}
        return {key: value for key, value in values.items() if value is not None}

    def path_from(self, composition: Path) -> Path:
        """The absolute path of `folder`, as named by a composition in the folder `composition`; links are followed."""
        return Path(os.path.realpath(composition / str(self.folder)))

    def moved(self: _ReferenceT, composition: ResolvedFolder, target: Path) -> _ReferenceT:
        """This reference of `composition`, as a composition in the folder `target` has to record it."""
        if self.folder is None:
            return self
        source = Path(self.wanted(composition, ()).source)
        return replace(self, folder=Reference.of(ResolvedFolder(source), target).folder)

    def pinned(self, sha256: Mapping[str, str]) -> Pin:
        """This reference with the SHA-256 of the weight files that it must lead to."""
        return Pin(self.repo, self.revision, self.folder, sha256=sha256)

    def wanted(self, composition: ResolvedFolder, patterns: Sequence[str], *, owned: bool = False) -> Wanted:
        """The request for this part, for `HubAccess.resolve_all`.

        Args:
            composition: where the composition was found.
            patterns: the files to download from a repository.
            owned: whether the part's owner may withdraw it, so the Hub is asked even if the cache is complete.

        Raises:
            ValueError: a composition from the Hub names a folder, which would be one of this machine.
        """
        if self.folder is None:
            return Wanted(str(self.repo), self.revision, patterns, is_repo=True, owned=owned)
        if composition.repo is not None:
            raise ValueError(
                f"The composition {composition.repo} names the folder {self.folder!r}: on the Hub it may only name "
                "repositories. Its author should push the anchor and the experts, and save it again with their ids."
            )
        return Wanted(self.path_from(composition.path))


@dataclass(frozen=True)
class Pin(Reference):
    """A reference to an expert package, with the SHA-256 of each of its weight files."""

    sha256: Mapping[str, str] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class Composition:
    """The entry `composition` of a config: the pinned parts of a model.

    Attributes:
        anchor: where the dense checkpoint is; the config's `anchor` has its fingerprint.
        experts: the packages, by the experts' names in the model.
        router_sha256: of `router.safetensors`; None if there is none.
    """

    anchor: Reference
    experts: Mapping[str, Pin]
    router_sha256: str | None = None

    @classmethod
    def from_config(cls, config: FlexMoeConfig) -> Composition:
        """The checked entry `composition` of a config.

        Raises:
            ValueError: another format version, malformed references or hashes, or an expert of the config without a
                reference.
        """
        values = config.composition or {}
        if not isinstance(values, dict):
            raise ValueError(f"composition: {str(values)[:100]!r} is not an object with the keys {sorted(_KEYS)}.")
        if values.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"composition: format_version is {values.get('format_version')!r}; this version of flexmoe reads "
                f"{FORMAT_VERSION}. Update flexmoe if the number is higher."
            )
        entries = values.get("experts")
        if set(values) != _KEYS or not isinstance(entries, dict):
            raise ValueError(f"composition: its keys must be {sorted(_KEYS)}; they are {sorted(values)}.")
        names = config.expert_names[1:]
        if missing := [name for name in names if name not in entries]:
            raise ValueError(f"composition: no reference for the expert(s) {missing} of this config.")
        pins = {}
        for name in names:
            entry = entries[name] if isinstance(entries[name], dict) else {}
            what, place = f"composition, expert {name!r}", {key: entry[key] for key in entry if key != "sha256"}
            pins[name] = Reference.from_dict(place, what).pinned(_checked_hashes(entry.get("sha256"), what))
        anchor, router = Reference.from_dict(values["anchor"], "composition, anchor"), values["router_sha256"]
        if router is not None and not _is_sha256(router):
            raise ValueError(f"composition: router_sha256 must be 64 hexadecimal digits or null; it is {router!r}.")
        return cls(anchor, pins, router)

    @property
    def references(self) -> dict[str, Reference]:
        """Where all parts are, by name; "public" is the anchor."""
        return {PUBLIC: self.anchor, **self.experts}

    def to_dict(self) -> dict[str, Any]:
        """The entry as a config holds it."""
        experts = {name: {**pin.to_dict(), "sha256": pin.sha256} for name, pin in self.experts.items()}
        return {
            "format_version": FORMAT_VERSION,
            "anchor": self.anchor.to_dict(),
            "experts": experts,
            "router_sha256": self.router_sha256,
        }


def is_composition(source: Any) -> TypeGuard[str | Path]:
    """Whether a folder or Hub id is a composition; only config.json of a repository is downloaded."""
    if not isinstance(source, str | Path):
        return False
    config = resolve_folder(source, allow_patterns=(CONFIG_FILE,)).path / CONFIG_FILE
    return config.is_file() and read_json_object(config).get("composition") is not None


def check_has_fingerprint(config: FlexMoeConfig) -> None:
    """Raises ValueError if the config records no fingerprint of its anchor, by which a composition identifies it."""
    if not (config.anchor or {}).get("fingerprint"):
        raise ValueError(
            "The anchor of this model has no fingerprint, so a composition cannot identify it. Graft it with "
            "`flexmoe graft`, which computes one, or save all weights with save_pretrained."
        )


def write_composition(
    folder: Path, config: FlexMoeConfig, composition: Composition, rows: Mapping[str, Tensor]
) -> None:
    """Writes the files of a composition into a folder; config.json comes last: without it, a folder does not load.

    Args:
        config: the model's; its `composition` is set.
        composition: the pinned parts; `router_sha256` is computed here.
        rows: router rows and biases that differ from the sources', as `Rows`.
    """
    composition = replace(composition, router_sha256=_write_router(folder, rows))
    config.composition = composition.to_dict()
    config.public_sample = None  # the sample lies beside the weights
    places = {name: reference.to_dict() for name, reference in composition.references.items()}
    card = render("composition", composition_facts(config, places))
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    config.save_pretrained(folder)


def read_router(folder: Path, sha256: str | None, config: FlexMoeConfig) -> Rows:
    """The rows in a composition's `router.safetensors`, converted to float32; none if `sha256` is None.

    At most the bytes that rows of all experts of the config can take are read. The rows are not checked for
    admission: the author of the composition chose them.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file has another SHA-256, or a tensor in it is not a row or bias of an expert of `config`, or
            is not finite; names the file and the tensor.
    """
    if sha256 is None:
        return {}
    rows: Rows = {}
    with TensorFile(file_inside(folder, ROUTER_FILE)) as file:
        _check_header(file, config)
        hasher = hashlib.sha256(file.header)
        for info in file.infos.values():
            rows[info.name] = empty_tensor(info)
            for part in file.fill(info.name, rows[info.name]):
                hasher.update(part)
        if (digest := hasher.hexdigest()) != sha256:
            raise ValueError(
                f"{file.path}: its SHA-256 is {digest}, config.json says {sha256}. It was damaged or changed."
            )
        rows = {name: row.float() for name, row in rows.items()}
        for name, row in rows.items():
            if not all_finite(row):
                raise ValueError(f"{file.path}: {name!r} holds NaN, an infinity, or a number too large for float32.")
    return rows


def rows_of(rows: Mapping[str, Tensor], experts: str | Iterable[str]) -> Rows:
    """The rows and biases of an expert, or of several."""
    names = [experts] if isinstance(experts, str) else list(experts)
    return {key: row for key, row in rows.items() if any(f".router.{name}." in key for name in names)}


def _check_header(file: TensorFile, config: FlexMoeConfig) -> None:
    """Checks the header alone: names, shapes and dtypes are those of router rows, and there are not too many."""
    text: Any = config.get_text_config()
    shapes = {record["name"]: row_shapes(record, text.hidden_size, 0) for record in config.expert_records}
    own = re.compile(rf"[\w.]+\.router\.({'|'.join(map(re.escape, shapes))})\.(\w+)", re.ASCII)

    def is_row(info: TensorInfo) -> bool:
        match = own.fullmatch(info.name)
        floating = TORCH_DTYPES[info.dtype].is_floating_point
        return match is not None and floating and info.shape == shapes[match[1]].get(match[2])

    if unknown := [info for info in file.infos.values() if not is_row(info)]:
        name, shape = unknown[0].name[:200], list(unknown[0].shape)
        raise ValueError(
            f"{file.path}: {name!r} {shape} {unknown[0].dtype} is not a router row of this model; those are "
            f"floating-point, ....router.<expert>.weight [1, {text.hidden_size}] and .bias [1] (and .calibration and "
            f".table, as in its config), for the experts {config.expert_names}."
        )
    elements = sum(math.prod(shape) for row in shapes.values() for shape in row.values())
    most = text.num_hidden_layers * elements * _MAX_ITEM_BYTES
    if (found := sum(info.nbytes for info in file.infos.values())) > most:
        raise ValueError(f"{file.path}: rows of {found:,} bytes; those of all experts take at most {most:,}.")


def _checked_hashes(values: Any, what: str) -> dict[str, str]:
    """The SHA-256 of weight files by their names, as a config holds them."""
    if not isinstance(values, dict) or not values or not all(map(_is_sha256, values.values())):
        raise ValueError(
            f"{what}: sha256 must map each weight file to 64 hexadecimal digits; it is {str(values)[:200]}."
        )
    return values


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _write_router(folder: Path, rows: Mapping[str, Tensor]) -> str | None:
    """Writes `router.safetensors` and returns its SHA-256; None if there are no rows to write."""
    if not rows:
        return None
    sources = [source_from_tensor(name, row) for name, row in rows.items()]
    return write_checkpoint(folder, sources, stem="router", aligned=False, hash_files=True).files[ROUTER_FILE]


__all__ = [
    "CONFIG_FILE",
    "ROUTER_FILE",
    "Composition",
    "Pin",
    "Reference",
    "Rows",
    "check_has_fingerprint",
    "is_composition",
    "read_router",
    "rows_of",
    "write_composition",
]
