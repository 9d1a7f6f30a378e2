"""Decoding: in every mode, the logits of each step equal those of one forward pass over the generated sequence.

The reference is a pass without a cache, because an error that all cached paths share would not show between them. Does
not cover the choice of experts, or cache stamps (`test_generation`).
"""

import copy

import pytest
import torch

from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.testing import TOLERANCES, random_tokens, tiny_anchor, tiny_flexmoe

OWNERS = ("math", "code", "legal")
PADDING = 0
LEFT_PADDED = torch.cat([torch.tensor([[PADDING] * 3, [7, 8, 9]]), random_tokens(2, 6)], 1)
families = pytest.mark.parametrize("family", ["llama", "olmo2", "gemma2", "gpt2"])


def model_of(family: str, seed: int = 0) -> FlexMoeForCausalLM:
    model = tiny_flexmoe(family, OWNERS, seed, num_experts_per_tok=2)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PADDING
    return model


@torch.no_grad()
def full_forward(model, sequences, attention_mask, **kwargs):
    """Logits of one forward pass without a cache, with the position ids of `generate`."""
    new = sequences.shape[1] - attention_mask.shape[1]
    attention_mask = torch.nn.functional.pad(attention_mask, (0, new), value=1)
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return model(sequences, attention_mask=attention_mask, position_ids=positions, use_cache=False, **kwargs).logits


MODES = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 0},
    "static cache": {"cache_implementation": "static"},
    "k as an argument": {"num_experts_per_tok": 3},
}


@families
@pytest.mark.parametrize("mode", MODES)
def test_steps_equal_the_full_forward_pass(family, mode):
    model = model_of(family)
    attention_mask = (LEFT_PADDED != PADDING).long()
    mask = model.expert_mask([["public", "code"], ["math", "legal", "public"]])
    options = {"max_new_tokens": 5, "do_sample": False, "expert_mask": mask, **MODES[mode]}
    torch.manual_seed(1)
    out = model.generate(
        LEFT_PADDED, attention_mask=attention_mask, return_dict_in_generate=True, output_logits=True, **options
    )
    steps = torch.stack(out.logits, 1)
    k = {"num_experts_per_tok": options["num_experts_per_tok"]} if "num_experts_per_tok" in options else {}
    expected = full_forward(model, out.sequences, attention_mask, expert_mask=mask, **k)[:, -steps.shape[1] - 1 : -1]
    torch.testing.assert_close(steps, expected, **TOLERANCES[torch.float32])


@families
def test_left_padding_changes_no_logit(family):
    model, tokens = model_of(family), random_tokens(2, 6)
    padded = torch.nn.functional.pad(tokens, (3, 0), value=PADDING)
    attention_mask = (padded != PADDING).long()
    torch.testing.assert_close(
        full_forward(model, padded, attention_mask)[:, 3:],
        full_forward(model, tokens, torch.ones_like(tokens)),
        **TOLERANCES[torch.float32],
    )


@families
def test_beam_scores_equal_the_full_forward_pass(family):
    model, tokens = model_of(family), random_tokens(2, 7)
    attention_mask = torch.ones_like(tokens)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "length_penalty": 1.0}
    out = model.generate(
        tokens,
        attention_mask=attention_mask,
        return_dict_in_generate=True,
        output_scores=True,
        do_sample=False,
        **options,
    )
    log_probs = full_forward(model, out.sequences, attention_mask.repeat_interleave(2, 0)).log_softmax(-1)
    expected = log_probs[:, 6:-1].gather(-1, out.sequences[:, 7:, None]).squeeze(-1)
    torch.testing.assert_close(out.sequences_scores, expected.mean(-1), **TOLERANCES[torch.float32])
    greedy = model.generate(tokens, attention_mask=attention_mask, max_new_tokens=5, do_sample=False)
    greedy_log_probs = full_forward(model, greedy, attention_mask).log_softmax(-1)[:, 6:-1]
    greedy_scores = greedy_log_probs.gather(-1, greedy[:, 7:, None]).mean((1, 2))
    assert (out.sequences_scores[::2] >= greedy_scores - 1e-6).all()


@families
def test_generation_from_embeddings_equals_generation_from_tokens(family):
    model, tokens = model_of(family), random_tokens(2, 7)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 5, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    by_tokens = model.generate(tokens, **options)
    by_embeddings = model.generate(inputs_embeds=model.get_input_embeddings()(tokens), **options)
    torch.testing.assert_close(
        torch.stack(by_embeddings.logits), torch.stack(by_tokens.logits), **TOLERANCES[torch.float32]
    )


ASSISTANTS = {
    "the model itself": lambda model: {"assistant_model": copy.deepcopy(model)},
    "another FlexMoE with these experts": lambda model: {"assistant_model": model_of("llama", seed=1)},
    "a dense model": lambda model: {"assistant_model": tiny_anchor("llama", seed=1)},
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("assistant", ASSISTANTS)
@pytest.mark.parametrize("experts", [None, ["public", "math"]], ids=["all experts", "chosen experts"])
def test_assisted_generation_gives_the_same_tokens(assistant, experts):
    model, tokens = model_of("llama"), random_tokens(1, 9)
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(tokens, experts=experts, **options)
    assert torch.equal(model.generate(tokens, experts=experts, **options, **ASSISTANTS[assistant](model)), expected)
    others = model.generate(tokens, experts=["legal"], **options)
    assert not torch.equal(others, expected)


def test_flexmoe_as_assistant_of_a_dense_model():
    dense, tokens = tiny_anchor("llama"), random_tokens(1, 9)
    dense.generation_config.eos_token_id = None
    options = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "do_sample": False}
    expected = dense.generate(tokens, **options)
    assert torch.equal(dense.generate(tokens, assistant_model=model_of("llama"), **options), expected)
