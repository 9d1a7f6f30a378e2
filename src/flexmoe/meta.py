"""Dense models on the meta device: their modules and shapes, without weights.

Does not cover reading a checkpoint (`flexmoe.io.dense`), or where a family has its FFNs (`anchors_flexmoe`).
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from flexmoe.modeling.anchors_flexmoe import FfnSite, UnsupportedAnchorError, find_ffn_sites


def build_on_meta(anchor_config: PreTrainedConfig) -> tuple[PreTrainedModel, list[FfnSite]]:
    """The dense model of `anchor_config` without weights, and its feed-forward networks.

    Raises:
        UnsupportedAnchorError: transformers has no causal LM for it, or its networks cannot be found.
    """
    try:
        with torch.device("meta"):
            dense = AutoModelForCausalLM.from_config(anchor_config)
    except ValueError as error:
        raise UnsupportedAnchorError(
            f"model_type {anchor_config.model_type!r} has no causal LM in transformers: {error}"
        ) from error
    return dense, find_ffn_sites(dense)


__all__ = ["build_on_meta"]
