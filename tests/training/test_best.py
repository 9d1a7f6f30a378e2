"""The best validation is found, its expert is kept, and training stops in time."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flexmoe.training.best import (
    BEST_FILE,
    KeepBest,
    Validation,
    best_of,
    load_best,
    save_best,
    validations,
    without_improvement,
)


def history(*losses: tuple[int, float, float]) -> list[dict[str, float]]:
    """What a Trainer logs for (step, own, public)."""
    return [
        {f"eval_{side}_loss": loss, "step": step}
        for step, own, public in losses
        for side, loss in (("own", own), ("public", public))
    ]


def test_own_and_public_losses_are_weighted_as_they_are_trained():
    measured = validations([{"loss": 1.0, "step": 5}, *history((0, 1, 1), (10, 3, 2), (20, 2.5, 3))])
    assert measured[1] == Validation(10, {"own": 3, "public": 2})
    assert (best_of(measured, 0.0).step, best_of(measured, 0.4).step) == (20, 10), "2.7 and 2.6 at a ratio of 0.4"
    assert Validation(1, {"own": 2}).score(0.4) == 2, "own text alone"


def test_the_first_of_equal_ones_is_the_best_and_step_0_is_none():
    measured = validations(history((0, 1, 1), (10, 2, 2), (20, 2, 2), (30, 3, 3)))
    assert best_of(measured, 0.4).step == 10
    assert without_improvement(measured, 0.4) == 2
    assert best_of(measured[:1], 0.4) is None
    assert without_improvement(measured[:1], 0.4) == 0


def evaluated(tmp_path, model, lines, *losses, patience=2) -> SimpleNamespace:
    """The Trainer's control after a validation."""
    keep = KeepBest(tmp_path, {"own", "public"}, public_ratio=0.4, patience=patience, show=lines.append)
    step = int(losses[-1][0])
    state = SimpleNamespace(log_history=history(*losses), global_step=step, max_steps=100, is_world_process_zero=True)
    control = SimpleNamespace(should_training_stop=False)
    keep.on_evaluate(None, state, control, model=model)
    return control


def test_the_best_is_stored_and_training_stops_after_some_that_are_not(tmp_path):
    model, lines = nn.Linear(2, 1), []
    model.bias.requires_grad_(False)
    assert not evaluated(tmp_path, model, lines, (0, 1, 1)).should_training_stop
    assert not (tmp_path / BEST_FILE).exists(), "step 0 is no expert"
    evaluated(tmp_path, model, lines, (0, 1, 1), (10, 2, 2))
    best = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.zero_()
    assert not evaluated(tmp_path, model, lines, (0, 1, 1), (10, 2, 2), (20, 3, 3)).should_training_stop
    assert evaluated(tmp_path, model, lines, (0, 1, 1), (10, 2, 2), (20, 3, 3), (30, 3, 3)).should_training_stop
    assert "step 10" in lines[-1]
    load_best(tmp_path, {"weight": model.weight}, 10)
    assert torch.equal(model.weight, best)


def test_a_validation_counts_once_all_sides_are_measured(tmp_path):
    keep = KeepBest(tmp_path, {"own", "public"}, public_ratio=0.4, patience=1, show=print)
    half = history((0, 1, 1), (10, 2, 2))[:-1]
    state = SimpleNamespace(log_history=half, global_step=10, max_steps=100, is_world_process_zero=True)
    keep.on_evaluate(None, state, SimpleNamespace(), model=nn.Linear(1, 1))
    assert not (tmp_path / BEST_FILE).exists()


def test_the_expert_of_another_step_is_not_taken(tmp_path):
    save_best(tmp_path, {"weight": torch.ones(2)}, 20)
    with pytest.raises(ValueError, match=r"holds the expert of step 20, and the best validation was that of step 10"):
        load_best(tmp_path, {"weight": torch.zeros(2)}, 10)
