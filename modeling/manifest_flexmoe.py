"""The manifest of an expert package, `expert_config.json`, format version 1: a table of keys, each with its check.

Not here: the weights it speaks of (`packages_flexmoe`), and whether the anchor is the one at hand.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .configuration_flexmoe import RECORD_KEYS, check_expert_name, is_count, is_counts, is_finite_number

FORMAT_VERSION = 1
KINDS = ("full", "low_rank")
MANIFEST_FILE = "expert_config.json"
WEIGHT_FILE = re.compile(r"expert(-\d{5}-of-\d{5})?\.safetensors", re.ASCII)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_FFN_KEYS = {"class", "hidden", "intermediate"}
_ANCHOR_KEYS = {"repo", "revision", "fingerprint", "model_type"}
_OPTIONAL = {"rank", "alpha", "training", "license", "data_statement"}


class PackageError(ValueError):
    """An expert package that is not what it says; the message names the file and the fault."""


@dataclass(frozen=True, kw_only=True)
class ExpertManifest:
    """What `expert_config.json` says of an expert. Checked when made.

    Attributes:
        name: the name that its owner gave it; a model may call it otherwise.
        version: of this expert, in the owner's counting.
        kind: "full" (a network of the anchor's own class) or "low_rank" (a difference from the public network).
        rank: per layer, for "low_rank" only.
        alpha: scale of a "low_rank" difference.
        layers: numbers of the anchor's decoder layers that it has a network for, ascending.
        ffn: `class`, `hidden` (H) and `intermediate` (one width, or one per layer) of the anchor's network.
        dtype: of the networks, as torch calls it ("bfloat16"), or "mixed".
        anchor: `repo` and `revision` on the Hub, `fingerprint`, `model_type`; None where unknown.
        training: `tokens`, `k`, `seed`, `config` and whatever else the trainer wants to be known.
        license: an SPDX identifier or a name.
        data_statement: what it was trained on, in the owner's words.
        sha256: hex digest of each weight file.

    Raises:
        PackageError: a value is of the wrong type or not allowed.
    """

    name: str
    layers: list[int]
    ffn: dict[str, Any]
    dtype: str
    anchor: dict[str, str | None]
    version: str = "1.0.0"
    kind: str = "full"
    rank: list[int] | None = None
    alpha: float | None = None
    training: dict[str, Any] | None = None
    license: str | None = None
    data_statement: str | None = None
    sha256: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        self._check(MANIFEST_FILE)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = MANIFEST_FILE) -> "ExpertManifest":
        """The manifest that a parsed `expert_config.json` holds; `where` names the file in errors.

        Raises:
            PackageError: a key is unknown, missing or holds what it may not; names the file and the key.
        """
        # the version first: of a newer format, unknown keys are not the fault
        version = values.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise PackageError(
                f"{where}: format_version is {version!r}; this FlexMoE reads {FORMAT_VERSION}. "
                "Update flexmoe if the number is higher."
            )
        known = [entry.name for entry in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise PackageError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(known)}.")
        if missing := [key for key in known if key not in values and key not in _OPTIONAL]:
            raise PackageError(f"{where}: the key {missing[0]!r} is missing.")
        manifest = object.__new__(cls)
        for entry in fields(cls):  # not __init__, whose check could not name the file
            object.__setattr__(manifest, entry.name, values.get(entry.name))
        manifest._check(where)
        if not manifest.sha256:
            raise PackageError(f"{where}: key 'sha256' names no weight file.")
        return manifest

    def to_dict(self) -> dict[str, Any]:
        """The manifest as it is written, every key present."""
        order = ["format_version", "name", "version", "kind", "rank", "alpha", "layers", "ffn", "dtype", "anchor"]
        order += ["training", "license", "data_statement", "sha256"]
        return {key: getattr(self, key) for key in order}

    def record(self) -> dict[str, Any]:
        """The expert's record in a model's config: what is known, without what belongs to the files."""
        values = {key: getattr(self, key, None) for key in RECORD_KEYS}
        return {key: value for key, value in values.items() if value is not None}

    def _check(self, where: str) -> None:
        for key, (allowed, holds) in _RULES.items():
            value = getattr(self, key)
            if value is None and key in _OPTIONAL:
                continue
            if not holds(value):
                raise PackageError(f"{where}: key {key!r} must be {allowed}; it is {str(value)[:200]!r}.")
        try:
            check_expert_name(self.name)
        except ValueError as error:
            raise PackageError(f"{where}: key 'name': {error}") from None
        if (self.rank is not None) != (self.kind == "low_rank"):
            raise PackageError(
                f"{where}: key 'rank' is for kind 'low_rank', and is needed there; kind is {self.kind!r}."
            )
        for key, value in (("rank", self.rank), ("ffn.intermediate", self.ffn["intermediate"])):
            if isinstance(value, list) and len(value) != len(self.layers):
                raise PackageError(f"{where}: key {key!r} has {len(value)} entries for {len(self.layers)} layers.")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_layers(value: Any) -> bool:
    if not isinstance(value, list) or not value or not all(type(layer) is int for layer in value):
        return False
    return value[0] >= 0 and value[-1] < 1_000_000 and value == sorted(set(value))


def _is_ffn(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != _FFN_KEYS:
        return False
    widths = value["intermediate"]
    return _is_text(value["class"]) and is_count(value["hidden"]) and (is_count(widths) or is_counts(widths))


def _is_anchor(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != _ANCHOR_KEYS or not _is_text(value["model_type"]):
        return False
    fingerprint = value["fingerprint"]
    return all(entry is None or _is_text(entry) for entry in value.values()) and (
        fingerprint is None or bool(_SHA256.fullmatch(fingerprint))
    )


def _is_hashes(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_text(name) and WEIGHT_FILE.fullmatch(name) and _is_text(digest) and _SHA256.fullmatch(digest)
        for name, digest in value.items()
    )


_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "format_version": (f"{FORMAT_VERSION}", lambda value: value == FORMAT_VERSION),
    "name": ("text", _is_text),
    "version": ("text, 1 to 64 characters", lambda value: _is_text(value) and 1 <= len(value) <= 64),
    "kind": (f"one of {', '.join(KINDS)}", lambda value: _is_text(value) and value in KINDS),
    "rank": ("a list of positive integers, one per layer", is_counts),
    "alpha": ("a finite number", is_finite_number),
    "layers": ("an ascending list of layer numbers, at least one", _is_layers),
    "ffn": ("an object with class (text), hidden and intermediate (positive integers, or a list of them)", _is_ffn),
    "dtype": ("text such as 'bfloat16', or 'mixed'", _is_text),
    "anchor": (
        "an object with model_type (text), repo and revision (text or null) and fingerprint (SHA-256 hex, or null)",
        _is_anchor,
    ),
    "training": ("an object", lambda value: isinstance(value, dict)),
    "license": ("text", _is_text),
    "data_statement": ("text", _is_text),
    "sha256": ("an object from expert*.safetensors file names to SHA-256 in hex", _is_hashes),
}

__all__ = ["FORMAT_VERSION", "KINDS", "MANIFEST_FILE", "WEIGHT_FILE", "ExpertManifest", "PackageError"]
