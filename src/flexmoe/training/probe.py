"""A few steps at the chosen learning rate and at a lower one, which tell whether it is too high for the anchor.

A rate that is too high for a pretrained model still lowers the loss on own text, so the run itself does not show that
a lower one would have been better. Both probes start from the same expert and see the same batches; the expert is then
as it was before. Fewer steps or smaller batches than these prefer rates that are too low for the whole run
(docs/training.md).

Does not cover the choice of the rate (`flexmoe.training.defaults`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexmoe.io.folders import write_file
from flexmoe.io.strict_json import read_json_object
from flexmoe.training.best import trained_parameters
from flexmoe.training.messages import Show
from flexmoe.training.text import OWN

if TYPE_CHECKING:
    from flexmoe.training.trainer import ExpertTrainer

LOWER = 4
"""The rate is compared with one that is so many times lower."""
STEPS = 12
"""Of each probe; half of them warm up."""
MARGIN = 0.01
"""A rate is too high if its loss is above that of the lower one by more than this share."""
UNUSUAL = 2
"""A rate that is given and so many times above the chosen one is probed in short runs, too."""
SHARE = 0.2
"""Other rates are probed where both probes take at most this share of the steps."""
VALIDATION_TOKENS = 2_048
"""Own tokens by which probes are compared."""
START_FILE = "start.safetensors"
PROBE_FILE = "learning_rate.json"


def is_worth_probing(rate: float, steps: int, *, usual: float) -> bool:
    """Whether a rate is unusual for the anchor, or the run so long that probing costs little.

    Args:
        rate: to train with.
        steps: of the run.
        usual: what `choose` chooses for the anchor.
    """
    return rate > UNUSUAL * usual or SHARE * steps >= 2 * STEPS


def probed_rate(trainer: ExpertTrainer, work: Path, *, given: bool, show: Show) -> float:
    """The rate to train with, probed once per run: a chosen one is lowered until it is not too high.

    Args:
        trainer: before its training, with own text held out.
        work: the work folder, which keeps the result for a resumed run.
        given: whether the user gave the rate; it is then used in any case.
        show: shows a line to the user.

    Warns:
        UserWarning: the rate was given and is too high.
    """
    file, rate = work / PROBE_FILE, trainer.args.learning_rate
    if file.is_file():
        return read_json_object(file)["learning_rate"]
    losses = probe(trainer, [rate, rate / LOWER], work)
    while not losses[rate] <= (1 + MARGIN) * losses[rate / LOWER]:  # with NaN, too
        found = (
            f"after {STEPS} steps, the loss on held-out own text is {losses[rate]:.3f} with it and "
            f"{losses[rate / LOWER]:.3f} with {rate / LOWER:.2g}"
        )
        if given:
            warnings.warn(
                f"learning_rate={rate:g} is too high for this anchor: {found}. Leave it out to have one chosen, or "
                "lower it.",
                stacklevel=2,
            )
            break
        show(f"learning_rate={rate:.2g} is too high for this anchor: {found}. Training with {rate / LOWER:.2g}.")
        rate /= LOWER
        losses |= probe(trainer, [rate / LOWER], work)
    write_file(file, json.dumps({"learning_rate": rate}).encode(), overwrite=True)
    return rate


def probe(trainer: ExpertTrainer, rates: Sequence[float], work: Path, *, steps: int = STEPS) -> dict[float, float]:
    """The loss on held-out own text after `steps` steps at each rate; the trained parameters stay as they are.

    Args:
        trainer: before its training, with own text held out.
        rates: learning rates.
        work: folder for a copy of the parameters, so that memory need not hold it.
        steps: of each probe.
    """
    trained = trained_parameters(trainer.model)
    start = work / START_FILE
    save_file({name: value.detach() for name, value in trained.items()}, start)
    losses = {}
    for rate in rates:
        with torch.random.fork_rng():
            _train(trainer, list(trained.values()), rate, steps)
        losses[rate] = _own_loss(trainer)
        with torch.no_grad():
            for name, value in load_file(start).items():
                trained[name].copy_(value)
    start.unlink()
    return losses


def _train(trainer: ExpertTrainer, trained: list[Tensor], rate: float, steps: int) -> None:
    """Trains on the first sequences of the run, as the Trainer does."""
    args, data, model = trainer.args, trainer.train_dataset, trainer.model.train()
    part, parts = args.per_device_train_batch_size, args.gradient_accumulation_steps
    optimizer = torch.optim.AdamW(trained, betas=(args.adam_beta1, args.adam_beta2), weight_decay=0.0, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, 2 * (step + 1) / steps)
        for first in range(step * parts * part, (step + 1) * parts * part, part):
            rows = [data[row % len(data)]["input_ids"] for row in range(first, first + part)]
            loss = trainer.training_loss(model, torch.stack(rows).to(args.device))
            (loss / parts).backward()
        torch.nn.utils.clip_grad_norm_(trained, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _own_loss(trainer: ExpertTrainer) -> float:
    """The mean loss per token on the first held-out sequences of own text."""
    own, part = trainer.eval_dataset[OWN], trainer.args.per_device_eval_batch_size
    count = min(len(own), max(1, VALIDATION_TOKENS // own[0]["input_ids"].numel()))
    model, total = trainer.model.eval(), 0.0
    for first in range(0, count, part):
        rows = torch.stack([own[row]["input_ids"] for row in range(first, min(first + part, count))])
        loss, _, _ = trainer.prediction_step(model, {"input_ids": rows})
        total += loss.item() * len(rows)
    return total / count
