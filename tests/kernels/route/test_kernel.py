"""The router's kernel against float64: values, slots, every gradient, and the cases in the table of the reference.

In Triton's interpreter, where there is no GPU. The full grid is in `tests/soak/test_kernel_route_grid.py`.
"""

import math

import pytest
import torch

pytest.importorskip("triton")

from flexmoe.kernels.route import kernel as kernels
from flexmoe.kernels.route.kernel import MAX_FEW, route
from flexmoe.testing import TOLERANCES
from tests.kernels.route.inputs import Inputs, all_gradients, draw, expected, poisoned, route_in_float64

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INF, NAN = math.inf, math.nan
FEW, MANY = 3, MAX_FEW + 1


def run(inputs, k, renormalize=True):
    on = [[t.to(DEVICE) for t in tensors] for tensors in (inputs.rows, inputs.biases)]
    offset = None if inputs.offset is None else inputs.offset.to(DEVICE)
    with poisoned():
        routing = route(inputs.x.to(DEVICE), *on, offset, k, renormalize)
    return type(routing)(*(t.cpu() for t in routing))


def check(inputs, k, renormalize=True):
    """Compares all four results with float64."""
    ours, theirs = run(inputs, k, renormalize), expected(inputs, k, renormalize)
    for name, a, b in zip(ours._fields, ours, theirs, strict=True):
        assert a.dtype == (torch.int32 if name == "top_ids_TK" else F32)
        message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(a.double(), b.double(), **TOLERANCES[F32], equal_nan=True, msg=message)
    return ours


# tokens, experts, k, hidden, mask, dtypes of x and rows
GRID = [
    (0, 3, 2, 8, "no offset", F32, F32),
    (1, 1, 1, 8, "no offset", F32, F32),
    (2, 2, 1, 40, "one masked", BF16, F32),
    (15, 3, 2, 136, "random", F16, F32),
    (17, 7, 5, 40, "evidence", BF16, BF16),
    (33, 7, 5, 136, "fewer than k", F32, F32),
    (3, 12, 8, 40, "random", F16, F16),
    (2, 63, 4, 2056, "one masked", BF16, F32),
    (3, 64, 8, 4104, "random", F32, F32),
    (4, 3, 8, 8, "one allowed", F32, F32),
    (3, 7, 2, 8, "nothing allowed", F32, F32),
    (65, 1, 3, 8, "no offset", BF16, F32),
    (65, 2, 2, 40, "evidence", F32, F32),
    (81, 7, 5, 264, "random", BF16, F32),
    (257, 3, 1, 40, "one masked", F16, F32),
    (66, 12, 12, 136, "fewer than k", BF16, BF16),
    (65, 63, 3, 136, "one allowed", F32, F32),
    (67, 64, 8, 40, "random", F16, F32),
    (70, 7, 9, 8, "nothing allowed", F32, F32),
]


@pytest.mark.parametrize("case", GRID, ids=lambda case: "-".join(map(str, case[:5])))
def test_values_and_slots(case):
    tokens, experts, k, hidden, mask, x_dtype, row_dtype = case
    inputs = draw(tokens, experts, k, hidden, mask, x_dtype, row_dtype, seed=sum(case[:4]))
    check(inputs, k, renormalize=bool(tokens % 2))


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_ties_go_to_the_lowest_index(tokens):
    inputs = draw(tokens, 7, 4, 8, "random", integers=True)
    assert len(torch.stack(inputs.biases).unique()) < 7
    check(inputs, 4)
    same = Inputs(inputs.x, [inputs.rows[0]] * 6, [-inputs.biases[0] * 0] * 6, None)
    ours = run(same, 2)
    assert ours.weights_TE.tolist() == [[0.5, 0.5, 0, 0, 0, 0]] * tokens
    assert ours.top_ids_TK.tolist() == [[0, 1]] * tokens


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("zeros", [(0.0, -0.0), (-0.0, 0.0)])
def test_the_two_zeros_are_equal(tokens, zeros):
    x, rows = torch.zeros(tokens, 8), [torch.zeros(1, 8)] * 3
    offset = torch.full((tokens, 3), -1.0)
    offset[:, 1:] = torch.tensor(zeros)
    biases = [torch.full((1,), -0.0)] * 3
    assert run(Inputs(x, rows, biases, offset), 1).top_ids_TK.tolist() == [[1]] * tokens


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("renormalize", [True, False])
def test_nan_and_infinite_logits(tokens, renormalize):
    inputs = draw(tokens, 5, 3, 8, "evidence")
    inputs.x[0, 3] = NAN
    inputs.offset[1, 2] = INF
    inputs.rows[4][0, 5] = NAN  # allowed for the last token only
    inputs.biases[4][:] = NAN
    inputs.offset[:-1, 4] = -INF
    ours = check(inputs, 3, renormalize)
    assert ours.weights_TE[[0, 1, -1]].isnan().all()
    assert ours.top_ids_TK[[0, 1, -1]].tolist() == [[0, 1, 2]] * 3
    assert ours.weights_TE[2:-1].isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # from NumPy, which the interpreter computes with
