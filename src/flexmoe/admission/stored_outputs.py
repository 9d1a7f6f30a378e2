"""Checks of what incoming experts compute, while their packages are streamed: one layer in memory at a time.

Does not cover the checks themselves (`flexmoe.admission.outputs`), router rows (`flexmoe.admission.stored_rows`), or
live models (`flexmoe.admission.checks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexmoe.admission.findings import refuse_unless_admitted
from flexmoe.admission.outputs import NOT_FINITE, OutputCheck, Probes, Reference, filled, zeros
from flexmoe.hub.stored_model import StoredModel
from flexmoe.io.dense import DenseCheckpoint
from flexmoe.meta import build_on_meta
from flexmoe.modeling.anchors_flexmoe import ANCHOR_PREFIX, FfnSite
from flexmoe.modeling.configuration_flexmoe import PUBLIC, FlexMoeConfig
from flexmoe.modeling.experts_flexmoe import make_expert
from flexmoe.modeling.low_rank_flexmoe import is_low_rank
from flexmoe.packages.checks import name_in_package

NOT_AVAILABLE = "public's network is not available: the anchor is neither a local folder nor in the cache"


class PublicNetworks:
    """Public's networks of a stored model or of an anchor; they are read layer by layer, when they are needed."""

    def __init__(
        self, config: FlexMoeConfig, read: Callable[[FfnSite, str], Tensor] | None = None, dtype: Any = None
    ) -> None:
        """
        Args:
            config: the model's.
            read: reads a tensor by its layer and its name in the network; None if public is not available.
            dtype: in which the model computes; None: the config's, or that of the tensors.
        """
        dense, sites = build_on_meta(config.anchor_config)
        self.hidden_size: int = config.get_text_config().hidden_size
        self._read = read
        self._sites = {site.index: site for site in sites}
        self._networks = {site.index: site.ffn(dense) for site in sites}  # without weights
        dtype = config.dtype if dtype is None else dtype
        self._dtype: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self._references: dict[int, Reference | None] = {}  # all experts are compared with the same ones

    @classmethod
    def of_model(cls, stored: StoredModel) -> PublicNetworks:
        """Those of a stored FlexMoE model."""

        def read(site: FfnSite, key: str) -> Tensor:
            return stored.tensors.read(f"{ANCHOR_PREFIX}{site.block}.experts.{PUBLIC}.{key}")

        return cls(stored.config, read)

    @classmethod
    def of_anchor(cls, config: FlexMoeConfig, dense: DenseCheckpoint | None) -> PublicNetworks:
        """Those of the dense checkpoint of a model with this config; None if it is not available."""
        if dense is None:
            return cls(config)

        def read(site: FfnSite, key: str) -> Tensor:
            inside = f"{site.block if len(site.attributes) == 1 else site.layer}.{key}"
            return dense.files.read(dense.stored[inside])

        return cls(config, read, dense.load_dtype)

    @property
    def layers(self) -> tuple[int, ...]:
        """The decoder layers that have a network."""
        return tuple(self._sites)

    def expert(self, record: Mapping[str, Any], layer: int) -> nn.Module:
        """An expert's network without weights, as its record in the config describes it."""
        return make_expert(self._networks[layer], record, layer=layer, hidden_size=self.hidden_size)

    def compare(self, check: OutputCheck, layer: int, expert: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Adds what an expert computes in one layer to `check`.

        Args:
            expert: its network without weights; it is filled.
            tensors: its weights, by their names in the network.
        """
        public, unread = self.expert({"name": PUBLIC, "kind": "full"}, layer), NOT_FINITE
        dtype = self._dtype or next(iter(tensors.values())).dtype
        dtype = dtype if dtype.itemsize > 1 else torch.float32  # there are no products of eight bits
        probes = Probes(layer, self.hidden_size, dtype)
        if layer not in self._references or is_low_rank(expert):
            try:
                state = public.state_dict().items()
                filled(public, {key: self._tensor(layer, key, like, dtype) for key, like in state})
                if layer not in self._references:
                    self._references[layer] = Reference.of(public, probes)
            except LookupError as error:
                self._references[layer], unread = None, str(error.args[0])
        reference = self._references[layer]
        if reference is None and is_low_rank(expert):
            public = zeros(public, dtype)
        network = filled(expert, {key: tensor.to(dtype) for key, tensor in tensors.items()})
        check.add(layer, network, public, reference, probes, unread=unread)

    def _tensor(self, layer: int, key: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of public's network. LookupError: it is not available, or of another anchor."""
        if self._read is None:
            raise LookupError(NOT_AVAILABLE)
        tensor = self._read(self._sites[layer], key)
        if tensor.shape != like.shape:  # the fingerprint, which is compared elsewhere, differs too
            raise LookupError(f"public's {key} has shape {list(tensor.shape)} instead of {list(like.shape)}")
        return tensor.to(dtype)


class StreamedOutputs:
    """The check of one expert's outputs: it takes tensors one by one, and computes each layer once it is complete."""

    def __init__(self, name: str, folder: Path, networks: Mapping[int, nn.Module], publics: PublicNetworks) -> None:
        """
        Args:
            name: the expert's, in the model.
            folder: its package, for messages.
            networks: the expert's by layer, without weights; they are filled, one at a time.
            publics: of the model.
        """
        self._name, self._folder, self._publics, self._networks = name, folder, publics, dict(networks)
        self._keys = {
            f"layers.{layer}.ffn.{name_in_package(network, key)}": (layer, key)
            for layer, network in self._networks.items()
            for key in network.state_dict()
        }
        self._waiting: dict[int, dict[str, Tensor]] = {layer: {} for layer in self._networks}
        self._check = OutputCheck()

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor of the package, by its name there; it must not change until its layer is complete.

        Raises:
            AdmissionError: the outputs of a layer that is now complete would dominate, or damage, the model.
        """
        if name not in self._keys:
            return
        layer, key = self._keys[name]
        self._waiting[layer][key] = tensor
        network = self._networks[layer]
        if self._waiting[layer].keys() == network.state_dict().keys():
            self._publics.compare(self._check, layer, network, self._waiting.pop(layer))
            del self._networks[layer]
            refuse_unless_admitted(self._name, self._check.findings(), self._folder)


__all__ = ["PublicNetworks", "StreamedOutputs"]
