"""The router's kernel over a random grid of sizes, masks and dtypes, against a witness in float64, gradients too.

Slots are compared where float64 sees logits further apart than float32 can confuse, and weights that are no less than
its smallest number: below, they are 0 and the slot is surplus. Not here: the table of single
cases (`tests/kernels/test_route.py`).
"""

import random

import pytest
import torch

pytest.importorskip("triton")

from flexmoe.modeling.kernels_route_flexmoe import route, route_backward
from flexmoe.testing import TOLERANCES
from tests.kernels.router_inputs import MASKS, draw, poisoned, witness, witness_of

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOKENS = (0, 1, 2, 15, 17, 33, 64, 65, 130, 257)
HIDDENS = (8, 40, 136, 264, 1032, 2056, 4096)
DTYPES = ((F32, F32), (BF16, F32), (F16, F32), (BF16, BF16), (F16, F16))


def decided(logits):
    """Rows in which no two allowed logits are closer than float32 tells apart; equal integers are told apart."""
    gaps = logits.sort(dim=-1).values.diff(dim=-1)
    return ~((gaps > 0) & (gaps < 1e-4)).any(-1)


@pytest.mark.parametrize("integers", [False, True], ids=["normal", "ties"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("experts", [1, 2, 3, 5, 7, 8, 9, 12, 16, 17, 31, 33, 63, 64])
def test_over_the_grid(experts, mask, integers):
    choose = random.Random(f"{experts} {mask} {integers}")
    for seed in range(3):
        tokens, hidden, k = choose.choice(TOKENS), choose.choice(HIDDENS), choose.randint(1, 9)
        renormalize = choose.random() < 0.5
        dtypes = choose.choice(DTYPES)
        where = f"{tokens=} {experts=} {k=} {hidden=} {dtypes=} {renormalize=} {seed=}"
        inputs = draw(tokens, experts, k, hidden, mask, *dtypes, integers=integers, seed=seed)
        with poisoned():
            routing = route(inputs.x, inputs.rows, inputs.biases, inputs.offset, k, renormalize)
        expected = witness_of(inputs, k, renormalize)
        tiny = (expected[2] > 0) & (expected[2] < torch.finfo(F32).tiny)
        expected[3][tiny] = routing.top_ids_TK[tiny]
        rows = decided(expected[0])
        # an integer of some thousands has fewer bits behind the point
        limits = {"rtol": 2e-5, "atol": 2e-5, "msg": lambda text, where=where: f"{where}: {text}"}
        for ours, theirs in zip(routing, expected, strict=True):
            torch.testing.assert_close(ours[rows].double(), theirs[rows].double(), **limits)
        check_gradients(inputs, routing, k, renormalize, rows, where)


def check_gradients(inputs, routing, k, renormalize, rows, where):
    generator = torch.Generator().manual_seed(k)
    towards = [torch.randn(t.shape, generator=generator) * rows[:, None] for t in routing[:3]]
    leaves = [inputs.x, torch.cat(inputs.rows), torch.cat(inputs.biases), inputs.offset]
    leaves = [None if leaf is None else leaf.double().requires_grad_() for leaf in leaves]
    results = witness(*leaves, k, renormalize)[:3]
    products = (torch.where(r.isinf(), 0.0, r) * t.double() for r, t in zip(results, towards, strict=True))
    sum(product.sum() for product in products).backward()
    ours = route_backward(*towards, inputs.x, inputs.rows, routing, k, renormalize)
    for name, a, leaf in zip(("x", "rows", "biases", "offset"), ours, leaves, strict=True):
        if leaf is not None:
            limits = TOLERANCES[inputs.x.dtype] if name == "x" else {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(a.double(), leaf.grad, **limits, msg=lambda t, n=name: f"{where} d{n}: {t}")
