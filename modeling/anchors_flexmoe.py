"""Where a dense causal LM has its feed-forward networks (FFNs), and its tensors' names in a FlexMoE.

It is read from the modules, so families need no entry in a list. Everything here works on a model on the meta device.

Does not cover the weights themselves.
"""

from __future__ import annotations

import inspect
import itertools
import re
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from .configuration_flexmoe import PUBLIC

ANCHOR_PREFIX = "anchor."
"""Prefix of every tensor name of the dense model inside a FlexMoE."""

FFN_SPAN = ("fc1", "activation_fn", "fc2")
"""Attributes of a decoder layer that has no module around its feed-forward network (OPT, XGLM, BART)."""

# Attribute names of a layer's FFN: mlp, feed_forward, ffn, ff, mlp_block, shared_mlp ...
_FFN_NAME = re.compile(r"(.*_)?(mlp|ffn|ff|feed_?forward)(_.*)?")

# Children that a mixture of experts has and a dense FFN does not.
_ROUTED_NAMES = frozenset({"experts", "router"})

# Names of caches that are not transformers' own; the outputs of a FlexMoE do not carry them.
_FOREIGN_CACHES = frozenset({"cache_params", "state", "mems", "past_buckets_states"})


class UnsupportedAnchorError(ValueError):
    """A model that cannot be an anchor; the message gives the reason."""


@dataclass(frozen=True)
class FfnSite:
    """The feed-forward network of one decoder layer.

    Attributes:
        index: number of the decoder layer.
        layer: name of the decoder layer in the dense model, e.g. "model.layers.3".
        attributes: the layer's attributes that make up the network; the first is where the block goes.
    """

    index: int
    layer: str
    attributes: tuple[str, ...]

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
        """Puts `block` where the FFN was."""
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
        UnsupportedAnchorError: an encoder-decoder, a mixture of experts, several stacks of decoder layers, or a layer
            without an FFN that is a function of each token alone.
    """
    family = f"{type(dense).__name__} (model_type {dense.config.model_type!r})"
    if dense.config.is_encoder_decoder:
        raise UnsupportedAnchorError(f"{family} is an encoder-decoder; an anchor is a decoder-only causal LM.")
    if foreign := _FOREIGN_CACHES.intersection(inspect.signature(dense.forward).parameters):
        raise UnsupportedAnchorError(
            f"{family} keeps its state in {min(foreign)!r}; an anchor uses past_key_values, or no cache."
        )
    layers_name, layers = _decoder_layers(dense, family)
    sites = [_site(index, f"{layers_name}.{index}", layer, family) for index, layer in enumerate(layers)]
    networks = [site.ffn(dense) for site in sites]
    _check_each_stands_alone(networks, family)
    for network in {type(network): network for network in networks}.values():
        _check_is_a_function_of_tokens(network, dense.config.get_text_config().hidden_size, family)
    return sites


def _decoder_layers(dense: PreTrainedModel, family: str) -> tuple[str, nn.ModuleList]:
    # some families call their head "decoder", so what get_decoder finds need not hold any layer
    stacks = _nearest_stacks(dense, dense.get_decoder()) or _nearest_stacks(dense, dense)
    with_network = {name: stack for name, stack in stacks.items() if any(map(_has_network, stack))}
    if not with_network:
        held = [f"{name} of {type(stack[0]).__name__}: {_children(stack[0])}" for name, stack in stacks.items()]
        raise UnsupportedAnchorError(
            f"{family} has no list of decoder layers with a feed-forward network in each. Its lists hold: "
            f"{'; '.join(held)}."
        )
    if len(with_network) > 1:
        raise UnsupportedAnchorError(
            f"{family} has several stacks of layers ({', '.join(with_network)}); an anchor is one stack of decoder "
            "layers."
        )
    return next(iter(with_network.items()))


def _nearest_stacks(dense: nn.Module, within: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of layers nearest to the top of a part of `dense`, by their names in `dense`.

    Image or audio encoders beside a decoder have their own lists, nested more deeply.
    """
    inside = {id(module) for module in within.modules()}
    stacks = {
        name: module
        for name, module in dense.named_modules()
        if isinstance(module, nn.ModuleList) and id(module) in inside and any(list(item.children()) for item in module)
    }
    depth = min((name.count(".") for name in stacks), default=0)
    return {name: stack for name, stack in stacks.items() if name.count(".") == depth}


def _has_network(layer: nn.Module) -> bool:
    return bool(_ffn_candidates(layer) or _routed_module(layer))


def _children(module: nn.Module) -> str:
    return ", ".join(name for name, _ in module.named_children())


