"""What libraries read of a FlexMoE's config and model has the value that they expect.

The tables come from the sources of PEFT 0.21, TRL 1.16, accelerate 1.15, lm-eval 0.4.13, torchao 0.18, bitsandbytes
0.50, sentence-transformers 6.2 and transformers 5.23. `TestReads` runs the installed ones and records what they read,
so a name that a new version reads fails here until it has a row. Does not cover whether their results are right
(`tests/flexmoe/test_peft.py`, `tests/modeling`).
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import accelerate
import peft
import pytest
import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedConfig, StaticCache

from flexmoe import expert_lora_config
from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM, FlexMoeModel
from flexmoe.testing import ANCHOR_CONFIGS, VOCABULARY, flexmoe_from_anchor, random_tokens, tiny_flexmoe
from tests.support.families import tiny_config

TOKENS = random_tokens(2, 7)


class Absent:
    """The value of an attribute that must not exist."""

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT = Absent()

# Attributes of the config of a FlexMoE with a Llama anchor and three experts: who reads each, and its value.
CONFIG: dict[str, tuple[str, Any]] = {
    "model_type": ("all", "flexmoe"),
    "architectures": ("sentence-transformers", None),
    "sub_configs": ("sentence-transformers, transformers", {"anchor_config": ...}),
    "text_config": ("lm-eval, sentence-transformers, transformers", ABSENT),
    "is_encoder_decoder": ("accelerate, TRL, transformers", False),
    "is_causal": ("sentence-transformers, transformers", ABSENT),
    # sizes of the anchor
    "hidden_size": ("PEFT, accelerate, DeepSpeed, sentence-transformers, TRL", 32),
    "intermediate_size": ("accelerate, TRL", 64),
    "num_hidden_layers": ("PEFT, accelerate, transformers", 2),
    "num_attention_heads": ("PEFT, accelerate, TRL", 4),
    "num_key_value_heads": ("PEFT, accelerate, TRL, transformers", 2),
    "head_dim": ("PEFT, accelerate, TRL, transformers", 8),
    "vocab_size": ("PEFT, TRL, lm-eval, accelerate, transformers", VOCABULARY),
    "max_position_embeddings": ("lm-eval, sentence-transformers, accelerate", 128),
    "n_positions": ("lm-eval, accelerate", ABSENT),
    "n_ctx": ("lm-eval", ABSENT),
    "pretraining_tp": ("PEFT", 1),
    "layer_types": ("accelerate, transformers", ABSENT),
    "sliding_window": ("transformers", ABSENT),
    "tie_word_embeddings": ("PEFT, accelerate, torchao, transformers", False),
    "use_cache": ("transformers, sentence-transformers, TRL", True),
    "initializer_range": ("transformers", 0.02),
    # what lies between the decoder's output and the logits
    "final_logit_softcapping": ("TRL", ABSENT),
    "logit_scale": ("TRL", ABSENT),
    "logits_scaling": ("TRL", ABSENT),
    "lm_head_multiplier": ("TRL", ABSENT),
    "output_multiplier": ("TRL", ABSENT),
    # special tokens
    "pad_token_id": ("TRL, PEFT, transformers", 0),
    "bos_token_id": ("transformers", 1),
    "eos_token_id": ("TRL, transformers", 2),
    # the router
    "num_experts": ("TRL", 3),
    "num_experts_per_tok": ("TRL", 2),
    "output_router_logits": ("TRL", False),
    "router_aux_loss_coef": ("TRL", 0.0),
    "keys_to_ignore_at_inference": ("TRL, transformers", ["past_key_values"]),
    # other
    "num_labels": ("TRL, sentence-transformers, transformers", 2),
    "problem_type": ("PEFT, transformers", None),
    "output_hidden_states": ("sentence-transformers, transformers", False),
    "return_dict": ("accelerate, transformers", True),
    "quantization_config": ("PEFT, lm-eval, bitsandbytes, torchao, transformers", ABSENT),
    "name_or_path": ("TRL, transformers", ""),
    "_name_or_path": ("PEFT, TRL, sentence-transformers", ""),
    "_attn_implementation": ("TRL, sentence-transformers, transformers", "sdpa"),
}

# Keys of `config.to_dict()`, which PEFT and the generation config read instead of attributes.
KEYS: dict[str, tuple[str, Any]] = {
    "model_type": ("PEFT", "flexmoe"),
    "hidden_size": ("PEFT", 32),
    "num_hidden_layers": ("PEFT", 2),
    "num_attention_heads": ("PEFT", 4),
    "num_key_value_heads": ("PEFT", 2),
    "head_dim": ("PEFT", 8),
    "tie_word_embeddings": ("PEFT", False),
    "text_config": ("PEFT", ABSENT),
    "per_layer_config": ("PEFT", ABSENT),
    "_name_or_path": ("PEFT", ""),
    "pad_token_id": ("transformers", 0),
    "bos_token_id": ("transformers", 1),
    "eos_token_id": ("transformers", 2),
    "use_cache": ("transformers", True),
}

# Attributes of the model; methods of torch's modules and of transformers' models are not listed.
MODEL: dict[str, tuple[str, Any]] = {
    "base_model_prefix": ("accelerate, transformers, vLLM", "anchor"),
    "main_input_name": ("sentence-transformers, transformers", "input_ids"),
    "loss_type": ("transformers", "ForCausalLM"),
    "accepts_loss_kwargs": ("transformers", ABSENT),  # decided by **kwargs of `forward`
    "_tied_weights_keys": ("PEFT, transformers", {}),
    "all_tied_weights_keys": ("bitsandbytes, torchao, transformers", {}),
    "_no_split_modules": ("PEFT, accelerate, transformers", {"LlamaDecoderLayer"}),
    "_skip_keys_device_placement": ("transformers", {"past_key_values"}),
    "_device_mesh": ("PEFT, transformers", None),
    "_tp_size": ("PEFT, transformers", None),
    "_tp_info": ("PEFT", ABSENT),
    "is_gradient_checkpointing": ("PEFT, TRL", False),
    "gradient_checkpointing": ("PEFT", ABSENT),
    "hf_device_map": ("PEFT, TRL, accelerate", ABSENT),
    "hf_quantizer": ("PEFT, transformers", ABSENT),
    "is_loaded_in_4bit": ("PEFT, TRL, accelerate", ABSENT),
    "is_loaded_in_8bit": ("PEFT, TRL, accelerate", ABSENT),
    "is_quantized": ("PEFT, transformers", ABSENT),
    "hqq_quantized": ("PEFT", ABSENT),
    "quantization_method": ("PEFT, TRL, accelerate", ABSENT),
    "peft_config": ("TRL, PEFT, transformers", ABSENT),
    "get_base_model": ("PEFT, TRL, transformers", ABSENT),
    "model": ("PEFT", ABSENT),
    "prompt_encoder": ("PEFT", ABSENT),
    "base_layer": ("PEFT", ABSENT),
    "merge_and_unload": ("PEFT", ABSENT),
    "unload_and_optionally_merge_module": ("PEFT", ABSENT),
    "_cast_adapter_dtype": ("PEFT", ABSENT),
    "_enable_peft_forward_hooks": ("PEFT", ABSENT),
    "_is_accelerate_prepared": ("accelerate", ABSENT),
    "_tie_weights": ("accelerate", ABSENT),
    "_hf_hook": ("accelerate", ABSENT),
    "_old_forward": ("accelerate", ABSENT),
    "model_tags": ("PEFT, TRL", None),
    "name_or_path": ("PEFT", ""),
}
# Present, with values that `TestModel` and other tests check.
CHECKED_ELSEWHERE = {"_tp_plan", "_checkpoint_conversion_mapping", "base_model", "generation_config", "config"}


@pytest.fixture(scope="module")
def model() -> FlexMoeForCausalLM:
    return tiny_flexmoe("llama", ["math", "code"], num_experts_per_tok=2)


def read(of: Any, name: str) -> Any:
    return of.get(name, ABSENT) if isinstance(of, dict) else getattr(of, name, ABSENT)


@pytest.mark.promise(
    "PEFT, TRL, accelerate, lm-eval, sentence-transformers, torchao, bitsandbytes",
    "attributes and keys of the config and attributes of the model that they read",
    "as of a model of transformers with the anchor's sizes",
)
@pytest.mark.parametrize(
    ("of", "name"),
    [*(("config", name) for name in CONFIG), *(("keys", name) for name in KEYS), *(("model", name) for name in MODEL)],
)
def test_value(model, of, name):
    table, where = {
        "config": (CONFIG, model.config.get_text_config()),
        "keys": (KEYS, model.config.to_dict()),
        "model": (MODEL, model),
    }[of]
    expected, value = table[name][1], read(where, name)
    if isinstance(expected, dict) and ... in expected.values():
        assert value.keys() == expected.keys()
    else:
        assert value is expected if expected is ABSENT else value == expected


class TestTextConfig:
    """`get_text_config()` is the FlexMoE's config, with the fields of its anchor's decoder."""

    # a composite, one with sliding layers, one whose layers differ, an encoder-decoder that is used as a decoder
    FAMILIES = ("gemma3", "gemma2", "gemma4_text", "bart", "gpt2", "qwen3_5", "moss_transcribe_diarize")

    @pytest.fixture(params=FAMILIES)
    def anchor(self, request) -> PreTrainedConfig:
        config = tiny_config(request.param)
        if request.param == "bart":
            config.is_encoder_decoder, config.decoder_layers = True, 3
        return config

    def test_fields_are_those_of_the_decoder(self, anchor):
        config, text = FlexMoeConfig(anchor_config=anchor), anchor.get_text_config(decoder=True)
        assert all(config.get_text_config(**which) is config for which in ({}, {"decoder": True}, {"encoder": True}))
        fields = [name for name in text if not name.startswith("_") and not hasattr(FlexMoeConfig, name)]
        differing = {name for name in fields if getattr(config, name) != getattr(text, name)}
        assert differing <= {"tie_word_embeddings"}
        assert config.tie_word_embeddings == anchor.tie_word_embeddings
        values = config.to_dict()
        assert all(
            values[name] == getattr(config, name) for name in ("vocab_size", "use_cache") if hasattr(text, name)
        )
        assert {"hidden_size", "n_embd", "d_model"} & values.keys()
        assert config.num_hidden_layers == text.num_hidden_layers

    def test_caches_and_generation_configs_are_those_of_the_anchor(self, anchor):
        config = FlexMoeConfig(anchor_config=anchor)
        for cache in (lambda of: DynamicCache(config=of), lambda of: StaticCache(config=of, max_cache_len=40)):
            ours, theirs = (
                [(type(layer), vars(layer)) for layer in cache(of).layers] for of in (config, config.anchor_config)
            )
            assert ours == theirs
        ours, theirs = (GenerationConfig.from_model_config(of).to_dict() for of in (config, config.anchor_config))
        ignored = {"transformers_version", "decoder_start_token_id"}  # the latter is for encoder-decoders
        assert {key: value for key, value in ours.items() if key not in ignored} == {
            key: value for key, value in theirs.items() if key not in ignored
        }

    def test_writing_reaches_the_anchor(self, anchor):
        config = FlexMoeConfig(anchor_config=anchor)
        for name in ("vocab_size", "pad_token_id"):
            setattr(config.get_text_config(), name, 7)
            assert getattr(config, name) == getattr(config.anchor_config.get_text_config(decoder=True), name, 7) == 7
            assert name not in vars(config)

    def test_saved_fields_are_in_anchor_config_only(self, anchor):
        config = FlexMoeConfig(anchor_config=anchor)
        assert "vocab_size" not in config.to_diff_dict()
        assert FlexMoeConfig(**config.to_dict()).to_dict() == config.to_dict()
        assert FlexMoeConfig.from_dict(config.to_diff_dict()).to_dict() == config.to_dict()

    def test_a_field_that_contradicts_anchor_config_is_refused(self):
        values = FlexMoeConfig(anchor_config=ANCHOR_CONFIGS["llama"]()).to_dict()
        values["anchor_config"]["hidden_size"] = 64
        with pytest.raises(ValueError, match="hidden_size is 32 beside anchor_config and 64 in it"):
            FlexMoeConfig(**values)


class TestModel:
    """Attributes of the model that differ between anchors."""

    @pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
    @pytest.mark.parametrize("tied", [True, False])
    def test_tied_weights_have_the_names_of_this_model(self, family, tied):
        config = ANCHOR_CONFIGS[family]()
        config.tie_word_embeddings = tied
        model = FlexMoeForCausalLM(FlexMoeConfig(anchor_config=config, experts=["public", "math"]))
        assert model._tied_weights_keys == model.all_tied_weights_keys
        assert bool(model._tied_weights_keys) == tied
        state = model.state_dict()
        for name, to in model._tied_weights_keys.items():
            assert state[name].data_ptr() == state[to].data_ptr()
        assert FlexMoeModel(model.config)._tied_weights_keys == {}

    def test_untying_in_the_config_unties(self):
        config = ANCHOR_CONFIGS["llama"]()
        config.tie_word_embeddings = True
        model = FlexMoeForCausalLM(FlexMoeConfig(anchor_config=config))
        model.config.tie_word_embeddings = False
        assert model.get_expanded_tied_weights_keys(all_submodels=True) == {}

    def test_generation_config_has_the_anchors_special_tokens(self, model):
        config = model.generation_config
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)


class TestBaseModel:
    """`base_model`, which trainers call to compute their own loss, runs with the experts of this model."""

    @torch.no_grad()
    def test_it_has_the_choice_of_experts(self, model):
        expected = model(TOKENS, experts=["public", "code"], output_hidden_states=True).hidden_states[-1]
        assert torch.equal(model.base_model(TOKENS, experts=["public", "code"]).last_hidden_state, expected)
        with model.only_experts("public", "code"):
            assert torch.equal(model.base_model(input_ids=TOKENS).last_hidden_state, expected)
        assert not torch.equal(model.base_model(TOKENS).last_hidden_state, expected)
        logits = model.base_model(TOKENS, output_router_logits=True).router_logits
        assert [layer.shape for layer in logits] == [(14, 3)] * 2

    @pytest.mark.promise(
        "TRL",
        "trainers that run the decoder and the head on their own, with a choice of experts",
        "the choice applies",
    )
    @torch.no_grad()
    def test_the_active_set_applies(self):
        model = tiny_flexmoe("llama", ["math", "code"], active_experts=["public", "code"])
        head = model.get_output_embeddings()
        assert torch.equal(head(model.base_model(input_ids=TOKENS).last_hidden_state), model(TOKENS).logits)

    def test_modules_are_those_of_the_decoder(self, model):
        assert model.base_model.layers is model.anchor.model.layers
        assert list(model.base_model.parameters()) == list(model.anchor.model.parameters())

    def test_router_logits_for_more_experts_per_token_than_there_are_are_refused(self):
        model = tiny_flexmoe("llama", ["math"])
        with pytest.raises(ValueError, match=r"num_experts_per_tok = 2 instead of 4"):
            model.base_model(TOKENS, output_router_logits=True)


READERS = ("accelerate", "peft", "sentence_transformers", "trl")


@contextmanager
def reads_of(model: FlexMoeForCausalLM, kind: str) -> Iterator[set[str]]:
    """Records the attributes of the model or its config that one of `READERS` reads."""
    names: set[str] = set()
    recorded = model if kind == "model" else model.config
    original = type(recorded)

    def get(self: Any, name: str) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] in READERS:
            names.add(name)
        return original.__getattribute__(self, name)

    attributes = {"__getattribute__": get, "__module__": original.__module__, "__qualname__": original.__qualname__}
    recorded.__class__ = type(original.__name__, (original,), attributes)
    yield names
    recorded.__class__ = original


def by_lora(model: FlexMoeForCausalLM) -> None:
    adapted = peft.get_peft_model(model, expert_lora_config(model, "math", r=2, router_row=True))
    adapted(input_ids=TOKENS, labels=TOKENS)
    adapted.merge_and_unload()


def by_trained_tokens(model: FlexMoeForCausalLM) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5], ensure_weight_tying=True)
    peft.get_peft_model(model, config)(input_ids=TOKENS)


def by_prefixes(model: FlexMoeForCausalLM) -> None:
    adapted = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    adapted.generate(input_ids=TOKENS, max_new_tokens=2)


def by_accelerate(model: FlexMoeForCausalLM) -> None:
    accelerate.infer_auto_device_map(model, max_memory={"cpu": 1 << 30})
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.unwrap_model(accelerator.prepare(model))


USES: dict[str, Callable[[FlexMoeForCausalLM], None]] = {
    "PEFT, a LoRA": by_lora,
    "PEFT, trained tokens": by_trained_tokens,
    "PEFT, prefixes": by_prefixes,
    "accelerate": by_accelerate,
}


class TestReads:
    """Every name that an installed library reads has a row above."""

    @pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")
    @pytest.mark.parametrize("use", USES)
    @pytest.mark.parametrize("kind", ["config", "model"])
    def test_names_are_in_the_tables(self, use, kind):
        model = tiny_flexmoe("llama", ["math", "code"])
        with reads_of(model, kind) as names:
            USES[use](model)
        methods = dir(FlexMoeForCausalLM if kind == "model" else FlexMoeConfig)
        known = {*(MODEL if kind == "model" else CONFIG), *CHECKED_ELSEWHERE, *methods, "_modules"}
        assert names
        assert sorted(name for name in names - known if not name.startswith("__")) == []


@pytest.mark.parametrize("batches", [1, 2, 4])
@pytest.mark.promise(
    "`Trainer`",
    "the auxiliary losses with gradient accumulation",
    "count once per batch, by the share of its labels",
)
def test_auxiliary_losses_count_by_the_share_of_the_labels(batches):
    losses = {"router_aux_loss_coef": 2.0, "router_z_loss_coef": 0.5, "output_router_logits": True}
    model = tiny_flexmoe("llama", ["math"], num_experts_per_tok=1, **losses)
    labels = random_tokens(1, 9).repeat(4, 1)
    with torch.no_grad():
        whole = model(labels, labels=labels)
        parts = [model(part, labels=part, num_items_in_batch=32).loss for part in labels.chunk(batches)]
        assert float(sum(parts)) == pytest.approx(float(whole.loss), rel=1e-5)
        shifted = {"shift_labels": torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)}
        assert float(model(labels, labels=labels, num_items_in_batch=torch.tensor(64), **shifted).loss) == (
            pytest.approx(float(whole.loss) / 2, rel=1e-5)
        )


def test_an_anchor_without_the_expected_fields_is_read_as_it_is():
    """GPT-2 has other names for its sizes; both are readable, as on its own config."""
    model = flexmoe_from_anchor(FlexMoeForCausalLM(FlexMoeConfig(anchor_config=ANCHOR_CONFIGS["gpt2"]())).anchor)
    config = model.config
    assert (config.n_positions, config.n_embd, config.hidden_size, config.num_hidden_layers) == (128, 32, 32, 2)
    assert {"n_embd": 32, "n_head": 4, "n_layer": 2}.items() <= config.to_dict().items()
