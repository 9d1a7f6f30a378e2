"""The training loss of a language model, with its gradient computed in the forward pass.

Shapes: B sequences in a batch, L tokens of each, T = B * L, V vocabulary.

Does not cover labels other than the next token, ignored positions, or vocabularies split over devices.
"""

from __future__ import annotations

from typing import Any

import torch


class _NextTokenLoss(torch.autograd.Function):
    """sum_t w_t * (-log p_t + z_loss * logsumexp_t^2), with its gradient computed in the forward pass.

    The vocabulary is by far the largest dimension of a small model. This computes one softmax, which becomes the
    gradient in place; autograd would compute several exponentials and copies of the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_TV: torch.Tensor, targets_T: torch.Tensor, weights_T: torch.Tensor, z_loss: float
    ) -> torch.Tensor:
        probs_TV = logits_TV.softmax(-1, dtype=torch.float32)
        # the largest probability is at least 1 / V, so its logarithm is finite; a target's may not be
        logsumexp_T = logits_TV.amax(-1).float() - probs_TV.amax(-1).log()
        picked_T = logits_TV.gather(-1, targets_T[:, None]).squeeze(-1).float()
        # d loss / d logit = w * (p * (1 + 2 z logsumexp) - [is the target])
        gradient_TV = probs_TV.mul_((weights_T * (1 + 2 * z_loss * logsumexp_T))[:, None])
        gradient_TV.scatter_add_(-1, targets_T[:, None], -weights_T[:, None])
        ctx.save_for_backward(gradient_TV.to(logits_TV.dtype))
        return weights_T @ (logsumexp_T - picked_T + z_loss * logsumexp_T.square())

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient_TV,) = ctx.saved_tensors
        return gradient_TV.mul_(upstream), None, None, None  # in place: autograd refuses a second backward


def next_token_loss(logits: torch.Tensor, input_ids: torch.Tensor, z_loss: float) -> torch.Tensor:
    """Mean cross-entropy of the next token plus `z_loss` times the mean squared log-sum-exp of the logits.

    Args:
        logits: float [B, L, V].
        input_ids: int64 [B, L], the tokens themselves; they are shifted here.
        z_loss: weight of the z-loss.

    Returns:
        A float32 scalar, in nats per token.

    Source of the z-loss: PaLM, arXiv 2204.02311, section 5.
    """
    targets_BL = input_ids.roll(-1, dims=1)
    weights_BL = torch.full(input_ids.shape, 1 / input_ids[:, 1:].numel(), device=logits.device)
    weights_BL[:, -1] = 0  # the last token has no target; a weight of 0 is cheaper than a copy without it
    return _NextTokenLoss.apply(logits.flatten(0, 1), targets_BL.flatten(), weights_BL.flatten(), z_loss)
