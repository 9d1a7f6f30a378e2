"""The norms around the feed-forward networks (FFNs) of a dense anchor.

A norm that follows an FFN undoes any scale of its output (OLMo-2, Gemma-2), a plain residual keeps it: the default of
`norm_topk_prob`. A norm before it gives its input, which is the router's, the scale of the norm's weights. Names
differ between families, so both are observed in a forward pass that computes shapes only. Does not cover families
whose forward pass needs values: there the user sets `norm_topk_prob`, and the scale is unknown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel

from flexmoe.meta import build_on_meta
from flexmoe.modeling.anchors_flexmoe import FfnSite

_observed: dict[str, bool] = {}
_input_norms: dict[str, str | None] = {}


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


def input_norm(anchor_config: PreTrainedConfig) -> str | None:
    """The norm whose output is the input of the first layer's FFN, by its name in the layer; None if there is none.

    None, too, if the forward pass of the family cannot be observed.
    """
    key = anchor_config.to_json_string(use_diff=False)
    if key not in _input_norms:
        _input_norms[key] = _observe_input(anchor_config)
    return _input_norms[key]


def _observe_input(anchor_config: PreTrainedConfig) -> str | None:
    dense, sites = build_on_meta(anchor_config)
    layer = dense.get_submodule(sites[0].layer)
    network = layer.get_submodule(sites[0].attributes[0])
    outputs: dict[int, tuple[Tensor, str]] = {}  # by storage, which views share; tensors are kept, so ids stay theirs
    found: list[str | None] = []

    def check(_module: nn.Module, args: tuple) -> None:
        found.append(outputs.get(args[0].untyped_storage()._cdata, (None, None))[1])
        raise _Observed

    handles = [network.register_forward_pre_hook(check)]
    for name, module in layer.named_modules():
        if "norm" not in type(module).__name__.lower() or module is layer:
            continue

        def remember(_module: nn.Module, _args: tuple, output: Any, name: str = name) -> None:
            if isinstance(output, Tensor):
                outputs[output.untyped_storage()._cdata] = output, name

        handles.append(module.register_forward_hook(remember))
    try:
        _compute_shapes(dense)
    except (_Observed, *FORWARD_ERRORS):
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _compute_shapes(dense: PreTrainedModel) -> None:
    """A forward pass without values."""
    dense.eval()  # in training, OPT drops layers at random, which needs values
    # with fake tensors, masks are built without reading values, as in a trace
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        dense(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"), use_cache=False)


def _observe(anchor_config: PreTrainedConfig) -> bool:
    dense, sites = build_on_meta(anchor_config)
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


__all__ = ["input_norm", "norm_follows_each_ffn"]
