"""Tiny random anchors and the table of tolerances that every numerical test uses.

Does not cover trained models: what these say is noise, which is enough to tell equal from unequal.
"""

from __future__ import annotations

import itertools
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
from flexmoe.modeling.compat_flexmoe import enable_activation_checkpointing
from flexmoe.modeling.low_rank_flexmoe import LowRankExpert

VOCABULARY = 99

TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    # a sum of some dozen products in another order moves the last of 24 bits by a few places
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    # 8 bits: two roundings in another order are two units in the last place
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    # used for references only
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
"""Families that the tests grow tiny anchors of."""


def tiny_anchor(family: str, seed: int = 0) -> PreTrainedModel:
    """A random dense model of `family` (see `ANCHOR_CONFIGS`), in eval mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(ANCHOR_CONFIGS[family]()).eval()


def tiny_flexmoe(
    family: str, experts: Sequence[str | dict[str, Any]] = (), seed: int = 0, **config: object
) -> FlexMoeForCausalLM:
    """`tiny_anchor(family, seed)` as a FlexMoE whose `experts` differ from the anchor's network and from each other.

    An expert (a name, or a record) has weights that depend on its name and `seed` alone, not on who else is there.
    """
    return grown_flexmoe(tiny_anchor(family, seed), experts, seed, **config)


def grown_flexmoe(
    anchor: PreTrainedModel, /, experts: Sequence[str | dict[str, Any]] = (), seed: int = 0, **config: object
) -> FlexMoeForCausalLM:
    """`anchor` as a FlexMoE, with `experts` as in `tiny_flexmoe`."""
    model = FlexMoeForCausalLM(FlexMoeConfig(anchor_config=anchor.config, experts=[PUBLIC, *experts], **config)).eval()
    names = model.anchor_names
    state = {names.to_flexmoe(name): tensor for name, tensor in anchor.state_dict().items()}
    model.load_state_dict(state, strict=False)
    for name in model.expert_names[1:]:
        perturb_expert(model, name, seed)
    return model


@torch.no_grad()
def perturb_expert(model: FlexMoeForCausalLM, name: str, seed: int = 0) -> None:
    """Gives the expert `name` weights near public's and a random router row and bias, a function of name and seed."""
    generator = torch.Generator().manual_seed(seed + sum(ord(letter) << (8 * i % 56) for i, letter in enumerate(name)))

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator).to(like)

    for block in model.flexmoe_blocks():
        expert = block.experts[name]
        is_low_rank = isinstance(expert, LowRankExpert)  # then its weights are the difference from public's
        start = expert.state_dict() if is_low_rank else block.experts[PUBLIC].state_dict()
        expert.load_state_dict({key: value * (not is_low_rank) + 0.3 * noise(value) for key, value in start.items()})
        row = block.router[name].state_dict()
        block.router[name].load_state_dict({key: noise(value) for key, value in row.items()})


def enable_checkpointing(model: PreTrainedModel, **kwargs: Any) -> None:
    """Turns activation checkpointing on, and trains."""
    enable_activation_checkpointing(model, **kwargs)
    model.train()


def realigned(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, its tensors copied to memory of their own.

    A mapped file puts tensors at odd addresses, and a BLAS may sum in another order there: logits then differ in the
    last bit between models whose weights are equal.
    """
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def random_tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids [batch, length] without the special ones."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


__all__ = [
    "ANCHOR_CONFIGS",
    "TOLERANCES",
    "VOCABULARY",
    "enable_checkpointing",
    "grown_flexmoe",
    "perturb_expert",
    "random_tokens",
    "realigned",
    "tiny_anchor",
    "tiny_flexmoe",
]
