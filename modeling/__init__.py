"""The FlexMoE model: flat files that also travel to the Hub as remote code."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .anchors_flexmoe import NameMap, UnsupportedAnchorError, find_ffn_sites
    from .configuration_flexmoe import PUBLIC, FlexMoeConfig, check_expert_name
    from .experts_flexmoe import FlexMoeBlock, FlexMoeRouter
    from .modeling_flexmoe import (
        FlexMoeCausalLMOutputWithPast,
        FlexMoeForCausalLM,
        FlexMoeModel,
        FlexMoePreTrainedModel,
    )

# Imported on first use: the configuration takes a moment, the model takes transformers' modelling code, seconds.
_LAZY = {
    "anchors_flexmoe": ("NameMap", "UnsupportedAnchorError", "find_ffn_sites"),
    "configuration_flexmoe": ("PUBLIC", "FlexMoeConfig", "check_expert_name"),
    "experts_flexmoe": ("FlexMoeBlock", "FlexMoeRouter"),
    "modeling_flexmoe": (
        "FlexMoeCausalLMOutputWithPast",
        "FlexMoeForCausalLM",
        "FlexMoeModel",
        "FlexMoePreTrainedModel",
    ),
}


def __getattr__(name: str) -> Any:
    for module, names in _LAZY.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "PUBLIC",
    "FlexMoeBlock",
    "FlexMoeCausalLMOutputWithPast",
    "FlexMoeConfig",
    "FlexMoeForCausalLM",
    "FlexMoeModel",
    "FlexMoePreTrainedModel",
    "FlexMoeRouter",
    "NameMap",
    "UnsupportedAnchorError",
    "check_expert_name",
    "find_ffn_sites",
]
