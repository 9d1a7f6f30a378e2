"""The prefill kernels of full experts: their sort, then all of it against float64; isolation of NaN.

A large random grid is in `tests/soak/test_kernel_experts_grid.py`, speed in `benchmarks/`.
"""

import math

import pytest
import torch

from flexmoe.kernels.experts import prefill_kernel as kernels
from flexmoe.kernels.experts.prefill_kernel import prefill, sort
from flexmoe.testing import TOLERANCES
from tests.kernels.experts.inputs import (
    BIASES,
    DEVICE,
    Experts,
    case_name,
    draw_tokens,
    draw_weights,
    mix_in_float64,
    poison,
    seeded,
    slots,
    table_with_invalid_addresses,
    table_without,
)

SORTS = [(1, 1, 1, 16), (1, 8, 3, 16), (40, 2, 7, 16), (33, 8, 12, 64), (300, 3, 1, 128), (257, 1, 63, 32)]


@pytest.mark.parametrize("few_programs", [False, True])
@pytest.mark.parametrize(("tokens", "k", "n_experts", "block_m"), SORTS)
def test_pairs_are_sorted_by_expert(tokens, k, n_experts, block_m, few_programs, monkeypatch):
    generator = seeded(tokens, k, n_experts)
    ids_TK = torch.randint(0, n_experts + 1, (tokens, k), generator=generator, dtype=torch.int32)
    ids_TK[ids_TK == 2] = 0  # no pair has expert 2
    poison(monkeypatch)
    if few_programs:
        monkeypatch.setattr(kernels, "MAX_SORT_PROGRAMS", 2)
    by_expert = sort(ids_TK.to(DEVICE), n_experts, block_m)

    token_of_row, row_of_slot, expert_of_block = [], torch.full([tokens, k], -1), []
    for e in range(n_experts):
        pairs = (ids_TK == e).nonzero().tolist()
        for t, slot in pairs:
            row_of_slot[t, slot] = len(token_of_row)
            token_of_row.append(t)
        token_of_row += [tokens] * (-len(pairs) % block_m)
        expert_of_block += [e] * -(-len(pairs) // block_m)
    assert by_expert.row_of_slot_TK.tolist() == row_of_slot.tolist()
    assert by_expert.token_of_row.tolist()[: len(token_of_row)] == token_of_row
    surplus = len(by_expert.expert_of_block) - len(expert_of_block)
    assert surplus >= 0
    assert by_expert.expert_of_block.tolist() == expert_of_block + [n_experts] * surplus


def test_every_pair_may_have_a_different_expert():
    """The largest possible number of blocks: each has one pair."""
    ids_TK = torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32, device=DEVICE)
    assert sort(ids_TK, 6, 16).expert_of_block.tolist() == [0, 1, 2, 3, 4, 5]


# A product of all sizes would be slow: each value occurs in at least one row.
CASES = [
    (0, 2, Experts([24, 40], 24)),
    (1, 1, Experts([136], 40)),
    (2, 3, Experts([24, 40, 8], 136, biases=BIASES)),
    (17, 5, Experts([24, 136, 40, 40, 8, 16, 24], 40, activation="gelu_tanh")),
    (65, 2, Experts([40] * 3, 24, gated=False, activation="gelu", biases=("up_bias", "down_bias"))),
    (257, 1, Experts([72, 24, 40], 40, activation="relu", biases=("gate_bias", "down_bias"))),
    (65, 8, Experts([8 * (1 + i % 5) for i in range(12)], 40, activation="gelu", biases=("up_bias",))),
    (3, 8, Experts([24, 16, 40] * 21, 24)),
    (9, 4, Experts([16] * 64, 16, gated=False)),
    (40, 2, Experts([40] * 3, 40, dtype=torch.bfloat16, biases=BIASES)),
    (65, 2, Experts([136, 40, 24], 136, dtype=torch.bfloat16, gated=False, activation="relu")),
    (17, 2, Experts([40, 136, 24], 40, dtype=torch.float16, biases=BIASES)),
]


def run(x_TH, weights_TE, experts):
    """`prefill` with two slots; `clean_TH` is its output for `layer`."""
    return prefill(x_TH, *slots(weights_TE, 2), experts)


@pytest.mark.parametrize(("tokens", "k", "kind"), CASES, ids=case_name)
def test_against_float64(tokens, k, kind, monkeypatch):
    generator = seeded(tokens, k, kind)
    experts = kind.draw(generator)
    x_TH = draw_tokens(tokens, kind.hidden, kind.dtype, generator)
    weights_TE = draw_weights(tokens, len(kind.widths), k, generator)
    poison(monkeypatch)
    y_TH = prefill(x_TH, *slots(weights_TE, k), experts)
    assert y_TH.dtype == kind.dtype
    torch.testing.assert_close(
        y_TH.double().cpu(), mix_in_float64(x_TH, weights_TE, experts), **TOLERANCES[kind.dtype], equal_nan=False
    )
    unrouted_T = (weights_TE == 0).all(-1)
    assert torch.equal(y_TH[unrouted_T], torch.zeros_like(y_TH[unrouted_T]))


