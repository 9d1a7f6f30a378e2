"""Routing over a large random grid, against softmax and top-k in float64; masking is bit-equal to removal.

Does not cover single cases (`tests/modeling/test_routing.py`), or speed.
"""

import itertools

import pytest
import torch

from flexmoe.modeling.routing_flexmoe import route_logits

INF = float("inf")
TOKENS = (0, 1, 2, 17, 257)
MASKS = ("none", "one", "fewer than k", "random")
LOGITS = ("normal", "large", "ties", "infinities")


def draw_logits(kind: str, tokens: int, experts: int, generator: torch.Generator) -> torch.Tensor:
    """Router logits [tokens, experts]; in "infinities" a few are -inf, but never all of a row."""
    logits = torch.randn(tokens, experts, generator=generator)
    if kind == "large":
        return logits * 40
    if kind == "ties":
        return logits.round()
    if kind == "infinities":
        logits = logits.masked_fill(torch.rand(logits.shape, generator=generator) < 0.3, -INF)
        logits[:, -1] = logits[:, -1].clamp(min=0)
    return logits


def draw_mask(kind: str, experts: int, k: int, generator: torch.Generator) -> torch.Tensor:
    """Indices of the allowed experts, ascending; at least one."""
    counts = {
        "none": experts,
        "one": experts - 1,
        "fewer than k": k - 1,
        "random": int(torch.randint(1, experts + 1, (), generator=generator)),
    }
    count = min(max(counts[kind], 1), experts)
    return torch.randperm(experts, generator=generator)[:count].sort().values


def reference(logits_TE: torch.Tensor, k: int, renormalize: bool) -> torch.Tensor:
    """float64 softmax and top-k by `torch.topk`, in rows whose k-th and next probability differ."""
    probs_TE = torch.softmax(logits_TE.double(), -1).nan_to_num(0.0)  # a row of -inf has no weights
    weights, chosen = probs_TE.topk(min(k, logits_TE.shape[-1]), -1)
    if renormalize:
        weights = (weights / weights.sum(-1, keepdim=True)).nan_to_num(0.0)
    return torch.zeros_like(probs_TE).scatter(1, chosen, weights)


def has_ties(logits_TE: torch.Tensor, k: int) -> torch.Tensor:
    """Rows [T] whose k-th and next largest logit are equal; there the lowest index must be selected."""
    if k >= logits_TE.shape[-1]:
        return torch.zeros(logits_TE.shape[0], dtype=torch.bool)
    ordered = logits_TE.sort(dim=-1, descending=True).values
    return ordered[:, k - 1] == ordered[:, k]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", LOGITS)
def test_route_over_the_grid(kind: str, mask: str) -> None:
    generator = torch.Generator().manual_seed(LOGITS.index(kind) * 10 + MASKS.index(mask))
    for experts, k, tokens in itertools.product(range(1, 65), range(1, 9), TOKENS):
        where = f"{experts=} {k=} {tokens=}"
        renormalize = bool(torch.randint(2, (), generator=generator))
        logits = draw_logits(kind, tokens, experts, generator)
        allowed = draw_mask(mask, experts, k, generator)
        offset = torch.full((tokens, experts), -INF)
        offset[:, allowed] = 0.0

        weights = route_logits(logits + offset, k, renormalize)
        assert weights.shape == (tokens, experts), where
        assert weights.dtype == torch.float32, where
        assert weights.isfinite().all(), where

        removed = route_logits(logits[:, allowed], k, renormalize)
        assert torch.equal(weights[:, allowed], removed), where
        assert weights.count_nonzero() == removed.count_nonzero(), where

        check_weights(logits[:, allowed], removed, k, renormalize, where)


def check_weights(logits: torch.Tensor, weights: torch.Tensor, k: int, renormalize: bool, where: str) -> None:
    """Weights equal those of float64; in rows with a tie at the k-th logit, the lowest indices get them."""
    expected, tied = reference(logits, k, renormalize), has_ties(logits, k)
    close = {"rtol": 2e-5, "atol": 1e-7, "msg": lambda text: f"{where}: {text}"}
    torch.testing.assert_close(weights[~tied].double(), expected[~tied], **close)
    sorted_weights, sorted_expected = (w[tied].sort(dim=-1).values for w in (weights.double(), expected))
    torch.testing.assert_close(sorted_weights, sorted_expected, **close)
    for logits_E, weights_E in zip(logits[tied], weights[tied], strict=True):
        kth = logits_E.sort(descending=True).values[k - 1]
        selected = weights_E[logits_E == kth] > 0  # the first of the equal logits
        assert torch.equal(selected, selected.sort(descending=True, stable=True).values), where
