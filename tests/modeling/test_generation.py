"""Generation with chosen experts, and the cache stamps that refuse a KV cache filled by other experts."""

import copy
import threading

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.testing import random_tokens, tiny_flexmoe

OWNERS = ("math", "code", "legal")


@pytest.fixture
def model() -> FlexMoeForCausalLM:
    model = tiny_flexmoe("llama", OWNERS, num_experts_per_tok=2)
    model.generation_config.eos_token_id = None
    return model


def generate(model, tokens, **kwargs):
    attention_mask = torch.ones_like(tokens)
    kwargs = {"max_new_tokens": 6, "do_sample": False, **kwargs}
    return model.generate(tokens, attention_mask=attention_mask, **kwargs)


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "returned sequences": {"num_beams": 3, "num_return_sequences": 2},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("mode", MODES)
def test_experts_for_all_prompts_equal_removal_of_the_others(model, mode):
    tokens = random_tokens(2, 7)
    chosen = generate(model, tokens, experts=["public", "code"], **MODES[mode])
    all_experts = generate(model, tokens, **MODES[mode])
    model.remove_expert("math")
    model.remove_expert("legal")
    assert torch.equal(generate(model, tokens, **MODES[mode]), chosen)
    assert not torch.equal(all_experts, chosen)


@pytest.mark.parametrize("mode", MODES)
def test_experts_per_prompt_equal_each_prompt_alone(model, mode):
    tokens = random_tokens(2, 7)
    sets = [["public", "code"], ["math"]]
    batched = generate(model, tokens, experts=sets, **MODES[mode])
    for row, names in enumerate(sets):
        alone = generate(model, tokens[row, None], experts=names, **MODES[mode])
        per_prompt = len(batched) // 2
        assert torch.equal(batched[row * per_prompt : (row + 1) * per_prompt], alone)


def test_experts_are_intersected_with_the_active_set(model):
    tokens = random_tokens(1, 7)
    expected = generate(model, tokens, experts=["code"])
    model.set_active_experts(["public", "code"])
    assert torch.equal(generate(model, tokens, experts=["code", "math"]), expected)


def test_k_as_an_argument(model):
    tokens = random_tokens(1, 7)
    by_call = generate(model, tokens, num_experts_per_tok=1)
    model.config.num_experts_per_tok = 1
    assert torch.equal(generate(model, tokens), by_call)


def filled_cache(model, cache=None, **kwargs):
    tokens = random_tokens(2, 5)
    with torch.no_grad():
        return model(tokens, past_key_values=cache, use_cache=True, **kwargs).past_key_values


def continue_with(model, cache, **kwargs):
    with torch.no_grad():
        return model(random_tokens(2, 1, seed=9), past_key_values=cache, **kwargs).logits


