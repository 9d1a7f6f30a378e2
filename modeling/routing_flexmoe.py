"""Routing weights from router logits, and the router losses, in plain PyTorch.

Shapes: T tokens, E experts.

| case | result |
|---|---|
| an expert masked with -inf | weight 0; the weights of the others have the same bits as without it |
| equal logits | the lowest index wins |
| fewer allowed experts than k | those there are |
| nothing allowed in a row | all weights 0 (the model refuses such a row) |
| NaN or +inf among the allowed logits | the row's weights are all NaN |
| no tokens | no rows |

Does not cover the logits (`FlexMoeRouter`) or fused kernels (`flexmoe.kernels`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min


def route_logits(logits_TE: Tensor, k: int, renormalize: bool) -> Tensor:
    """Softmax over all experts in float32, then the k largest per token.

    Args:
        logits_TE: [tokens, experts], -inf where an expert is not allowed.
        k: experts per token; more than there are means all.
        renormalize: divide the kept weights by their sum.

    Returns:
        float32 [tokens, experts], 0 for experts that a token is not routed to.

    Source: FlexOlmo, arXiv 2507.07024, section 3: softmax over all experts, then top-k.
    """
    logits_TE = logits_TE.float()
    exp_TE = kept_TE = _exp(logits_TE)
    if k < exp_TE.shape[-1]:
        order_TE = logits_TE.sort(dim=-1, descending=True, stable=True).indices
        kept_TE = exp_TE.scatter(1, order_TE[:, k:], 0.0)
    return _normalize(kept_TE, by_TE=kept_TE if renormalize else exp_TE)


def _softmax(logits_TE: Tensor) -> Tensor:
    exp_TE = _exp(logits_TE)
    return _normalize(exp_TE, by_TE=exp_TE)


def _exp(logits_TE: Tensor) -> Tensor:
    """Exponentials of the logits minus the row's maximum, whose own exponential is 1."""
    largest_T1 = logits_TE.detach().amax(-1, keepdim=True).clamp_(min=LOWEST)  # -inf - -inf is NaN
    return (logits_TE - largest_T1).exp_()


def _normalize(exp_TE: Tensor, by_TE: Tensor) -> Tensor:
    """Divides by row sums whose bits do not depend on columns of -inf, unlike those of `torch.softmax`."""
    return exp_TE / _ordered_sum(by_TE).clamp(min=1.0)  # the maximum contributes 1, unless nothing is allowed


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
    chosen_NE = route_logits(logits_NE.detach(), k, renormalize=False) > 0
    share_E = chosen_NE.float().mean(0)
    return logits_NE.shape[-1] * (share_E * probs_NE.mean(0)).sum()


def router_z_loss(router_logits: Sequence[Tensor], token_mask_T: Tensor | None = None) -> Tensor:
    """Mean over layers and tokens of the squared log-sum-exp of the router logits, which keeps them small.

    Args: as for `load_balancing_loss`. Source: ST-MoE, arXiv 2202.08906, equation 5.
    """
    return _counted(router_logits, token_mask_T).logsumexp(-1).square().mean()


def _counted(router_logits: Sequence[Tensor], token_mask_T: Tensor | None) -> Tensor:
    """The logits of all layers and unpadded tokens, float32 [N, E]."""
    device = router_logits[0].device
    logits_LTE = torch.stack([logits.to(device).float() for logits in router_logits])
    if token_mask_T is not None:
        logits_LTE = logits_LTE[:, token_mask_T.to(device)]
    return logits_LTE.flatten(0, 1)
