"""The FlexMoE model: flat files that also travel to the Hub as remote code."""

from .anchors_flexmoe import NameMap, UnsupportedAnchorError, build_on_meta, find_ffn_sites
from .configuration_flexmoe import PUBLIC, FlexMoeConfig, check_expert_name
from .experts_flexmoe import FlexMoeBlock, FlexMoeRouter
from .modeling_flexmoe import (
    FlexMoeCausalLMOutputWithPast,
    FlexMoeForCausalLM,
    FlexMoeModel,
    FlexMoePreTrainedModel,
)
from .packages_flexmoe import ExpertManifest, ExpertPackage, write_package
from .usage_flexmoe import ExpertUsage, track_usage

__all__ = [
    "PUBLIC",
    "ExpertManifest",
    "ExpertPackage",
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
