"""What is exact: the graft, the removal, the mask. Seven families, equality of bits unless a comment says why not."""

import pytest
import torch
from torch import nn

from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM
from flexmoe.modeling.context_flexmoe import forward_scope
from flexmoe.testing import ANCHOR_CONFIGS, TOLERANCES, random_tokens, tiny_anchor, tiny_flexmoe

families = pytest.mark.parametrize("family", ANCHOR_CONFIGS)
OWNERS = ("math", "code", "legal")


@torch.no_grad()
def logits(model: nn.Module, batch: int = 2, length: int = 17, **kwargs: object) -> torch.Tensor:
    return model(random_tokens(batch, length), **kwargs).logits


def mask(model: FlexMoeForCausalLM, *rows: tuple[str, ...]) -> torch.Tensor:
    return model.expert_mask(rows)


@families
def test_graft_with_public_alone_is_the_anchor(family):
    assert torch.equal(logits(tiny_flexmoe(family)), logits(tiny_anchor(family)))


@families
def test_single_token_steps_of_the_graft_are_the_anchors(family):
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
def test_copies_of_public_are_the_anchor_where_the_block_renormalises(family):
    model = FlexMoeForCausalLM(FlexMoeConfig(anchor_config=tiny_anchor(family).config, norm_topk_prob=True)).eval()
    alone = logits(model)
    for name in OWNERS:
        model.add_expert_copy(name)
        for block in model.flexmoe_blocks():
            nn.init.normal_(block.router[name].weight)
    for k in (1, 2, 3, 4):
        # a sum of weights that add to 1 rounds; the norms behind it scale that by up to some tens
        torch.testing.assert_close(logits(model, num_experts_per_tok=k), alone, rtol=1e-4, atol=1e-4)


@families
def test_default_renormalises_unless_a_norm_follows(family):
    assert tiny_flexmoe(family).config.norm_topk_prob is (family not in {"olmo2", "gemma2"})


@families
def test_removed_is_never_had(family):
    had, never = tiny_flexmoe(family, OWNERS), tiny_flexmoe(family, ["math", "legal"])
    had.remove_expert("code")
    assert had.config.to_dict() == never.config.to_dict()
    ours, theirs = had.state_dict(), never.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for k in (1, 2, 3):
        assert torch.equal(logits(had, num_experts_per_tok=k), logits(never, num_experts_per_tok=k))


@families
@pytest.mark.parametrize("k", [1, 2, 4])
def test_masked_is_removed(family, k):
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
def test_masked_beside_sequences_that_are_not_is_removed(family, dtype):
    """With k = all, every expert sees as many tokens either way, so the products and their sum have the same bits."""
    model = tiny_flexmoe(family, OWNERS).to(dtype)
    rest = ("public", "math", "legal")
    beside = logits(model, expert_mask=mask(model, rest, tuple(model.expert_names)))
    model.remove_expert("code")
    assert torch.equal(beside[0], logits(model)[0])


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
    assert logits(model).isnan().any()  # unmasked, it does harm: the test can fail
    beside = logits(model, expert_mask=mask(model, ("public", "code", "legal"), ("public", "math")))
    torch.testing.assert_close(beside[0], clean[0], **TOLERANCES[torch.float32])  # one that may use it, in its batch
    assert beside[1].isnan().all()


@families
@pytest.mark.parametrize("k", [1, 2, 4])
def test_each_row_of_a_mask_is_that_row_alone(family, k):
    model = tiny_flexmoe(family, OWNERS, num_experts_per_tok=k)
    tokens = random_tokens(3, 11)
    sets = [("public",), ("math", "code"), ("public", "math", "code", "legal")]
    with torch.no_grad():
        together = model(tokens, expert_mask=mask(model, *sets)).logits
        for row, names in enumerate(sets):
            with model.only_experts(*names):
                alone = model(tokens[row, None]).logits[0]
            # another number of rows in a product may round otherwise, and sandwich norms amplify it
            torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)


def test_public_can_be_masked():
    model = tiny_flexmoe("llama", OWNERS)
    with model.only_experts("math"):
        alone = logits(model)
    assert not torch.equal(alone, logits(model))


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_row_mask_and_removal_give_the_same_weights_bit_for_bit(k, norm_topk_prob):
    """Where sequences differ, the mask is -inf in the softmax; zeros in its sum must not change a bit."""
    had = tiny_flexmoe("llama", OWNERS, num_experts_per_tok=k, norm_topk_prob=norm_topk_prob)
    never = tiny_flexmoe("llama", ["math", "legal"], num_experts_per_tok=k, norm_topk_prob=norm_topk_prob)
    x = torch.randn(2, 501, 32, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([[True, True, False, True], [True, True, False, True]])
    one, other = had.flexmoe_blocks()[0], never.flexmoe_blocks()[0]
    weights = []
    for block, values in ((one, {"row_mask": rows}), (other, {})):
        usage = _Keep()
        with forward_scope({**values, "usage": [usage]}), torch.no_grad():
            block(x)
        weights.append(usage.weights)
    assert torch.equal(weights[0][:, [0, 1, 3]], weights[1])
    assert not weights[0][:, 2].any()


class _Keep:
    def record(self, layer, names, weights, token_mask):
        self.weights = weights
