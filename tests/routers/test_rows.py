"""Each method for router rows, compared with its definition."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from flexmoe.routers import rows
from flexmoe.routers.rows import RIDGE, ROUTER_ROWS, Moments, embed_documents, router_row, row_method

H = 12


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def states():
    """Own and public states float32 [T, H], different in number, with correlated units of very different scales."""
    mix = torch.randn(H, H, generator=generator(1)) * torch.logspace(-2, 2, H)
    shift = 0.7 * mix[0] + 0.4 * mix[3]
    own = torch.randn(900, H, generator=generator(2)) @ mix + 0.5 * mix[5] + shift
    public = torch.randn(1400, H, generator=generator(3)) @ mix + 0.5 * mix[5]
    return own, public


def fit(name, own, public, bias=False, hidden_size=H):
    return row_method(name).fit(own, public, hidden_size=hidden_size, bias=bias, generator=generator())


@pytest.mark.parametrize("bias", [True, False])
def test_log_odds_is_the_minimum_of_the_stated_loss(states, bias):
    own, public = (side.double() for side in states)
    row = fit("log_odds", *states, bias=bias)
    scale = public.std(0, correction=0) if bias else public.square().mean(0).sqrt()
    weight = row.weight.double().requires_grad_()
    intercept = torch.tensor(row.bias, dtype=torch.float64, requires_grad=True)
    loss = (
        F.softplus(-(own @ weight + intercept)).mean() / 2
        + F.softplus(public @ weight + intercept).mean() / 2
        + RIDGE / 2 * (weight * scale).square().sum()
    )
    slope, slope_of_intercept = torch.autograd.grad(loss, [weight, intercept])
    assert (slope / scale).abs().max() < 1e-6
    if bias:
        assert slope_of_intercept.abs() < 1e-6
    else:
        assert row.bias == 0.0
    assert row.weight.dtype == torch.float32


def test_log_odds_recovers_known_log_odds():
    """Two Gaussians with identity covariance: log-odds <d, u> - <d, m>, d the difference of means, m the midpoint."""
    mean = torch.linspace(-0.5, 0.5, 6)
    own, public = (
        torch.randn(40_000, 6, generator=generator(1)) + mean,
        torch.randn(40_000, 6, generator=generator(2)) - mean,
    )
    row = fit("log_odds", own, public, bias=True, hidden_size=6)
    assert torch.allclose(row.weight, 2 * mean, atol=0.04)
    assert abs(row.bias) < 0.03


def test_log_odds_with_separable_and_constant_units(states):
    own, public = states[0].clone(), states[1].clone()
    own[:, 0], public[:, 0] = 3.0, -3.0  # separable by one unit
    own[:, 1], public[:, 1] = 5.0, 5.0  # constant
    for bias in (True, False):
        row = fit("log_odds", own, public, bias=bias)
        assert torch.isfinite(row.weight).all()
        assert ((own @ row.weight + row.bias > 0).float().mean()) > 0.99
    with pytest.raises(ValueError, match="own text are empty or not finite"):
        fit("log_odds", own.fill_(float("nan")), public)


@pytest.mark.parametrize("public", [torch.randn(1, H, generator=generator(5)), torch.ones(500, H), torch.zeros(9, H)])
@pytest.mark.parametrize("bias", [True, False])
def test_log_odds_with_public_states_that_do_not_vary(states, public, bias):
    row = fit("log_odds", states[0], public, bias=bias)
    assert torch.isfinite(row.weight).all()


@pytest.mark.parametrize("bias", [True, False])
def test_log_odds_does_not_depend_on_the_sample_it_starts_from(states, bias, monkeypatch):
    many = [side.repeat(3, 1) + 0.1 * torch.randn(3 * len(side), H, generator=generator(4)) for side in states]
    calls = []
    hessian = rows._LogisticRegression._hessian
    monkeypatch.setattr(
        rows._LogisticRegression,
        "_hessian",
        lambda self, *args: (calls.append(len(self.sides[0][0])), hessian(self, *args))[1],
    )
    with monkeypatch.context() as context:
        context.setattr(rows, "SAMPLE", 10**6)  # so there is none
        expected = fit("log_odds", *many, bias=bias)
    assert set(calls) == {2700}
    row = fit("log_odds", *many, bias=bias)
    assert torch.allclose(row.weight, expected.weight, rtol=1e-4, atol=1e-6)
    assert row.bias == pytest.approx(expected.bias, abs=1e-4)
    assert 8 * H < min(calls) < 16 * H


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["near", "reversed", "far"])
def test_log_odds_does_not_depend_on_the_logits_it_starts_from(states, bias, kind):
    cold = fit("log_odds", *states, bias=bias)
    near = tuple(cold.logits(side) + torch.randn(len(side), generator=generator(5)) for side in states)
    factor = {"near": 1.0, "reversed": -1.0, "far": -1e4}[kind]
    start = tuple(factor * logits for logits in near)
    options = {"hidden_size": H, "bias": bias, "generator": generator()}
    warm = row_method("log_odds").fit(*states, **options, start=start)
    assert torch.allclose(warm.weight, cold.weight, rtol=1e-4, atol=1e-5)
    assert warm.bias == pytest.approx(cold.bias, abs=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("folds", [([180] * 5, [280] * 5), ([100, 200, 600], [800, 500, 100])])
def test_held_out_logits_are_those_of_a_row_without_the_fold(states, bias, dtype, folds):
    own, public = (side.to(dtype) for side in states)
    options = {"hidden_size": own.shape[1], "bias": bias, "generator": torch.Generator()}
    found = row_method("log_odds").fit(own, public, **options, folds=folds)
    start = [0, 0]
    for sizes in zip(*folds, strict=True):
        fold = [slice(first, first + size) for first, size in zip(start, sizes, strict=True)]
        others = [
            torch.cat([side[: part.start], side[part.stop :]]) for side, part in zip((own, public), fold, strict=True)
        ]
        row = row_method("log_odds").fit(*others, **options)
        for side, part, logits in zip((own, public), fold, found.held_out, strict=True):
            expected, by_all = row.logits(side[part]), found.logits(side[part])
            error = (logits[part].float() - expected).square().mean().sqrt()
            assert error < 0.3 * (by_all - expected).square().mean().sqrt(), "closer to it than the row of all tokens"
        start = [part.stop for part in fold]
    assert torch.equal(found.weight, row_method("log_odds").fit(own, public, **options).weight)


def test_moments_of_a_stream_equal_those_of_all_states(states):
    moments = Moments(H)
    for part in states[0].split(70):
        moments.update(part)
    whole = states[0].double()
    assert moments.count == len(whole)
    assert torch.allclose(moments.mean, whole.mean(0))
    assert torch.allclose(moments.covariance, torch.cov(whole.T, correction=0))


@pytest.mark.parametrize("offset", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_lda_separates_as_well_as_log_odds(bias, offset):
    """For Gaussians with a common diagonal covariance, which shrinkage does not change, both estimate one function."""
    spread, shift = torch.logspace(-2, 2, H), torch.linspace(-1, 1, H) / 2
    own = (torch.randn(20_000, H, generator=generator(2)) + offset + shift) * spread
    public = (torch.randn(30_000, H, generator=generator(3)) + offset) * spread
    moments = []
    for side in (own, public):
        moments.append(Moments(H))
        moments[-1].update(side)
    losses = []
    for row in (fit("lda", *moments, bias=bias), fit("log_odds", own, public, bias=bias)):
        scores = [side @ row.weight + row.bias for side in (own, public)]
        losses.append((F.softplus(-scores[0]).mean() + F.softplus(scores[1]).mean()) / 2)
        assert (row.bias == 0.0) != bias
    assert losses[0] < losses[1] + 0.005 < 0.6


def test_mean_rows_point_from_public_to_own(states):
    own, public = Moments(H), Moments(H)
    own.update(states[0])
    public.update(states[1])
    directions = [side.mean(0) / side.mean(0).norm() for side in states]
    assert torch.allclose(fit("hidden_mean", own, public).weight, directions[0] - directions[1], atol=1e-4)
    vectors = torch.eye(3)
    assert fit("embedding", vectors[:1], vectors[1:], hidden_size=3).weight.tolist() == [1.0, -0.5, -0.5]


@pytest.mark.parametrize("width", [5, 40])
def test_embeddings_of_another_width_are_projected_equally_for_all_owners(width):
    a, b, public = torch.randn(3, 200, width, generator=generator(4)).unbind()
    rows = [fit("embedding", own, public).weight for own in (a, b, a)]
    assert torch.equal(rows[0], rows[2])
    assert rows[0].shape == (H,)
    if width < H:
        lengths = [(own.mean(0) - public.mean(0)).norm() for own in (a, b)]
        assert torch.allclose(torch.stack([row.norm() for row in rows[:2]]), torch.stack(lengths), atol=1e-6)


def test_random_rows_depend_on_the_generator():
    assert torch.equal(fit("random", None, None).weight, fit("random", None, None).weight)
    assert 0.005 < fit("random", None, None, hidden_size=400).weight.std() < 0.03


def test_registry():
    assert [name for name, method in ROUTER_ROWS.items() if not method.trained_by_loss] == ["log_odds", "lda"]
    with pytest.raises(ValueError, match="Available: log_odds, lda, hidden_mean, embedding, random"):
        row_method("kmeans")
    with pytest.raises(ValueError, match="registered already"):
        router_row("random", needs="nothing", trained_by_loss=True)(lambda *_, **__: None)


def test_sentence_embedder_is_loaded_on_demand(monkeypatch):
    class Embedder:
        def __init__(self, name):
            assert name == "folder"

        def encode(self, documents, convert_to_tensor):
            return torch.tensor([[float(len(document)), 1.0] for document in documents])

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Embedder))
    documents = ["x" * (1 + i) for i in range(100)]
    drawn = [embed_documents(documents, "folder", limit=20, seed=seed)[:, 0].tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 20
    assert max(drawn[0]) > 50, "a sample of all documents, not the first ones"
    assert embed_documents(["ab", "c"], "folder").tolist() == [[2.0, 1.0], [1.0, 1.0]]
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r"flexmoe\[embedding\]"):
        embed_documents(["ab"], "folder")
