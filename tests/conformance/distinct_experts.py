"""Makes fresh experts differ: importing this module does it, in this process.

In a fresh FlexMoE every expert is a copy of public and every row is zero, so a model that mixed up its experts would
pass all of transformers' common tests. Here experts and rows are drawn at random, as the library draws what it
initialises. Processes that a test starts get there by unpickling `DistinctExpertsConfig`.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flexmoe.modeling import FlexMoeConfig, experts_flexmoe

EXPERT_STD = 0.02  # what the library's configs say for their own matrices
FACTOR_STD = 0.1  # so that a product of two is as large as a matrix
ROW_STD = 0.5  # at 32 dimensions: clear decisions, and no expert that is never chosen

_row_of_zeros = experts_flexmoe.router_row


@torch.no_grad()
def _drawn_expert(ffn: nn.Module, record: Mapping[str, Any], *, layer: int, hidden_size: int) -> nn.Module:
    return _drawn(copy.deepcopy(ffn), EXPERT_STD)


@torch.no_grad()
def _drawn_low_rank_expert(ffn: nn.Module, record: Mapping[str, Any], *, layer: int, hidden_size: int) -> nn.Module:
    expert = experts_flexmoe.low_rank_expert(ffn, record, layer=layer, hidden_size=hidden_size)
    return _drawn(expert, FACTOR_STD)


def _drawn(expert: nn.Module, std: float) -> nn.Module:
    for parameter in expert.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, std)
    return expert


@torch.no_grad()
def _drawn_row(*args: Any, **kwargs: Any) -> nn.Linear:
    row = _row_of_zeros(*args, **kwargs)
    for parameter in row.parameters():
        parameter.normal_(0.0, ROW_STD)
    return row


experts_flexmoe.EXPERT_KINDS["full"] = _drawn_expert
experts_flexmoe.EXPERT_KINDS["low_rank"] = _drawn_low_rank_expert
experts_flexmoe.router_row = _drawn_row


class DistinctExpertsConfig:
    """Stands for `FlexMoeConfig` where a test hands the class of a config to other processes."""

    @staticmethod
    def from_dict(values: dict[str, Any]) -> FlexMoeConfig:
        """A `FlexMoeConfig`."""
        return FlexMoeConfig.from_dict(values)
