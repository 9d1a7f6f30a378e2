"""Hidden states of the anchor: equal to the dense model's FFN inputs, and independent of the memory budget."""

import pytest
import torch

from flexmoe.modeling import find_ffn_sites
from flexmoe.routers.hidden_states import RowText, collect_states, ffn_inputs, fit_rows
from flexmoe.routers.rows import row_method
from flexmoe.testing import random_tokens, tiny_anchor, tiny_flexmoe


@pytest.mark.parametrize("family", ["olmo2", "gpt2", "llama"])
def test_states_are_the_dense_models_ffn_inputs(family):
    """Compares with hooks on the dense model; the FlexMoE model has another expert, which must have no effect."""
    dense, model = tiny_anchor(family), tiny_flexmoe(family, ["math"])
    ids = random_tokens(5, 16)
    expected = []
    for site in find_ffn_sites(dense):
        site.ffn(dense).register_forward_pre_hook(lambda _, args: expected.append(args[0].flatten(0, -2)))
    dense(ids)
    model.train()
    for layers in ([0, 1], [1], [0]):
        states = collect_states(model, ids, layers, tokens=70)
        assert sorted(states) == layers
        for layer in layers:
            torch.testing.assert_close(states[layer], expected[layer][:70])
    assert model.training
    assert all(not block._forward_pre_hooks for block in model.flexmoe_blocks())
    torch.testing.assert_close(next(ffn_inputs(model, ids, [0]))[0], expected[0])


@pytest.mark.parametrize("method", ["log_odds", "lda"])
def test_rows_do_not_depend_on_the_memory_budget(method):
    model = tiny_flexmoe("llama")
    own, public = (RowText([], random_tokens(40, 32, seed)) for seed in (1, 2))
    rows = [
        fit_rows(model, row_method(method), own, public, tokens=600, bias=True, seed=0, max_bytes=budget)
        for budget in (1, 10**9)
    ]
    assert len(rows[0]) == 2
    for one, other in zip(*rows, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert one.bias == other.bias


def test_progress_counts_all_tokens_and_layers(capsys):
    own, public = (RowText([], random_tokens(40, 32, seed)) for seed in (1, 2))
    fit = {"tokens": 600, "bias": False, "seed": 0, "max_bytes": 1}
    fit_rows(tiny_flexmoe("llama"), row_method("log_odds"), own, public, **fit)
    assert not capsys.readouterr().err
    fit_rows(tiny_flexmoe("llama"), row_method("log_odds"), own, public, **fit, progress=True)
    shown = capsys.readouterr().err
    assert "Reading states: 100%" in shown
    assert "2.43k/2.43k" in shown  # 19 sequences of a side, in two groups of layers
    assert "Fitting router rows: 100%" in shown
