"""Graft, removal and masking are exact, for seven families: bit-equal unless a comment gives the reason."""

import pytest
import torch
from torch import nn

from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM
from flexmoe.modeling.masking_flexmoe import ForwardContext, forward_scope
from flexmoe.testing import ANCHOR_CONFIGS, TOLERANCES, random_tokens, tiny_anchor, tiny_flexmoe

families = pytest.mark.parametrize("family", ANCHOR_CONFIGS)
OWNERS = ("math", "code", "legal")


@torch.no_grad()
def logits(model: nn.Module, batch: int = 2, length: int = 17, **kwargs: object) -> torch.Tensor:
    return model(random_tokens(batch, length), **kwargs).logits


def mask(model: FlexMoeForCausalLM, *rows: tuple[str, ...]) -> torch.Tensor:
    return model.expert_mask(rows)


@families
def test_graft_with_public_alone_equals_the_anchor(family):
    assert torch.equal(logits(tiny_flexmoe(family)), logits(tiny_anchor(family)))


@families
def test_single_token_steps_of_the_graft_equal_those_of_the_anchor(family):
    anchor, model = tiny_anchor(family), tiny_flexmoe(family)
    tokens = random_tokens(2, 9)

    @torch.no_grad()
    def step_by_step(dense: nn.Module) -> torch.Tensor:
        out = dense(tokens[:, :5], use_cache=True)
        steps = [out.logits]
        for position in range(5, 9):
            out = dense(tokens[:, position, None], past_key_values=out.past_key_values, use_cache=True)
            steps.append(out.logits)
        return torch.cat(steps, 1)

    assert torch.equal(step_by_step(model), step_by_step(anchor))
    torch.testing.assert_close(step_by_step(model), logits(model, 2, 9), **TOLERANCES[torch.float32])


@families
def test_copies_of_public_equal_the_anchor_with_renormalization(family):
    model = FlexMoeForCausalLM(FlexMoeConfig(anchor_config=tiny_anchor(family).config, norm_topk_prob=True)).eval()
    alone = logits(model)
    for name in OWNERS:
        model.add_expert_copy(name)
        for block in model.flexmoe_blocks():
            nn.init.normal_(block.router[name].weight)
    for k in (1, 2, 3, 4):
        # weights that sum to 1 up to rounding; the norms after the block scale the difference by some tens
        torch.testing.assert_close(logits(model, num_experts_per_tok=k), alone, rtol=1e-4, atol=1e-4)


@families
def test_renormalization_is_the_default_unless_a_norm_follows(family):
    assert tiny_flexmoe(family).config.norm_topk_prob is (family not in {"olmo2", "gemma2"})


@families
def test_removed_equals_never_added(family):
    removed, never = tiny_flexmoe(family, OWNERS), tiny_flexmoe(family, ["math", "legal"])
    removed.remove_expert("code")
    assert removed.config.to_dict() == never.config.to_dict()
    ours, theirs = removed.state_dict(), never.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for k in (1, 2, 3):
        assert torch.equal(logits(removed, num_experts_per_tok=k), logits(never, num_experts_per_tok=k))


@families
@pytest.mark.parametrize("k", [1, 2, 4])
def test_masked_equals_removed(family, k):
    model = tiny_flexmoe(family, OWNERS, num_experts_per_tok=k)
    rest = ("public", "math", "legal")
    with model.only_experts(*rest):
        only = logits(model)
    by_mask = logits(model, expert_mask=mask(model, rest, rest))
    model.set_active_experts(rest)
    by_active_set = logits(model)
    model.set_active_experts(None)
    model.remove_expert("code")
    removed = logits(model)
    assert torch.equal(only, removed)
    assert torch.equal(by_mask, removed)
    assert torch.equal(by_active_set, removed)


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_in_one_sequence_of_a_batch_equals_removed(family, dtype):
    """With k = all, each expert has the same number of tokens either way, so products and sums have the same bits."""
    model = tiny_flexmoe(family, OWNERS).to(dtype)
    rest = ("public", "math", "legal")
    mixed = logits(model, expert_mask=mask(model, rest, tuple(model.expert_names)))
    model.remove_expert("code")
    assert torch.equal(mixed[0], logits(model)[0])


@families
def test_masked_expert_may_hold_nan(family):
    model = tiny_flexmoe(family, OWNERS, num_experts_per_tok=2)
    clean = logits(model, expert_mask=mask(model, ("public", "code", "legal"), ("public", "legal")))
    for block in model.flexmoe_blocks():
        for parameter in [*block.experts["math"].parameters(), *block.router["math"].parameters()]:
            parameter.data.fill_(float("nan"))
    masked = logits(model, expert_mask=mask(model, ("public", "code", "legal"), ("public", "legal")))
    assert torch.equal(masked, clean)
    assert clean.isfinite().all()
    assert logits(model).isnan().any()  # without the mask the NaN spreads, so this test can fail
    mixed = logits(model, expert_mask=mask(model, ("public", "code", "legal"), ("public", "math")))
    torch.testing.assert_close(mixed[0], clean[0], **TOLERANCES[torch.float32])  # only the second may use "math"
    assert mixed[1].isnan().all()


@families
@pytest.mark.parametrize("k", [1, 2, 4])
def test_each_sequence_of_a_masked_batch_equals_that_sequence_alone(family, k):
    model = tiny_flexmoe(family, OWNERS, num_experts_per_tok=k)
    tokens = random_tokens(3, 11)
    sets = [("public",), ("math", "code"), ("public", "math", "code", "legal")]
    with torch.no_grad():
        batched = model(tokens, expert_mask=mask(model, *sets)).logits
        for row, names in enumerate(sets):
            with model.only_experts(*names):
                alone = model(tokens[row, None]).logits[0]
            # matrix products over another number of tokens may round differently, and sandwich norms amplify that
            torch.testing.assert_close(batched[row], alone, rtol=1e-4, atol=1e-4)


def test_public_can_be_masked():
    model = tiny_flexmoe("llama", OWNERS)
    with model.only_experts("math"):
        alone = logits(model)
    assert not torch.equal(alone, logits(model))


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_row_mask_and_removal_give_bit_equal_weights(k, norm_topk_prob):
    """A mask that differs between sequences adds -inf before the softmax; its zeros must not change a bit."""
    masked = tiny_flexmoe("llama", OWNERS, num_experts_per_tok=k, norm_topk_prob=norm_topk_prob)
    never = tiny_flexmoe("llama", ["math", "legal"], num_experts_per_tok=k, norm_topk_prob=norm_topk_prob)
    x = torch.randn(2, 501, 32, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([[True, True, False, True], [True, True, False, True]])
    with_code, without_code = masked.flexmoe_blocks()[0], never.flexmoe_blocks()[0]
    weights = []
    for block, mask in ((with_code, rows), (without_code, None)):
        usage = _LastWeights()
        with forward_scope(ForwardContext(row_mask=mask, usage=(usage,))), torch.no_grad():
            block(x)
        weights.append(usage.weights)
    assert torch.equal(weights[0][:, [0, 1, 3]], weights[1])
    assert not weights[0][:, 2].any()


class _LastWeights:
    """Keeps the routing weights of the last block that ran."""

    def record(self, layer, names, weights, token_mask):
        self.weights = weights
