"""Where a dense causal LM keeps its feed-forward networks, and what its tensors are called in a FlexMoE.

The answer is read off the modules, so it holds for families that nobody listed here. Does not cover the weights
themselves: everything in this file works on a model on the meta device.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .configuration_flexmoe import PUBLIC

ANCHOR_PREFIX = "anchor."
"""What a FlexMoE puts before every name of the dense model that it holds."""

FFN_NAMES = ("mlp", "feed_forward", "ffn")
"""Attributes of a decoder layer under which families keep their feed-forward network."""

FFN_SPAN = ("fc1", "activation_fn", "fc2")
"""Attributes of a decoder layer that has no module around its feed-forward network (OPT)."""

# The norm that is applied to the network's output before the residual is added (OLMo-2, Gemma-2, GLM-4 ...).
_NORM_AFTER_FFN = re.compile(r"post_(feed_?forward|mlp|ffn)_(layer_?)?norm")


class UnsupportedAnchorError(ValueError):
    """A model that cannot be an anchor; the message says why."""


@dataclass(frozen=True)
class FfnSite:
    """The feed-forward network of one decoder layer.

    Attributes:
        index: number of the decoder layer.
        layer: name of the decoder layer in the dense model, e.g. "model.layers.3".
        attributes: the layer's attributes that make up the network; the first is where the block goes.
        norm_follows: a norm takes the network's output before the residual is added.
    """

    index: int
    layer: str
    attributes: tuple[str, ...]
    norm_follows: bool

    @property
    def block(self) -> str:
        """Name, in the dense model, of the module that the block replaces."""
        return f"{self.layer}.{self.attributes[0]}"

    def ffn(self, dense: nn.Module) -> nn.Module:
        """The network, as one module; a span of modules is put into a Sequential that keeps their names."""
        layer = dense.get_submodule(self.layer)
        if len(self.attributes) == 1:
            return getattr(layer, self.attributes[0])
        span = nn.Sequential()
        for name in self.attributes:
            span.add_module(name, getattr(layer, name))
        return span

    def put(self, dense: nn.Module, block: nn.Module) -> None:
        """Puts `block` where the network stood."""
        layer = dense.get_submodule(self.layer)
        for name in self.attributes[1:]:
            setattr(layer, name, nn.Identity())
        setattr(layer, self.attributes[0], block)

    def renames(self) -> list[tuple[str, str]]:
        """Pairs of prefixes (in the dense model, in the FlexMoE) of the network's own tensors."""
        inside = f"{ANCHOR_PREFIX}{self.block}.experts.{PUBLIC}."
        if len(self.attributes) == 1:
            return [(f"{self.block}.", inside)]
        return [(f"{self.layer}.{name}.", f"{inside}{name}.") for name in self.attributes]


def find_ffn_sites(dense: PreTrainedModel) -> list[FfnSite]:
    """Finds the feed-forward network of every decoder layer of `dense`.

    Raises:
        UnsupportedAnchorError: the model is an encoder-decoder, a mixture of experts already, or a layer has no
            feed-forward network that can be told apart.
    """
    config = dense.config.get_text_config()
    family = f"{type(dense).__name__} (model_type {config.model_type!r})"
    if getattr(dense.config, "is_encoder_decoder", False):
        raise UnsupportedAnchorError(f"{family} is an encoder-decoder; an anchor is a decoder-only causal LM.")
    layers_name, layers = _decoder_layers(dense, config.num_hidden_layers, family)
    return [_site(index, f"{layers_name}.{index}", layer, family) for index, layer in enumerate(layers)]


def _decoder_layers(dense: nn.Module, count: int, family: str) -> tuple[str, nn.ModuleList]:
    for name, module in dense.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise UnsupportedAnchorError(f"{family} has no list of {count} decoder layers, so its networks cannot be found.")


def _site(index: int, name: str, layer: nn.Module, family: str) -> FfnSite:
    attributes = _ffn_attributes(layer)
    if attributes is None:
        children = ", ".join(child for child, _ in layer.named_children())
        raise UnsupportedAnchorError(
            f"{family}: layer {index} ({type(layer).__name__}) has no feed-forward network under any of "
            f"{', '.join(FFN_NAMES)} or {'/'.join(FFN_SPAN)}; it holds {children}."
        )
    ffn = getattr(layer, attributes[0])
    if routed := _routed_module(ffn):
        raise UnsupportedAnchorError(
            f"{family}: layer {index} is a mixture of experts already ({routed}); an anchor is dense. "
            "A flex_olmo checkpoint is imported, not grafted."
        )
    norm_follows = any(_NORM_AFTER_FFN.fullmatch(child) for child, _ in layer.named_children())
    return FfnSite(index, name, attributes, norm_follows)


def _ffn_attributes(layer: nn.Module) -> tuple[str, ...] | None:
    for name in FFN_NAMES:
        if isinstance(getattr(layer, name, None), nn.Module):
            return (name,)
    if all(isinstance(getattr(layer, name, None), nn.Module) for name in FFN_SPAN):
        return FFN_SPAN
    return None


def _routed_module(ffn: nn.Module) -> str | None:
    """Names the class of `ffn` if it routes tokens, which shows in a child called experts or router."""
    children = dict(ffn.named_children())
    if "experts" in children or "router" in children:
        return type(ffn).__name__
    return None


class NameMap:
    """Tensor names of a dense model and of the FlexMoE made from it, both ways.

    `model.layers.3.mlp.up_proj.weight` is `anchor.model.layers.3.mlp.experts.public.up_proj.weight` there;
    what is not part of a feed-forward network only gets the prefix `anchor.`.
    """

    def __init__(self, sites: list[FfnSite]) -> None:
        self._to_flexmoe = dict(pair for site in sites for pair in site.renames())
        self._to_dense = {theirs: ours for ours, theirs in self._to_flexmoe.items()}
        self._blocks = tuple(f"{ANCHOR_PREFIX}{site.block}." for site in sites)

    def to_flexmoe(self, dense_name: str) -> str:
        """The FlexMoE's name of the tensor that the dense model calls `dense_name`."""
        for ours, theirs in self._to_flexmoe.items():
            if dense_name.startswith(ours):
                return theirs + dense_name.removeprefix(ours)
        return ANCHOR_PREFIX + dense_name

    def to_dense(self, flexmoe_name: str) -> str | None:
        """The dense model's name of `flexmoe_name`; None for router rows and the owners' experts."""
        for theirs, ours in self._to_dense.items():
            if flexmoe_name.startswith(theirs):
                return ours + flexmoe_name.removeprefix(theirs)
        if flexmoe_name.startswith(self._blocks) or not flexmoe_name.startswith(ANCHOR_PREFIX):
            return None
        return flexmoe_name.removeprefix(ANCHOR_PREFIX)


def build_on_meta(anchor_config: PreTrainedConfig) -> tuple[PreTrainedModel, list[FfnSite]]:
    """The dense model of `anchor_config` without weights, and its feed-forward networks.

    Raises:
        UnsupportedAnchorError: transformers has no causal LM for it, or its networks cannot be found.
    """
    try:
        with torch.device("meta"):
            dense = AutoModelForCausalLM.from_config(anchor_config)
    except ValueError as error:
        raise UnsupportedAnchorError(
            f"model_type {anchor_config.model_type!r} has no causal LM in transformers: {error}"
        ) from error
    return dense, find_ffn_sites(dense)


__all__ = ["ANCHOR_PREFIX", "FfnSite", "NameMap", "UnsupportedAnchorError", "build_on_meta", "find_ffn_sites"]