def test_no_tokens_need_no_launch(layer, monkeypatch):
    x_TH, weights_TE, experts = layer
    monkeypatch.setattr(kernels, "count_kernel", None)
    assert prefill(x_TH[:0], *slots(weights_TE[:0], 2), experts).shape == (0, 40)


def test_many_tokens_are_processed_in_chunks(layer, clean_TH, monkeypatch):
    """A chunk has a fixed number of pairs, to bound memory: with more slots, fewer tokens."""
    x_TH, weights_TE, experts = layer
    own, chunks = kernels._prefill_chunk, []
    monkeypatch.setattr(kernels, "_prefill_chunk", lambda *args: chunks.append(args[2].numel()) or own(*args))
    monkeypatch.setattr(kernels, "MAX_PAIRS", 50)
    assert torch.equal(run(x_TH, weights_TE, experts), clean_TH)
    assert chunks[0] == max(chunks) == 32
    assert sum(chunks) == 2 * len(x_TH)


def test_surplus_slots_are_ignored(layer):
    """Their weight may be NaN."""
    x_TH, weights_TE, experts = layer
    top_weights_TK, top_ids_TK = slots(weights_TE, 4)
    clean_TH = prefill(x_TH, top_weights_TK, top_ids_TK, experts)
    assert (top_ids_TK == 4).any()
    top_weights_TK[top_ids_TK == 4] = math.nan
    assert torch.equal(prefill(x_TH, top_weights_TK, top_ids_TK, experts), clean_TH)


def test_a_slot_of_weight_0_is_ignored(layer):
    """Even if it has the id of an expert."""
    x_TH, weights_TE, experts = layer
    top_weights_TK, top_ids_TK = slots(weights_TE, 4)
    clean_TH = prefill(x_TH, top_weights_TK, top_ids_TK, experts)
    experts.down[3].fill_(math.nan)
    top_ids_TK[top_ids_TK == 4] = 3
    assert torch.equal(prefill(x_TH, top_weights_TK, top_ids_TK, experts), clean_TH)


def test_nan_in_a_token_reaches_no_other(layer, clean_TH):
    x_TH, weights_TE, experts = layer
    x_TH[1, 3] = math.nan
    y_TH = run(x_TH, weights_TE, experts)
    assert y_TH[1].isnan().all()
    others = torch.arange(17) != 1
    assert torch.equal(y_TH[others], clean_TH[others])


@pytest.mark.parametrize("name", ["gate", "up", "down", *BIASES])
def test_nan_in_an_expert_reaches_only_its_tokens(name, layer, clean_TH):
    x_TH, weights_TE, experts = layer
    for e in (0, 3):  # no token is routed to 3
        getattr(experts, name)[e].fill_(math.nan)
    y_TH = run(x_TH, weights_TE, experts)
    routed_T = weights_TE[:, 0] != 0
    assert routed_T.any()
    assert y_TH[routed_T].isnan().all()
    assert torch.equal(y_TH[~routed_T], clean_TH[~routed_T])


def test_weights_that_are_nan_make_the_token_nan(layer, clean_TH):
    x_TH, weights_TE, experts = layer
    weights_TE[1] = math.nan
    y_TH = run(x_TH, weights_TE, experts)
    assert y_TH[1].isnan().all()
    others = torch.arange(17) != 1
    assert torch.equal(y_TH[others], clean_TH[others])


@pytest.mark.parametrize("name", ["gate", "up", "down", *BIASES])
def test_a_removed_tensor_gives_nan_and_is_not_read(name, layer, clean_TH, monkeypatch):
    x_TH, weights_TE, experts = layer
    table = table_without(experts, getattr(experts, name)[1])
    monkeypatch.setattr(kernels, "expert_table", lambda _: table)
    y_TH = run(x_TH, weights_TE, experts)
    routed_T = weights_TE[:, 1] != 0
    assert routed_T.any()
    assert not routed_T.all()
    assert y_TH[routed_T].isnan().all()
    assert torch.equal(y_TH[~routed_T], clean_TH[~routed_T])


@pytest.mark.parametrize("e", [0, 3])
def test_an_expert_without_tokens_is_not_read(e, layer, monkeypatch):
    x_TH, weights_TE, experts = layer
    weights_TE[:, e] = 0.0
    clean_TH = run(x_TH, weights_TE, experts)
    table = table_with_invalid_addresses(experts, e)
    monkeypatch.setattr(kernels, "expert_table", lambda _: table)
    assert torch.equal(run(x_TH, weights_TE, experts), clean_TH)
