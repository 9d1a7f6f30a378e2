"""What a model is made of, opened where it lies: a dense anchor and the packages of its experts, as one stream of
tensors that are called as in the model.

The anchor is known by its fingerprint, a package by the hashes in its manifest; both are computed from the very bytes
that are handed out. Not here: where the parts come from, and rows that were changed since (`composition_flexmoe`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .anchors_flexmoe import ANCHOR_PREFIX, NameMap
from .configuration_flexmoe import PUBLIC, FlexMoeConfig
from .dense_flexmoe import DenseCheckpoint
from .experts_flexmoe import make_expert
from .fitting_flexmoe import check_anchor, name_in_package
from .low_rank_flexmoe import unpacked_name
from .packages_flexmoe import ExpertPackage
from .tensors_flexmoe import fingerprint, tensor_bytes

_PACKAGE_TENSOR = re.compile(r"layers\.(?P<layer>\d+)\.(?P<part>ffn|router)\.(?P<rest>.+)")


class Sources:
    """The dense anchor and the packages of a model, opened: all of its tensors but for changed router rows.

    Raises:
        ValueError: a package was made for another anchor or another network.
    """

    def __init__(self, config: FlexMoeConfig, anchor: Path, packages: Mapping[str, Path]) -> None:
        self.config = config
        self.anchor = DenseCheckpoint(anchor)
        self.packages = {name: ExpertPackage.open(folder) for name, folder in packages.items()}
        self._blocks = {site.index: f"{ANCHOR_PREFIX}{site.block}" for site in self.anchor.sites}
        for record in config.expert_records[1:]:
            self._check_package(self.packages[record["name"]], record)

    def rows(self) -> dict[str, Tensor]:
        """The public rows and biases that a graft makes: zeros, by their names in the model."""
        hidden = self.config.get_text_config().hidden_size
        zeros = {"weight": torch.zeros(1, hidden), "bias": torch.zeros(1)}
        return {
            f"{block}.router.{PUBLIC}.{key}": zero.clone()
            for block in self._blocks.values()
            for key, zero in zeros.items()
        }

    def tensors(self, public_rows: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
        """Yields (owner, name in the model, CPU tensor), verified when the iteration has ended.

        Args:
            public_rows: the model's, which belong to the fingerprint of an anchor that was imported with its own.

        Raises:
            ValueError: the anchor has another fingerprint, or a package is not what it says (`PackageError`).
        """
        yield from self._anchor_tensors(public_rows)
        for name, package in self.packages.items():
            for inside, tensor in package.tensors():
                is_row = ".router." in inside
                yield name, self._place(name, inside), tensor.to(torch.float32) if is_row else tensor

    def _anchor_tensors(self, public_rows: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
        names, lines = NameMap(self.anchor.sites), []
        for name, info in self.anchor.infos.items():
            tensor = self.anchor.files.read(self.anchor.stored[name])
            lines.append((name, info.dtype, info.shape, _sha256(tensor)))
            yield PUBLIC, names.to_flexmoe(name), tensor
        wanted = (self.config.anchor or {}).get("fingerprint")
        weights = [(name, row) for name, row in public_rows.items() if name.endswith(".weight") and row.any()]
        imported = [(name, "F32", tuple(row.shape), _sha256(row)) for name, row in weights]
        if wanted not in (fingerprint(lines), fingerprint([*lines, *imported])):
            raise ValueError(
                f"{self.anchor.folder} is not the anchor of this model: its fingerprint is {fingerprint(lines)}, the "
                f"model's is {wanted}. Give the dense checkpoint that the model was grafted from."
            )

    def _place(self, name: str, inside: str) -> str:
        """The model's name of a tensor that the package of the expert `name` calls `inside`."""
        match = _PACKAGE_TENSOR.fullmatch(inside)
        assert match, inside  # checked when the package was opened
        block, rest = self._blocks[int(match["layer"])], match["rest"]
        if match["part"] == "router":
            return f"{block}.router.{name}.{rest}"
        is_low_rank = self.packages[name].manifest.kind == "low_rank"
        return f"{block}.experts.{name}.{unpacked_name(rest) if is_low_rank else rest}"

    def _check_package(self, package: ExpertPackage, record: dict[str, Any]) -> None:
        check_anchor(self.config, package.manifest)
        for key in ("kind", "rank", "alpha"):  # what shapes may not show
            if (theirs := getattr(package.manifest, key)) != (ours := record.get(key)):
                raise ValueError(f"{package.folder}: its {key} is {theirs!r}, the model's expert has {ours!r}.")
        hidden_size = self.config.get_text_config().hidden_size
        wanted: dict[str, tuple[int, ...]] = {}
        for site in self.anchor.sites:
            expert = make_expert(site.ffn(self.anchor.model), record, layer=site.index, hidden_size=hidden_size)
            state, at = expert.state_dict(), f"layers.{site.index}.ffn"
            wanted |= {f"{at}.{name_in_package(expert, key)}": tuple(value.shape) for key, value in state.items()}
        found = {name: info.shape for name, info in package.infos.items() if ".router." not in name}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise ValueError(
                    f"{package.folder}: tensor {name!r} has shape {found.get(name)}, this model wants "
                    f"{wanted.get(name)} (None: no such tensor). The expert was made for another network."
                )


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


__all__ = ["Sources"]
