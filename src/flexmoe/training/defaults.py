"""The settings of a run that nobody gave: they follow from the anchor, the amount of own text, and the machine.

Each choice is a value and the reason for it, which are shown before training. The rules come from runs on three
anchors (docs/training.md, `benchmarks/bench_defaults.py`). Does not cover settings that are the same everywhere
(`TrainingSettings`), and whether a learning rate is too high for the anchor, which a few steps tell
(`flexmoe.training.probe`).

Shapes: H hidden size, R rank, L tokens of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flexmoe.training.settings import ChosenSettings, TrainingSettings

RATE_TIMES_HIDDEN = 0.25
"""The learning rate of a full expert, times H."""
LOW_RANK_RATE = 1.75
"""That of a low-rank expert, as a multiple of sqrt(H / R) times that of a full one."""
FEWEST_STEPS = 50
"""With fewer, the learning rate has no time to rise and fall."""
STEP_TOKENS = {"cpu": (256, 2_048), "accelerator": (1_024, 8_192)}
"""At least, because each step changes all weights of the expert, and at most."""
SEQUENCE = {"cpu": 256, "accelerator": 1_024}
PUBLIC_RATIO, PUBLIC_RATIO_OF_ROWS = 0.1, 0.4
"""With evidence, and with rows alone."""
FEWEST_SEQUENCES = 32
"""Of own text; with less text, sequences get shorter instead."""
SHORTEST_SEQUENCE = 128
MOST_PASSES = 3
ENOUGH_TOKENS = 200_000
"""With this much own text, one pass is enough."""
ROUTER_SHARE = 0.375
"""Tokens of each side for a router row, as a share of the tokens that are trained on."""
ROUTER_TOKENS = (16, 40_000)
"""At least so many times H, which is the number of a row's weights, and at most so many."""
VALIDATION_SHARE = 0.1
"""Validation tokens of a side, as a share of the tokens that are trained on."""
VALIDATION_TOKENS = (512, 20_000)
"""At least and at most, of each side."""
VALIDATION_COST = 0.2
"""All validations together cost at most this share of the training; a forward pass is a third of a step."""
VALIDATIONS = (2, 10)
"""At least and at most, after the first step, of more than `FEW_STEPS`."""
FEW_STEPS = 20
"""Up to so many, there is one validation, after the last step."""
LOW_RANK = 64


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What the choices depend on.

    Attributes:
        hidden_size: H of the anchor.
        longest_sequence: tokens that the anchor takes; None if unlimited.
        own_tokens: of the own text, for training.
        shortest_text: tokens of the smallest text that has to fill a sequence: of own or public text, for training or
            for validation.
        accelerator: whether training runs on a GPU or the like.
        processes: that train together.
    """

    hidden_size: int
    longest_sequence: int | None
    own_tokens: int
    shortest_text: int
    accelerator: bool
    processes: int = 1

    @property
    def machine(self) -> str:
        """The key of the tables by machine, and its name."""
        return "accelerator" if self.accelerator else "cpu"


@dataclass(frozen=True)
class Choice:
    """A setting's value and why."""

    value: int | float
    reason: str


def choose(settings: TrainingSettings, situation: Situation) -> tuple[ChosenSettings, dict[str, Choice]]:
    """`settings` with values for those that are None, and the choices by field.

    Example:
        ```pycon
        >>> from flexmoe.training.defaults import Situation, choose
        >>> from flexmoe.training.settings import TrainingSettings
        >>> anchor = {"hidden_size": 576, "longest_sequence": 8192, "accelerator": False}
        >>> found, choices = choose(
        ...     TrainingSettings(max_steps=80), Situation(own_tokens=6_000, shortest_text=1_500, **anchor)
        ... )
        >>> found.sequence_length, found.max_steps, found.learning_rate
        (128, 80, 0.00043)
        >>> choices["learning_rate"].reason
        '0.25 / hidden size 576'
        ```
    """
    values = asdict(settings)
    choices: dict[str, Choice] = {}

    def chosen(field: str, choice: Choice) -> Any:
        """The value that was given, or else the choice."""
        if values[field] is None:
            values[field], choices[field] = choice.value, choice
        return values[field]

    public_ratio = chosen("public_ratio", _public_ratio(settings))
    length = chosen("sequence_length", _sequence_length(situation))
    given = settings.max_steps is not None or settings.epochs is not None
    passes = (
        _passes(situation)
        if not given
        else Choice(settings.epochs or 1, f"{settings.epochs or 1:g} passes were given")
    )
    per_pass = situation.own_tokens / (1 - public_ratio)
    trained = None if settings.max_steps is not None else passes.value * per_pass
    step = situation.processes * settings.gradient_accumulation_steps * length
    step *= chosen("batch_size", _batch_size(trained, step, situation))
    own_sequences = situation.own_tokens // length
    steps = chosen(
        "max_steps",
        Choice(
            max(1, math.ceil(passes.value * own_sequences * length / (step * (1 - public_ratio)))),
            passes.reason,
        ),
    )
    values["epochs"] = None  # counted in steps from here on
    if settings.method == "low_rank":
        chosen("rank", Choice(min(LOW_RANK, situation.hidden_size), "the default, and at most the hidden size"))
    chosen("learning_rate", _learning_rate(situation.hidden_size, values["rank"], settings.alpha))
    chosen("warmup_steps", _warmup(steps))
    chosen("router_tokens", _router_tokens(steps * step, situation))
    validation = chosen("validation_tokens", _validation_tokens(steps * step))
    chosen("eval_steps", _evaluation_steps(steps, step, validation))
    return ChosenSettings(**values), choices


