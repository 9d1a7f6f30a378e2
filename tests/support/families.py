"""Tiny configurations of all causal language models in the installed transformers.

`EXCEPTIONS` lists the families that cannot be anchors, with the reasons that `docs/families.md` shows. Does not cover
the checks (`family_checks`).
"""

import re
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# Patterns of config fields that hold sizes, and tiny values; the first pattern that matches the full name applies.
SIZES = (
    (r"(num|n|decoder|encoder)_(hidden_)?layers?|num_(decoder|encoder)_layers|num_blocks", 2),
    (r"hidden_size|d_model|n_embd|emb_dim|embedding_size|embedding_dim|word_embed_proj_dim|lru_width", 32),
    (r".*intermediate_size|.*ffn_dim|dff|n_inner|.*ffn_hidden_size|dim_ff|d_inner|feed_forward_size", 64),
    (r"num_key_value_heads|num_kv_heads|n_head_kv|num_query_groups", 2),
    (r"(.*_)?(num_heads|attention_heads)|n_heads?", 4),
    (r"(.*_)?head_dim|dim_head|d_head", 8),
    (r"rotary_dim", 4),
    (r".*_rank", 8),
    (r"hidden_size_per_layer_input", 8),
    (r"(.*_)?num_kv_shared_layers", 0),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"(shape_|pronunciation_)?vocab_size(_per_layer_input)?", 99),
    (r"(shape|pronunciation)_embed_dim", 16),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length", 128),
    (r"max_(source|target)_positions", 128),
    (r"(sliding|attention)_window(_size)?|window_size", 16),
)

SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}

# Fields that these patterns cannot set consistently.
HINTS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "gemma3n_text": {"num_hidden_layers": 5, "intermediate_size": [64, 64, 64, 64, 128]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"num_hidden_layers": 4},
    "mamba2": {"num_heads": 8},
    "minicpm3": {"num_key_value_heads": 4},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen3_5_text": {"num_hidden_layers": 4},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "youtu": {"num_key_value_heads": 4},
    "zamba": {"layers_block_type": ["mamba", "hybrid"], "use_mamba_kernels": False},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "use_mamba_kernels": False},
}


Reason = tuple[str, str]
"""Why a family cannot be an anchor, and a pattern of the resulting error."""

MOE: Reason = ("a mixture of experts already", "is a mixture of experts already")
ENCODER: Reason = (
    "an encoder: its network is split over `intermediate` and `output`, whose norm takes the residual in",
    "no list of decoder layers",
)
RECURRENT: Reason = (
    "recurrent, with a state that is no key-value cache",
    r"keeps its state in '(state|cache_params)'",
)
STATE_SPACE: Reason = (
    "state-space layers, not all of which hold a feed-forward network",
    "no list of decoder layers|has no feed-forward network",
)

