"""The routing functions against softmax and top-k of torch in float64, and single cases: ties, masks, NaN, losses."""

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from flexmoe.cpu.forward import route_one
from flexmoe.kernels.experts.reference import ExpertTensors, mix
from flexmoe.kernels.route.reference import route
from flexmoe.modeling.routing_flexmoe import load_balancing_loss, route_logits, router_z_loss

INF = float("inf")


def reference(logits: torch.Tensor, k: int, renormalize: bool) -> torch.Tensor:
    probs = torch.softmax(logits.double(), -1)
    weights, chosen = probs.topk(min(k, logits.shape[-1]), -1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return torch.zeros_like(probs).scatter(1, chosen, weights)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (2, 1), (3, 2), (7, 5), (12, 12), (63, 4), (64, 8), (3, 9)])
def test_route_is_softmax_then_top_k(experts, k, renormalize):
    logits = torch.randn(257, experts, generator=torch.Generator().manual_seed(experts)) * 3
    weights = route_logits(logits, k, renormalize)
    torch.testing.assert_close(weights.double(), reference(logits, k, renormalize), rtol=1e-5, atol=1e-7)
    assert weights.dtype == torch.float32
    assert ((weights > 0).sum(-1) == min(k, experts)).all()


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (2, 1), (3, 2), (7, 5), (12, 12), (63, 4), (64, 8), (3, 9)])
def test_routing_one_token_equals_routing_a_batch(experts, k, renormalize):
    logits = torch.randn(129, experts, generator=torch.Generator().manual_seed(experts)) * 3
    logits[::3] = logits[::3].round()  # ties
    logits[::5, experts // 2 :] = -INF
    batched = route_logits(logits, k, renormalize)
    one_by_one = torch.tensor([route_one(row, k, renormalize) for row in logits.tolist()])
    torch.testing.assert_close(one_by_one, batched, rtol=1e-5, atol=1e-7)
    assert torch.equal(one_by_one != 0, batched != 0)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("row", [[-INF] * 3, [0.0, float("nan"), -INF], [INF, 0.0, 1.0], [INF, -INF, INF]])
def test_routing_one_token_with_nan_or_infinities(row, renormalize):
    batched = route_logits(torch.tensor([row]), 2, renormalize)[0]
    assert batched.isnan().all() or not batched.any()
    torch.testing.assert_close(torch.tensor(route_one(row, 2, renormalize)), batched, equal_nan=True)


def test_half_precision_logits_are_routed_in_float32():
    logits = torch.randn(9, 5, dtype=torch.bfloat16)
    assert torch.equal(route_logits(logits, 2, True), route_logits(logits.float(), 2, True))


def test_ties_go_to_the_lowest_index():
    assert route_logits(torch.zeros(3, 6), 2, True).tolist() == [[0.5, 0.5, 0, 0, 0, 0]] * 3
    assert route_logits(torch.tensor([[0.0, 1.0, 1.0, 1.0]]), 2, True).tolist() == [[0, 0.5, 0.5, 0]]


def test_masked_experts_have_weight_zero_and_change_no_bit():
    logits = torch.randn(129, 12)
    allowed = torch.tensor([0, 2, 3, 7, 11])
    offset = torch.full((129, 12), -INF)
    offset[:, allowed] = 0
    for k in (1, 3, 5):
        weights = route_logits(logits + offset, k, True)
        assert torch.equal(weights[:, allowed], route_logits(logits[:, allowed], k, True))
        assert not weights[:, [1, 4, 5, 6, 8, 9, 10]].any()


def test_fewer_allowed_than_k_and_none_at_all():
    logits = torch.zeros(2, 4)
    offset = torch.tensor([[0.0, -INF, -INF, 0.0], [-INF] * 4])
    assert route_logits(logits + offset, 3, True).tolist() == [[0.5, 0, 0, 0.5], [0, 0, 0, 0]]


def test_nan_stays_in_its_row():
    logits = torch.randn(3, 4)
    logits[1, 2] = float("nan")
    weights = route_logits(logits, 2, True)
    assert weights[1].isnan().any()
    assert weights[[0, 2]].isfinite().all()


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_gradients(k, renormalize):
    logits = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = logits.float().requires_grad_()
    theirs = logits.clone().requires_grad_()
    grad_output = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (route_logits(ours, k, renormalize) * grad_output.float()).sum().backward()
    (reference(theirs, k, renormalize) * grad_output).sum().backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("padded", [False, True])
def test_load_balancing_loss_equals_that_of_transformers(padded):
    logits = tuple(torch.randn(24, 6, generator=torch.Generator().manual_seed(i)) for i in range(3))
    attention_mask = torch.ones(2, 12, dtype=torch.long)
    attention_mask[0, :5] = 0
    theirs = load_balancing_loss_func(logits, 6, 2, attention_mask if padded else None)
    ours = load_balancing_loss(logits, 2, attention_mask.reshape(-1).bool() if padded else None)
    torch.testing.assert_close(ours, theirs)


def test_z_loss_ignores_padding_and_masked_experts():
    logits = torch.randn(5, 3)
    with_masked = torch.cat([logits, torch.full((5, 1), -INF)], -1)
    expected = logits[1:].exp().sum(-1).log().square().mean()
    keep = torch.tensor([False, True, True, True, True])
    torch.testing.assert_close(router_z_loss([with_masked], keep), expected)


def test_losses_bring_the_logits_of_all_layers_to_the_device_of_the_first():
    logits = [torch.ones(5, 3, device="meta"), torch.ones(5, 3)]
    assert load_balancing_loss(logits, 2).device.type == "meta"
    assert router_z_loss(logits).device.type == "meta"


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "k"), [(0, 3, 2), (1, 1, 1), (5, 7, 5), (33, 64, 8), (4, 3, 9)])
def test_slots_equal_the_dense_weights(tokens, experts, k, renormalize):
    generator = torch.Generator().manual_seed(experts)
    x = torch.randn(tokens, 16, generator=generator, dtype=torch.bfloat16)
    rows = [torch.randn(1, 16, generator=generator) for _ in range(experts)]
    biases = [torch.randn(1, generator=generator) for _ in range(experts)]
    offset = torch.zeros(tokens, experts).masked_fill(torch.rand(tokens, experts, generator=generator) < 0.4, -INF)
    logits, weights, top_weights, top_ids = route(x, rows, biases, offset, k, renormalize)
    exact = x.double() @ torch.cat(rows).double().T + torch.cat(biases).double() + offset
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    assert top_ids.dtype == torch.int32
    assert top_ids.shape == (tokens, min(k, experts))
    from_slots = torch.zeros(tokens, experts + 1).scatter(1, top_ids.long(), top_weights)
    assert torch.equal(from_slots[:, :-1], weights)
    assert (top_weights.diff(dim=-1) <= 0).all()
    assert ((top_ids == experts) == (top_weights == 0)).all()


