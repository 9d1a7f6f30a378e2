"""The public networks of an anchor, read from its files layer by layer: low-rank experts are differences from them.

Does not cover their use (`low_rank`, `export`), or compositions, which hold no weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flexmoe.hub.client import resolve_folder
from flexmoe.hub.stored_model import CONFIG_FILE, StoredModel
from flexmoe.io.dense import DenseCheckpoint
from flexmoe.io.strict_json import read_json_object
from flexmoe.io.tensors import CheckpointFolder, TensorInfo
from flexmoe.meta import build_on_meta
from flexmoe.modeling.anchors_flexmoe import ANCHOR_PREFIX, FfnSite, NameMap
from flexmoe.modeling.configuration_flexmoe import PUBLIC, FlexMoeConfig
from flexmoe.modeling.fingerprint_flexmoe import fingerprint as fingerprint_of


@dataclass(frozen=True)
class PublicNetworks:
    """The feed-forward networks of an anchor, on disk.

    Attributes:
        folder: where the anchor is.
        fingerprint: the anchor's; None if it was grafted without one.
        networks: the networks without weights, one per layer.
    """

    folder: Path
    fingerprint: str | None
    networks: Sequence[nn.Module]
    _files: CheckpointFolder
    _stored_names: Sequence[Mapping[str, str]]  # per layer, the names in the files by the names in the network

    @classmethod
    def open(cls, anchor: str | Path, *, revision: str | None = None) -> PublicNetworks:
        """Opens a dense checkpoint, which is hashed completely, or a FlexMoE model, whose config has the fingerprint.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: no such model (see `resolve_folder`).
            ValueError: it cannot be an anchor (see `DenseCheckpoint`, `StoredModel`).
        """
        folder = resolve_folder(anchor, revision=revision).path
        config = folder / CONFIG_FILE
        if config.is_file() and read_json_object(config).get("model_type") == FlexMoeConfig.model_type:
            return cls.of_flexmoe(StoredModel(folder, "read as an anchor"))
        dense = DenseCheckpoint(folder)
        names = NameMap(dense.sites)
        stored_names = {names.to_flexmoe(name): stored for name, stored in dense.stored.items()}
        return cls(folder, _fingerprint(dense), *_networks(dense.model, dense.sites, dense.files, stored_names))

    @classmethod
    def of_flexmoe(cls, stored: StoredModel) -> PublicNetworks:
        """The public networks of an opened FlexMoE model."""
        config: Any = stored.config.anchor_config
        model, sites = build_on_meta(config)
        stored_names = {name: name for name in stored.tensors.infos}
        fingerprint = (stored.config.anchor or {}).get("fingerprint")
        return cls(stored.folder, fingerprint, *_networks(model, sites, stored.tensors, stored_names))

    def read(self, layer: int) -> dict[str, Tensor]:
        """The state dict of a layer's network.

        Raises:
            ValueError: the files lack a tensor.
        """
        return {key: self.read_one(layer, key) for key in self.networks[layer].state_dict()}

    def read_one(self, layer: int, key: str) -> Tensor:
        """One tensor of a layer's network. Raises: as `read`."""
        return self._files.read(self.info(layer, key).name)

    def info(self, layer: int, key: str) -> TensorInfo:
        """The stored name, dtype and shape of a tensor. Raises: as `read`."""
        if key not in self._stored_names[layer]:
            raise ValueError(f"{self.folder} lacks the tensor {key!r} of the network in layer {layer}.")
        return self._files.infos[self._stored_names[layer][key]]


def _networks(
    model: nn.Module, sites: Sequence[FfnSite], files: CheckpointFolder, stored_names: Mapping[str, str]
) -> tuple[list[nn.Module], CheckpointFolder, list[dict[str, str]]]:
    """The last three fields of `PublicNetworks`. `stored_names`: names in the files by names in a FlexMoE model."""
    by_layer = []
    for site in sites:
        start = f"{ANCHOR_PREFIX}{site.block}.experts.{PUBLIC}."
        by_layer.append({n.removeprefix(start): stored for n, stored in stored_names.items() if n.startswith(start)})
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
