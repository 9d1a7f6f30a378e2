"""The norms around the feed-forward networks (FFNs) of a dense anchor.

A norm that follows an FFN undoes any scale of its output (OLMo-2, Gemma-2), a plain residual keeps it: the default of
`norm_topk_prob`. A norm before it gives its input, which is the router's, the scale of the norm's weights. Names
differ between families, so both are observed in a forward pass that computes shapes only. Does not cover families
whose forward pass needs values: there the user sets `norm_topk_prob`, and the scale is unknown.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel

from flexmoe.meta import build_on_meta
from flexmoe.modeling.anchors_flexmoe import FfnSite

_observed: dict[str, bool] = {}
_input_norms: dict[str, tuple[str | None, ...]] = {}


FORWARD_ERRORS = (RuntimeError, NotImplementedError, TypeError, ValueError)
"""Raised by forward passes that need values."""


class _Observed(BaseException):
    """Ends the forward pass: the remaining layers cannot change the result."""


def norm_follows_each_ffn(anchor_config: PreTrainedConfig) -> bool:
    """Whether in every decoder layer a norm takes the output of the feed-forward network, and nothing else.

    Raises:
        ValueError: a forward pass of the family without values fails, so that it cannot be observed.
    """
    key = anchor_config.to_json_string(use_diff=False)
    if key not in _observed:
        _observed[key] = _observe(anchor_config)
    return _observed[key]


def input_norms(anchor_config: PreTrainedConfig) -> tuple[str | None, ...]:
    """For each layer the norm whose output is the FFN's input, by its name in the dense model; None if there is none.

    Layers of one model may differ, as those of OLMo-hybrid do. All are None if the forward pass cannot be observed.
    """
    key = anchor_config.to_json_string(use_diff=False)
    if key in _input_norms:
        return _input_norms[key]
    dense, sites = build_on_meta(_eager(anchor_config))
    found: dict[int, str] = {}
    handles = [handle for site in sites for handle in _hooks_on_input(dense, site, found)]
    try:
        _compute_shapes(dense)
    except FORWARD_ERRORS:
        return (None,) * len(sites)
    finally:
        for handle in handles:
            handle.remove()
    _input_norms[key] = tuple(found.get(site.index) for site in sites)
    return _input_norms[key]


def _hooks_on_input(dense: nn.Module, site: FfnSite, found: dict[int, str]) -> Iterator[Any]:
    """Hooks on a layer that put the name of the norm before its FFN into `found`."""
    outputs: dict[int, tuple[Tensor, str]] = {}  # by storage, which views share; tensors are kept, so ids stay theirs
    layer = dense.get_submodule(site.layer)

    def check(_module: nn.Module, args: tuple) -> None:
        if (norm := outputs.get(args[0].untyped_storage()._cdata)) is not None:
            found[site.index] = norm[1]

    def remember(_module: nn.Module, _args: tuple, output: Any, name: str) -> None:
        if isinstance(output, Tensor):
            outputs[output.untyped_storage()._cdata] = output, f"{site.layer}.{name}"

    yield layer.get_submodule(site.attributes[0]).register_forward_pre_hook(check)
    for name, module in layer.named_modules():
        if module is not layer and "norm" in type(module).__name__.lower():
            yield module.register_forward_hook(functools.partial(remember, name=name))


def _eager(anchor_config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy whose attention runs without values; some implementations need a device, or compile."""
    copied = copy.deepcopy(anchor_config)
    copied._attn_implementation = "eager"
    return copied


def _compute_shapes(dense: PreTrainedModel) -> None:
    """A forward pass without values."""
    dense.eval()  # in training, OPT drops layers at random, which needs values
    # with fake tensors, masks are built without reading values, as in a trace
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        dense(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"), use_cache=False)


def _observe(anchor_config: PreTrainedConfig) -> bool:
    dense, sites = build_on_meta(_eager(anchor_config))
    with _hooks_on_ffns(dense, sites) as taken_by_norm:
        try:
            _compute_shapes(dense)
        except _Observed:
            return False
        except FORWARD_ERRORS as error:
            raise ValueError(
                f"Cannot determine whether a norm follows the feed-forward networks of {type(dense).__name__}: its "
                f"forward pass without values failed: {error}. Set norm_topk_prob: False if one does, else True."
            ) from error
    return len(taken_by_norm) == len(sites)


@contextlib.contextmanager
def _hooks_on_ffns(dense: nn.Module, sites: list[FfnSite]) -> Iterator[set[str]]:
    """Follows each FFN's output through its layer; yields the set of layers where a norm receives it unchanged.

    Raises _Observed at the end of the first layer where none does.
    """
    taken_by_norm: set[str] = set()
    handles = []
    for site in sites:
        outputs: dict[int, Tensor] = {}  # by id; the tensor is kept, so that its id stays its own

        def remember(_module: nn.Module, _args: tuple, output: Any, outputs: dict[int, Tensor] = outputs) -> None:
            outputs[id(output)] = output

        def follow(
            module: nn.Module,
            args: tuple,
            output: Any,
            outputs: dict[int, Tensor] = outputs,
            layer_name: str = site.layer,
        ) -> None:
            if not args or id(args[0]) not in outputs:
                return
            if isinstance(module, nn.Dropout | nn.Identity):
                outputs[id(output)] = output
            elif "norm" in type(module).__name__.lower():
                taken_by_norm.add(layer_name)

        def check(_module: nn.Module, _args: tuple, _output: Any, layer_name: str = site.layer) -> None:
            if layer_name not in taken_by_norm:
                raise _Observed

        layer = dense.get_submodule(site.layer)
        network = layer.get_submodule(site.attributes[-1])
        for module in layer.children():
            handles.append(module.register_forward_hook(remember if module is network else follow))
        handles.append(layer.register_forward_hook(check))
    try:
        yield taken_by_norm
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["input_norms", "norm_follows_each_ffn"]
