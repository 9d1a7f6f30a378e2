"""Compositions: a model by reference, kilobytes that name a dense anchor and the packages of its experts.

    config.json         the model's configuration, and under `composition` where the anchor and each expert come from
    router.safetensors  router rows and biases that are not what the sources say (of public: zero); absent if all are
    README.md           the card

A source is a repository of the Hub at a commit, or a folder. An anchor is known by its fingerprint and an expert by
the SHA-256 of its files, so what is loaded is what was saved, or an error. `docs/composition.md` is for readers.

Here: the files. Not here: loading one (`pulling_flexmoe`), making one of a live model (`referring_flexmoe`),
signatures, uploads.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cards_flexmoe import HUB_ID, composition_facts, render_card
from .configuration_flexmoe import PUBLIC, FlexMoeConfig
from .finite_flexmoe import all_finite
from .folders_flexmoe import file_inside
from .hub_flexmoe import ResolvedFolder, Wanted
from .packages_flexmoe import CARD_FILE, CONFIG_FILE
from .tensor_writer_flexmoe import source_from_tensor, write_checkpoint
from .tensors_flexmoe import TORCH_DTYPES, TensorFile, TensorInfo, empty_tensor

FORMAT_VERSION = 1
ROUTER_FILE = "router.safetensors"
GENERATION_FILE = "generation_config.json"

_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_LARGEST_NUMBER = 8  # bytes, of a float64
_KEYS = {"format_version", "anchor", "experts", "router_sha256"}


@dataclass(frozen=True)
class Reference:
    """Where the anchor or an expert comes from: `repo` at the commit `revision`, or else `folder`.

    A folder that lies beside the composition is named relative to it, so that both can be moved together.
    """

    repo: str | None = None
    revision: str | None = None
    folder: str | None = None

    @classmethod
    def of(cls, found: ResolvedFolder, composition: Path) -> Reference:
        """The reference by which a composition in the folder `composition` names what was found."""
        if found.repo is not None:
            return cls(found.repo, found.revision)
        real = Path(os.path.realpath(found.path))
        beside = real.is_relative_to(composition.parent)
        return cls(folder=Path(os.path.relpath(real, composition)).as_posix() if beside else str(real))

    @classmethod
    def from_dict(cls, values: Any, what: str) -> Reference:
        """The reference that a config holds; `what` names it in errors.

        Raises:
            ValueError: it is not one.
        """
        texts = isinstance(values, dict) and all(isinstance(value, str) for value in values.values())
        if not texts or set(values) not in ({"repo", "revision"}, {"folder"}):
            raise ValueError(
                f"{what}: {values!r} is no reference; one is {{'repo': ..., 'revision': ...}} or {{'folder': ...}}."
            )
        if "repo" in values and not (HUB_ID.fullmatch(values["repo"]) and _COMMIT.fullmatch(values["revision"])):
            raise ValueError(f"{what}: {values!r} must name a Hub repository and a commit of 40 hexadecimal digits.")
        return cls(**values)

    def to_dict(self) -> dict[str, str]:
        """As a config holds it."""
        return {key: value for key, value in vars(self).items() if value is not None}

    def wanted(self, composition: ResolvedFolder, patterns: Sequence[str], *, owned: bool = False) -> Wanted:
        """What it names, for `HubAccess.resolve_all`.

        Args:
            patterns: the files that are fetched of a repository.
            owned: its owner may withdraw it.

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
        return Wanted(composition.path / self.folder)


@dataclass(frozen=True)
class Composition:
    """The entry `composition` of a config: what a model is made of.

    Attributes:
        anchor: where the dense checkpoint is.
        experts: where the packages are, by the experts' names in the model.
        sha256: of each package's weight files, by the experts' names.
        router_sha256: of `router.safetensors`; None if there is none.
    """

    anchor: Reference
    experts: Mapping[str, Reference]
    sha256: Mapping[str, Mapping[str, str]]
    router_sha256: str | None

    @classmethod
    def from_config(cls, config: FlexMoeConfig) -> Composition:
        """What the config of a composition says, checked.

        Raises:
            ValueError: it is of another format version, or not of this format (references, hashes), or lacks an expert
                of the config.
        """
        values = config.composition or {}
        if not isinstance(values, dict):
            raise ValueError(f"composition: {str(values)[:100]!r} is no object with the keys {sorted(_KEYS)}.")
        if values.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"composition: format_version is {values.get('format_version')!r}; this FlexMoE reads "
                f"{FORMAT_VERSION}. Update flexmoe if the number is higher."
            )
        experts = values.get("experts")
        if set(values) != _KEYS or not isinstance(experts, dict):
            raise ValueError(f"composition: its keys must be {sorted(_KEYS)}; they are {sorted(values)}.")
        owners = config.expert_names[1:]
        if lacking := [name for name in owners if name not in experts]:
            raise ValueError(f"composition: nothing says where the expert(s) {lacking} of this config come from.")
        references, hashes = {}, {}
        for name in owners:
            entry = experts[name] if isinstance(experts[name], dict) else {}
            what, place = f"composition, expert {name!r}", {key: entry[key] for key in entry if key != "sha256"}
            references[name] = Reference.from_dict(place, what)
            hashes[name] = _hashes(entry.get("sha256"), what)
        anchor, router = Reference.from_dict(values["anchor"], "composition, anchor"), values["router_sha256"]
        if router is not None and not _is_sha256(router):
            raise ValueError(f"composition: router_sha256 must be 64 hexadecimal digits or null; it is {router!r}.")
        return cls(anchor, references, hashes, router)

    def to_dict(self) -> dict[str, Any]:
        """As a config holds it."""
        experts = {name: {**entry.to_dict(), "sha256": self.sha256[name]} for name, entry in self.experts.items()}
        return {
            "format_version": FORMAT_VERSION,
            "anchor": self.anchor.to_dict(),
            "experts": experts,
            "router_sha256": self.router_sha256,
        }