@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("value", [INF, NAN])
def test_a_masked_row_may_be_infinite(tokens, value):
    inputs = draw(tokens, 4, 2, 8, "evidence")
    inputs.offset[:, 1] = -INF
    clean = run(inputs, 2)
    inputs.rows[1].fill_(value)
    for ours, theirs in zip(run(inputs, 2), clean, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_far_apart_logits(tokens):
    """A weight that underflows in float32 is 0, so its slot is surplus."""
    inputs = draw(tokens, 3, 2, 8)
    inputs.biases[0].fill_(500.0)
    inputs.biases[1].fill_(-500.0)
    inputs.biases[2].fill_(-600.0)
    ours = run(inputs, 2)
    assert ours.top_ids_TK.tolist() == [[0, 3]] * tokens
    assert ours.top_weights_TK.tolist() == [[1.0, 0.0]] * tokens


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_one_expert_weighs_exactly_one(tokens):
    assert (run(draw(tokens, 1, 1, 40), 1).weights_TE == 1).all()


@pytest.mark.parametrize("tokens", [FEW, MANY])
def test_masked_is_removed_in_every_bit_of_the_weights(tokens):
    inputs = draw(tokens, 8, 3, 40, "evidence")
    allowed = [0, 2, 3, 6, 7]
    inputs.offset[:, [1, 4, 5]] = -INF
    masked = run(inputs, 3)
    fewer = Inputs(
        inputs.x, [inputs.rows[e] for e in allowed], [inputs.biases[e] for e in allowed], inputs.offset[:, allowed]
    )
    removed = run(fewer, 3)
    assert torch.equal(masked.weights_TE[:, allowed], removed.weights_TE)
    assert torch.equal(masked.top_weights_TK, removed.top_weights_TK)
    assert not masked.weights_TE[:, [1, 4, 5]].any()


def test_a_tokens_bits_do_not_depend_on_the_batch():
    inputs = draw(33, 7, 5, 2056, "evidence", BF16)
    together = run(inputs, 5)
    for t in (0, 32):
        alone = run(Inputs(inputs.x[t : t + 1], inputs.rows, inputs.biases, inputs.offset[t : t + 1]), 5)
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a[0], b[t])


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("view", [lambda x: x[:, 8:48], lambda x: x[:, ::2][:, :40], lambda x: x[::2, 3:43]])
def test_views_of_x_and_of_the_offset(tokens, view):
    big = draw(2 * tokens, 80, 3, 96, "evidence")
    x = view(big.x)[:tokens]
    inputs = Inputs(x, [row[:, :40].clone() for row in big.rows[:5]], big.biases[:5], big.offset[:tokens, 3:8])
    check(inputs, 3)


def test_one_mask_for_all_tokens():
    inputs = draw(4, 5, 3, 8, "random")
    check(Inputs(inputs.x, inputs.rows, inputs.biases, inputs.offset[:1].expand(4, -1)), 3)


