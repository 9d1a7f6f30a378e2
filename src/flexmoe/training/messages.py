"""What a training run tells its user: a summary before, the time it will take, and what an interruption leaves.

Does not cover how lines are shown (the caller's choice) and the progress bar (`flexmoe.training.trainer`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flexmoe.training.resume import last_checkpoint, step_of
from flexmoe.training.text import OWN, SideCounts, TrainingText

Show = Callable[[str], None]
"""Shows one line to the user."""

MEASURED_STEPS = 4
"""Steps by which the duration is estimated; the first step of a run is slower and does not count."""


class TrainingInterrupted(KeyboardInterrupt):
    """Training was interrupted (Ctrl-C); the message says what was kept and how to continue."""


class Interruptible:
    """A block that raises TrainingInterrupted instead of KeyboardInterrupt.

    Args:
        work: the work folder of the run.
        save_steps: steps between checkpoints.

    Attributes:
        trainer: None before it exists.
    """

    def __init__(self, work: Path, save_steps: int) -> None:
        self.work, self.save_steps = work, save_steps
        self.trainer: Trainer | None = None

    def __enter__(self) -> Interruptible:
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            state = None if self.trainer is None else self.trainer.state
            raise TrainingInterrupted(interruption(self.work, state, self.save_steps)) from error


def to_stderr(line: str) -> None:
    """Shows a line on stderr."""
    sys.stderr.write(f"{line}\n")


def text_summary(text: TrainingText) -> list[str]:
    """A line on the text of each side."""
    return [_side_line(side, counts) for side, counts in text.counts.items()]


def steps_summary(
    text: TrainingText, *, steps: int, sequences_per_step: int, public_sequences: int, resumed_at: int = 0
) -> str:
    """One line on the steps of training.

    Args:
        public_sequences: among all that are trained on.
        resumed_at: the step of the checkpoint that training resumes from.
    """
    length = text.own.sequences.shape[1]
    own_tokens = (steps * sequences_per_step - public_sequences) * length
    passes = own_tokens / text.own.sequences.numel()
    resumed = f" Resuming after step {resumed_at:,}." if resumed_at else ""
    return (
        f"Training: {steps:,} steps of {sequences_per_step:,} sequences of {length:,} tokens; {own_tokens:,} own "
        f"tokens ({_rounded(passes)} passes) and {public_sequences * length:,} public ones.{resumed}"
    )


def losses(report: Mapping[str, Any]) -> str:
    """One line on the validation losses in a package's training record."""
    measured = report.get("validation_loss") or {}
    if not measured:
        return "No text was held out, so no loss was measured."
    sides = ", ".join(f"{side} {loss['before']:.4f} -> {loss['after']:.4f}" for side, loss in measured.items())
    return f"Loss per token on held-out text, before -> after: {sides}."


def interruption(work: Path, state: TrainerState | None, save_steps: int) -> str:
    """What an interrupted run has kept, and how to continue; `state` is None before the first step."""
    at = "before its first step" if state is None else f"after step {state.global_step:,} of {state.max_steps:,}"
    checkpoint = last_checkpoint(work)
    if checkpoint is None:
        kept = (
            "No checkpoint was written yet, so the same command starts from step 0; a smaller --save-steps "
            f"(save_steps={save_steps}) writes them more often."
        )
    else:
        kept = (
            f"The checkpoint of step {step_of(checkpoint):,} is kept in {work}: give the same command to resume from "
            "it, or --no-resume (resume=False) to start over."
        )
    return f"Training was interrupted {at}. {kept} If you do not want to continue, delete {work}."


class TimeEstimate(TrainerCallback):
    """Shows how long training will take, once some steps were measured."""

    def __init__(self, show: Show) -> None:
        self._show = show
        self._steps = 0
        self._start = 0.0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measures, and shows the estimate once."""
        self._steps += 1
        if self._steps == 1:
            self._start = time.monotonic()
        left = state.max_steps - state.global_step
        if self._steps == 1 + MEASURED_STEPS and left and state.is_world_process_zero:
            seconds = (time.monotonic() - self._start) / MEASURED_STEPS
            self._show(
                f"Expected: {duration(seconds * left)} for the remaining {left:,} steps, at {seconds:.2g} s per step, "
                "and some more for validation and checkpoints."
            )


def duration(seconds: float) -> str:
    """The time as "40 s", "12 min" or "3 h 20 min"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60:,} h {minutes % 60} min"


def _rounded(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _side_line(side: str, counts: SideCounts) -> str:
    name = "Own" if side == OWN else side.capitalize()
    dropped = [
        f"{number:,} {what}"
        for number, what in ((counts.blank, "blank document(s)"), (counts.skipped, "row(s) without text"))
        if number
    ]
    return (
        f"{name} text: {counts.documents:,} documents, {counts.tokens + counts.held_out_tokens:,} tokens; held out "
        f"for validation: {counts.held_out:,} documents, {counts.held_out_tokens:,} tokens; dropped: "
        f"{' and '.join(dropped) or 'nothing'}."
    )
