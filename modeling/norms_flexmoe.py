"""Whether a norm takes what a decoder layer's feed-forward network returns, before the residual is added.

It decides whether the chosen experts' weights are divided by their sum by default: a norm undoes any scale (OLMo-2,
Gemma-2), a plain residual keeps it. Names differ from family to family, so the answer is seen in a forward pass that
computes shapes alone. Does not cover models whose forward pass needs values: there it is for the user to say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig

from .anchors_flexmoe import FfnSite, build_on_meta

_seen: dict[str, bool] = {}


class _Answered(BaseException):
    """Ends the forward pass: what the layers after this one do changes nothing any more."""


def norm_follows_each_ffn(anchor_config: PreTrainedConfig) -> bool:
    """Whether in every decoder layer a norm takes the output of the feed-forward network, and nothing else.

    Raises:
        ValueError: a forward pass of the family without values fails, so that it cannot be seen.
    """
    key = anchor_config.to_json_string(use_diff=False)
    if key not in _seen:
        _seen[key] = _see(anchor_config)
    return _seen[key]


def _see(anchor_config: PreTrainedConfig) -> bool:
    dense, sites = build_on_meta(anchor_config)
    dense.eval()  # in training, OPT drops layers by chance, and chance is a value
    # masks are made without a look at values where tensors are fake, as in a trace
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), _watching(dense, sites) as taken_by_norm:
        try:
            dense(input_ids=torch.zeros(1, 2, dtype=torch.long, device="meta"), use_cache=False)
        except _Answered:
            return False
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            raise ValueError(
                f"Cannot see whether a norm follows the feed-forward networks of {type(dense).__name__}: its forward "
                f"pass without values says {error}. Give norm_topk_prob: False if one does, else True."
            ) from error
    return len(taken_by_norm) == len(sites)


@contextlib.contextmanager
def _watching(dense: nn.Module, sites: list[FfnSite]) -> Iterator[set[str]]:
    """Follows each network's output through its layer; yields the layers where a norm receives it as it is.

    At the end of the first layer where none does, it raises _Answered.
    """
    taken_by_norm: set[str] = set()
    handles = []
    for site in sites:
        outputs: dict[int, Tensor] = {}  # by id; the tensor is kept, so that its id stays its own

        def remember(_module: nn.Module, _args: tuple, output: Any, outputs: dict[int, Tensor] = outputs) -> None:
            outputs[id(output)] = output

        def follow(
            module: nn.Module, args: tuple, output: Any, outputs: dict[int, Tensor] = outputs, layer: str = site.layer
        ) -> None:
            if not args or id(args[0]) not in outputs:
                return
            if isinstance(module, nn.Dropout | nn.Identity):
                outputs[id(output)] = output
            elif "norm" in type(module).__name__.lower():
                taken_by_norm.add(layer)

        def check(_module: nn.Module, _args: tuple, _output: Any, layer: str = site.layer) -> None:
            if layer not in taken_by_norm:
                raise _Answered

        whole = dense.get_submodule(site.layer)
        network = whole.get_submodule(site.attributes[-1])
        for module in whole.children():
            handles.append(module.register_forward_hook(remember if module is network else follow))
        handles.append(whole.register_forward_hook(check))
    try:
        yield taken_by_norm
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["norm_follows_each_ffn"]
