"""The best of the validations of a run: its expert is kept, and training stops when none is better for a while.

A validation is scored by the loss on own and on public text, weighted as they are mixed in training. What was measured
is read from the Trainer's log, which checkpoints hold, so a resumed run decides as an uninterrupted one.

    best.safetensors    in the work folder: the trained parameters at the best validation, and its step

Does not cover when validations take place (`flexmoe.training.defaults`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flexmoe.training.messages import Show
from flexmoe.training.text import OWN, PUBLIC_SIDE

BEST_FILE = "best.safetensors"


@dataclass(frozen=True)
class Validation:
    """The mean loss per token on held-out text after `step` steps, by side."""

    step: int
    losses: Mapping[str, float]

    def score(self, public_ratio: float) -> float:
        """The loss to minimise: own and public text weighted as in training; own text alone if there is no other."""
        own = self.losses[OWN]
        return own + public_ratio * (self.losses.get(PUBLIC_SIDE, own) - own)


def validations(history: Iterable[Mapping[str, Any]]) -> list[Validation]:
    """The validations in a Trainer's `log_history` on own text, in order; the first is usually that of step 0."""
    found: dict[int, dict[str, float]] = {}
    for entry in history:
        for side in (OWN, PUBLIC_SIDE):
            if (key := f"eval_{side}_loss") in entry:
                found.setdefault(entry["step"], {})[side] = entry[key]
    return [Validation(step, losses) for step, losses in sorted(found.items()) if OWN in losses]


def best_of(measured: Iterable[Validation], public_ratio: float) -> Validation | None:
    """The first validation with the lowest score, step 0 apart; None if there is none."""
    after_training = (validation for validation in measured if validation.step > 0)
    return min(after_training, key=lambda validation: validation.score(public_ratio), default=None)


def without_improvement(measured: Iterable[Validation], public_ratio: float) -> int:
    """The number of validations since the best one."""
    measured = list(measured)
    best = best_of(measured, public_ratio)
    return 0 if best is None else sum(validation.step > best.step for validation in measured)


class KeepBest(TrainerCallback):
    """Stores the trained parameters at each validation that is the best so far, and stops training after some that
    are not.

    Args:
        work: the work folder.
        sides: that are validated.
        public_ratio: share of public text in training.
        patience: validations without improvement after which training stops.
        show: shows a line to the user.
    """

    def __init__(self, work: Path, sides: Set[str], *, public_ratio: float, patience: int, show: Show) -> None:
        self._work, self._sides, self._show = work, sides, show
        self._public_ratio, self._patience = public_ratio, patience

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the validation of the last side."""
        measured = validations(state.log_history)
        if not measured or measured[-1].step == 0 or measured[-1].losses.keys() != self._sides:
            return
        best = best_of(measured, self._public_ratio)
        assert best is not None
        if best.step == measured[-1].step:
            # after the last step, the model itself is the best
            if state.is_world_process_zero and best.step < state.max_steps:
                save_best(self._work, trained_parameters(kwargs["model"]), best.step)
        elif (
            without_improvement(measured, self._public_ratio) >= self._patience and state.global_step < state.max_steps
        ):
            control.should_training_stop = True
            self._show(
                f"Stopping after step {state.global_step:,} of {state.max_steps:,}: no validation since that of step "
                f"{best.step:,} was better, and its expert is kept (patience={self._patience})."
            )


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def save_best(work: Path, parameters: Mapping[str, torch.Tensor], step: int) -> None:
    """Replaces what was best."""
    unfinished = work / f"{BEST_FILE}.unfinished"
    save_file({name: value.detach() for name, value in parameters.items()}, unfinished, metadata={"step": str(step)})
    os.replace(unfinished, work / BEST_FILE)


def load_best(work: Path, parameters: Mapping[str, torch.Tensor], step: int) -> None:
    """Copies the parameters of the best validation into `parameters`.

    Raises:
        ValueError: the file is not that of `step`.
    """
    with safe_open(work / BEST_FILE, "pt") as opened, torch.no_grad():
        stored = (opened.metadata() or {}).get("step")
        if stored != str(step):
            raise ValueError(
                f"{work / BEST_FILE} holds the expert of step {stored}, and the best validation was that of step "
                f"{step}: another process has written there. Start over with resume=False (--no-resume)."
            )
        for name, value in parameters.items():
            value.copy_(opened.get_tensor(name))
