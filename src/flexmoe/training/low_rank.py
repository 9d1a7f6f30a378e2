"""The start of a low-rank expert's training: A from the gradient of the loss, B zero.

With B zero, a step changes an expert by `dB @ A` only, so A decides which inputs its first steps can react to. A
random A leaves out most of the gradient. Here its rows span the inputs that the gradient G [O, I] of each full matrix
uses most: its leading right singular vectors. They are found by subspace iteration, without a gradient of the full
size, because the gradients of the factors are sketches of G:

    B orthonormal, A zero    the gradient of A is B^T G [R, I], whose row space becomes A
    A orthonormal, B zero    the gradient of B is G A^T [O, R], whose column space becomes the next B

The expert equals public before and after, because one of its factors is zero. The result is a function of the seed,
the model and the first sequences, so each process computes the same and an interrupted run starts alike.

Does not cover the factors' creation (`flexmoe.modeling.low_rank_flexmoe`), the learning rate (`defaults`) or
compression (`flexmoe.conversion`).

Shapes: O out, I in, R rank.

Source: LoRA-GA, arXiv 2407.05000, which takes both factors from the gradient of the first batch and subtracts their
product from the frozen weights; the one-sided form leaves these alone. Measured in docs/low-rank.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flexmoe.modeling.low_rank_flexmoe import LowRankDelta

if TYPE_CHECKING:
    from flexmoe.training.trainer import ExpertTrainer

TOKENS = 4096  # of the first sequences, on which the gradient is computed


def initialize_from_gradient(trainer: ExpertTrainer) -> None:
    """Sets A of the expert in training to the leading inputs of the gradient, and B to zero.

    It takes three forward and backward passes over the first sequences of the training data, at most `TOKENS` tokens
    but at least one sequence, and no more memory than a step. If a gradient is not finite, nothing is changed: the
    training reports it.
    """
    deltas = [
        part for part in trainer.model.modules() if isinstance(part, LowRankDelta) and part.A.weight.requires_grad
    ]
    inputs, outputs = [delta.A.weight for delta in deltas], [delta.B.weight for delta in deltas]
    before = [a_RI.detach().clone() for a_RI in inputs]
    with torch.random.fork_rng(), _in_training_mode(trainer.model):
        torch.manual_seed(trainer.args.seed)
        with torch.no_grad():
            for a_RI, b_OR in zip(inputs, outputs, strict=True):
                a_RI.zero_()
                nn.init.orthogonal_(b_OR)
        is_finite = (
            _replace(trainer, inputs, outputs, rows=True)
            and _replace(trainer, outputs, inputs, rows=False)
            and _replace(trainer, inputs, outputs, rows=True)
        )
    if not is_finite:
        with torch.no_grad():
            for a_RI, b_OR, random_RI in zip(inputs, outputs, before, strict=True):
                a_RI.copy_(random_RI)
                b_OR.zero_()


def _replace(trainer: ExpertTrainer, zero: list[nn.Parameter], other: list[nn.Parameter], *, rows: bool) -> bool:
    """Replaces each factor that is zero by an orthonormal basis of its gradient, and zeroes the other one.

    Args:
        rows: whether the basis is of the gradient's rows, or else of its columns.

    Returns:
        False if a gradient is not finite; then nothing is changed.
    """
    gradients = _gradients(trainer, zero)
    if not all(torch.isfinite(gradient).all() for gradient in gradients):
        return False
    with torch.no_grad():
        for factor, gradient in zip(zero, gradients, strict=True):
            factor.copy_(_orthonormal(gradient.T).T if rows else _orthonormal(gradient))
        for factor in other:
            factor.zero_()
    return True


def _gradients(trainer: ExpertTrainer, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The gradients of the loss on the first sequences, summed over these."""
    data, size = trainer.train_dataset, trainer.args.per_device_train_batch_size
    count = min(len(data), max(1, TOKENS // len(data[0]["input_ids"])))
    sequences_NL = torch.stack([data[i]["input_ids"] for i in range(count)])
    trainer.model.zero_grad()
    for ids_BL in sequences_NL.to(trainer.args.device).split(size):
        with trainer.accelerator.autocast():
            loss, _ = trainer._next_token_loss(trainer.model, ids_BL, z_loss=0.0)
        (loss * len(ids_BL)).backward()
    found = [torch.zeros_like(one) if one.grad is None else one.grad.detach().clone() for one in parameters]
    trainer.model.zero_grad()
    return found


def _orthonormal(columns_NR: Tensor) -> Tensor:
    """An orthonormal basis [N, R] of the columns; beyond N of them, zeros.

    It is computed in float64 on the CPU, so it does not depend on the device. Columns that depend on others are
    replaced by arbitrary orthogonal ones.
    """
    basis = torch.linalg.qr(columns_NR.cpu().double())[0]
    missing = columns_NR.shape[1] - basis.shape[1]
    return nn.functional.pad(basis, (0, missing)).to(columns_NR)


@contextmanager
def _in_training_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.train()
    try:
        yield
    finally:
        model.train(was_training)
