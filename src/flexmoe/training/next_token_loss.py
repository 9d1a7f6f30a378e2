"""The training loss of a language model, with its gradient computed in the forward pass.

`next_token_loss` takes logits. `next_token_loss_of_states` takes the hidden states before the head, and computes the
logits of some tokens at a time, so those of a batch are never held: with a vocabulary of 49,152, they and their
gradient are larger than everything else that a small model keeps. torch's `linear_cross_entropy` does the same for one
matrix; it exists from torch 2.13 on, and has no z-loss and no heads that cap or scale their logits.

Shapes: B sequences in a batch, L tokens of each, T = B * L, N tokens of a part, H hidden, V vocabulary.

Does not cover labels other than the next token, ignored positions, or vocabularies split over devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LOGITS = 1 << 24  # logits held at a time: 64 MB in float32, and as much for their gradient
Head = Callable[[Tensor, Tensor], Tensor]  # from states [N, H] and input_ids [N] to logits [N, V]


def _loss_and_gradient(
    logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    """sum_t w_t * (-log p_t + z_loss * logsumexp_t^2), and its gradient [N, V] in the dtype of the logits.

    The vocabulary is by far the largest dimension of a small model. This computes one softmax, which becomes the
    gradient in place; autograd would compute several exponentials and copies of the logits.
    """
    probs_NV = logits_NV.softmax(-1, dtype=torch.float32)
    # the largest probability is at least 1 / V, so its logarithm is finite; a target's may not be
    logsumexp_N = logits_NV.amax(-1).float() - probs_NV.amax(-1).log()
    picked_N = logits_NV.gather(-1, targets_N[:, None]).squeeze(-1).float()
    # d loss / d logit = w * (p * (1 + 2 z logsumexp) - [is the target])
    gradient_NV = probs_NV.mul_((weights_N * (1 + 2 * z_loss * logsumexp_N))[:, None])
    gradient_NV.scatter_add_(-1, targets_N[:, None], -weights_N[:, None])
    return weights_N @ (logsumexp_N - picked_N + z_loss * logsumexp_N.square()), gradient_NV.to(logits_NV.dtype)


class _NextTokenLoss(torch.autograd.Function):
    """The loss of logits [T, V]."""

    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, weights_T: Tensor, z_loss: float) -> Tensor:
        loss, gradient_TV = _loss_and_gradient(logits_TV, targets_T, weights_T, z_loss)
        ctx.save_for_backward(gradient_TV)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_TV,) = ctx.saved_tensors
        return gradient_TV.mul_(upstream), None, None, None  # in place: autograd refuses a second backward


class _LossOfStates(torch.autograd.Function):
    """The loss of states [T, H], of which `rows` at a time go through the head and back."""

    @staticmethod
    def forward(
        ctx: Any,
        states_TH: Tensor,
        input_ids_T: Tensor,
        targets_T: Tensor,
        weights_T: Tensor,
        head: Head,
        z_loss: float,
        rows: int,
    ) -> Tensor:
        loss = torch.zeros((), device=states_TH.device)
        gradient_TH = torch.empty_like(states_TH)
        for part in map(slice, range(0, len(states_TH), rows), range(rows, len(states_TH) + rows, rows)):
            with torch.enable_grad():
                states_NH = states_TH[part].detach().requires_grad_()
                logits_NV = head(states_NH, input_ids_T[part])
            loss_of_part, gradient_NV = _loss_and_gradient(
                logits_NV.detach(), targets_T[part], weights_T[part], z_loss
            )
            loss += loss_of_part
            (gradient_TH[part],) = torch.autograd.grad(logits_NV, states_NH, gradient_NV)
        ctx.save_for_backward(gradient_TH)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_TH,) = ctx.saved_tensors
        return gradient_TH.mul_(upstream), None, None, None, None, None, None


def next_token_loss(logits: Tensor, input_ids: Tensor, z_loss: float) -> Tensor:
    """Mean cross-entropy of the next token plus `z_loss` times the mean squared log-sum-exp of the logits.

    Args:
        logits: float [B, L, V].
        input_ids: int64 [B, L], the tokens themselves; they are shifted here.
        z_loss: weight of the z-loss.

    Returns:
        A float32 scalar, in nats per token.

    Source of the z-loss: PaLM, arXiv 2204.02311, section 5.
    """
    return _NextTokenLoss.apply(logits.flatten(0, 1), *_targets(input_ids, logits.device), z_loss)


def next_token_loss_of_states(
    states: Tensor, input_ids: Tensor, head: Head, z_loss: float, vocab_size: int, logits: int | None = None
) -> Tensor:
    """`next_token_loss(head(states), input_ids, z_loss)`, without holding the logits of all tokens.

    Only `states` receive gradients; the head must not be trained. Without gradients (`torch.no_grad()`), none is
    computed.

    Args:
        states: float [B, L, H], the input of the head.
        input_ids: int64 [B, L].
        head: from states [N, H] and their tokens [N] to logits [N, V]; called on consecutive parts of all tokens.
        vocab_size: V.
        logits: the most logits held at a time (those of one token always are). None: `LOGITS`.
    """
    rows = max(1, (logits or LOGITS) // vocab_size)
    targets_T, weights_T = _targets(input_ids, states.device)
    states_TH, input_ids_T = states.flatten(0, 1), input_ids.flatten()
    if torch.is_grad_enabled() and states.requires_grad:
        return _LossOfStates.apply(states_TH, input_ids_T, targets_T, weights_T, head, z_loss, rows)
    loss = torch.zeros((), device=states.device)
    with torch.no_grad():
        parts = zip(*(x.split(rows) for x in (states_TH, input_ids_T, targets_T, weights_T)), strict=True)
        for states_NH, input_ids_N, targets_N, weights_N in parts:
            loss += _loss_and_gradient(head(states_NH, input_ids_N), targets_N, weights_N, z_loss)[0]
    return loss


def _targets(input_ids: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The next tokens [T], and the weights [T] of their losses in the mean."""
    weights_BL = torch.full(input_ids.shape, 1 / input_ids[:, 1:].numel(), device=device)
    weights_BL[:, -1] = 0  # the last token has no target; a weight of 0 is cheaper than a copy without it
    return input_ids.roll(-1, dims=1).flatten(), weights_BL.flatten()
