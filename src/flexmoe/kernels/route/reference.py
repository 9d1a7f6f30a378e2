"""The router in plain PyTorch: the reference for the kernel, and the operator's CPU implementation.

Deliberately simple, and shares no code with the kernel.

Shapes: T tokens, H hidden, E experts, K = min(k, E) slots.

| case | result |
|---|---|
| an expert masked with -inf | weight 0, whatever its row holds; the others' bits are as without it (on CPU) |
| equal logits | the lowest index wins |
| fewer allowed experts than K | all of those; surplus slots have the id E and weight 0 |
| no allowed expert for a token | all weights 0, all slots surplus (the model raises for such a row) |
| NaN or +inf among the allowed logits | the token's weights are all NaN, its slots are the first K experts |
| no tokens | empty results |

Does not cover the losses of the router (`modeling/routing_flexmoe.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min


class Routing(NamedTuple):
    """Which experts each token is routed to, with which weights.

    Attributes:
        logits_TE: float32 [tokens, experts], -inf where an expert is not allowed.
        weights_TE: float32 [tokens, experts], 0 where the expert is not among the token's top k.
        top_weights_TK: float32 [tokens, K], the same weights, largest logit first; 0 in surplus slots.
        top_ids_TK: int32 [tokens, K], the index of each slot's expert; E in surplus slots.
    """

    logits_TE: Tensor
    weights_TE: Tensor
    top_weights_TK: Tensor
    top_ids_TK: Tensor


def route(
    x_TH: Tensor, rows: Sequence[Tensor], biases: Sequence[Tensor], offset_TE: Tensor | None, k: int, renormalize: bool
) -> Routing:
    """Computes the logits of all experts, a float32 softmax over the allowed ones, and the top k.

    Args:
        x_TH: hidden states [tokens, hidden], any floating dtype.
        rows: the router row [1, hidden] of each expert. Each row is multiplied separately, so that the bits of a logit
            do not depend on which other experts there are.
        biases: the bias [1] of each expert.
        offset_TE: float32 [tokens, experts], added to the logits: -inf masks an expert, finite values are evidence
            from elsewhere. None adds nothing.
        k: number of experts per token; more than there are means all.
        renormalize: whether to divide the top-k weights by their sum.

    Source: FlexOlmo, arXiv 2507.07024, section 3: softmax over all experts, then top-k.
    """
    x32_TH = x_TH.float()
    products = [F.linear(x32_TH, row.float(), bias.float()) for row, bias in zip(rows, biases, strict=True)]
    logits_TE = torch.cat(products, -1)
    if offset_TE is not None:  # masked_fill, because a masked row may hold NaN
        logits_TE = (logits_TE + offset_TE).masked_fill(offset_TE == -math.inf, -math.inf)
    exp_TE = _exp(logits_TE)
    dropped_TE = logits_TE.sort(dim=-1, descending=True, stable=True).indices[:, k:]
    kept_TE = exp_TE.scatter(1, dropped_TE, 0.0)
    weights_TE = _normalized(kept_TE, kept_TE if renormalize else exp_TE)
    # the logits of a token with NaN among them have no order: its slots are the first K experts
    ordered_TE = torch.where(weights_TE.isnan(), 0.0, logits_TE)
    order_TK = ordered_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    top_weights_TK = weights_TE.gather(1, order_TK)
    top_ids_TK = torch.where(top_weights_TK == 0, len(rows), order_TK).to(torch.int32)
    return Routing(logits_TE, weights_TE, top_weights_TK, top_ids_TK)


def input_gradients(
    gradients: Sequence[Tensor | None], x_TH: Tensor, rows: Sequence[Tensor], routing: Routing, renormalize: bool
) -> tuple[Tensor, Tensor]:
    """Computes the gradients of `x_TH` and of the offset from those of the results of `route`.

    Written out, because autograd does not record inside an operator. An expert that is masked for a token, or not
    among its top k, adds nothing to the token's gradient, even if its row holds NaN.

    Args:
        gradients: of logits, weights and weights of the slots; None means zero.
        x_TH, rows, renormalize: the arguments of `route`.
        routing: its results.

    Returns:
        dx_TH in the dtype of `x_TH`; d_offset_TE in float32.
    """
    d_logits_TE, d_weights_TE, d_top_weights_TK = gradients
    logits_TE, weights_TE, _, top_ids_TK = routing
    d_offset_TE = torch.zeros_like(logits_TE)
    if d_weights_TE is not None or d_top_weights_TK is not None:
        dw_TE = torch.zeros_like(logits_TE) if d_weights_TE is None else d_weights_TE
        if d_top_weights_TK is not None:  # surplus slots go to one more column, which is dropped
            by_expert_TE = dw_TE.new_zeros(len(dw_TE), len(rows) + 1)
            dw_TE = dw_TE + by_expert_TE.scatter_add(1, top_ids_TK.long(), d_top_weights_TK)[:, :-1]
        weighted_TE = torch.where(weights_TE == 0, 0.0, weights_TE * dw_TE)
        exp_TE = _exp(logits_TE)
        softmax_TE = weights_TE if renormalize else _normalized(exp_TE, exp_TE)
        d_offset_TE = weighted_TE - softmax_TE * weighted_TE.sum(-1, keepdim=True)
    if d_logits_TE is not None:
        d_offset_TE = d_offset_TE + d_logits_TE
    d_offset_TE = d_offset_TE.masked_fill(logits_TE == -math.inf, 0.0)
    dx_TH = x_TH.new_zeros(x_TH.shape, dtype=torch.float32)
    for d_T1, row in zip(d_offset_TE.split(1, -1), rows, strict=True):
        dx_TH += torch.where(d_T1 == 0, 0.0, d_T1 * row.float())
    return dx_TH.to(x_TH.dtype), d_offset_TE


def _exp(logits_TE: Tensor) -> Tensor:
    """The exponentials of the logits minus the row's largest."""
    largest_T1 = logits_TE.detach().amax(-1, keepdim=True).clamp(min=LOWEST)  # -inf minus -inf is NaN
    return (logits_TE - largest_T1).exp()


def _normalized(exp_TE: Tensor, summed_TE: Tensor) -> Tensor:
    """`exp_TE` divided by the sum of `summed_TE`; masked columns change no bit of it, unlike in `torch.softmax`.

    `cumsum` adds from the first expert to the last, so a 0 changes nothing; a vectorised sum would regroup the terms.
    """
    total_T1 = summed_TE.cumsum(-1).narrow(-1, -1, 1)
    return exp_TE / total_T1.clamp(min=1.0)  # the largest term is 1, unless no expert is allowed


__all__ = ["Routing", "input_gradients", "route"]
