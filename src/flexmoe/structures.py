"""The structure of a feed-forward network, read once per network: what may run without calling its modules.

Shared by the CPU and GPU implementations. Does not cover how a structure is read (`modeling/low_rank_flexmoe.py`), or
whether the parts of a network are unwrapped: code that computes with their weights checks each part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from flexmoe.modeling.evidence_flexmoe import EvidenceRow
from flexmoe.modeling.low_rank_flexmoe import FfnStructure, is_plain_linear, is_unwrapped, read_structure

_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))

_cache: WeakKeyDictionary[nn.Module, tuple[Callable[..., Any], FfnStructure | None]] = WeakKeyDictionary()


def structure_of(network: nn.Module) -> FfnStructure | None:
    """The structure of `network`; None if it has no known one, is in training mode, or has hooks or a wrapped forward.

    See `structure_in_any_mode`.
    """
    return None if network.training else structure_in_any_mode(network)


def structure_in_any_mode(network: nn.Module) -> FfnStructure | None:
    """The structure of `network`; None if it has no known one, or has hooks or a wrapped forward.

    The result is cached per network and read again if the `forward` of its class is replaced.
    """
    if not is_unwrapped(network):
        return None
    forward = type(network).forward
    cached = _cache.get(network)
    if cached is None or cached[0] is not forward:
        cached = _cache[network] = (forward, read_structure(network))
    return cached[1]


def is_plain_row(row: nn.Module) -> bool:
    """Whether the weight, the bias and the calibration of a router row determine what it computes."""
    has_evidence = type(row).__name__ == EvidenceRow.__name__  # also that of remote code
    return is_plain_linear(row) or (has_evidence and is_unwrapped(row))


def settings_of(module: nn.Module) -> dict[str, Any]:
    """The attributes of `module` beyond those of every `nn.Module`, such as the slope of an activation."""
    return {name: value for name, value in vars(module).items() if name not in _MODULE_ATTRIBUTES}


__all__ = ["is_plain_row", "settings_of", "structure_in_any_mode", "structure_of"]
