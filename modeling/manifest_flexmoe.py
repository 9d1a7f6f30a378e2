"""The manifest of an expert package, `expert_config.json`, format version 1.

What each key may hold stands in its JSON schema (`manifest_schema_flexmoe`), what they must agree on stands here. Not
here: the weights it speaks of (`packages_flexmoe`), and whether the anchor is the one at hand.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .configuration_flexmoe import RECORD_KEYS, check_expert_name, is_finite_number
from .manifest_schema_flexmoe import FORMAT_VERSION, KINDS, first_fault

MANIFEST_FILE = "expert_config.json"
WEIGHT_FILE = re.compile(r"expert(-\d{5}-of-\d{5})?\.safetensors", re.ASCII)

_NOT_WRITTEN = {"expert.safetensors": "0" * 64}  # stands for the hashes of files that are still to be written


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
        if fault := first_fault({**self.to_dict(), "sha256": self.sha256 or _NOT_WRITTEN}):
            raise PackageError(f"{MANIFEST_FILE}: {fault}")
        self._check_agreement(MANIFEST_FILE)

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
                f"{where}: format_version is {repr(version)[:40]}; this FlexMoE reads {FORMAT_VERSION}. "
                "Update flexmoe if the number is higher."
            )
        if fault := first_fault(values):
            raise PackageError(f"{where}: {fault}")
        manifest = object.__new__(cls)
        for entry in fields(cls):  # not __init__, whose check could not name the file
            object.__setattr__(manifest, entry.name, values.get(entry.name))
        manifest._check_agreement(where)
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

    def _check_agreement(self, where: str) -> None:
        """What several keys must agree on, and what a schema cannot say."""
        if self.layers != sorted(set(self.layers)):
            raise PackageError(
                f"{where}: key 'layers' must be an ascending list of layer numbers; it is {str(self.layers)[:200]}."
            )
        if self.alpha is not None and not is_finite_number(self.alpha):  # in Python it may be one that JSON has not
            raise PackageError(f"{where}: key 'alpha' must be a finite number; it is {self.alpha}.")
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


__all__ = ["FORMAT_VERSION", "KINDS", "MANIFEST_FILE", "WEIGHT_FILE", "ExpertManifest", "PackageError"]
