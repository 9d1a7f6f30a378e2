"""The FlexMoE model: flat files that also travel to the Hub as remote code."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .anchors_flexmoe import NameMap, UnsupportedAnchorError, build_on_meta, find_ffn_sites
    from .configuration_flexmoe import PUBLIC, ExpertPackageConfig, FlexMoeConfig, check_expert_name
    from .experts_flexmoe import FlexMoeBlock, FlexMoeRouter
    from .modeling_flexmoe import (
        FlexMoeCausalLMOutputWithPast,
        FlexMoeForCausalLM,
        FlexMoeModel,
        FlexMoePreTrainedModel,
    )
    from .packages_flexmoe import ExpertManifest, ExpertPackage, write_package
    from .usage_flexmoe import ExpertUsage, track_usage

# Imported on first use: the configuration takes a moment, the model takes transformers' modelling code, seconds.
_LAZY = {
    "ExpertManifest": "packages_flexmoe",
    "ExpertPackage": "packages_flexmoe",
    "ExpertPackageConfig": "configuration_flexmoe",
    "ExpertUsage": "usage_flexmoe",
    "FlexMoeBlock": "experts_flexmoe",
    "FlexMoeCausalLMOutputWithPast": "modeling_flexmoe",
    "FlexMoeConfig": "configuration_flexmoe",
    "FlexMoeForCausalLM": "modeling_flexmoe",
    "FlexMoeModel": "modeling_flexmoe",
    "FlexMoePreTrainedModel": "modeling_flexmoe",
    "FlexMoeRouter": "experts_flexmoe",
    "NameMap": "anchors_flexmoe",
    "PUBLIC": "configuration_flexmoe",
    "UnsupportedAnchorError": "anchors_flexmoe",
    "build_on_meta": "anchors_flexmoe",
    "check_expert_name": "configuration_flexmoe",
    "find_ffn_sites": "anchors_flexmoe",
    "track_usage": "usage_flexmoe",
    "write_package": "packages_flexmoe",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "PUBLIC",
    "ExpertManifest",
    "ExpertPackage",
    "ExpertPackageConfig",
    "ExpertUsage",
    "FlexMoeBlock",
    "FlexMoeCausalLMOutputWithPast",
    "FlexMoeConfig",
    "FlexMoeForCausalLM",
    "FlexMoeModel",
    "FlexMoePreTrainedModel",
    "FlexMoeRouter",
    "NameMap",
    "UnsupportedAnchorError",
    "build_on_meta",
    "check_expert_name",
    "find_ffn_sites",
    "track_usage",
    "write_package",
]
