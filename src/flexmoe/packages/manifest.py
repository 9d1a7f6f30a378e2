"""The manifest of an expert package, `expert_config.json`, format version 1.

Each key is validated by the JSON schema (`flexmoe.packages.schema`); rules that relate several keys are checked here.
Does not cover the weights (`flexmoe.packages.package`), or whether the anchor matches (`flexmoe.packages.checks`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from flexmoe.modeling.configuration_flexmoe import RECORD_KEYS, check_expert_name, is_finite_number
from flexmoe.packages.schema import FORMAT_VERSION, KINDS, first_error

MANIFEST_FILE = "expert_config.json"
WEIGHT_FILE = re.compile(r"expert(-\d{5}-of-\d{5})?\.safetensors", re.ASCII)

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
        return {key: getattr(self, key) for key in order}

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


__all__ = ["FORMAT_VERSION", "KINDS", "MANIFEST_FILE", "WEIGHT_FILE", "ExpertManifest", "PackageError"]
