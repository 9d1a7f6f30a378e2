"""`FlexMoeConfig` behaves like other configs of transformers, and gives access to the fields of its anchor's config.

Does not cover invalid configs (`test_loading`).
"""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM
from flexmoe.testing import ANCHOR_CONFIGS, VOCABULARY, tiny_flexmoe

families = pytest.mark.parametrize("family", ["llama", "olmo2", "gpt2"])


def config_of(family: str) -> FlexMoeConfig:
    return FlexMoeConfig(anchor_config=ANCHOR_CONFIGS[family](), experts=["public", "math"])


@families
def test_fields_of_the_anchor_are_read_and_written_through(family):
    config = config_of(family)
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (2, 32, VOCABULARY)
    config.use_cache = False
    config.vocab_size = 50
    assert config.anchor_config.use_cache is False
    assert config.anchor_config.vocab_size == 50
    assert config.to_dict()["vocab_size"] == 50  # where libraries look it up
    assert "vocab_size" not in config.to_diff_dict()  # what is saved
    with pytest.raises(AttributeError, match="no_such_field"):
        _ = config.no_such_field


@families
def test_save_and_load_round_trip(family, tmp_path):
    config = config_of(family)
    assert json.loads(config.to_json_string())["anchor_config"]["model_type"] == family
    assert repr(config).startswith("FlexMoeConfig {")
    assert FlexMoeConfig.from_dict(config.to_diff_dict()).to_dict() == config.to_dict()
    config.save_pretrained(tmp_path)
    first, second = AutoConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert first == second
    assert first.experts == config.experts


@families
def test_kwargs_override_stored_fields(family, tmp_path):
    tiny_flexmoe(family, ["math"], num_experts_per_tok=1).save_pretrained(tmp_path)
    changes = {"num_experts_per_tok": 2, "use_cache": False}
    config, unused = AutoConfig.from_pretrained(tmp_path, **changes, nonsense=1, return_unused_kwargs=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **changes)
    for each in (config, model.config):
        assert (each.num_experts_per_tok, each.use_cache, each.anchor_config.use_cache) == (2, False, False)
    assert unused == {"nonsense": 1}
    assert AutoConfig.from_pretrained(tmp_path).num_experts_per_tok == 1


@families
def test_attention_implementation_is_set_on_the_anchor(family, tmp_path):
    def used(model: FlexMoeForCausalLM) -> set[str]:
        return {part.config._attn_implementation for part in model.modules() if hasattr(part, "config")}

    tiny_flexmoe(family, ["math"]).save_pretrained(tmp_path)
    for name in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        assert used(model) == {name}
        other = "sdpa" if name == "eager" else "eager"
        model.set_attn_implementation(other)
        assert used(model) == {other}
        assert used(AutoModelForCausalLM.from_config(config_of(family), attn_implementation=name)) == {name}


@families
def test_dtype_auto_is_the_stored_dtype(family, tmp_path):
    tiny_flexmoe(family, ["math"]).to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert model.dtype == model.config.dtype == model.config.anchor_config.dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").dtype == torch.float32


@families
def test_generation_config_comes_from_the_anchor_and_is_saved(family, tmp_path):
    model = tiny_flexmoe(family)
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (1, 2)
    model.generation_config.max_new_tokens = 7
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert (loaded.max_new_tokens, loaded.do_sample, loaded.eos_token_id) == (7, True, 2)


def test_the_fields_of_an_anchor_follow_the_rules_of_its_own_class() -> None:
    """Nemotron-H has names of layer types that configs in general may not have."""
    anchor = CONFIG_MAPPING["nemotron_h"]()
    assert FlexMoeConfig(anchor_config=anchor).layer_types == anchor.layer_types
