"""The kernels of full and low-rank experts over a random grid of shapes and dtypes, against float64.

Does not cover isolation of NaN (`tests/kernels/experts`, `tests/kernels/low_rank`), or speed.
"""

import random
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from flexmoe.kernels.experts.decode_kernel import MAX_TOKENS, decode
from flexmoe.kernels.experts.prefill_kernel import prefill
from flexmoe.kernels.low_rank.kernel import decode_low_rank
from flexmoe.testing import TOLERANCES
from tests.kernels.experts.inputs import (
    ACTIVATIONS,
    BIASES,
    Experts,
    draw_tokens,
    draw_weights,
    mix_in_float64,
    order_products,
    poison,
    seeded,
    slots,
)
from tests.kernels.low_rank.inputs import LowRank, mix_low_rank_in_float64

DRAWS = 25
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COUNTS = (1, 2, 3, 7, 12, 63, 64)
SIZES = (8, 16, 24, 40, 64, 72, 136, 200, 264)
TOKENS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 129, 257, 300)


def draw_case(key: random.Random, dtype: torch.dtype, activation: str) -> tuple[int, int, Experts]:
    """A number of tokens, k and experts; many experts are small, or float64 would take minutes."""
    n_experts = key.choice(COUNTS)
    sizes = SIZES if n_experts <= 12 else SIZES[:4]
    gated = key.random() < 0.7
    biases = tuple(name for name in BIASES if key.random() < 0.5 and (gated or name != "gate_bias"))
    widths = [key.choice(sizes) for _ in range(n_experts)]
    if key.random() < 0.3:
        widths = widths[:1] * n_experts
    kind = Experts(widths, key.choice(sizes), dtype, gated, biases, activation)
    return key.choice(TOKENS), key.randint(1, 8), kind


def check_bits(
    run: Callable[..., torch.Tensor],
    x_TH: torch.Tensor,
    weights_TE: torch.Tensor,
    experts: object,
    some: list[int],
    where: str,
) -> None:
    """Checks that the bits of the tokens `some` do not depend on the others; for small cases, as it is slow."""
    if weights_TE.shape[1] <= 3:
        with pytest.MonkeyPatch.context() as patch:
            order_products(patch)
            y_TH = run(x_TH, weights_TE, experts)
            assert torch.equal(run(x_TH[some], weights_TE[some], experts), y_TH[some]), where


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
        expected_TH = mix_in_float64(x_TH, weights_TE, experts)

        def check(y_TH: torch.Tensor, expected_TH: torch.Tensor = expected_TH, where: str = where) -> None:
            close = torch.isclose(y_TH.double().cpu(), expected_TH, **TOLERANCES[y_TH.dtype])
            assert close.all(), f"{where}: off by {(y_TH.double().cpu() - expected_TH).abs().max()}"

        check(prefill(x_TH, *slots(weights_TE, k), experts))
        if tokens > MAX_TOKENS:
            continue
        check(decode(x_TH, weights_TE, experts))
        some = sorted(key.sample(range(tokens), key.randint(1, tokens)))
        check_bits(decode, x_TH, weights_TE, experts, some, where)


def draw_low_rank(key: random.Random, dtype: torch.dtype, activation: str) -> tuple[int, int, LowRank]:
    """A number of tokens, k and low-rank experts, with the public network among them or without it."""
    ranks = [key.choice((1, 2, 3, 5, 8, 16, 17, 24, 40, 64, 100)) for _ in range(key.choice((1, 2, 3, 5, 9)))]
    gated = key.random() < 0.7
    biases = tuple(name for name in BIASES if key.random() < 0.5 and (gated or name != "gate_bias"))
    public = key.choice((None, key.randint(0, len(ranks))))
    sizes = [key.choice(SIZES) for _ in range(2)]
    kind = LowRank(ranks, *sizes, public, dtype, gated, biases, activation)
    return key.choice([tokens for tokens in TOKENS if tokens <= MAX_TOKENS]), key.randint(1, 5), kind


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
        expected_TH = mix_low_rank_in_float64(x_TH, weights_TM, experts)
        close = torch.isclose(y_TH.double().cpu(), expected_TH, **TOLERANCES[dtype])
        assert close.all(), f"{where}: off by {(y_TH.double().cpu() - expected_TH).abs().max()}"
        some = sorted(key.sample(range(tokens), key.randint(1, tokens)))
        check_bits(decode_low_rank, x_TH, weights_TM, experts, some, where)