@pytest.mark.parametrize("tokens", [FEW, MANY])
@pytest.mark.parametrize("removed", ["row", "bias"])
def test_a_removed_expert_gives_nan_and_is_not_read(tokens, removed, monkeypatch):
    inputs = draw(tokens, 4, 2, 8, "evidence")
    inputs.offset[0, 1] = -INF
    row_table = kernels.row_table

    def without_expert_1(rows, biases):
        table = row_table(rows, biases).clone()
        table[0 if removed == "row" else 1, 1] = 0
        return table

    monkeypatch.setattr(kernels, "row_table", without_expert_1)
    ours = run(inputs, 2)
    assert ours.logits_TE[1:, 1].isnan().all()
    assert ours.weights_TE[1:].isnan().all()
    assert ours.weights_TE[0].isfinite().all()


def gradients_in_float64(inputs, k, renormalize, d_results):
    """Gradients of x, rows, biases and offset; `d_results`: the gradient of each of three results, or None."""
    leaves = [inputs.x, torch.cat(inputs.rows), torch.cat(inputs.biases), inputs.offset]
    leaves = [None if leaf is None else leaf.double().requires_grad_() for leaf in leaves]
    results = route_in_float64(*leaves, k, renormalize)[:3]
    loss = sum(
        (torch.where(result.isinf(), 0.0, result) * d_result.double()).sum()
        for result, d_result in zip(results, d_results, strict=True)
        if d_result is not None
    )
    loss.backward()
    return [None if leaf is None else leaf.grad for leaf in leaves]


GRADIENTS = [
    # tokens, experts, k, hidden, mask, x, which of the results have a gradient
    (3, 1, 1, 8, "no offset", F32, (1, 1, 1)),
    (17, 7, 5, 40, "evidence", BF16, (1, 1, 1)),
    (5, 12, 3, 136, "random", F32, (0, 1, 0)),
    (4, 3, 8, 8, "fewer than k", F16, (0, 0, 1)),
    (33, 4, 2, 520, "one masked", F32, (1, 0, 0)),
    (65, 63, 8, 40, "random", F32, (0, 1, 1)),
    (2, 3, 2, 8, "nothing allowed", F32, (1, 1, 1)),
    (0, 3, 2, 8, "no offset", F32, (1, 1, 1)),
]


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("case", GRADIENTS, ids=lambda case: "-".join(map(str, case[:5])))
def test_gradients(case, renormalize):
    tokens, experts, k, hidden, mask, x_dtype, which = case
    inputs = draw(tokens, experts, k, hidden, mask, x_dtype, seed=1)
    routing = run(inputs, k, renormalize)
    generator = torch.Generator().manual_seed(2)
    d_results = [
        torch.randn(t.shape, generator=generator) if on else None for t, on in zip(routing, which, strict=False)
    ]
    d_results[0] = None if d_results[0] is None else d_results[0].masked_fill(routing.logits_TE.isinf(), 7.0)
    theirs = gradients_in_float64(inputs, k, renormalize, d_results)
    with poisoned():
        ours = all_gradients(
            [None if t is None else t.to(DEVICE) for t in d_results],
            inputs.x.to(DEVICE),
            [row.to(DEVICE) for row in inputs.rows],
            type(routing)(*(t.to(DEVICE) for t in routing)),
            k,
            renormalize,
        )
    assert ours[0].dtype == x_dtype
    assert all(t.dtype == F32 for t in ours[1:])
    for name, a, b in zip(("x", "rows", "biases", "offset"), ours, theirs, strict=True):
        if b is None:
            continue
        message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        tolerance = TOLERANCES[x_dtype if name == "x" else F32]
        torch.testing.assert_close(a.cpu().double(), b, **tolerance, msg=message)


def test_a_masked_row_of_nan_does_not_reach_gradients():
    inputs = draw(3, 4, 2, 8, "evidence")
    inputs.offset[0, 1] = inputs.offset[2, 1] = -INF
    inputs.rows[1].fill_(NAN)
    routing = run(inputs, 2)
    ones = torch.ones(3, 4, device=DEVICE)
    x, rows, on_device = inputs.x.to(DEVICE), [row.to(DEVICE) for row in inputs.rows], [t.to(DEVICE) for t in routing]
    dx, _, _, d_offset = all_gradients((ones, ones, None), x, rows, type(routing)(*on_device), 2, True)
    assert dx[[0, 2]].isfinite().all()
    assert d_offset[[0, 2]].isfinite().all()
    assert dx[1].isnan().all()
    assert d_offset[1].isnan().all()
