"""The kernels of full and low-rank experts over a grid of shapes and dtypes, against float64.

Every pair of values of any two parameters (`tests/support/pairwise.py`); with `FLEXMOE_FULL_GRID=1` also random draws
for each dtype and activation, which take hours in Triton's interpreter.
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
from tests.support.pairwise import FULL_GRID, pairwise

DRAWS = 25
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COUNTS = (1, 2, 3, 7, 12, 63, 64)
SIZES = (8, 16, 24, 40, 64, 72, 136, 200, 264)
TOKENS = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 129, 257, 300)


AXES = {
    "tokens": TOKENS,
    "k": range(1, 9),
    "count": COUNTS,
    "hidden": SIZES,
    "is_even": (False, True),  # experts of equal widths
    "gated": (True, False),
    "dtype": DTYPES,
    "activation": tuple(ACTIVATIONS),
}
LOW_RANK_AXES = {
    "tokens": [tokens for tokens in TOKENS if tokens <= MAX_TOKENS],
    "k": range(1, 6),
    "count": (1, 2, 3, 5, 9),
    "hidden": SIZES,
    "place": ("none", "first", "middle", "last"),  # of the public network among the low-rank experts
    "gated": (True, False),
    "dtype": DTYPES,
    "activation": tuple(ACTIVATIONS),
}
RANKS = (1, 2, 3, 5, 8, 16, 17, 24, 40, 64, 100)


def draw_biases(key: random.Random, gated: bool) -> tuple[str, ...]:
    return tuple(name for name in BIASES if key.random() < 0.5 and (gated or name != "gate_bias"))


def draw_experts(
    key: random.Random, count: int, hidden: int, is_even: bool, gated: bool, dtype: torch.dtype, activation: str
) -> Experts:
    """Experts of random widths; more than 12 have small widths and hidden sizes, or float64 would take minutes."""
    sizes = SIZES if count <= 12 else SIZES[:4]
    widths = [key.choice(sizes) for _ in range(count)]
    if is_even:
        widths = widths[:1] * count
    return Experts(widths, min(hidden, sizes[-1]), dtype, gated, draw_biases(key, gated), activation)


def draw_case(key: random.Random, dtype: torch.dtype, activation: str) -> tuple[int, int, Experts]:
    """A number of tokens, k and experts."""
    count, hidden = key.choice(COUNTS), key.choice(SIZES)
    kind = draw_experts(key, count, hidden, key.random() < 0.3, key.random() < 0.7, dtype, activation)
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


def check_experts(key: random.Random, tokens: int, k: int, kind: Experts, name: str) -> None:
    where = f"{name} {tokens=} {k=} {kind=}"
    generator = seeded(where)
    experts = kind.draw(generator)
    x_TH = draw_tokens(tokens, kind.hidden, kind.dtype, generator)
    weights_TE = draw_weights(tokens, len(kind.widths), k, generator)
    expected_TH = mix_in_float64(x_TH, weights_TE, experts)
    check_values(prefill(x_TH, *slots(weights_TE, k), experts), expected_TH, where)
    if tokens > MAX_TOKENS:
        return
    check_values(decode(x_TH, weights_TE, experts), expected_TH, where)
    some = sorted(key.sample(range(tokens), key.randint(1, tokens)))
    check_bits(decode, x_TH, weights_TE, experts, some, where)


def check_values(y_TH: torch.Tensor, expected_TH: torch.Tensor, where: str) -> None:
    close = torch.isclose(y_TH.double().cpu(), expected_TH, **TOLERANCES[y_TH.dtype])
    assert close.all(), f"{where}: off by {(y_TH.double().cpu() - expected_TH).abs().max()}"


@pytest.mark.parametrize("case", list(enumerate(pairwise(AXES))), ids=lambda case: str(case[0]))
def test_experts_at_every_pair_of_values(case, monkeypatch):
    number, values = case[0], dict(case[1])
    key = random.Random(f"pairs {number}")
    poison(monkeypatch)
    tokens, k = values.pop("tokens"), values.pop("k")
    check_experts(key, tokens, k, draw_experts(key, **values), f"pair {number}")


@pytest.mark.skipif(not FULL_GRID, reason="FLEXMOE_FULL_GRID is not 1")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_over_the_grid(dtype, activation, monkeypatch):
    key = random.Random(f"{dtype} {activation}")
    poison(monkeypatch)
    for draw in range(DRAWS):
        check_experts(key, *draw_case(key, dtype, activation), f"{draw=}")


def draw_low_rank(
    key: random.Random, count: int, hidden: int, place: str, gated: bool, dtype: torch.dtype, activation: str
) -> LowRank:
    """Low-rank experts of random ranks and one random width."""
    ranks = [key.choice(RANKS) for _ in range(count)]
    public = {"none": None, "first": 0, "middle": count // 2, "last": count}[place]
    return LowRank(ranks, hidden, key.choice(SIZES), public, dtype, gated, draw_biases(key, gated), activation)


def check_low_rank(key: random.Random, tokens: int, k: int, kind: LowRank, name: str) -> None:
    where = f"{name} {tokens=} {k=} {kind=}"
    generator = seeded(where)
    experts = kind.draw(generator)
    x_TH = draw_tokens(tokens, kind.hidden, kind.dtype, generator)
    weights_TM = draw_weights(tokens, kind.members, k, generator)
    y_TH = decode_low_rank(x_TH, weights_TM, experts)
    check_values(y_TH, mix_low_rank_in_float64(x_TH, weights_TM, experts), where)
    some = sorted(key.sample(range(tokens), key.randint(1, tokens)))
    check_bits(decode_low_rank, x_TH, weights_TM, experts, some, where)


@pytest.mark.parametrize("case", list(enumerate(pairwise(LOW_RANK_AXES))), ids=lambda case: str(case[0]))
def test_low_rank_experts_at_every_pair_of_values(case, monkeypatch):
    number, values = case[0], dict(case[1])
    key = random.Random(f"low-rank pairs {number}")
    poison(monkeypatch)
    tokens, k = values.pop("tokens"), values.pop("k")
    check_low_rank(key, tokens, k, draw_low_rank(key, **values), f"pair {number}")


@pytest.mark.skipif(not FULL_GRID, reason="FLEXMOE_FULL_GRID is not 1")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_rank_experts_over_the_grid(dtype, activation, monkeypatch):
    key = random.Random(f"low rank {dtype} {activation}")
    poison(monkeypatch)
    for draw in range(DRAWS // 2):
        drawn = {name: key.choice(values) for name, values in LOW_RANK_AXES.items()}
        drawn |= {"dtype": dtype, "activation": activation}
        tokens, k = drawn.pop("tokens"), drawn.pop("k")
        check_low_rank(key, tokens, k, draw_low_rank(key, **drawn), f"{draw=}")
