"""The head of a model on its own: the logits of its family, or none."""

import pytest
import torch
from transformers import CohereConfig, GraniteConfig, OPTConfig

from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM
from flexmoe.testing import ANCHOR_CONFIGS, VOCABULARY
from flexmoe.training.head import HeadCall, capture_states, head_call
from flexmoe.training.next_token_loss import next_token_loss, next_token_loss_of_states

LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    **{family: ANCHOR_CONFIGS[family] for family in ("llama", "olmo2", "gpt2", "gemma2")},
    "granite": lambda: GraniteConfig(**LLAMA, logits_scaling=4.0),
    "cohere": lambda: CohereConfig(**LLAMA, logit_scale=0.3),
}


def training_model(family: str, tied: bool = True) -> FlexMoeForCausalLM:
    config = CONFIGS[family]()
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = FlexMoeForCausalLM(FlexMoeConfig(anchor_config=config))
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)  # so large that a soft cap has an effect
    model.add_expert_copy("own")
    model.freeze_except("own", rows=True)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # GPT-2's
            module.p = 0.0
    return model.train()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_loss_and_gradients_equal_those_of_all_logits(family, tied):
    model = training_model(family, tied)
    input_ids = torch.randint(VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(1))
    head = head_call(model)
    assert head is not None
    with capture_states(model.anchor) as captured:
        logits = model(input_ids=input_ids, use_cache=False, num_experts_per_tok=2).logits
    states, parts = captured[0].last_hidden_state, VOCABULARY * 7
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    values, gradients = [], []
    for loss in (
        next_token_loss(logits, input_ids, 0.01),
        next_token_loss_of_states(states, input_ids, head, 0.01, VOCABULARY, logits=parts),
    ):
        values.append(loss.item())
        gradients.append(torch.autograd.grad(loss, trained, retain_graph=True))
    assert values[1] == pytest.approx(values[0], abs=1e-6 * abs(values[0]))
    for expected, found in zip(*gradients, strict=True):
        assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_without_gradients_the_loss_is_the_same():
    model = training_model("llama").eval()
    input_ids = torch.randint(VOCABULARY, (2, 9))
    with torch.no_grad(), capture_states(model.anchor) as captured:
        expected = next_token_loss(model(input_ids=input_ids).logits, input_ids, 0.0)
        found = next_token_loss_of_states(
            captured[0].last_hidden_state, input_ids, head_call(model), 0.0, VOCABULARY, logits=VOCABULARY * 4
        )
    torch.testing.assert_close(found, expected)


def test_no_more_logits_than_allowed_are_held(monkeypatch):
    rows = []

    def head(states_NH, input_ids_N):
        rows.append(len(states_NH))
        return states_NH @ torch.ones(4, VOCABULARY)

    states = torch.randn(2, 8, 4, requires_grad=True)
    next_token_loss_of_states(
        states, torch.zeros(2, 8).long(), head, 0.0, VOCABULARY, logits=VOCABULARY * 5
    ).backward()
    assert rows == [5, 5, 5, 1]
    assert states.grad is not None


def add_to_logits(model, added):
    """Has the model's family compute other logits than its head on the states."""
    anchor = type(model.anchor)

    class Shifted(anchor):
        def forward(self, input_ids=None, **kwargs):
            out = super().forward(input_ids=input_ids, **kwargs)
            out.logits = out.logits + added(input_ids)
            return out

    model.anchor.__class__ = Shifted


def test_logits_that_depend_on_the_position_are_not_computed_in_parts():
    model = training_model("llama")
    add_to_logits(model, lambda input_ids: torch.arange(input_ids.shape[1])[None, :, None])
    assert head_call(model) is None


def test_a_scale_of_the_logits_is_part_of_the_head():
    model = training_model("llama")
    add_to_logits(model, lambda input_ids: 0.25)
    states = torch.randn(3, 32)
    head = head_call(model)
    torch.testing.assert_close(head(states, torch.zeros(3).long()), model.get_output_embeddings()(states) + 0.25)


@pytest.mark.parametrize("why", ["trained", "hook", "structure"])
def test_heads_that_are_not_known_are_none(why):
    model = training_model("llama")
    if why == "trained":
        model.get_output_embeddings().weight.requires_grad_(True)
    elif why == "hook":
        model.anchor.register_forward_hook(lambda *_: None)
    else:
        config = OPTConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=64
        )
        model = FlexMoeForCausalLM(FlexMoeConfig(anchor_config=config))
    assert head_call(model) is None


def test_hooks_of_the_head_stay_in_force():
    model = training_model("llama")
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: output + 1)
    head = head_call(model)
    assert isinstance(head, HeadCall)
    states = torch.randn(3, 32)
    torch.testing.assert_close(
        head(states, torch.zeros(3).long()), states @ model.get_output_embeddings().weight.T + 1
    )