def _site(index: int, name: str, layer: nn.Module, family: str) -> FfnSite:
    if routed := _routed_module(layer):
        raise UnsupportedAnchorError(
            f"{family}: layer {index} is a mixture of experts already ({routed}); an anchor is dense. "
            "A flex_olmo checkpoint is imported, not grafted."
        )
    found = _ffn_candidates(layer)
    if len(found) != 1:
        raise UnsupportedAnchorError(
            f"{family}: layer {index} ({type(layer).__name__}) has {len(found) or 'no'} feed-forward network(s) where "
            f"one is expected, under a name like mlp, feed_forward, ffn or {'/'.join(FFN_SPAN)}; it holds "
            f"{_children(layer)}."
        )
    return FfnSite(index, name, found[0])


def _ffn_candidates(layer: nn.Module) -> list[tuple[str, ...]]:
    """Candidates for the FFN of `layer`: named like one, with at least two matrices."""
    found: list[tuple[str, ...]] = [
        (name,)
        for name, child in layer.named_children()
        if _FFN_NAME.fullmatch(name) and sum(p.dim() > 1 for p in child.parameters()) > 1
    ]
    if not found and all(isinstance(getattr(layer, name, None), nn.Module) for name in FFN_SPAN):
        found.append(FFN_SPAN)
    return found


def _routed_module(layer: nn.Module) -> str | None:
    """The class name of a module in `layer` that routes tokens, recognised by children called experts or router."""
    for module in layer.modules():
        if not _ROUTED_NAMES.isdisjoint(name for name, _ in module.named_children()):
            return type(module).__name__
    return None


def _check_each_stands_alone(networks: list[nn.Module], family: str) -> None:
    parameters = [id(parameter) for network in networks for parameter in network.parameters()]
    if len(set(parameters)) != len(parameters):
        raise UnsupportedAnchorError(
            f"{family} shares feed-forward weights between layers; an expert has weights of its own in each layer."
        )


def _check_is_a_function_of_tokens(network: nn.Module, hidden_size: int, family: str) -> None:
    """Calls the network on the meta device: [1, 2, H] in, one tensor of that shape out, no state."""
    tensors = itertools.chain(network.named_parameters(), network.named_buffers())
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    dtype = next((tensor.dtype for tensor in shapes.values() if tensor.is_floating_point()), None)
    x_1TH = torch.empty(1, 2, hidden_size, device="meta", dtype=dtype)
    takes_residual = "residual" in inspect.signature(network.forward).parameters
    try:
        output = torch.func.functional_call(network, shapes, (x_1TH, x_1TH) if takes_residual else (x_1TH,))
    except (RuntimeError, TypeError) as error:
        output = f"fails with {str(error).splitlines()[0]!r}"
    if not isinstance(output, torch.Tensor) or output.shape != x_1TH.shape:
        raise UnsupportedAnchorError(
            f"{family}: its feed-forward network {type(network).__name__}, given hidden states alone, "
            f"{output if isinstance(output, str) else 'does not return hidden states alone'}; an expert is a function "
            "of each token by itself."
        )


class NameMap:
    """Tensor names of a dense model and of the FlexMoE made from it, both ways.

    `model.layers.3.mlp.up_proj.weight` is `anchor.model.layers.3.mlp.experts.public.up_proj.weight` there;
    a tensor outside the FFNs only gets the prefix `anchor.`.
    """

    def __init__(self, sites: list[FfnSite]) -> None:
        self._to_flexmoe = dict(pair for site in sites for pair in site.renames())
        self._to_dense = {theirs: ours for ours, theirs in self._to_flexmoe.items()}
        self._blocks = tuple(f"{ANCHOR_PREFIX}{site.block}." for site in sites)

    def to_flexmoe(self, dense_name: str, expert: str = PUBLIC) -> str:
        """The FlexMoE's name of the tensor that the dense model calls `dense_name`; of a network's, in that expert."""
        for ours, theirs in self._to_flexmoe.items():
            if dense_name.startswith(ours):
                inside = theirs.replace(f".experts.{PUBLIC}.", f".experts.{expert}.", 1)
                return inside + dense_name.removeprefix(ours)
        return ANCHOR_PREFIX + dense_name

    def replacements(self) -> dict[str, str]:
        """What `to_flexmoe` does, as regular expressions and what replaces them; the first that matches applies."""
        inside = {f"^{re.escape(ours)}": theirs for ours, theirs in self._to_flexmoe.items()}
        return {**inside, rf"^(?!{re.escape(ANCHOR_PREFIX)})": ANCHOR_PREFIX}

    def is_ffn(self, dense_name: str) -> bool:
        """Whether the dense model's tensor `dense_name` is part of a feed-forward network."""
        return dense_name.startswith(tuple(self._to_flexmoe))

    def to_dense(self, flexmoe_name: str) -> str | None:
        """The dense model's name of `flexmoe_name`; None for router rows and the owners' experts."""
        for theirs, ours in self._to_dense.items():
            if flexmoe_name.startswith(theirs):
                return ours + flexmoe_name.removeprefix(theirs)
        if flexmoe_name.startswith(self._blocks) or not flexmoe_name.startswith(ANCHOR_PREFIX):
            return None
        return flexmoe_name.removeprefix(ANCHOR_PREFIX)