def usual_rate(settings: ChosenSettings, hidden_size: int) -> float:
    """The learning rate that `choose` chooses with these settings."""
    return _learning_rate(hidden_size, settings.rank, settings.alpha).value


def shown(choices: Mapping[str, Choice]) -> Iterator[str]:
    """A line for each choice."""
    for field, choice in choices.items():
        value = f"{choice.value:,}" if isinstance(choice.value, int) else f"{choice.value:g}"
        yield f"--{field.replace('_', '-')} {value} ({choice.reason})"


def _public_ratio(settings: TrainingSettings) -> Choice:
    """The share of public sequences: with evidence, the expert has hardly any weight on public text."""
    if settings.has_evidence:
        return Choice(PUBLIC_RATIO, "with evidence, hardly any public text is routed to the expert")
    return Choice(PUBLIC_RATIO_OF_ROWS, "without evidence, some public text is routed to the expert")


def _sequence_length(situation: Situation) -> Choice:
    """The largest power of two with `FEWEST_SEQUENCES` sequences of own text, within what anchor and machine take."""
    fits = max(SHORTEST_SEQUENCE, _power_of_two(situation.own_tokens / FEWEST_SEQUENCES))
    limits = {
        f"enough to be fast on a {situation.machine}": SEQUENCE[situation.machine],
        f"at least {FEWEST_SEQUENCES} sequences of {situation.own_tokens:,} own tokens": fits,
        f"a part of the text has {situation.shortest_text:,} tokens": max(
            SHORTEST_SEQUENCE, _power_of_two(situation.shortest_text)
        ),
    }
    if situation.longest_sequence is not None:
        limits["the anchor's limit"] = situation.longest_sequence
    reason = min(limits, key=lambda name: limits[name])
    return Choice(limits[reason], reason)


def _passes(situation: Situation) -> Choice:
    """Passes over the own text."""
    passes = min(MOST_PASSES, max(1, math.ceil(ENOUGH_TOKENS / max(situation.own_tokens, 1))))
    return Choice(passes, f"{passes} {'pass' if passes == 1 else 'passes'} over {situation.own_tokens:,} own tokens")


def _batch_size(trained: float | None, tokens_each: int, situation: Situation) -> Choice:
    """Sequences per process: few enough for `FEWEST_STEPS` steps, if possible.

    Args:
        trained: own and public tokens of the run; None if its steps were given instead.
        tokens_each: of a step with one sequence per process.
    """
    least, most = STEP_TOKENS[situation.machine]
    tokens = most if trained is None else min(most, max(least, _power_of_two(trained / FEWEST_STEPS)))
    reason = f", for at least {FEWEST_STEPS} steps" if least < tokens < most else ""
    return Choice(max(1, tokens // tokens_each), f"{tokens:,} tokens per step{reason}")


def _learning_rate(hidden_size: int, rank: int | None, alpha: float | None) -> Choice:
    """The peak learning rate, to two digits; `rank` is None for full experts.

    Adam moves each entry of a matrix by about the learning rate. A full matrix then changes its output for an input x
    by up to the rate times the sum of |x|, of the order of H for an input of H normalised entries; with orthonormal
    rows of A, B does so by the rate times the sum of |A x|, of the order of sqrt(R H), and times `alpha / R`.
    """
    rate, reason = RATE_TIMES_HIDDEN / hidden_size, f"{RATE_TIMES_HIDDEN:g} / hidden size {hidden_size:,}"
    if rank is not None:
        rate *= LOW_RANK_RATE * math.sqrt(hidden_size / rank) * rank / (alpha or rank)
        reason += f", x {LOW_RANK_RATE} sqrt(hidden size / rank {rank})" + (", / scale" if alpha else "")
    digits = 1 - math.floor(math.log10(rate))
    return Choice(round(rate, digits), reason)


def _warmup(steps: int) -> Choice:
    """Steps in which the learning rate rises."""
    return Choice(max(steps // 20, min(10, steps // 5)), "5 % of the steps, or 10")


def _router_tokens(trained: int, situation: Situation) -> Choice:
    """Tokens of each side for a row."""
    times, most = ROUTER_TOKENS
    tokens = min(most, max(times * situation.hidden_size, int(ROUTER_SHARE * trained)))
    return Choice(tokens, f"{ROUTER_SHARE:.1%} of the tokens to train on, {times} x hidden size, or {most:,}")


def _validation_tokens(trained: int) -> Choice:
    """Tokens of each side."""
    least, most = VALIDATION_TOKENS
    tokens = min(most, max(least, int(VALIDATION_SHARE * trained)))
    return Choice(tokens, f"{VALIDATION_SHARE:.0%} of the {trained:,} tokens to train on")


def _evaluation_steps(steps: int, step_tokens: int, validation_tokens: int) -> Choice:
    """Steps between validations, each of which costs forward passes on both sides."""
    if steps <= FEW_STEPS:
        return Choice(steps, "1 validation, of so few steps")
    least, most = VALIDATIONS
    affordable = VALIDATION_COST * steps * step_tokens / (2 * validation_tokens / 3)
    count = int(min(most, max(least, affordable)))
    return Choice(math.ceil(steps / count), f"{count} validations")


def _power_of_two(number: float) -> int:
    """The largest power of two up to a number of at least 1."""
    return 1 << int(math.log2(max(number, 1)))
