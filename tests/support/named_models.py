"""Published models with special architectures: their configurations with tiny sizes, and the formats they export to.

Each configuration has the keys and flags of the published config.json (activation, biases, parallel residual, partial
rotation, key-value heads, tied embeddings, soft-caps, windows). They were written from memory and from the code of
transformers, not copied from the Hub; `unsure` lists uncertain ones. `docs/families.md` shows the table (`markdown`).
Does not cover weights, tokenizers and the checks (`test_named_models`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto import CONFIG_MAPPING


@dataclass(frozen=True)
class NamedModel:
    """A published model.

    Attributes:
        also: other models of the same architecture.
        special: the special features of its architecture.
        config: its config.json with tiny sizes.
        has, lacks: patterns that match some tensor name, and no tensor name, because of these features.
        native: the format it can be exported to besides "dense".
        relics: obsolete tensors in published files that the class does not have, with their shapes.
        bare: published files omit the base model's prefix ("h.0.mlp..." for "transformer.h.0.mlp...").
        unsure: flags that may be wrong.
    """

    also: str
    special: str
    config: Mapping[str, Any]
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    native: str | None = None
    relics: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    bare: bool = False
    unsure: str = ""

    @property
    def family(self) -> str:
        """Its model_type."""
        return str(self.config["model_type"])

    def configuration(self) -> PreTrainedConfig:
        """The configuration as an object of transformers."""
        return CONFIG_MAPPING[self.family].from_dict(dict(self.config))


_TOKENS = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_MODERN = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_GROUPED = {**_MODERN, "num_key_value_heads": 2}
_NEOX = {
    **_TOKENS,
    "model_type": "gpt_neox",
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,  # of size 16: a quarter of it, 4, is rotated
    "max_position_embeddings": 128,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
}
_OLD_NEOX_BUFFERS = {
    "gpt_neox.layers.0.attention.bias": (1, 1, 128, 128),
    "gpt_neox.layers.0.attention.masked_bias": (),
    "gpt_neox.layers.0.attention.rotary_emb.inv_freq": (2,),
}
_GEMMA = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "head_dim": 16,  # more than hidden / heads
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "sliding_window": 4,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
_FALCON = {
    **_TOKENS,
    "model_type": "falcon",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "layer_norm_epsilon": 1e-5,
    "alibi": False,
    "bias": False,
    "multi_query": True,
    "parallel_attn": True,
    "tie_word_embeddings": True,
}
_OPT = {
    **_TOKENS,
    "model_type": "opt",
    "hidden_size": 32,
    "ffn_dim": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "activation_function": "relu",
    "tie_word_embeddings": True,
}

NAMED_MODELS: dict[str, NamedModel] = {
    "meta-llama/Llama-2-7b-hf": NamedModel(
        also="Vicuna 1.5, and with a norm eps of 1e-6 LLaMA 1, Alpaca and Vicuna 1.1",
        special="the plain pre-norm decoder: RMS norms, SiLU gate, no biases",
        config={**_MODERN, "model_type": "llama", "rope_scaling": None},
        has=(r"mlp\.gate_proj\.weight", r"^lm_head\.weight"),
        lacks=(r"\.bias$",),
        native="mixtral",
        relics={"model.layers.0.self_attn.rotary_emb.inv_freq": (4,)},
    ),
    "meta-llama/Llama-3.2-1B": NamedModel(
        also="Llama 3.2 3B; 3.1 8B with an untied head and a factor of 8",
        special="grouped key-value heads, scaled rotary embedding (llama3, factor 32), tied head",
        config={
            **_GROUPED,
            "model_type": "llama",
            "head_dim": 8,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            "tie_word_embeddings": True,
        },
        has=(r"self_attn\.k_proj\.weight",),
        lacks=(r"\.bias$", r"^lm_head"),
        native="mixtral",
    ),
    "cerebras/Cerebras-GPT-111M": NamedModel(
        also="Cerebras-GPT 256M to 13B",
        special="GPT-2 with the exact GELU and an explicit inner size; transposed weights (Conv1D), biases, tied head",
        config={
            **_TOKENS,
            "model_type": "gpt2",
            "n_embd": 32,
            "n_inner": 128,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "activation_function": "gelu",
            "layer_norm_epsilon": 1e-5,
            "scale_attn_weights": True,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
        has=(r"mlp\.c_fc\.bias", r"^transformer\.wpe"),
        lacks=(r"^lm_head",),
        relics={"transformer.h.0.attn.bias": (1, 1, 128, 128)},
        unsure="that its files hold the causal mask as a buffer",
    ),
    "mosaicml/mpt-7b": NamedModel(
        also="MPT-30B; the storywriter clips queries, keys and values besides",
        special="ALiBi, no biases at all (its layer norms included), tied head",
        config={
            **_TOKENS,
            "model_type": "mpt",
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "expansion_ratio": 4,
            "max_seq_len": 128,
            "no_bias": True,
            "learned_pos_emb": True,
            "norm_type": "low_precision_layernorm",
            "attn_config": {"alibi": True, "alibi_bias_max": 8, "attn_type": "multihead_attention", "qk_ln": False},
        },
        has=(r"ffn\.up_proj\.weight",),
        lacks=(r"\.bias$", r"wpe", r"^lm_head"),
    ),
    "databricks/dolly-v2-3b": NamedModel(
        also="Dolly 2 7B and 12B, which are fine-tunes of Pythia",
        special="attention and network in parallel (use_parallel_residual), a quarter of each head rotated, biases",
        config=_NEOX,
        has=(r"mlp\.dense_h_to_4h\.bias", r"attention\.query_key_value\.bias", r"^lm_head\.weight"),
        relics=_OLD_NEOX_BUFFERS,
    ),
    "EleutherAI/pythia-160m": NamedModel(
        also="Pythia 14M to 12B; GPT-NeoX-20B with `gelu_fast`",
        special="as Dolly 2",
        config=_NEOX,
        has=(r"mlp\.dense_h_to_4h\.bias",),
        relics=_OLD_NEOX_BUFFERS,
    ),
    "allenai/OLMo-2-1124-7B": NamedModel(
        also="OLMo-2 1B and 13B; 32B with grouped key-value heads; FlexOlmo's own anchor",
        special="norms after attention and network, before the residual; norms on whole queries and keys",
        config={**_MODERN, "model_type": "olmo2", "rms_norm_eps": 1e-6, "rope_theta": 500000, "attention_bias": False},
        has=(r"post_feedforward_layernorm", r"self_attn\.q_norm"),
        lacks=(r"\.bias$", r"input_layernorm"),
        native="flex_olmo",
    ),
    "allenai/Olmo-3-1025-7B": NamedModel(
        also="Olmo-3 32B with grouped key-value heads",
        special="as OLMo-2, with three sliding layers to each full one; YaRN in the full ones only",
        config={
            **_MODERN,
            "model_type": "olmo3",
            "num_hidden_layers": 4,
            "rms_norm_eps": 1e-6,
            "rope_theta": 500000,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "attention_factor": 1.2079441541679836,
                "original_max_position_embeddings": 16,
            },
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "attention_bias": False,
        },
        has=(r"post_feedforward_layernorm", r"self_attn\.q_norm"),
        lacks=(r"\.bias$", r"input_layernorm"),
    ),
    "mistralai/Mistral-7B-v0.1": NamedModel(
        also="Zephyr; Mistral 7B v0.2 and v0.3, which have no window",
        special="grouped key-value heads, a sliding window in every layer",
        config={**_GROUPED, "model_type": "mistral", "rope_theta": 10000.0, "sliding_window": 4},
        has=(r"mlp\.gate_proj\.weight",),
        lacks=(r"\.bias$",),
        native="mixtral",
    ),
    "Qwen/Qwen2.5-0.5B": NamedModel(
        also="Qwen2 and Qwen2.5 of all sizes; untied heads from 7B on",
        special="biases on queries, keys and values only; a window that is configured and not used; tied head",
        config={
            **_GROUPED,
            "model_type": "qwen2",
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "use_sliding_window": False,
            "sliding_window": 4,
            "max_window_layers": 2,
            "tie_word_embeddings": True,
        },
        has=(r"q_proj\.bias", r"k_proj\.bias", r"v_proj\.bias"),
        lacks=(r"o_proj\.bias", r"mlp\..*\.bias", r"^lm_head"),
    ),
    "Qwen/Qwen3-0.6B": NamedModel(
        also="dense Qwen3 of all sizes; untied heads from 8B on",
        special="heads wider than hidden / heads, norms on each head's queries and keys, no biases, tied head",
        config={
            **_GROUPED,
            "model_type": "qwen3",
            "head_dim": 16,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": None,
            "max_window_layers": 2,
            "tie_word_embeddings": True,
        },
        has=(r"self_attn\.q_norm",),
        lacks=(r"\.bias$", r"^lm_head"),
        native="qwen3_moe",
    ),
    "google/gemma-2-2b": NamedModel(
        also="Gemma 2 9B; 27B with another query scale",
        special="norms before and after attention and network, soft-caps on attention (50) and logits (30), every "
        "second layer sliding, tied head scaled at the input",
        config={
            **_GEMMA,
            "model_type": "gemma2",
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        has=(r"pre_feedforward_layernorm", r"post_feedforward_layernorm"),
        lacks=(r"\.bias$", r"^lm_head"),
    ),
    "google/gemma-3-1b-pt": NamedModel(
        also="Gemma 3 4B to 27B, whose text part is this one inside of `gemma3`",
        special="five sliding layers to each full one, with rotary bases of their own; norms on each head's queries "
        "and keys; one key-value head; no soft-caps; tied head",
        config={
            **_GEMMA,
            "model_type": "gemma3_text",
            "num_hidden_layers": 6,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "sliding_window_pattern": 6,
            "rope_theta": 1000000,
            "rope_local_base_freq": 10000,
            "rope_scaling": None,
        },
        has=(r"pre_feedforward_layernorm", r"self_attn\.q_norm"),
        lacks=(r"\.bias$", r"^lm_head"),
    ),
    "microsoft/Phi-3-mini-4k-instruct": NamedModel(
        also="phi-4 with grouped key-value heads; Phi-4-mini with three quarters of each head rotated",
        special="fused query-key-value and fused gate-up matrices, a sliding window, untied head",
        config={
            **_MODERN,
            "model_type": "phi3",
            "rope_theta": 10000.0,
            "rope_scaling": None,
            "sliding_window": 4,
            "original_max_position_embeddings": 128,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
        has=(r"self_attn\.qkv_proj\.weight", r"mlp\.gate_up_proj\.weight"),
        lacks=(r"\.bias$",),
    ),
    "facebook/opt-125m": NamedModel(
        also="OPT 1.3B to 66B",
        special="ReLU, biases, learned positions that begin at 2; no module around its network; tied head",
        config={**_OPT, "do_layer_norm_before": True, "word_embed_proj_dim": 32},
        has=(r"fc1\.bias", r"decoder\.final_layer_norm"),
        lacks=(r"^lm_head", r"project_in"),
    ),
    "facebook/opt-350m": NamedModel(
        also="",
        special="the OPT that normalises after the residual, and whose embeddings are narrower than its layers",
        config={**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
        has=(r"decoder\.project_in\.weight", r"decoder\.project_out\.weight"),
        lacks=(r"decoder\.final_layer_norm",),
    ),
    "bigscience/bloom-560m": NamedModel(
        also="BLOOM and BLOOMZ of all sizes",
        special="ALiBi, a norm on the embeddings, biases, the residual added inside of the network, tied head",
        config={
            **_TOKENS,
            "model_type": "bloom",
            "n_embed": 32,
            "n_layer": 2,
            "num_attention_heads": 4,
            "layer_norm_epsilon": 1e-5,
            "apply_residual_connection_post_layernorm": False,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "pretraining_tp": 1,
        },
        has=(r"word_embeddings_layernorm", r"mlp\.dense_h_to_4h\.bias"),
        lacks=(r"^lm_head",),
        bare=True,
    ),
    "tiiuae/falcon-7b": NamedModel(
        also="Falcon 7B instruct",
        special="attention and network in parallel behind one norm, one key-value head, no biases, tied head",
        config={**_FALCON, "new_decoder_architecture": False},
        has=(r"input_layernorm\.weight",),
        lacks=(r"mlp\..*\.bias", r"query_key_value\.bias", r"post_attention_layernorm", r"ln_mlp"),
        relics={"lm_head.weight": (99, 32)},
        unsure="that its files hold the tied head a second time",
    ),
    "tiiuae/falcon-40b": NamedModel(
        also="Falcon 180B; Falcon 2 11B with one norm",
        special="the new decoder architecture: in parallel, each behind a norm of its own, grouped key-value heads",
        config={**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        has=(r"ln_attn\.weight", r"ln_mlp\.weight"),
        lacks=(r"mlp\..*\.bias", r"input_layernorm"),
    ),
    "tiiuae/falcon-rw-1b": NamedModel(
        also="",
        special="the Falcon with ALiBi and biases, a key-value head for each head, nothing in parallel",
        config={
            **_FALCON,
            "new_decoder_architecture": False,
            "alibi": True,
            "bias": True,
            "multi_query": False,
            "parallel_attn": False,
        },
        has=(r"mlp\.dense_h_to_4h\.bias", r"post_attention_layernorm"),
    ),
}
"""Published models by their name on the Hub."""


def markdown() -> str:
    """The rows of the table in `docs/families.md`."""
    rows = []
    for name, model in NAMED_MODELS.items():
        exports = "`dense`" + (f", `{model.native}`" if model.native else "")
        cells = (name, f"`{model.family}`", model.special, model.also or "-", exports, model.unsure or "-")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)
