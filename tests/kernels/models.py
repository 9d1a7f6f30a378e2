"""Small models on the operators, for the tests of dispatch and of the forward pass."""

from __future__ import annotations

from typing import Any

import torch

from flexmoe import FlexMoeForCausalLM
from flexmoe.testing import random_tokens, tiny_flexmoe

OWNERS = ("math", "code", "legal")
LOW_RANK = {"name": "thin", "kind": "low_rank", "rank": [2, 2]}
FUSED = "router and experts are fused"


def fused(family: str = "olmo2", experts: Any = OWNERS, **config: Any) -> FlexMoeForCausalLM:
    """A tiny model with two active experts and `experts_implementation="flexmoe_triton"`."""
    model = tiny_flexmoe(family, experts, num_experts_per_tok=2, **config)
    model.set_experts_implementation("flexmoe_triton")
    return model


@torch.no_grad()
def both(model: FlexMoeForCausalLM, length: int = 9, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of modules, and of operators."""
    tokens = random_tokens(2, length)
    model.set_experts_implementation("eager")
    by_modules = model(tokens, **kwargs).logits
    model.set_experts_implementation("flexmoe_triton")
    return by_modules, model(tokens, **kwargs).logits
