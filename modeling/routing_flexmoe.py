"""Routing: which experts a token goes to and with which weight. The reference in plain PyTorch, on any device.

Shapes: T tokens, E experts (those that are allowed, in the model's order), K active experts.

| case | answer |
|---|---|
| an expert masked with -inf | weight 0; the other weights have the bits that they have without it (on CPU) |
| equal logits | the lowest index wins |
| fewer allowed experts than k | those there are |
| nothing allowed in a row | all weights 0 (the model refuses such a row before it comes here) |
| NaN among the logits | NaN weights in that row, never an index outside the experts |

Does not cover the logits themselves (each row is a module of its own, `experts_flexmoe`), nor fused kernels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min


def route(logits_TE: Tensor, k: int, renormalize: bool, offset_TE: Tensor | None = None) -> Tensor:
    """Softmax over all allowed experts in float32, then the k largest.

    Args:
        logits_TE: router logits, [tokens, experts].
        k: number of experts that a token keeps; more than there are means all.
        renormalize: divide the kept weights by their sum.
        offset_TE: added to the logits, [tokens, experts] or broadcastable: -inf forbids an expert to a token, finite
            values are evidence from elsewhere.

    Returns:
        weights_TE: float32 [tokens, experts], 0 where a token does not go.

    Source: FlexOlmo, arXiv 2507.07024, section 3: softmax over all experts, then top-k.
    """
    logits_TE = logits_TE.float()
    if offset_TE is not None:
        logits_TE = logits_TE + offset_TE
    exp_TE = kept_TE = _exp(logits_TE)
    if k < exp_TE.shape[-1]:
        order_TE = exp_TE.sort(dim=-1, descending=True, stable=True).indices
        kept_TE = exp_TE.scatter(1, order_TE[:, k:], 0.0)
    return _shares(kept_TE, of_TE=kept_TE if renormalize else exp_TE)


def route_one(logits: Sequence[float], k: int, renormalize: bool) -> list[float]:
    """`route` of one token in Python's numbers: for so few, they are there before a kernel would have started."""
    largest = max(logits)
    if largest == math.inf or any(map(math.isnan, logits)):
        return [math.nan] * len(logits)
    if largest == -math.inf:
        return [0.0] * len(logits)
    exp = [math.exp(logit - largest) for logit in logits]
    surplus = sorted(range(len(exp)), key=exp.__getitem__, reverse=True)[k:]  # stable: equal ones stay in order
    total = sum(exp)
    for i in surplus:
        exp[i] = 0.0
    if renormalize:
        total = sum(exp)
    return [value / total for value in exp]


def _softmax(logits_TE: Tensor) -> Tensor:
    exp_TE = _exp(logits_TE)
    return _shares(exp_TE, of_TE=exp_TE)


def _exp(logits_TE: Tensor) -> Tensor:
    """The exponentials of logits from which the row's largest is taken, so that its own is 1."""
    largest_T1 = logits_TE.detach().amax(-1, keepdim=True).clamp(min=LOWEST)  # -inf - -inf is not a number
    return (logits_TE - largest_T1).exp()


def _shares(exp_TE: Tensor, of_TE: Tensor) -> Tensor:
    """Softmax whose bits don't change when columns of -inf come or go, as `torch.softmax` would."""
    return exp_TE / _ordered_sum(of_TE).clamp(min=1.0)  # the largest adds 1, unless there is none


def _ordered_sum(values_TE: Tensor) -> Tensor:
    """Sums from the first expert to the last, so that a 0 anywhere changes no bit: a vectorised sum regroups."""
    return values_TE.cumsum(-1).narrow(-1, -1, 1)


def load_balancing_loss(router_logits: Sequence[Tensor], k: int, token_mask_T: Tensor | None = None) -> Tensor:
    """The auxiliary loss that is k when the experts share the tokens evenly, over the tokens of all layers.

    Args:
        router_logits: one [tokens, experts] per layer, -inf where an expert is not allowed.
        k: number of active experts.
        token_mask_T: bool [tokens], False for padding.

    Source: Switch Transformers, arXiv 2101.03961, equations 4 to 6, with top-k shares as in Mixtral.
    """
    logits_NE = _counted(router_logits, token_mask_T)
    probs_NE = _softmax(logits_NE)
    chosen_NE = route(logits_NE.detach(), k, renormalize=False) > 0
    share_E = chosen_NE.float().mean(0)
    return logits_NE.shape[-1] * (share_E * probs_NE.mean(0)).sum()


def router_z_loss(router_logits: Sequence[Tensor], token_mask_T: Tensor | None = None) -> Tensor:
    """Mean over layers and tokens of the squared log-sum-exp of the router logits, which keeps them small.

    Args: as for `load_balancing_loss`. Source: ST-MoE, arXiv 2202.08906, equation 5.
    """
    return _counted(router_logits, token_mask_T).logsumexp(-1).square().mean()


def _counted(router_logits: Sequence[Tensor], token_mask_T: Tensor | None) -> Tensor:
    device = router_logits[0].device
    logits_LTE = torch.stack([logits.to(device).float() for logits in router_logits])
    if token_mask_T is not None:
        logits_LTE = logits_LTE[:, token_mask_T.to(device)]
    return logits_LTE.flatten(0, 1)


__all__ = ["load_balancing_loss", "route", "route_one", "router_z_loss"]
