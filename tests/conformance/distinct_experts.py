"""Makes the experts of new models differ, in each process that imports this module.

In a new FlexMoE every expert is a copy of public and every row is zero, so transformers' common tests would not notice
if experts were mixed up. This module initializes experts and rows at random. Processes that a test starts import it by
unpickling `DistinctExpertsConfig`.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flexmoe.modeling import FlexMoeConfig, experts_flexmoe

EXPERT_STD = 0.02  # the default initializer_range of transformers
FACTOR_STD = 0.1  # makes the product of two factors about as large
ROW_STD = 0.5  # at 32 dimensions: clear routing decisions, and every expert is selected

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
    """Replaces `FlexMoeConfig` where a test passes the config class to other processes."""

    @staticmethod
    def from_dict(values: dict[str, Any]) -> FlexMoeConfig:
        """A `FlexMoeConfig`."""
        return FlexMoeConfig.from_dict(values)
