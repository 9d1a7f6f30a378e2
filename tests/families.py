"""The dense families of the installed transformers, found by walking its causal-LM mapping, as tiny configurations.

`EXCEPTIONS` is the literal table of the families that are no anchors, and why. Does not cover the checks themselves
(`test_families`).
"""

import re
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# What a size becomes by what its field is called; the first rule that fits the whole name counts.
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

# Sizes that hang together in a way that no rule above knows.
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
    "youtu": {"num_key_value_heads": 4},
}


MOE = "a mixture of experts already"
ENCODER = "an encoder: its network is split over `intermediate` and `output`, whose norm takes the residual in"
NO_NETWORK = "no feed-forward network in each layer (state-space blocks)"

EXCEPTIONS: dict[str, tuple[str, str]] = {}
"""Families that are no anchors: why, and a pattern of the error that says so."""


def causal_lm_families() -> list[str]:
    """Every model_type for which the installed transformers has a causal LM."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING.keys()))


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The family's own default configuration with every size made small."""
    return _shrunk(CONFIG_MAPPING[model_type])


def _shrunk(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    default = config_class()
    parts = {name: getattr(default, name, None) for name in config_class.sub_configs}
    values = {name: _shrunk(type(part)) for name, part in parts.items() if isinstance(part, PreTrainedConfig)}
    values |= {name: size for name, value in default.to_dict().items() if (size := _tiny(name, value)) is not None}
    values |= {alias: values.pop(name) for name, alias in config_class.attribute_map.items() if name in values}
    return config_class(**{**values, **HINTS.get(config_class.model_type, {})})


def _tiny(name: str, value: Any) -> int | None:
    """The small value of a size; None for what is not one."""
    if name in SPECIAL_TOKENS:
        return None if value is None else SPECIAL_TOKENS[name]
    if not isinstance(value, int) or isinstance(value, bool):
        return None
    return next((min(size, value) for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
