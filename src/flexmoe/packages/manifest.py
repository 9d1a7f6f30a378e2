"""The manifest of an expert package, `expert_config.json`, format version 1.

Each key is validated by the JSON schema (`flexmoe.packages.schema`); rules that relate several keys are checked here.
Does not cover the weights (`flexmoe.packages.package`), or whether the anchor matches (`flexmoe.packages.checks`).
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from flexmoe.io.strict_json import JsonDepthError, check_depth
from flexmoe.modeling.configuration_flexmoe import RECORD_KEYS, check_expert_name, is_finite_number
from flexmoe.packages.schema import FORMAT_VERSION, KINDS, first_error

MANIFEST_FILE = "expert_config.json"
WEIGHT_FILE = re.compile(r"expert(-\d{5}-of-\d{5})?\.safetensors", re.ASCII)
MAX_DEPTH = 16
"""Objects and lists within each other. The manifest becomes a part of a model's config, three levels down, which is
read to a depth of 32 (`flexmoe.io.strict_json.MAX_JSON_DEPTH`)."""
MAX_RECORD_BYTES = 64 << 10
"""Of the expert's record as a config holds it: a config of 32 MiB (`MAX_JSON_BYTES`) has room for 500 such records."""

_MAX_INTEGER_BITS = 64
_PLACEHOLDER = {"expert.safetensors": "0" * 64}  # for validation, while the files are not written yet


class PackageError(ValueError):
    """An expert package that is invalid or damaged; the message names the file and the error."""


@dataclass(frozen=True, kw_only=True)
class ExpertManifest:
    """The contents of `expert_config.json`, validated on construction.

    Attributes:
        name: the owner's name for the expert; a model may use another.
        version: chosen by the owner.
        kind: "full" (a network of the anchor's class) or "low_rank" (a difference from the public network).
        rank: per layer, for "low_rank" only.
        alpha: a "low_rank" difference is scaled by `alpha / rank`; None is a scale of 1.
        evidence: what the expert's table of scores was made with, and `tokens`, `decays` and `window`; None without.
        layers: indices of the anchor's decoder layers that the expert has a network for, ascending.
        ffn: `class`, `hidden` (H) and `intermediate` (one width, or one per layer) of the network.
        dtype: torch's name of the networks' dtype ("bfloat16"), or "mixed".
        anchor: `repo` and `revision` on the Hub, `fingerprint`, `model_type`; None where unknown.
        training: `tokens`, `k`, `seed`, `config` and further entries of the trainer.
        license: an identifier of the Hub or SPDX, or a name.
        data_statement: the owner's description of the training data.
        sha256: hex digest of each weight file.

    Raises:
        PackageError: a value has a wrong type or is not allowed.
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
    evidence: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    license: str | None = None
    data_statement: str | None = None
    sha256: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if error := first_error({**self.to_dict(), "sha256": self.sha256 or _PLACEHOLDER}):
            raise PackageError(f"{MANIFEST_FILE}: {error}")
        self._check_agreement(MANIFEST_FILE)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = MANIFEST_FILE) -> "ExpertManifest":
        """The manifest in a parsed `expert_config.json`; `where` names the file in error messages.

        Raises:
            PackageError: a key is unknown, missing or invalid; names the file and the key.
        """
        # the version first: a newer format may have other keys
        version = values.get("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise PackageError(
                f"{where}: format_version is {repr(version)[:40]}; this FlexMoE reads {FORMAT_VERSION}. "
                "Update flexmoe if the number is higher."
            )
        if error := first_error(values):
            raise PackageError(f"{where}: {error}")
        manifest = object.__new__(cls)
        for entry in fields(cls):  # not by __init__, whose error could not name the file
            object.__setattr__(manifest, entry.name, values.get(entry.name))
        manifest._check_agreement(where)
        return manifest

    def to_dict(self) -> dict[str, Any]:
        """The manifest as it is written to the file, with every key."""
        order = ["format_version", "name", "version", "kind", "rank", "alpha", "layers", "ffn", "dtype", "anchor"]
        order += ["training", "license", "data_statement", "sha256"]
        values = {key: getattr(self, key) for key in order}
        return values if self.evidence is None else {**values, "evidence": self.evidence}  # for earlier versions

    def record(self) -> dict[str, Any]:
        """The expert's record in a model's config: the known values, without those about the files."""
        values = {key: getattr(self, key, None) for key in RECORD_KEYS}
        return {key: value for key, value in values.items() if value is not None}

    def _check_agreement(self, where: str) -> None:
        """Checks rules that relate several keys, and those that a JSON schema cannot express."""
        if self.layers != sorted(set(self.layers)):
            raise PackageError(
                f"{where}: key 'layers' must be an ascending list of layer numbers; it is {str(self.layers)[:200]}."
            )
        if self.alpha is not None and not is_finite_number(self.alpha):  # JSON has no infinity, Python has
            raise PackageError(f"{where}: key 'alpha' must be a finite number; it is {self.alpha}.")
        try:
            check_expert_name(self.name)
        except ValueError as error:
            raise PackageError(f"{where}: key 'name': {error}") from None
        if (self.rank is not None) != (self.kind == "low_rank"):
            raise PackageError(
                f"{where}: key 'rank' is for kind 'low_rank', and required there; kind is {self.kind!r}."
            )
        for key, value in (("rank", self.rank), ("ffn.intermediate", self.ffn["intermediate"])):
            if isinstance(value, list) and len(value) != len(self.layers):
                raise PackageError(f"{where}: key {key!r} has {len(value)} entries for {len(self.layers)} layers.")
        self._check_size(where)

    def _check_size(self, where: str) -> None:
        """Checks that a model's config can hold the expert's record, and that it can be copied and written."""
        try:
            check_depth(self.to_dict(), MAX_DEPTH)
            # indented as in the config of a model
            size = len(json.dumps({"experts": [self.record()]}, indent=2, allow_nan=False))
        except JsonDepthError:
            raise PackageError(f"{where}: key 'training' is nested too deep: at most {MAX_DEPTH} levels.") from None
        except (TypeError, ValueError) as error:  # given in Python; a file is JSON
            raise PackageError(f"{where}: key 'training' cannot be written as JSON: {error}.") from None
        if size > MAX_RECORD_BYTES:
            raise PackageError(
                f"{where}: its entries take {size:,} bytes in a model's config; at most {MAX_RECORD_BYTES:,} are "
                "allowed. Shorten 'data_statement' or 'training', and put long texts into the README.md."
            )
        if any(number.bit_length() > _MAX_INTEGER_BITS for number in _integers(self.training)):
            raise PackageError(f"{where}: key 'training' has an integer of more than {_MAX_INTEGER_BITS} bits.")


def _integers(value: Any) -> Iterator[int]:
    """The integers in dictionaries and lists, nested as deep as `check_depth` allows."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, dict | list | tuple):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _integers(child)


__all__ = [
    "FORMAT_VERSION",
    "KINDS",
    "MANIFEST_FILE",
    "MAX_DEPTH",
    "MAX_RECORD_BYTES",
    "WEIGHT_FILE",
    "ExpertManifest",
    "PackageError",
]
