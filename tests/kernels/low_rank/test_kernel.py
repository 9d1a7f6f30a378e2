"""The kernel of low-rank experts: against float64, isolation of NaN, bits that do not depend on the batch.

A random grid is in `tests/soak/test_kernel_experts_grid.py`, the operator in `test_op.py`.
"""

import math

import pytest
import torch

from flexmoe.kernels.low_rank import kernel as kernels
from flexmoe.kernels.low_rank.kernel import decode_low_rank
from flexmoe.kernels.low_rank.reference import mix_low_rank
from flexmoe.kernels.pointers import update_pointers
from flexmoe.kernels.triton_common import expert_table, low_rank_table
from flexmoe.testing import TOLERANCES
from tests.kernels.experts.inputs import BIASES, DEVICE, draw_tokens, draw_weights, poison, seeded
from tests.kernels.low_rank.inputs import LowRank, mix_low_rank_in_float64

BF16, F16 = torch.bfloat16, torch.float16
UP_DOWN = ("up_bias", "down_bias")

# tokens, k, experts. A product of all sizes would be slow: each value occurs in at least one row.
CASES = [
    (0, 1, LowRank([3], 24, 40)),
    (1, 1, LowRank([16], 40, 136, public=0)),
    (3, 2, LowRank([1, 3], 24, 72, public=1, biases=BIASES)),
    (17, 3, LowRank([40, 16, 3, 1], 40, 40, public=4, biases=("gate_bias", "down_bias"), activation="gelu_tanh")),
    (17, 2, LowRank([40, 8], 24, 40, gated=False, biases=UP_DOWN, activation="relu")),
    (64, 2, LowRank([16, 16], 40, 24, public=0, biases=("up_bias",), activation="gelu")),
    (2, 5, LowRank([1, 2, 4, 5, 9], 8, 8, activation="gelu")),
    (3, 3, LowRank([1 + i % 3 for i in range(63)], 16, 8, public=30, gated=False)),
    (5, 2, LowRank([24, 8], 72, 40, public=2, dtype=BF16, biases=BIASES)),
    (17, 2, LowRank([3, 40], 24, 72, dtype=F16, gated=False, activation="relu")),
]


def drawn(tokens, k, kind):
    generator = seeded(tokens, k, kind)
    x_TH = draw_tokens(tokens, kind.hidden, kind.dtype, generator)
    return x_TH, draw_weights(tokens, kind.members, k, generator), kind.draw(generator)


def name_of(value):
    return str(value.ranks if len(value.ranks) < 6 else len(value.ranks)) if isinstance(value, LowRank) else str(value)


@pytest.mark.parametrize(("tokens", "k", "kind"), CASES, ids=name_of)
def test_against_float64(tokens, k, kind, monkeypatch):
    x_TH, weights_TM, experts = drawn(tokens, k, kind)
    expected_TH = mix_low_rank_in_float64(x_TH, weights_TM, experts)
    poison(monkeypatch)
    for run in (decode_low_rank, mix_low_rank) if kind.dtype == torch.float32 else (decode_low_rank,):
        y_TH = run(x_TH, weights_TM, experts)
        assert y_TH.dtype == kind.dtype
        torch.testing.assert_close(y_TH.double().cpu(), expected_TH, **TOLERANCES[kind.dtype], equal_nan=False)
        unrouted_T = (weights_TM == 0).all(-1)
        assert torch.equal(y_TH[unrouted_T], torch.zeros_like(y_TH[unrouted_T]))


def test_no_tokens_need_no_launch(layer, monkeypatch):
    for name in ("shrink_kernel", "gate_up_kernel", "down_kernel"):
        monkeypatch.setattr(kernels, name, None)
    assert decode_low_rank(layer.x_TH[:0], layer.weights_TM[:0], layer.experts).shape == (0, 24)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_tokens_bits_do_not_depend_on_the_batch(dtype, ordered_products):
    x_TH, weights_TM, experts = drawn(64, 1, LowRank([20], 40, 40, public=0, dtype=dtype, biases=BIASES))
    y_TH = decode_low_rank(x_TH, weights_TM, experts)
    for batch in ([63], list(range(30, 47))):
        assert torch.equal(decode_low_rank(x_TH[batch], weights_TM[batch], experts), y_TH[batch]), batch


def test_nan_in_a_token_reaches_no_other(layer):
    layer.x_TH[1, 3] = math.nan
    layer.check_nan_for([1])


def test_weights_that_are_nan_make_the_token_nan(layer):
    layer.weights_TM[1] = math.nan
    layer.check_nan_for([1])


MATRICES = [("a", name) for name in ("gate", "up", "down")] + [("b", name) for name in ("gate", "up", "down", *BIASES)]
TOKENS_OF = {0: [0, 3], 1: [0, 1], 2: []}  # by index of the low-rank expert


@pytest.mark.parametrize("e", TOKENS_OF)
def test_nan_in_an_expert_reaches_only_its_tokens(e, layer):
    for factor, name in MATRICES:
        getattr(getattr(layer.experts, factor), name)[e].fill_(math.nan)
    layer.check_nan_for(TOKENS_OF[e])


@pytest.mark.parametrize(("factor", "name"), MATRICES)
def test_a_removed_tensor_gives_nan_and_is_not_read(factor, name, layer, monkeypatch):
    table = low_rank_table(layer.experts)
    update_pointers({getattr(getattr(layer.experts, factor), name)[1].data_ptr(): 0})
    monkeypatch.setattr(kernels, "low_rank_table", lambda _: table)
    layer.check_nan_for(TOKENS_OF[1])


@pytest.mark.parametrize("name", ["gate", "up", "down", *BIASES])
def test_without_the_public_network_all_tokens_are_nan(name, layer, monkeypatch):
    public = expert_table(layer.experts.public)
    update_pointers({getattr(layer.experts.public, name)[0].data_ptr(): 0})
    monkeypatch.setattr(kernels, "expert_table", lambda _: public)
    layer.check_nan_for([0, 1, 2, 3])


def test_without_routed_tokens_nothing_is_read(layer, monkeypatch):
    removed = torch.zeros(7, 1, dtype=torch.int64, device=DEVICE)
    monkeypatch.setattr(kernels, "expert_table", lambda _: removed)
    layer.weights_TM.zero_()
    assert torch.equal(layer.run(), torch.zeros(5, 24, device=DEVICE))
