"""The expert kernels over a random grid of shapes, kinds of experts and dtypes, against a witness in float64.

Not here: what must not be heard (`tests/kernels/test_decode.py` and its neighbours), speed.
"""

import random

import pytest
import torch

from flexmoe.modeling.kernels_decode_flexmoe import MOST_TOKENS, decode
from flexmoe.modeling.kernels_low_rank_flexmoe import decode_low_rank
from flexmoe.modeling.kernels_prefill_flexmoe import prefill
from flexmoe.testing import TOLERANCES
from tests.kernels.expert_witness import (
    ACTIVATIONS,
    BIASES,
    Experts,
    draw_tokens,
    draw_weights,
    poison,
    said,
    seeded,
    slots,
)
from tests.kernels.low_rank_witness import LowRank
from tests.kernels.low_rank_witness import said as said_low_rank

DRAWS = 25
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COUNTS = (1, 2, 3, 7, 12, 63, 64)
SIZES = (8, 16, 24, 40, 64, 72, 136, 200, 264)
TOKENS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 129, 257, 300)


def draw_case(key: random.Random, dtype: torch.dtype, activation: str) -> tuple[int, int, Experts]:
    """A number of tokens, k and experts; many experts are small, or the witness would take minutes."""
    n_experts = key.choice(COUNTS)
    sizes = SIZES if n_experts <= 12 else SIZES[:4]
    gated = key.random() < 0.7
    biases = tuple(name for name in BIASES if key.random() < 0.5 and (gated or name != "gate_bias"))
    widths = [key.choice(sizes) for _ in range(n_experts)]
    if key.random() < 0.3:
        widths = widths[:1] * n_experts
    kind = Experts(widths, key.choice(sizes), dtype, gated, biases, activation)
    return key.choice(TOKENS), key.randint(1, 8), kind


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_over_the_grid(dtype, activation, monkeypatch):
    key = random.Random(f"{dtype} {activation}")
    poison(monkeypatch)
    for draw in range(DRAWS):
        tokens, k, kind = draw_case(key, dtype, activation)
        where = f"{draw=} {tokens=} {k=} {kind=}"
        generator = seeded(where)
        experts = kind.draw(generator)
        x_TH = draw_tokens(tokens, kind.hidden, dtype, generator)
        weights_TE = draw_weights(tokens, len(kind.widths), k, generator)
        expected_TH = said(x_TH, weights_TE, experts)

        def check(y_TH: torch.Tensor, expected_TH: torch.Tensor = expected_TH, where: str = where) -> None:
            close = torch.isclose(y_TH.double().cpu(), expected_TH, **TOLERANCES[y_TH.dtype])
            assert close.all(), f"{where}: off by {(y_TH.double().cpu() - expected_TH).abs().max()}"

        check(prefill(x_TH, *slots(weights_TE, k), experts))
        if tokens > MOST_TOKENS:
            continue
        y_TH = decode(x_TH, weights_TE, experts)
        check(y_TH)
        some = sorted(key.sample(range(tokens), key.randint(1, tokens)))
        assert torch.equal(decode(x_TH[some], weights_TE[some], experts), y_TH[some]), where


def draw_low_rank(key: random.Random, dtype: torch.dtype, activation: str) -> tuple[int, int, LowRank]:
    """A number of tokens, k and low-rank experts, with the public network among them or not."""
    ranks = [key.choice((1, 2, 3, 5, 8, 16, 17, 24, 40, 64, 100)) for _ in range(key.choice((1, 2, 3, 5, 9)))]
    gated = key.random() < 0.7
    biases = tuple(name for name in BIASES if key.random() < 0.5 and (gated or name != "gate_bias"))
    public = key.choice((None, key.randint(0, len(ranks))))
    sizes = [key.choice(SIZES) for _ in range(2)]
    kind = LowRank(ranks, *sizes, public, dtype, gated, biases, activation)
    return key.choice([tokens for tokens in TOKENS if tokens <= MOST_TOKENS]), key.randint(1, 5), kind


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank_experts_over_the_grid(dtype, activation, monkeypatch):
    key = random.Random(f"low rank {dtype} {activation}")
    poison(monkeypatch)
    for draw in range(DRAWS // 2):
        tokens, k, kind = draw_low_rank(key, dtype, activation)
        where = f"{draw=} {tokens=} {k=} {kind=}"
        generator = seeded(where)
        experts = kind.draw(generator)
        x_TH = draw_tokens(tokens, kind.hidden, dtype, generator)
        weights_TM = draw_weights(tokens, kind.members, k, generator)
        y_TH = decode_low_rank(x_TH, weights_TM, experts)
        expected_TH = said_low_rank(x_TH, weights_TM, experts)
        close = torch.isclose(y_TH.double().cpu(), expected_TH, **TOLERANCES[dtype])
        assert close.all(), f"{where}: off by {(y_TH.double().cpu() - expected_TH).abs().max()}"
        some = sorted(key.sample(range(tokens), key.randint(1, tokens)))
        assert torch.equal(decode_low_rank(x_TH[some], weights_TM[some], experts), y_TH[some]), where
