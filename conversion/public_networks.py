"""The public networks of an anchor, read from its files layer by layer: what a low-rank expert is a difference from.

Not here: what is done with them (`low_rank`, `export`), and compositions, which hold no weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flexmoe.conversion.stored import CONFIG_FILE, StoredModel
from flexmoe.modeling.anchors_flexmoe import ANCHOR_PREFIX, FfnSite, NameMap, build_on_meta
from flexmoe.modeling.configuration_flexmoe import PUBLIC, FlexMoeConfig
from flexmoe.modeling.dense_flexmoe import DenseCheckpoint
from flexmoe.modeling.hub_flexmoe import resolve_folder
from flexmoe.modeling.json_flexmoe import read_json_object
from flexmoe.modeling.tensors_flexmoe import CheckpointFolder, TensorInfo
from flexmoe.modeling.tensors_flexmoe import fingerprint as fingerprint_of


@dataclass(frozen=True)
class PublicNetworks:
    """The feed-forward networks of an anchor, on disk.

    Attributes:
        folder: where the anchor is.
        fingerprint: the anchor's; None where a graft did without.
        networks: the networks without weights, one per layer.
    """

    folder: Path
    fingerprint: str | None
    networks: Sequence[nn.Module]
    _files: CheckpointFolder
    _places: Sequence[Mapping[str, str]]  # per layer, where a network's tensors are in the files

    @classmethod
    def open(cls, anchor: str | Path, *, revision: str | None = None) -> PublicNetworks:
        """Opens a dense checkpoint, which is hashed whole, or a FlexMoE, whose config says what it is.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: no such model (see `resolve_folder`).
            ValueError: it can be no anchor (see `DenseCheckpoint`, `StoredModel`).
        """
        folder = resolve_folder(anchor, revision=revision).path
        config = folder / CONFIG_FILE
        if config.is_file() and read_json_object(config).get("model_type") == FlexMoeConfig.model_type:
            return cls.of_flexmoe(StoredModel(folder, "read as an anchor"))
        dense = DenseCheckpoint(folder)
        names = NameMap(dense.sites)
        places = {names.to_flexmoe(name): stored for name, stored in dense.stored.items()}
        return cls(folder, _fingerprint(dense), *_networks(dense.model, dense.sites, dense.files, places))

    @classmethod
    def of_flexmoe(cls, stored: StoredModel) -> PublicNetworks:
        """Those of a FlexMoE that is open already."""
        config: Any = stored.config.anchor_config
        model, sites = build_on_meta(config)
        places = {name: name for name in stored.tensors.infos}
        fingerprint = (stored.config.anchor or {}).get("fingerprint")
        return cls(stored.folder, fingerprint, *_networks(model, sites, stored.tensors, places))

    def read(self, layer: int) -> dict[str, Tensor]:
        """The tensors of a layer's network, as its state dict names them.

        Raises:
            ValueError: the files lack one.
        """
        return {key: self.read_one(layer, key) for key in self.networks[layer].state_dict()}

    def read_one(self, layer: int, key: str) -> Tensor:
        """One tensor of a layer's network. Raises: as `read`."""
        return self._files.read(self.info(layer, key).name)

    def info(self, layer: int, key: str) -> TensorInfo:
        """What the files say of it, under its name there. Raises: as `read`."""
        if key not in self._places[layer]:
            raise ValueError(f"{self.folder} lacks the tensor {key!r} of the network in layer {layer}.")
        return self._files.infos[self._places[layer][key]]


def _networks(
    model: nn.Module, sites: Sequence[FfnSite], files: CheckpointFolder, places: Mapping[str, str]
) -> tuple[list[nn.Module], CheckpointFolder, list[dict[str, str]]]:
    """The last fields of `PublicNetworks`. `places`: names in the files by names in a FlexMoE."""
    by_layer = []
    for site in sites:
        start = f"{ANCHOR_PREFIX}{site.block}.experts.{PUBLIC}."
        by_layer.append({name.removeprefix(start): at for name, at in places.items() if name.startswith(start)})
    return [site.ffn(model) for site in sites], files, by_layer


def _fingerprint(dense: DenseCheckpoint) -> str:
    lines = []
    for name, info in dense.infos.items():
        digest = hashlib.sha256()
        for chunk in dense.files.chunks(dense.stored[name]):
            digest.update(chunk)
        lines.append((name, info.dtype, info.shape, digest.hexdigest()))
    return fingerprint_of(lines)


__all__ = ["PublicNetworks"]