def write_composition(
    folder: Path, config: FlexMoeConfig, composition: Composition, rows: Mapping[str, Tensor]
) -> None:
    """Writes the files of a composition into a folder; the config comes last: without it, a folder does not load.

    Args:
        config: the model's; becomes the composition's.
        composition: where the parts are; its `router_sha256` is computed here.
        rows: router rows and biases that are not what the sources say, by their names in the model, float32.
    """
    digest = _write_router(folder, rows)
    composition = replace(composition, router_sha256=digest)
    config.composition = composition.to_dict()
    config.public_sample = None  # it lies beside weights
    (folder / CARD_FILE).write_text(_card(config, composition), encoding="utf-8")
    config.save_pretrained(folder)


def read_router(folder: Path, sha256: str | None, config: FlexMoeConfig) -> dict[str, Tensor]:
    """The rows in a composition's `router.safetensors`, in float32; none if `sha256` is None.

    No more is read than rows of all experts of the config take. Whether they would take over the model is not asked:
    who made the composition chose them.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it has another SHA-256, or a tensor in it is no row or bias of an expert of `config`, or holds what
            is no finite number; names the file and the tensor.
    """
    if sha256 is None:
        return {}
    rows: dict[str, Tensor] = {}
    with TensorFile(file_inside(folder, ROUTER_FILE)) as file:
        _check_rows(file, config)
        hasher = hashlib.sha256(file.header)
        for info in file.infos.values():
            rows[info.name] = empty_tensor(info)
            for part in file.fill(info.name, rows[info.name]):
                hasher.update(part)
        if (digest := hasher.hexdigest()) != sha256:
            raise ValueError(
                f"{file.path}: its SHA-256 is {digest}, config.json says {sha256}. It was damaged or changed."
            )
        rows = {name: row.to(torch.float32) for name, row in rows.items()}
        if wild := [name for name, row in rows.items() if not all_finite(row)]:
            raise ValueError(f"{file.path}: {wild[0]!r} holds NaN, an infinity, or a number too large for float32.")
    return rows


def _check_rows(file: TensorFile, config: FlexMoeConfig) -> None:
    """By the header alone: names, shapes and dtypes are those of router rows, and there are not too many."""
    text: Any = config.get_text_config()
    shapes = {"weight": (1, text.hidden_size), "bias": (1,)}
    own = re.compile(rf"[\w.]+\.router\.({'|'.join(map(re.escape, config.expert_names))})\.(weight|bias)", re.ASCII)

    def is_row(info: TensorInfo) -> bool:
        match = own.fullmatch(info.name)
        floating = TORCH_DTYPES[info.dtype].is_floating_point
        return match is not None and floating and info.shape == shapes[match[2]]

    if strange := [info for info in file.infos.values() if not is_row(info)]:
        name, shape = strange[0].name[:200], list(strange[0].shape)
        raise ValueError(
            f"{file.path}: {name!r} {shape} {strange[0].dtype} is no row of this model; those are floating-point, "
            f"....router.<expert>.weight [1, {text.hidden_size}] and .bias [1]; experts are {config.expert_names}."
        )
    most = text.num_hidden_layers * len(config.expert_names) * (text.hidden_size + 1) * _LARGEST_NUMBER
    if (found := sum(info.nbytes for info in file.infos.values())) > most:
        raise ValueError(f"{file.path}: rows of {found:,} bytes; those of all experts take {most:,} at most.")


def _hashes(values: Any, what: str) -> dict[str, str]:
    """The SHA-256 of weight files by their names, as a config holds them."""
    if not isinstance(values, dict) or not values or not all(map(_is_sha256, values.values())):
        raise ValueError(
            f"{what}: sha256 must map each weight file to 64 hexadecimal digits; it is {str(values)[:200]}."
        )
    return values


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _write_router(folder: Path, rows: Mapping[str, Tensor]) -> str | None:
    if not rows:
        return None
    written = write_checkpoint(
        folder, [source_from_tensor(name, row) for name, row in rows.items()], stem="router", hash_files=True
    )
    return written.files[ROUTER_FILE]


def _card(config: FlexMoeConfig, composition: Composition) -> str:
    references = {PUBLIC: composition.anchor, **composition.experts}
    return render_card("composition", composition_facts(config, {k: v.to_dict() for k, v in references.items()}))


__all__ = [
    "CONFIG_FILE",
    "GENERATION_FILE",
    "ROUTER_FILE",
    "Composition",
    "Reference",
    "read_router",
    "write_composition",
]
