"""The routing reference against the library's softmax and top-k in float64, and its table of cases."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from flexmoe.modeling.routing_flexmoe import load_balancing_loss, route, route_one, router_z_loss

INF = float("inf")


def witness(logits: torch.Tensor, k: int, renormalize: bool) -> torch.Tensor:
    probs = torch.softmax(logits.double(), -1)
    weights, chosen = probs.topk(min(k, logits.shape[-1]), -1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter(1, chosen, weights)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (2, 1), (3, 2), (7, 5), (12, 12), (63, 4), (64, 8), (3, 9)])
def test_route_is_softmax_then_top_k(experts, k, renormalize):
    logits = torch.randn(257, experts, generator=torch.Generator().manual_seed(experts)) * 3
    weights = route(logits, k, renormalize)
    torch.testing.assert_close(weights.double(), witness(logits, k, renormalize), rtol=1e-5, atol=1e-7)
    assert weights.dtype == torch.float32
    assert ((weights > 0).sum(-1) == min(k, experts)).all()


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (2, 1), (3, 2), (7, 5), (12, 12), (63, 4), (64, 8), (3, 9)])
def test_one_token_is_routed_as_many_are(experts, k, renormalize):
    logits = torch.randn(129, experts, generator=torch.Generator().manual_seed(experts)) * 3
    logits[::3] = logits[::3].round()  # ties
    logits[::5, experts // 2 :] = -INF
    together = route(logits, k, renormalize)
    alone = torch.tensor([route_one(row, k, renormalize) for row in logits.tolist()])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-7)
    assert torch.equal(alone != 0, together != 0)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("row", [[-INF] * 3, [0.0, float("nan"), -INF], [INF, 0.0, 1.0], [INF, -INF, INF]])
def test_one_token_with_numbers_that_are_none(row, renormalize):
    together = route(torch.tensor([row]), 2, renormalize)[0]
    assert together.isnan().all() or not together.any()
    torch.testing.assert_close(torch.tensor(route_one(row, 2, renormalize)), together, equal_nan=True)


def test_half_precision_logits_are_routed_in_float32():
    logits = torch.randn(9, 5, dtype=torch.bfloat16)
    assert torch.equal(route(logits, 2, True), route(logits.float(), 2, True))


def test_ties_go_to_the_lowest_index():
    assert route(torch.zeros(3, 6), 2, True).tolist() == [[0.5, 0.5, 0, 0, 0, 0]] * 3
    assert route(torch.tensor([[0.0, 1.0, 1.0, 1.0]]), 2, True).tolist() == [[0, 0.5, 0.5, 0]]


def test_masked_experts_weigh_nothing_and_change_no_bit():
    logits = torch.randn(129, 12)
    allowed = torch.tensor([0, 2, 3, 7, 11])
    offset = torch.full((129, 12), -INF)
    offset[:, allowed] = 0
    for k in (1, 3, 5):
        weights = route(logits, k, True, offset)
        assert torch.equal(weights[:, allowed], route(logits[:, allowed], k, True))
        assert not weights[:, [1, 4, 5, 6, 8, 9, 10]].any()


def test_fewer_allowed_than_k_and_none_at_all():
    logits = torch.zeros(2, 4)
    offset = torch.tensor([[0.0, -INF, -INF, 0.0], [-INF] * 4])
    assert route(logits, 3, True, offset).tolist() == [[0.5, 0, 0, 0.5], [0, 0, 0, 0]]


def test_finite_offsets_are_evidence():
    logits, offset = torch.randn(5, 3), torch.randn(5, 3)
    assert torch.equal(route(logits, 2, True, offset), route(logits + offset, 2, True))


def test_nan_stays_in_its_row():
    logits = torch.randn(3, 4)
    logits[1, 2] = float("nan")
    weights = route(logits, 2, True)
    assert weights[1].isnan().any()
    assert weights[[0, 2]].isfinite().all()


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_gradients(k, renormalize):
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = logits.float().requires_grad_()
    theirs = logits.clone().requires_grad_()
    toward = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (route(ours, k, renormalize) * toward.float()).sum().backward()
    (witness(theirs, k, renormalize) * toward).sum().backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_load_balancing_loss_is_the_librarys(padded):
    logits = tuple(torch.randn(24, 6, generator=torch.Generator().manual_seed(i)) for i in range(3))
    attention_mask = torch.ones(2, 12, dtype=torch.long)
    attention_mask[0, :5] = 0
    theirs = load_balancing_loss_func(logits, 6, 2, attention_mask if padded else None)
    ours = load_balancing_loss(logits, 2, attention_mask.reshape(-1).bool() if padded else None)
    torch.testing.assert_close(ours, theirs)


def test_z_loss_leaves_padding_and_masked_experts_out():
    logits = torch.randn(5, 3)
    with_masked = torch.cat([logits, torch.full((5, 1), -INF)], -1)
    expected = logits[1:].exp().sum(-1).log().square().mean()
    keep = torch.tensor([False, True, True, True, True])
    torch.testing.assert_close(router_z_loss([with_masked], keep), expected)