CHANGES = {
    "remove": lambda model: model.remove_expert("math"),
    "add": lambda model: model.add_expert_copy("news"),
    "replace": lambda model: (model.remove_expert("legal"), model.add_expert_copy("legal")),
    "active set": lambda model: model.set_active_experts(["public", "code"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_cache_filled_by_other_experts_is_refused(model, change):
    cache = filled_cache(model)
    continue_with(model, cache)
    CHANGES[change](model)
    with pytest.raises(ValueError, match="fresh cache"):
        continue_with(model, cache)
    continue_with(model, DynamicCache(config=model.config))


def test_cache_with_another_mask_or_context_is_refused(model):
    first = model.expert_mask([["public"], ["math"]])
    second = model.expert_mask([["math"], ["public"]])
    cache = filled_cache(model, expert_mask=first)
    continue_with(model, cache, expert_mask=first)
    for kwargs in ({"expert_mask": second}, {}):
        with pytest.raises(ValueError, match="fresh cache"):
            continue_with(model, cache, **kwargs)
    with model.only_experts("math"), pytest.raises(ValueError, match="fresh cache"):
        continue_with(model, cache)


def test_renames_keep_caches_valid_and_copies_keep_the_stamp(model):
    cache = filled_cache(model)
    copied = copy.deepcopy(cache)
    expected = continue_with(model, cache)
    model.rename_expert("math", "algebra")
    assert torch.equal(continue_with(model, copied), expected)
    model.remove_expert("algebra")
    with pytest.raises(ValueError, match="fresh cache"):
        continue_with(model, copied)


def test_cache_holds_no_tensors_but_keys_and_values(model):
    cache = filled_cache(model, expert_mask=model.expert_mask([["public"], ["math"]]))

    def tensors(value):
        if isinstance(value, torch.Tensor):
            return [value]
        parts = (
            value if isinstance(value, list | tuple) else vars(value).values() if hasattr(value, "__dict__") else ()
        )
        return [tensor for part in parts for tensor in tensors(part)]

    assert len(tensors(cache)) == 2 * model.config.num_hidden_layers


def test_cache_of_another_model_is_refused(model):
    cache = filled_cache(model)
    continue_with(copy.deepcopy(model), copy.deepcopy(cache))
    with pytest.raises(ValueError, match="fresh cache"):
        continue_with(tiny_flexmoe("llama", OWNERS, seed=1), cache)


def test_reset_static_cache_can_be_filled_again(model):
    cache = filled_cache(model, StaticCache(config=model.config, max_cache_len=16))
    model.remove_expert("math")
    with pytest.raises(ValueError, match="fresh cache"):
        continue_with(model, cache)
    cache.reset()
    filled_cache(model, cache)


def test_generate_refuses_a_cache_filled_by_other_experts(model):
    tokens = random_tokens(2, 7)
    cache = DynamicCache(config=model.config)
    generate(model, tokens, past_key_values=cache, experts=["public"])
    longer = random_tokens(2, 20)
    with pytest.raises(ValueError, match="fresh cache"):
        generate(model, longer, past_key_values=cache, experts=["math"])


class ChangingStreamer(BaseStreamer):
    """Calls `change` for each generated token."""

    def __init__(self, change):
        self.change, self.error = change, None

    def put(self, value):
        try:
            self.change()
        except RuntimeError as error:
            self.error = error

    def end(self): ...


@pytest.mark.parametrize("change", ["remove", "add", "active set", "rename"])
def test_changes_while_generating_are_refused(model, change):
    change = {**CHANGES, "rename": lambda model: model.rename_expert("math", "algebra")}[change]
    expected = generate(model, random_tokens(1, 7))
    streamer = ChangingStreamer(lambda: change(model))
    assert torch.equal(generate(model, random_tokens(1, 7), streamer=streamer), expected)
    assert "while generate() runs" in str(streamer.error)
    change(model)


CALLS = {
    "add_expert": ["nowhere"],
    "add_expert_copy": ["news"],
    "remove_expert": ["math"],
    "rename_expert": ["math", "algebra"],
    "replace_expert": ["math", "nowhere"],
    "set_active_experts": [["public"]],
}


@pytest.mark.parametrize("method", CALLS)
def test_error_for_a_change_while_generating_names_the_method(model, method):
    streamer = ChangingStreamer(lambda: getattr(model, method)(*CALLS[method]))
    generate(model, random_tokens(1, 7), streamer=streamer)
    assert str(streamer.error).startswith(f"{method} while generate() runs")


def test_changes_from_another_thread_while_generating_are_refused(model):
    errors = []

    def remove_in_thread():
        thread = threading.Thread(target=lambda: errors.append(_error_of(lambda: model.remove_expert("math"))))
        thread.start()
        thread.join()

    generate(model, random_tokens(1, 7), streamer=ChangingStreamer(remove_in_thread))
    assert errors
    assert all(isinstance(error, RuntimeError) for error in errors)
    assert model.expert_names == ["public", *OWNERS]


def _error_of(call):
    try:
        call()
    except RuntimeError as error:
        return error
    return None