def test_tokens_with_nan_logits_have_slots():
    x, offset = torch.ones(3, 2), torch.zeros(3, 4)
    rows = [torch.ones(1, 2) * scale for scale in (1.0, 2.0, float("nan"), 3.0)]
    offset[0, 2] = -INF  # the expert with a NaN row is masked here
    offset[2] = -INF
    routing = route(x, rows, [torch.zeros(1)] * 4, offset, 3, True)
    assert routing.top_ids_TK.tolist() == [[3, 1, 0], [0, 1, 2], [4, 4, 4]]
    assert routing.weights_TE.isnan().all(-1).tolist() == [False, True, False]
    assert routing.top_weights_TK.isnan().all(-1).tolist() == [False, True, False]
    assert not routing.weights_TE[2].any()


def test_nan_in_an_expert_does_not_reach_tokens_without_it():
    x = torch.randn(3, 8)
    nan = torch.full((8, 8), float("nan"))
    matrix = torch.randn(8, 8)
    experts = ExpertTensors(up=[matrix, nan], down=[matrix, nan], activation="relu")
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 0.0]])
    output = mix(x, weights, experts)
    torch.testing.assert_close(output[0], (x[0] @ matrix.T).relu() @ matrix.T)
    assert output[1].isnan().all()
    assert not output[2].any()
