"""The decode kernel of full experts: against float64, isolation of NaN, bits that do not depend on the batch.

A large random grid is in `tests/soak/test_kernel_experts_grid.py`, speed in `benchmarks/`.
"""

import math

import pytest
import torch

from flexmoe.kernels.experts import decode_kernel as kernels
from flexmoe.kernels.experts.decode_kernel import MAX_TOKENS, decode
from flexmoe.testing import TOLERANCES
from tests.kernels.experts.inputs import (
    BIASES,
    Experts,
    case_name,
    draw_tokens,
    draw_weights,
    mix_in_float64,
    poison,
    seeded,
    table_with_invalid_addresses,
    table_without,
)

# A product of all sizes would be slow: each value occurs in at least one row.
CASES = [
    (0, 2, Experts([24, 40], 24)),
    (1, 1, Experts([136], 40)),
    (2, 1, Experts([24, 40, 8], 136, biases=BIASES)),
    (15, 3, Experts([40] * 3, 24, gated=False, activation="gelu", biases=("up_bias", "down_bias"))),
    (17, 5, Experts([24, 136, 40, 40, 8, 16, 24], 40, activation="gelu_tanh")),
    (33, 2, Experts([264, 24, 40], 40, activation="relu", biases=("gate_bias", "down_bias"))),
    (64, 8, Experts([8 * (1 + i % 5) for i in range(12)], 40, activation="gelu", biases=("up_bias",))),
    (3, 8, Experts([24, 16, 40] * 21, 24)),
    (4, 1, Experts([16] * 64, 16, gated=False)),
    (5, 2, Experts([40] * 3, 40, dtype=torch.bfloat16, biases=BIASES)),
    (64, 2, Experts([136, 40, 24], 136, dtype=torch.bfloat16, gated=False, activation="relu")),
    (17, 2, Experts([40, 136, 24], 40, dtype=torch.float16, biases=BIASES)),
]


run = decode  # of which `clean_TH` is the output


@pytest.mark.parametrize(("tokens", "k", "kind"), CASES, ids=case_name)
def test_against_float64(tokens, k, kind, monkeypatch):
    generator = seeded(tokens, k, kind)
    experts = kind.draw(generator)
    x_TH = draw_tokens(tokens, kind.hidden, kind.dtype, generator)
    weights_TE = draw_weights(tokens, len(kind.widths), k, generator)
    poison(monkeypatch)
    y_TH = decode(x_TH, weights_TE, experts)
    assert y_TH.dtype == kind.dtype
    torch.testing.assert_close(
        y_TH.double().cpu(), mix_in_float64(x_TH, weights_TE, experts), **TOLERANCES[kind.dtype], equal_nan=False
    )
    unrouted_T = (weights_TE == 0).all(-1)
    assert torch.equal(y_TH[unrouted_T], torch.zeros_like(y_TH[unrouted_T]))


def test_no_tokens_need_no_launch(layer, monkeypatch):
    x_TH, weights_TE, experts = layer
    monkeypatch.setattr(kernels, "gate_up_kernel", None)
    monkeypatch.setattr(kernels, "down_kernel", None)
    assert decode(x_TH[:0], weights_TE[:0], experts).shape == (0, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tokens_bits_do_not_depend_on_the_batch(dtype, ordered_products):
    generator = seeded("batches")
    experts = Experts([136, 24], 40, dtype=dtype, biases=BIASES).draw(generator)
    x_TH = draw_tokens(MAX_TOKENS, 40, dtype, generator)
    weights_TE = draw_weights(MAX_TOKENS, 2, 1, generator)
    y_TH = decode(x_TH, weights_TE, experts)
    for batch in ([63], list(range(20, 37))):
        assert torch.equal(decode(x_TH[batch], weights_TE[batch], experts), y_TH[batch]), batch


def test_nan_in_a_token_reaches_no_other(layer, clean_TH):
    x_TH, weights_TE, experts = layer
    x_TH[1, 3] = math.nan
    y_TH = decode(x_TH, weights_TE, experts)
    assert y_TH[1].isnan().all()
    others = torch.arange(17) != 1
    assert torch.equal(y_TH[others], clean_TH[others])


@pytest.mark.parametrize("name", ["gate", "up", "down", *BIASES])
def test_nan_in_an_expert_reaches_only_its_tokens(name, layer, clean_TH):
    x_TH, weights_TE, experts = layer
    for e in (0, 3):  # no token is routed to 3
        getattr(experts, name)[e].fill_(math.nan)
    y_TH = decode(x_TH, weights_TE, experts)
    routed_T = weights_TE[:, 0] != 0
    assert routed_T.any()
    assert y_TH[routed_T].isnan().all()
    assert torch.equal(y_TH[~routed_T], clean_TH[~routed_T])


def test_weights_that_are_nan_make_the_token_nan(layer, clean_TH):
    x_TH, weights_TE, experts = layer
    weights_TE[1] = math.nan
    y_TH = decode(x_TH, weights_TE, experts)
    assert y_TH[1].isnan().all()
    others = torch.arange(17) != 1
    assert torch.equal(y_TH[others], clean_TH[others])


@pytest.mark.parametrize("name", ["gate", "up", "down", *BIASES])
def test_a_removed_tensor_gives_nan_and_is_not_read(name, layer, clean_TH, monkeypatch):
    x_TH, weights_TE, experts = layer
    table = table_without(experts, getattr(experts, name)[1])
    monkeypatch.setattr(kernels, "expert_table", lambda _: table)
    y_TH = decode(x_TH, weights_TE, experts)
    routed_T = weights_TE[:, 1] != 0
    assert routed_T.any()
    assert not routed_T.all()
    assert y_TH[routed_T].isnan().all()
    assert torch.equal(y_TH[~routed_T], clean_TH[~routed_T])


@pytest.mark.parametrize("e", [0, 3])
def test_an_expert_without_tokens_is_not_read(e, layer, monkeypatch):
    x_TH, weights_TE, experts = layer
    weights_TE[:, e] = 0.0
    clean_TH = decode(x_TH, weights_TE, experts)
    table = table_with_invalid_addresses(experts, e)
    monkeypatch.setattr(kernels, "expert_table", lambda _: table)
    assert torch.equal(decode(x_TH, weights_TE, experts), clean_TH)
