"""The routing kernel over a grid of sizes, masks and dtypes, against float64, with its gradients.

Every pair of values of any two parameters (`tests/support/pairwise.py`); with `FLEXMOE_FULL_GRID=1` also random draws
for each number of experts, mask and kind of logits, which take hours in Triton's interpreter.
Slots are compared where the logits differ by more than float32 rounding errors, and where the weights do not underflow
in float32 (an underflowed weight is 0, and its slot unused). Does not cover single cases
(`tests/kernels/route/test_kernel.py`).
"""

import random

import pytest
import torch

pytest.importorskip("triton")

from flexmoe.kernels.route.kernel import route
from flexmoe.testing import TOLERANCES
from tests.kernels.route.inputs import MASKS, all_gradients, draw, expected, poisoned, route_in_float64
from tests.support.pairwise import FULL_GRID, pairwise

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TOKENS = (0, 1, 2, 15, 17, 33, 64, 65, 130, 257)
HIDDENS = (8, 40, 136, 264, 1032, 2056, 4096)
DTYPES = ((F32, F32), (BF16, F32), (F16, F32), (BF16, BF16), (F16, F16))
EXPERTS = (1, 2, 3, 5, 7, 8, 9, 12, 16, 17, 31, 33, 63, 64)
AXES = {
    "tokens": TOKENS,
    "experts": EXPERTS,
    "k": range(1, 10),
    "hidden": HIDDENS,
    "mask": MASKS,
    "dtypes": DTYPES,
    "integers": (False, True),
    "renormalize": (False, True),
}


def have_clear_order(logits):
    """Rows in which no two allowed logits are nearly equal; exactly equal integers are fine."""
    gaps = logits.sort(dim=-1).values.diff(dim=-1)
    return ~((gaps > 0) & (gaps < 1e-4)).any(-1)


@pytest.mark.parametrize("case", list(enumerate(pairwise(AXES))), ids=lambda case: str(case[0]))
def test_every_pair_of_values(case):
    check(seed=case[0], **case[1])


@pytest.mark.skipif(not FULL_GRID, reason="FLEXMOE_FULL_GRID is not 1")
@pytest.mark.parametrize("integers", [False, True], ids=["normal", "ties"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("experts", EXPERTS)
def test_over_the_grid(experts, mask, integers):
    choose = random.Random(f"{experts} {mask} {integers}")
    for seed in range(3):
        drawn = {name: choose.choice(AXES[name]) for name in ("tokens", "hidden", "k", "renormalize", "dtypes")}
        check(experts=experts, mask=mask, integers=integers, seed=seed, **drawn)


def check(*, tokens, experts, k, hidden, mask, dtypes, integers, renormalize, seed):
    where = f"{tokens=} {experts=} {k=} {hidden=} {mask=} {dtypes=} {integers=} {renormalize=} {seed=}"
    inputs = draw(tokens, experts, k, hidden, mask, *dtypes, integers=integers, seed=seed)
    with poisoned():
        routing = route(inputs.x, inputs.rows, inputs.biases, inputs.offset, k, renormalize)
    exact = expected(inputs, k, renormalize)
    tiny = (exact[2] > 0) & (exact[2] < torch.finfo(F32).tiny)
    exact[3][tiny] = routing.top_ids_TK[tiny]
    rows = have_clear_order(exact[0])
    # integers of some thousands have fewer fractional bits
    limits = {"rtol": 2e-5, "atol": 2e-5, "msg": lambda text: f"{where}: {text}"}
    for ours, theirs in zip(routing, exact, strict=True):
        torch.testing.assert_close(ours[rows].double(), theirs[rows].double(), **limits)
    check_gradients(inputs, routing, k, renormalize, rows, where)


def check_gradients(inputs, routing, k, renormalize, rows, where):
    generator = torch.Generator().manual_seed(k)
    d_results = [torch.randn(t.shape, generator=generator) * rows[:, None] for t in routing[:3]]
    leaves = [inputs.x, torch.cat(inputs.rows), torch.cat(inputs.biases), inputs.offset]
    leaves = [None if leaf is None else leaf.double().requires_grad_() for leaf in leaves]
    results = route_in_float64(*leaves, k, renormalize)[:3]
    products = (torch.where(r.isinf(), 0.0, r) * t.double() for r, t in zip(results, d_results, strict=True))
    sum(product.sum() for product in products).backward()
    ours = all_gradients(d_results, inputs.x, inputs.rows, routing, k, renormalize)
    for name, a, leaf in zip(("x", "rows", "biases", "offset"), ours, leaves, strict=True):
        if leaf is not None:
            limits = TOLERANCES[inputs.x.dtype] if name == "x" else {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(a.double(), leaf.grad, **limits, msg=lambda t, n=name: f"{where} d{n}: {t}")
