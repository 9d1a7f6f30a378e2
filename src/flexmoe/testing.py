"""Tiny random models, and the tolerances of all numerical tests.

The outputs of these models are meaningless, but they show whether two models are equal. Does not cover trained models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from flexmoe.modeling import PUBLIC, FlexMoeConfig, FlexMoeForCausalLM
from flexmoe.modeling.fingerprint_flexmoe import align_tensors
from flexmoe.modeling.low_rank_flexmoe import LowRankExpert

VOCABULARY = 99

TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    # 24 bits: another order of a sum of some dozen products changes the last few
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    # 8 bits: two roundings in another order change two units in the last place
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    # of references
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
}

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}

ANCHOR_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_GROUPED),
    "olmo2": lambda: Olmo2Config(**_GROUPED),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
    "gemma2": lambda: Gemma2Config(**_GROUPED, head_dim=8, query_pre_attn_scalar=8, sliding_window=16),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=8),
    "phi3": lambda: Phi3Config(**_GROUPED),
    "gpt_neox": lambda: GPTNeoXConfig(**_COMMON),
}
"""Tiny configurations of the anchors in tests, by family."""


def tiny_anchor(family: str, seed: int = 0) -> PreTrainedModel:
    """A random dense model of `family` (a key of `ANCHOR_CONFIGS`), in eval mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(ANCHOR_CONFIGS[family]()).eval()


def tiny_flexmoe(
    family: str, experts: Sequence[str | dict[str, Any]] = (), seed: int = 0, **config: object
) -> FlexMoeForCausalLM:
    """A FlexMoE on `tiny_anchor(family, seed)` whose `experts` differ from public and from each other.

    The weights of an expert (a name, or a record) depend on its name and `seed` only, not on the other experts.
    """
    return flexmoe_from_anchor(tiny_anchor(family, seed), experts, seed, **config)


def flexmoe_from_anchor(
    anchor: PreTrainedModel, /, experts: Sequence[str | dict[str, Any]] = (), seed: int = 0, **config: object
) -> FlexMoeForCausalLM:
    """A FlexMoE with the weights of `anchor`, and `experts` as in `tiny_flexmoe`."""
    model = FlexMoeForCausalLM(FlexMoeConfig(anchor_config=anchor.config, experts=[PUBLIC, *experts], **config)).eval()
    names = model.anchor_names
    state = {names.to_flexmoe(name): tensor for name, tensor in anchor.state_dict().items()}
    model.load_state_dict(state, strict=False)
    for name in model.expert_names[1:]:
        perturb_expert(model, name, seed)
    return model


@torch.no_grad()
def perturb_expert(model: FlexMoeForCausalLM, name: str, seed: int = 0) -> None:
    """Sets the weights of an expert to those of public plus noise, and its router row and bias to noise.

    The noise depends on `name` and `seed` only.
    """
    generator = torch.Generator().manual_seed(seed + sum(ord(letter) << (8 * i % 56) for i, letter in enumerate(name)))

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    for block in model.flexmoe_blocks():
        expert = block.experts[name]
        is_low_rank = isinstance(expert, LowRankExpert)  # its weights are a difference from public
        start = expert.state_dict() if is_low_rank else block.experts[PUBLIC].state_dict()
        expert.load_state_dict({key: value * (not is_low_rank) + 0.3 * noise(value) for key, value in start.items()})
        row = block.router[name].state_dict()
        block.router[name].load_state_dict({key: noise(value) for key, value in row.items()})


def enable_checkpointing(model: PreTrainedModel, **kwargs: Any) -> None:
    """Enables gradient checkpointing and training mode."""
    from flexmoe.training.trainer import enable_activation_checkpointing  # importing Trainer is slow

    enable_activation_checkpointing(model, **kwargs)
    model.train()


def realigned(model: PreTrainedModel) -> PreTrainedModel:
    """Aligns the tensors of a model, as those of a loaded FlexMoE are, in place; returns the model.

    Tensors of a memory-mapped file may be unaligned, and a BLAS library may sum in another order there. The logits of
    models with equal weights then differ in the last bit.
    """
    align_tensors(model)
    return model


def random_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, length] without special tokens."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


__all__ = [
    "ANCHOR_CONFIGS",
    "TOLERANCES",
    "VOCABULARY",
    "enable_checkpointing",
    "flexmoe_from_anchor",
    "perturb_expert",
    "random_tokens",
    "realigned",
    "tiny_anchor",
    "tiny_flexmoe",
]
