"""Settings that follow from the anchor, the text and the machine."""

import dataclasses

import pytest

from flexmoe.training.defaults import (
    ENOUGH_TOKENS,
    FEWEST_STEPS,
    LOW_RANK,
    ROUTER_TOKENS,
    STEP_TOKENS,
    VALIDATION_TOKENS,
    VALIDATIONS,
    Situation,
    choose,
    shown,
)
from flexmoe.training.settings import ChosenSettings, TrainingSettings

SMALL = Situation(hidden_size=576, longest_sequence=8192, own_tokens=6_000, shortest_text=1_000_000, accelerator=False)


def chosen(situation: Situation = SMALL, **given) -> ChosenSettings:
    return choose(TrainingSettings(**given), situation)[0]


def on(**changes) -> Situation:
    return dataclasses.replace(SMALL, **changes)


@pytest.mark.parametrize("own_tokens", [100, 6_000, 60_000, 1_000_000, 10**9])
@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("processes", [1, 4])
def test_every_setting_gets_a_value_within_its_limits(own_tokens, accelerator, processes):
    situation = on(own_tokens=own_tokens, accelerator=accelerator, processes=processes)
    found = chosen(situation, method="low_rank")
    for field in dataclasses.fields(ChosenSettings):
        if field.type in ("int", "float"):
            assert getattr(found, field.name) is not None, field.name
    step = found.batch_size * found.sequence_length * processes
    assert step <= max(STEP_TOKENS[situation.machine][1], found.sequence_length * processes)
    assert VALIDATION_TOKENS[0] <= found.validation_tokens <= VALIDATION_TOKENS[1]
    assert found.router_tokens <= ROUTER_TOKENS[1]
    assert found.warmup_steps < found.max_steps
    assert found.rank == LOW_RANK
    assert -(-found.max_steps // found.eval_steps) <= VALIDATIONS[1] + 1


def test_little_text_gives_short_sequences_small_steps_and_several_passes():
    little, much = chosen(on(own_tokens=6_000)), chosen(on(own_tokens=2_000_000))
    assert (little.sequence_length, much.sequence_length) == (128, 256)
    assert FEWEST_STEPS * 0.9 <= little.max_steps < 2 * FEWEST_STEPS + 30
    assert little.batch_size < much.batch_size
    trained = little.max_steps * little.batch_size * little.sequence_length * (1 - little.public_ratio)
    assert trained == pytest.approx(3 * 6_000, rel=0.05), "three passes"
    trained = much.max_steps * much.batch_size * much.sequence_length * (1 - much.public_ratio)
    assert trained == pytest.approx(2_000_000, rel=0.01), "one pass"
    assert chosen(on(own_tokens=ENOUGH_TOKENS - 1)).max_steps > chosen(on(own_tokens=ENOUGH_TOKENS)).max_steps


def test_the_learning_rate_follows_from_the_hidden_size():
    assert chosen(on(hidden_size=128)).learning_rate == pytest.approx(2e-3, rel=0.05)
    assert chosen(on(hidden_size=4096)).learning_rate == pytest.approx(6.1e-5, rel=0.01)


def test_the_rate_of_a_low_rank_expert_follows_from_its_rank_and_scale():
    rates = {rank: chosen(on(hidden_size=128), method="low_rank", rank=rank).learning_rate for rank in (64, 16, 4)}
    assert rates == pytest.approx({64: 5e-3, 16: 1e-2, 4: 2e-2}, rel=0.1), "the best ones in docs/low-rank.md"
    scaled = chosen(on(hidden_size=128), method="low_rank", rank=16, alpha=32)
    assert scaled.learning_rate == pytest.approx(rates[16] / 2, rel=0.05)


def test_what_is_given_is_kept_and_the_rest_follows_from_it():
    given = {"learning_rate": 5e-3, "sequence_length": 64, "batch_size": 3, "router_tokens": 7, "warmup_steps": 0}
    found, choices = choose(TrainingSettings(**given), SMALL)
    assert {field: getattr(found, field) for field in given} == given
    assert not given.keys() & choices.keys()
    one_pass = chosen(epochs=1, batch_size=2, sequence_length=100)
    assert (one_pass.max_steps, one_pass.epochs) == (34, None), "6,000 own tokens, of 200 * 0.9 per step"
    with_rows_alone = chosen(epochs=1, batch_size=2, sequence_length=100, evidence="none")
    assert (with_rows_alone.max_steps, with_rows_alone.public_ratio) == (50, 0.4)
    assert chosen(router="hidden_mean").public_ratio == 0.4, "rows that the loss trains have no evidence"
    assert chosen(max_steps=7).max_steps == 7


def test_sequences_fit_the_anchor_and_the_smallest_part_of_the_text():
    assert chosen(on(own_tokens=10**6, longest_sequence=100)).sequence_length == 100
    assert chosen(on(own_tokens=10**6, shortest_text=150)).sequence_length == 128
    assert chosen(on(own_tokens=10**6, longest_sequence=None)).sequence_length == 256


def test_choices_are_shown_with_their_reasons():
    lines = list(shown(choose(TrainingSettings(batch_size=4), SMALL)[1]))
    assert "--learning-rate 0.00043 (0.25 / hidden size 576)" in lines
    assert any(line.startswith("--max-steps ") and "3 passes over 6,000 own tokens" in line for line in lines)
    assert not any("--batch-size" in line for line in lines)
