"""Expert usage: totals of the routing weights, per thread, without padding."""

import threading

import pytest
import torch
from torch import nn

import flexmoe
from flexmoe.testing import enable_checkpointing, random_tokens, tiny_flexmoe

OWNERS = ("math", "code")


@pytest.fixture
def model():
    return tiny_flexmoe("llama", OWNERS, num_experts_per_tok=2)


@torch.no_grad()
def test_shares_are_the_mean_routing_weights(model):
    tokens = random_tokens(2, 9)
    with flexmoe.track_usage(model) as usage:
        out = model(tokens, output_router_logits=True)
    weights = torch.stack([flexmoe.modeling.routing_flexmoe.route_logits(x, 2, True) for x in out.router_logits])
    expected = weights.mean((0, 1)).tolist()
    assert usage.tokens == 18
    assert list(usage.share().values()) == pytest.approx(expected)
    assert list(usage.share(1).values()) == pytest.approx(weights[1].mean(0).tolist())
    assert list(usage.chosen_share().values()) == pytest.approx(((weights > 0).float().mean((0, 1)) / 2).tolist())
    assert sum(usage.share().values()) == pytest.approx(1)


@torch.no_grad()
def test_padding_does_not_count(model):
    tokens = random_tokens(2, 9)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    with flexmoe.track_usage(model) as usage:
        model(tokens, attention_mask=mask)
    assert usage.tokens == 14


@torch.no_grad()
def test_masked_experts_carry_nothing_and_generation_counts(model):
    with flexmoe.track_usage(model) as outer:
        with flexmoe.track_usage(model) as inner:
            model.generate(random_tokens(1, 5), max_new_tokens=3, experts=["math"], eos_token_id=None)
        model(random_tokens(1, 4))
    assert inner.share() == {"math": 1.0}
    assert inner.tokens == 5 + 2
    assert outer.tokens == inner.tokens + 4


@torch.no_grad()
def test_other_models_and_threads_do_not_count(model):
    other = tiny_flexmoe("llama", OWNERS)
    with flexmoe.track_usage(model) as usage:
        other(random_tokens(1, 4))
        thread = threading.Thread(target=lambda: model(random_tokens(1, 4)))
        thread.start()
        thread.join()
    assert usage.tokens == 0
    assert usage.share() == {}


def test_wrappers_are_accepted_and_other_modules_refused(model):
    wrapper = nn.Sequential(model)
    with flexmoe.track_usage(wrapper) as usage, torch.no_grad():
        wrapper(random_tokens(1, 4))
    assert usage.tokens == 4
    with pytest.raises(TypeError, match="no FlexMoE"), flexmoe.track_usage(nn.Linear(2, 2)):
        pass


@torch.no_grad()
def test_printed(model):
    with flexmoe.track_usage(model) as usage:
        assert str(usage) == "0 tokens\nexpert  routing weight  choices"
        model(random_tokens(2, 9))
    title, heading, *rows = str(usage).splitlines()
    assert title == "18 tokens"
    assert heading == "expert  routing weight  choices"
    assert [row.split()[0] for row in rows] == ["public", "math", "code"]
    assert rows[1] == f"math    {usage.share()['math']:>14.1%}  {usage.chosen_share()['math']:>7.1%}"
    assert repr(usage).startswith("ExpertUsage(tokens=18, share={public: 0.")


def test_checkpointed_training_counts_each_token_once(model):
    enable_checkpointing(model)
    tokens = random_tokens(2, 9)
    with flexmoe.track_usage(model) as usage:
        model(tokens, labels=tokens).loss.backward()
    assert usage.tokens == 18
