"""The common model tests of transformers, run on FlexMoE classes: `make conformance TRANSFORMERS_TESTS=DIR`.

This file only names the anchors and the classes. The tests that are skipped, with the reasons, are in `skips.py`. Does
not cover errors that all cached paths share, which the common tests miss (`tests/modeling/test_decoding.py`).
"""

import unittest
from typing import Any

from distinct_experts import DistinctExpertsConfig
from transformers import LlamaConfig, Olmo2Config, PreTrainedConfig

from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM, FlexMoeModel
from tests import test_fsdp_mixin, test_modeling_common, test_tensor_parallel_mixin
from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester
from tests.generation import test_utils

LAYERS = 2  # of the tester's models
EXPERTS = ["public", "math", {"name": "code", "kind": "low_rank", "rank": [4] * LAYERS}, "legal"]

# transformers looks up in these mappings which classes have a loss, and in these sets which run distributed tests.
for module in (test_modeling_common, test_utils):
    for table, name in (
        ("MODEL_MAPPING_NAMES", "FlexMoeModel"),
        ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "FlexMoeForCausalLM"),
    ):
        if hasattr(module, table):
            setattr(module, table, {**getattr(module, table), "flexmoe": name})
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None


class FlexMoeTester(CausalLMModelTester):
    """A tiny FlexMoE whose anchor has the sizes of the tester."""

    config_class = FlexMoeConfig
    base_model_class = FlexMoeModel
    causal_lm_class = FlexMoeForCausalLM
    anchor_config_class: type[PreTrainedConfig]

    def get_config(self) -> FlexMoeConfig:
        anchor = self.anchor_config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_position_embeddings,
            pad_token_id=self.pad_token_id,
            bos_token_id=self.bos_token_id,
            eos_token_id=self.eos_token_id,
        )
        return FlexMoeConfig(anchor_config=anchor, experts=EXPERTS, num_experts_per_tok=self.num_experts_per_tok)


class FlexMoeTest(CausalLMModelTest):
    """The common tests, with distinct experts also in the processes of the FSDP tests."""

    def _get_tiny_config(self) -> tuple[type, dict[str, Any]]:
        _, values = super()._get_tiny_config()
        return DistinctExpertsConfig, values


class LlamaTester(FlexMoeTester):
    anchor_config_class = LlamaConfig


class TestLlama(FlexMoeTest, unittest.TestCase):
    model_tester_class = LlamaTester


class Olmo2Tester(FlexMoeTester):
    anchor_config_class = Olmo2Config


class TestOlmo2(FlexMoeTest, unittest.TestCase):
    model_tester_class = Olmo2Tester
