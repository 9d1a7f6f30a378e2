"""Against `FlexOlmoForCausalLM` of transformers as independent reference: the same weights give the same logits."""

import pytest
import torch
from transformers import FlexOlmoConfig, FlexOlmoForCausalLM, Olmo2Config

from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM
from flexmoe.testing import random_tokens

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
NAMES = ["public", "math", "code", "news"]


def flex_olmo(k: int, norm_topk_prob: bool) -> FlexOlmoForCausalLM:
    torch.manual_seed(3)
    model = FlexOlmoForCausalLM(
        FlexOlmoConfig(**SIZES, num_experts=4, num_experts_per_tok=k, norm_topk_prob=norm_topk_prob)
    ).eval()
    for layer in model.model.layers:  # as initialized, the experts hardly change the output
        for parameter in (layer.mlp.gate.weight, layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def as_flexmoe(source: FlexOlmoForCausalLM, k: int, norm_topk_prob: bool) -> FlexMoeForCausalLM:
    config = FlexMoeConfig(
        anchor_config=Olmo2Config(**SIZES), experts=NAMES, num_experts_per_tok=k, norm_topk_prob=norm_topk_prob
    )
    model = FlexMoeForCausalLM(config).eval()
    shared = {f"anchor.{name}": value for name, value in source.state_dict().items() if ".mlp." not in name}
    result = model.load_state_dict(shared, strict=False)
    assert not result.unexpected_keys
    assert all(".mlp." in name for name in result.missing_keys)
    for layer, block in zip(source.model.layers, model.flexmoe_blocks(), strict=True):
        for i, name in enumerate(NAMES):
            gate, up = layer.mlp.experts.gate_up_proj[i].chunk(2)
            block.experts[name].gate_proj.weight.copy_(gate)
            block.experts[name].up_proj.weight.copy_(up)
            block.experts[name].down_proj.weight.copy_(layer.mlp.experts.down_proj[i])
            block.router[name].weight.copy_(layer.mlp.gate.weight[i, None])
    return model


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
@torch.no_grad()
def test_logits_and_losses_equal_those_of_flex_olmo(k, norm_topk_prob):
    source = flex_olmo(k, norm_topk_prob)
    model = as_flexmoe(source, k, norm_topk_prob)
    tokens = random_tokens(3, 40)
    theirs = source(tokens, output_router_logits=True)
    ours = model(tokens, output_router_logits=True)
    assert (ours.logits - theirs.logits).abs().max() <= 1e-5
    for our, their in zip(ours.router_logits, theirs.router_logits, strict=True):
        assert (our - their).abs().max() <= 1e-5
    torch.testing.assert_close(ours.aux_loss, theirs.aux_loss, rtol=1e-5, atol=1e-6)
