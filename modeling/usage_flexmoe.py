"""How much each expert is used: sums over tokens, never a trace of them.

A trace of routing decisions per token lets most of the text be recovered, so only totals are kept.
Does not cover what an owner is owed for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ExpertUsage:
    """Totals per expert and layer over the forward passes of a `track_usage` context.

    Attributes:
        tokens: number of tokens seen (padding left out where an attention mask says so).
    """

    def __init__(self) -> None:
        self._weight: dict[tuple[int, str], float] = {}
        self._chosen: dict[tuple[int, str], int] = {}
        self._tokens: dict[int, int] = {}

    def record(self, layer: int, names: Sequence[str], weights_TA: Tensor, token_mask_T: Tensor | None) -> None:
        """Adds one block's routing weights, [tokens, allowed experts]."""
        if token_mask_T is not None and token_mask_T.numel() == len(weights_TA):
            weights_TA = weights_TA[token_mask_T.reshape(-1).to(weights_TA.device)]
        sums = torch.stack([weights_TA.double().sum(0), (weights_TA != 0).sum(0).double()]).tolist()
        for name, weight, chosen in zip(names, *sums, strict=True):
            self._weight[layer, name] = self._weight.get((layer, name), 0.0) + weight
            self._chosen[layer, name] = self._chosen.get((layer, name), 0) + int(chosen)
        self._tokens[layer] = self._tokens.get(layer, 0) + len(weights_TA)

    @property
    def tokens(self) -> int:
        """Tokens that went through each layer."""
        return max(self._tokens.values(), default=0)

    def share(self, layer: int | None = None) -> dict[str, float]:
        """Share of the routing weight that each expert carried, in one layer or over all; the shares sum to 1."""
        return _shares(self._weight, layer)

    def chosen_share(self, layer: int | None = None) -> dict[str, float]:
        """Share of the tokens' choices (k per token) that fell on each expert, in one layer or over all."""
        return _shares(self._chosen, layer)


def _shares(totals: dict[tuple[int, str], float] | dict[tuple[int, str], int], layer: int | None) -> dict[str, float]:
    names = dict.fromkeys(name for at, name in totals if layer in (None, at))
    sums = {name: sum(v for (at, n), v in totals.items() if n == name and layer in (None, at)) for name in names}
    everything = sum(sums.values())
    return {name: value / everything for name, value in sums.items()} if everything else sums


@contextlib.contextmanager
def track_usage(model: nn.Module) -> Iterator[ExpertUsage]:
    """Within it, the forward passes of `model` (this thread's) add to the usage that it gives.

    Example:
        with flexmoe.track_usage(model) as usage:
            model.generate(**inputs)
        print(usage.share())  # {"public": 0.41, "math": 0.52, "code": 0.07}

    Raises:
        TypeError: `model` is not a FlexMoE and holds none (a PEFT or DDP wrapper around one is fine).
    """
    flexmoe: Any = next((module for module in model.modules() if hasattr(module, "flexmoe_blocks")), None)
    if flexmoe is None:
        raise TypeError(f"{type(model).__name__} holds no FlexMoE model, so there is no expert's usage to track.")
    usage = ExpertUsage()
    with flexmoe.recording_usage(usage):  # of the model's own copy of this code, which may be remote code
        yield usage


__all__ = ["ExpertUsage", "track_usage"]
