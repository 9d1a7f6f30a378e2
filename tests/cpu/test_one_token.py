"""One token on a CPU, as when decoding: equal to the reference within tolerance, exact masking, usage, hooks."""

import pytest
import torch

from flexmoe import track_usage
from flexmoe.cpu import forward as cpu_forward
from flexmoe.testing import ANCHOR_CONFIGS, TOLERANCES, random_tokens, tiny_flexmoe

ONE = random_tokens(1, 1)


@pytest.fixture
def model():
    return tiny_flexmoe("olmo2", ("math", "code", "legal"), num_experts_per_tok=2)


@pytest.fixture
def networks(monkeypatch):
    """Lists the networks that are computed from their weights, without calling their modules."""
    modules = []
    own = cpu_forward.bind_structure
    monkeypatch.setattr(cpu_forward, "bind_structure", lambda *args: modules.append(args[0]) or own(*args))
    return modules


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2, 4])
@torch.no_grad()
def test_masked_equals_removed(model, networks, dtype, k):
    model.to(dtype)
    for block in model.flexmoe_blocks():
        for parameter in block.experts["code"].parameters():
            parameter.data.fill_(float("nan"))
    by_mask = model(ONE, expert_mask=model.expert_mask([["public", "math", "legal"]]), num_experts_per_tok=k).logits
    model.remove_expert("code")
    assert torch.equal(by_mask, model(ONE, num_experts_per_tok=k).logits)
    assert by_mask.isfinite().all()
    assert len(networks) == 2 * 2 * min(k, 3)


@pytest.mark.parametrize("family", ANCHOR_CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_equals_the_reference(family, dtype):
    model = tiny_flexmoe(family, ("math", "code", "legal"), num_experts_per_tok=2).to(dtype)
    with torch.no_grad():
        alone = model(ONE, output_router_logits=True)
        batched = model(ONE.expand(3, 1), output_router_logits=True)
    with_gradients = model(ONE)
    model.set_experts_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(alone.logits, model(ONE).logits, **TOLERANCES[dtype])
    torch.testing.assert_close(alone.logits, batched.logits[:1], **TOLERANCES[dtype])
    torch.testing.assert_close(alone.logits, with_gradients.logits, **TOLERANCES[dtype])
    for one, three in zip(alone.router_logits, batched.router_logits, strict=True):
        torch.testing.assert_close(one, three[:1], **TOLERANCES[dtype])


@torch.no_grad()
def test_usage_of_one_token_is_recorded(model):
    with track_usage(model) as usage:
        model(ONE)
    with torch.enable_grad(), track_usage(model) as expected:
        model(ONE)
    assert usage.share() == pytest.approx(expected.share(), rel=1e-5)
    assert usage.chosen_share() == expected.chosen_share()


@pytest.mark.parametrize("part", ["expert", "row"])
@torch.no_grad()
def test_hook_that_returns_nothing_changes_no_bit(model, part):
    before = model(ONE).logits
    hooked = []
    for block in model.flexmoe_blocks():
        module = block.experts["math"] if part == "expert" else block.router["math"]
        module.register_forward_hook(lambda module, args, output: hooked.append(module))
    assert torch.equal(model(ONE, num_experts_per_tok=4).logits, model(ONE, num_experts_per_tok=4).logits)
    assert torch.equal(model(ONE).logits, before)
    assert hooked


@torch.no_grad()
def test_hook_on_a_row_takes_effect_at_once(model):
    before = model(ONE).logits
    for block in model.flexmoe_blocks():
        block.router["math"].register_forward_hook(lambda module, args, output: output + 10)
    assert not torch.equal(model(ONE).logits, before)