EXCEPTIONS: dict[str, Reason] = {
    "afmoe": MOE,
    "aria_text": MOE,
    "axk1": MOE,
    "axk2": MOE,
    "bailing_hybrid": MOE,
    "bert": ENCODER,
    "bert-generation": ENCODER,
    "big_bird": ENCODER,
    "blt": ("byte-latent: four stacks of layers of different widths", "several stacks of layers"),
    "camembert": ENCODER,
    "cohere2_moe": MOE,
    "data2vec-text": ENCODER,
    "dbrx": ("a mixture of experts already (and its default configuration cannot be built)", "rope_theta"),
    "deepseek_v2": MOE,
    "deepseek_v3": MOE,
    "deepseek_v32": MOE,
    "deepseek_v4": MOE,
    "dots1": MOE,
    "dots3_note": (
        "a mixture of experts already (and its default text configuration has no smaller size)",
        "per_layer_config",
    ),
    "dots3_note_text": MOE,
    "electra": ENCODER,
    "emu3": (
        "its causal LM saves a configuration (emu3_text_model) that AutoModelForCausalLM does not know",
        "Emu3TextConfig",
    ),
    "ernie": ENCODER,
    "ernie4_5_moe": MOE,
    "exaone_moe": MOE,
    "falcon_mamba": RECURRENT,
    "flex_olmo": MOE,
    "gemma3n": ("its vision tower needs the library timm; the decoder alone is gemma3n_text", "timm"),
    "gemma4_assistant": ("drafts over the cache of another model", "hidden_size_per_layer_input must be 0"),
    "gemma4_unified_assistant": ("drafts over the cache of another model", "layer types producing a cache"),
    "git": ENCODER,
    "glm4_moe": MOE,
    "glm4_moe_lite": MOE,
    "glm_moe_dsa": MOE,
    "gpt_oss": MOE,
    "granitemoe": MOE,
    "granitemoe_swa": MOE,
    "granitemoehybrid": MOE,
    "granitemoeshared": MOE,
    "hrm_text": ("two stacks of layers that run in turns, several times per token", "several stacks of layers"),
    "hunyuan_v1_moe": MOE,
    "hy_v3": MOE,
    "hy_v4": MOE,
    "inkling2_text": MOE,
    "inkling_text": MOE,
    "jamba": MOE,
    "jetmoe": MOE,
    "kimi_linear": MOE,
    "kolibri1": MOE,
    "laguna": MOE,
    "lfm2_moe": MOE,
    "llama4": MOE,
    "llama4_text": MOE,
    "longcat_flash": MOE,
    "mamba": RECURRENT,
    "mamba2": RECURRENT,
    "megatron-bert": ENCODER,
    "mellum": MOE,
    "mimo_v2_flash": MOE,
    "minimax": MOE,
    "minimax_m2": MOE,
    "minimax_m3_vl_text": MOE,
    "mixtral": MOE,
    "mllama": (
        "its causal LM saves a configuration (mllama_text_model) that AutoModelForCausalLM does not know",
        "MllamaTextConfig",
    ),
    "musicgen": ("writes audio codes, and AutoModelForCausalLM cannot build it", "dropout"),
    "musicgen_melody": ("writes audio codes, and AutoModelForCausalLM cannot build it", "dropout"),
    "nemotron_h": STATE_SPACE,
    "olmoe": MOE,
    "phimoe": MOE,
    "qwen2_moe": MOE,
    "qwen3_5_moe": MOE,
    "qwen3_5_moe_text": MOE,
    "qwen3_moe": MOE,
    "qwen3_next": MOE,
    "qwen4_exp": MOE,
    "qwen4_exp_text": MOE,
    "reformer": (
        "reversible layers with a cache of their own, with which transformers 5 cannot generate",
        "past_buckets_states",
    ),
    "rembert": ENCODER,
    "roberta": ENCODER,
    "roberta-prelayernorm": ENCODER,
    "roc_bert": ENCODER,
    "roformer": ENCODER,
    "rwkv": RECURRENT,
    "solar_open": MOE,
    "xlm": ("an encoder: its networks stand in lists apart from any layer", "no list of decoder layers"),
    "xlm-roberta": ENCODER,
    "xlm-roberta-xl": ENCODER,
    "xlnet": ("a permutation language model: it sees the future unless it is told otherwise", "'mems'"),
    "xlstm": RECURRENT,
    "xmod": ENCODER,
    "zamba": ("state-space layers; their networks are shared between layers", "shared_transf"),
    "zamba2": STATE_SPACE,
    "zaya": MOE,
}
"""The families that cannot be anchors."""


def causal_lm_families() -> list[str]:
    """Every `model_type` with a causal language model in the installed transformers."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING.keys()))


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The default configuration of the family with tiny sizes."""
    return _shrunk(CONFIG_MAPPING[model_type])


def _shrunk(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    default = config_class()
    parts = {name: getattr(default, name, None) for name in config_class.sub_configs}
    values = {name: _shrunk(type(part)) for name, part in parts.items() if isinstance(part, PreTrainedConfig)}
    values |= {name: size for name, value in default.to_dict().items() if (size := _tiny(name, value)) is not None}
    values |= {alias: values.pop(name) for name, alias in config_class.attribute_map.items() if name in values}
    return config_class(**{**values, **HINTS.get(config_class.model_type, {})})


def _tiny(name: str, value: Any) -> int | None:
    """The tiny value of a field; None if the field is not a size."""
    if name in SPECIAL_TOKENS:
        return None if value is None else SPECIAL_TOKENS[name]
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return next((min(size, value) for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
