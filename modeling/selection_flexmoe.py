"""Who may take part in a forward pass, and whether a KV cache was filled by the same experts.

Three sets are intersected: the model's active set (saved in its config), the `only_experts` contexts around the call,
and the call's `expert_mask`. Does not cover which of the allowed experts a token goes to (`routing_flexmoe`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .context_flexmoe import is_recording, scoped_values
from .parallel_flexmoe import has_company


@dataclass(frozen=True)
class Selection:
    """The allowed experts of a batch.

    Attributes:
        names: those that at least one sequence may use, in the model's order. The others are not computed. In a group
            of processes, those that the mask keeps from every sequence here are among them: others may wait for them.
        row_mask: bool [batch, len(names)] where sequences differ; None where all may use all of `names`.
    """

    names: tuple[str, ...]
    row_mask: Tensor | None


def check_names(names: Iterable[str], known: Sequence[str], what: str) -> tuple[str, ...]:
    """`names` as a tuple in the order of `known`.

    Raises:
        ValueError: none is named, or one is unknown; `what` says where they came from.
    """
    names = list(names)
    if not names:
        raise ValueError(f"{what} names no expert: name at least one of {list(known)}.")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{what} names {unknown}, which this model has not: it has {list(known)}.")
    return tuple(name for name in known if name in names)


def select_experts(model: Any, batch: int | None, expert_mask: Tensor | None) -> Selection:
    """Intersects the active set, the enclosing `only_experts` contexts and the mask.

    Args:
        model: the FlexMoE that runs.
        batch: number of sequences, if known.
        expert_mask: bool [batch, experts] in the order of `model.expert_names`, or None.

    Raises:
        ValueError: the mask has another shape or no values, or a sequence is left without an expert.
        TypeError: the mask is not a bool tensor.
    """
    names = tuple(model.active_experts)
    for scope in scoped_values(model, "only"):
        names = tuple(name for name in names if model.serial_of(name) in scope)
    if not names:
        raise ValueError(
            f"No expert is allowed: only_experts leaves nothing of the active set {list(model.active_experts)}."
        )
    if expert_mask is None:
        return Selection(names, None)
    everyone = model.expert_names
    _check_mask(expert_mask, batch, everyone)
    # no list as an index: it would be copied to the device, which a graph that is captured can't wait for
    rows_BA = torch.stack([expert_mask[:, everyone.index(name)] for name in names], 1)
    if is_recording():  # what follows looks at values
        return Selection(names, rows_BA)
    return _without_idle_experts(names, rows_BA)


def _check_mask(expert_mask: Tensor, batch: int | None, everyone: Sequence[str]) -> None:
    if not isinstance(expert_mask, Tensor) or expert_mask.dtype != torch.bool:
        got = expert_mask.dtype if isinstance(expert_mask, Tensor) else type(expert_mask).__name__
        raise TypeError(f"expert_mask must be a bool tensor [batch, experts], True = allowed; got {got}.")
    expected = (expert_mask.shape[0] if batch is None else batch, len(everyone))
    if tuple(expert_mask.shape) != expected:
        raise ValueError(
            f"expert_mask has shape {list(expert_mask.shape)}; expected {list(expected)}: [batch, experts], "
            f"columns in the order {list(everyone)}."
        )
    if expert_mask.is_meta:
        raise ValueError(
            "expert_mask is on the meta device and has no values: put it where the model is, or on the CPU."
        )


def _without_idle_experts(names: tuple[str, ...], rows_BA: Tensor) -> Selection:
    """Drops experts that no sequence may use, so that masking everywhere computes just what removal computes.

    Other processes have sequences of their own, so where there are any, nobody is dropped: all call the same modules
    in the same order.
    """
    rows_BA = rows_BA.cpu()
    empty = (~rows_BA.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"expert_mask allows no active expert for sequence(s) {empty} of the batch; active are {list(names)}."
        )
    used = rows_BA.any(0) | has_company()
    names = tuple(name for name, is_used in zip(names, used.tolist(), strict=True) if is_used)
    rows_BA = rows_BA[:, used]
    return Selection(names, None if rows_BA.all() else rows_BA)


@dataclass(frozen=True, eq=False, slots=True)
class CacheStamp:
    """Which experts filled a cache: their serials, and the mask where sequences differ.

    It has slots because transformers' exporters walk through a cache by `__dict__` and take each tensor that they meet
    for an input.
    """

    serials: tuple[str, ...]
    names: tuple[str, ...]
    row_mask: Tensor | None

    def same_experts(self, other: CacheStamp) -> bool:
        """Whether going on from one with the other gives what one of them alone would."""
        if self.serials != other.serials:
            return False
        if self.row_mask is None or other.row_mask is None:
            return self.row_mask is other.row_mask
        return torch.equal(self.row_mask, other.row_mask)


def stamp_cache(cache: Any, stamp: CacheStamp | None) -> None:
    """Marks a KV cache with the experts that fill it, or checks the mark that it bears.

    A cache without a mark is taken as filled by these: compiled code leaves none.

    Raises:
        ValueError: other experts filled the cache, so going on would mix them in.
    """
    if cache is None or stamp is None or not hasattr(cache, "get_seq_length"):
        return
    known = getattr(cache, "_flexmoe_stamp", None)
    # the length last: it is on the device for a static cache
    if known is not None and not known.same_experts(stamp) and cache.get_seq_length() > 0:
        raise ValueError(
            f"This KV cache was filled by the experts {list(known.names)} (as they were then, or with another mask) "
            f"and would be continued with {list(stamp.names)}. It carries their influence: start with a fresh cache."
        )
    cache._flexmoe_stamp = stamp


__all__ = ["CacheStamp", "Selection", "check_names", "select_experts", "stamp_cache"]
