"""Expert usage: totals of routing weights and choices, never a trace per token.

Most of a text can be recovered from a trace of its routing decisions, so only totals are kept.

Shapes: T tokens, A allowed experts. Does not cover remuneration of owners.
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
        tokens: number of tokens, without padding if there is an attention mask.
    """

    def __init__(self) -> None:
        self._weight: dict[tuple[int, str], float] = {}
        self._chosen: dict[tuple[int, str], int] = {}
        self._tokens: dict[int, int] = {}

    def record(self, layer: int, names: Sequence[str], weights_TA: Tensor, token_mask_T: Tensor | None) -> None:
        """Adds the routing weights of one block, [T, A]; `token_mask_T` is False for padding."""
        if token_mask_T is not None and token_mask_T.numel() == len(weights_TA):
            weights_TA = weights_TA[token_mask_T.reshape(-1).to(weights_TA.device)]
        sums = torch.stack([weights_TA.double().sum(0), (weights_TA != 0).sum(0).double()]).tolist()
        for name, weight, chosen in zip(names, *sums, strict=True):
            self._weight[layer, name] = self._weight.get((layer, name), 0.0) + weight
            self._chosen[layer, name] = self._chosen.get((layer, name), 0) + int(chosen)
        self._tokens[layer] = self._tokens.get(layer, 0) + len(weights_TA)

    def __repr__(self) -> str:
        shares = ", ".join(f"{name}: {share:.3f}" for name, share in self.share().items())
        return f"ExpertUsage(tokens={self.tokens}, share={{{shares}}})"

    def __str__(self) -> str:
        """A table of all layers together: each expert's share of the routing weight and of the choices."""
        share, chosen = self.share(), self.chosen_share()
        width = max(map(len, ("expert", *share)))
        rows = [f"{name:<{width}}  {share[name]:>14.1%}  {chosen[name]:>7.1%}" for name in share]
        return "\n".join([f"{self.tokens:,} tokens", f"{'expert':<{width}}  routing weight  choices", *rows])

    @property
    def tokens(self) -> int:
        """The number of tokens in each layer."""
        return max(self._tokens.values(), default=0)

    def share(self, layer: int | None = None) -> dict[str, float]:
        """Each expert's share of the routing weight, in one layer or over all; the shares sum to 1."""
        return _shares(self._weight, layer)

    def chosen_share(self, layer: int | None = None) -> dict[str, float]:
        """Each expert's share of the top-k choices, in one layer or over all."""
        return _shares(self._chosen, layer)


def _shares(totals: dict[tuple[int, str], float] | dict[tuple[int, str], int], layer: int | None) -> dict[str, float]:
    names = dict.fromkeys(name for at, name in totals if layer in (None, at))
    sums = {name: sum(v for (at, n), v in totals.items() if n == name and layer in (None, at)) for name in names}
    total = sum(sums.values())
    return {name: value / total for name, value in sums.items()} if total else sums


@contextlib.contextmanager
def track_usage(model: nn.Module) -> Iterator[ExpertUsage]:
    """Records the expert usage of the forward passes of `model` in this thread, within the context.

    Raises:
        TypeError: `model` is not a FlexMoE model and contains none (a PEFT or DDP wrapper around one is accepted).

    Example:
        ```pycon
        >>> import flexmoe, torch
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("model")
        >>> with flexmoe.track_usage(model) as usage:
        ...     output = model(torch.tensor([[5, 6, 7]]))
        >>> usage.tokens, sorted(usage.share())
        (3, ['code', 'math', 'public'])
        ```
    """
    flexmoe: Any = next((module for module in model.modules() if hasattr(module, "flexmoe_blocks")), None)
    if flexmoe is None:
        raise TypeError(f"{type(model).__name__} contains no FlexMoE model, so there is no expert usage to track.")
    usage = ExpertUsage()
    with flexmoe.recording_usage(usage):
        yield usage


__all__ = ["ExpertUsage", "track_usage"]
