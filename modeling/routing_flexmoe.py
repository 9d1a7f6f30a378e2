"""Routing: which experts a token goes to, with which weight, and what they then say. The reference in plain PyTorch.

It is dull on purpose. On any device it says what is right, and the kernels share nothing with it; on a CPU it is what
the ops run (`ops_flexmoe`).

Shapes: T tokens, H hidden, I intermediate (experts may differ in it), E experts, A those that a call allows, in the
model's order, K active experts: `min(k, E)`.

| case | answer |
|---|---|
| an expert masked with -inf | weight 0, whatever its row holds; the others' bits are as without it (on CPU) |
| equal logits | the lowest index wins |
| fewer allowed experts than K | those there are; surplus slots have the id E and weight 0 |
| nothing allowed in a row | all weights 0, all slots surplus (the model refuses such a row) |
| NaN or +inf among the allowed logits | the row's weights are all NaN, its slots the first K experts |
| NaN in an expert that a token does not go to | nothing of it in that token's output |
| no tokens | no rows |

Does not cover fused kernels, or experts that are more than plain matrices (`experts_flexmoe`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
"""What an expert's activation may be, by the name that it has in `ExpertTensors`."""


class Routing(NamedTuple):
    """Where each token goes.

    Attributes:
        logits_TE: float32 [tokens, experts], -inf where an expert is not allowed.
        weights_TE: float32 [tokens, experts], 0 where a token does not go.
        top_weights_TK: float32 [tokens, K], the same weights, largest logit first; surplus slots 0.
        top_ids_TK: int32 [tokens, K], their experts; surplus slots E.
    """

    logits_TE: Tensor
    weights_TE: Tensor
    top_weights_TK: Tensor
    top_ids_TK: Tensor


@dataclass(frozen=True)
class ExpertTensors:
    """The matrices of a layer's experts, one of each per expert: `down(activation(gate x) * up x)`.

    Attributes:
        up: [I, H] each; I may differ from expert to expert.
        down: [H, I] each.
        gate: [I, H] each, or none: `down(activation(up x))`.
        up_bias, gate_bias: [I] each, or none.
        down_bias: [H] each, or none.
        activation: a key of `ACTIVATIONS`.
    """

    up: Sequence[Tensor]
    down: Sequence[Tensor]
    gate: Sequence[Tensor] = ()
    up_bias: Sequence[Tensor] = ()
    down_bias: Sequence[Tensor] = ()
    gate_bias: Sequence[Tensor] = ()
    activation: str = "silu"


@dataclass(frozen=True)
class LowRankTensors:
    """Experts that are their difference from one public network: `W + scale * B A` for each of its matrices.

    Attributes:
        public: the matrices of one network.
        a: up and gate [R, H] and down [R, I] of each expert; the rank R may differ from expert to expert. No biases.
        b: up and gate [I, R] and down [H, R] of each expert; a bias where the public network has one: its difference.
        scales: one of each expert.
        public_column: where the public network itself stands among the experts; None: it is none of them.
    """

    public: ExpertTensors
    a: ExpertTensors
    b: ExpertTensors
    scales: Sequence[float]
    public_column: int | None = None


def route(
    x_TH: Tensor, rows: Sequence[Tensor], biases: Sequence[Tensor], offset_TE: Tensor | None, k: int, renormalize: bool
) -> Routing:
    """Logits of all experts, softmax over the allowed in float32, then the k largest.

    Args:
        x_TH: hidden states [tokens, hidden], any floating dtype.
        rows: each expert's router row [1, hidden]. A row is multiplied on its own: a logit has the same bits whoever
            else is there.
        biases: each expert's bias [1].
        offset_TE: float32 [tokens, experts], added to the logits: -inf forbids an expert to a token, finite values are
            evidence from elsewhere. None adds nothing.
        k: number of experts that a token keeps; more than there are means all.
        renormalize: divide the kept weights by their sum.

    Source: FlexOlmo, arXiv 2507.07024, section 3: softmax over all experts, then top-k.
    """
    x32_TH = x_TH.float()
    products = (F.linear(x32_TH, row.float(), bias.float()) for row, bias in zip(rows, biases, strict=True))
    logits_TE = _with_offset(torch.cat(list(products), -1), offset_TE)
    weights_TE = route_logits(logits_TE, k, renormalize)
    # a row with NaN among its logits has no order: its slots are the first
    order_TK = (
        torch.where(weights_TE.isnan(), 0.0, logits_TE).sort(dim=-1, descending=True, stable=True).indices[:, :k]
    )
    top_weights_TK = weights_TE.gather(1, order_TK)
    top_ids_TK = torch.where(top_weights_TK == 0, len(rows), order_TK).to(torch.int32)
    return Routing(logits_TE, weights_TE, top_weights_TK, top_ids_TK)


def mix(x_TH: Tensor, weights_TE: Tensor, experts: ExpertTensors) -> Tensor:
    """The weighted sum [tokens, hidden] of what the experts say, in the dtype of `x_TH`.

    Args:
        weights_TE: of `Routing`; an expert says nothing of a token where it is 0.
    """
    y_TH = torch.zeros_like(x_TH)
    for e in range(len(experts.up)):
        tokens = weights_TE[:, e].nonzero().squeeze(-1)
        said_NH = _said(x_TH[tokens], e, experts)
        y_TH = y_TH.index_add(0, tokens, said_NH * weights_TE[tokens, e, None].to(said_NH.dtype))
    return y_TH


def _said(x_NH: Tensor, e: int, experts: ExpertTensors) -> Tensor:
    activation = ACTIVATIONS[experts.activation]
    up_NI = F.linear(x_NH, experts.up[e], experts.up_bias[e] if experts.up_bias else None)
    if experts.gate:
        gate_NI = F.linear(x_NH, experts.gate[e], experts.gate_bias[e] if experts.gate_bias else None)
        h_NI = activation(gate_NI) * up_NI
    else:
        h_NI = activation(up_NI)
    return F.linear(h_NI, experts.down[e], experts.down_bias[e] if experts.down_bias else None)


def mix_low_rank(x_TH: Tensor, weights_TM: Tensor, experts: LowRankTensors) -> Tensor:
    """`mix` for low-rank experts, and the public network if it is one of them.

    Args:
        weights_TM: [tokens, experts]; an expert says nothing of a token where it is 0.
    """
    y_TH = torch.zeros_like(x_TH)
    low_rank = iter(range(len(experts.scales)))
    for m in range(weights_TM.shape[1]):
        difference = None if m == experts.public_column else next(low_rank)
        tokens = weights_TM[:, m].nonzero().squeeze(-1)
        said_NH = _said_with(difference, x_TH[tokens], experts)
        y_TH = y_TH.index_add(0, tokens, said_NH * weights_TM[tokens, m, None].to(said_NH.dtype))
    return y_TH


def _said_with(difference: int | None, x_NH: Tensor, experts: LowRankTensors) -> Tensor:
    def through(name: str, v: Tensor) -> Tensor:
        public_bias, biases = getattr(experts.public, f"{name}_bias"), getattr(experts.b, f"{name}_bias")
        product = F.linear(v, getattr(experts.public, name)[0], public_bias[0] if public_bias else None)
        if difference is None:
            return product
        within = F.linear(v, getattr(experts.a, name)[difference]) * experts.scales[difference]
        bias = biases[difference] if biases else None
        return product + F.linear(within, getattr(experts.b, name)[difference], bias)

    activation = ACTIVATIONS[experts.public.activation]
    up_NI = through("up", x_NH)
    h_NI = activation(through("gate", x_NH)) * up_NI if experts.public.gate else activation(up_NI)
    return through("down", h_NI)


def route_logits(logits_TE: Tensor, k: int, renormalize: bool, offset_TE: Tensor | None = None) -> Tensor:
    """`route` for logits that are there already; arguments as there.

    Returns:
        weights_TE: float32 [tokens, experts], 0 where a token does not go.
    """
    logits_TE = _with_offset(logits_TE.float(), offset_TE)
    exp_TE = kept_TE = _exp(logits_TE)
    if k < exp_TE.shape[-1]:
        order_TE = logits_TE.sort(dim=-1, descending=True, stable=True).indices
        kept_TE = exp_TE.scatter(1, order_TE[:, k:], 0.0)
    return _shares(kept_TE, of_TE=kept_TE if renormalize else exp_TE)


def _with_offset(logits_TE: Tensor, offset_TE: Tensor | None) -> Tensor:
    if offset_TE is None:
        return logits_TE
    return (logits_TE + offset_TE).masked_fill(offset_TE == -math.inf, -math.inf)  # also where the row holds NaN


def route_one(logits: Sequence[float], k: int, renormalize: bool) -> list[float]:
    """`route_logits` of one token in Python's numbers: so few are there before a kernel would have started."""
    largest = max(logits)
    if largest == math.inf or any(map(math.isnan, logits)):
        return [math.nan] * len(logits)
    if largest == -math.inf:
        return [0.0] * len(logits)
    exp = [math.exp(logit - largest) for logit in logits]
    surplus = sorted(range(len(exp)), key=logits.__getitem__, reverse=True)[k:]  # stable: equal ones stay in order
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
    largest_T1 = logits_TE.detach().amax(-1, keepdim=True).clamp_(min=LOWEST)  # -inf - -inf is not a number
    return (logits_TE - largest_T1).exp_()


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
    chosen_NE = route_logits(logits_NE.detach(), k, renormalize=False) > 0
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


__all__ = [
    "ACTIVATIONS",
    "ExpertTensors",
    "LowRankTensors",
    "Routing",
    "load_balancing_loss",
    "mix",
    "mix_low_rank",
    "route",
    "route_logits",
    "route_one",
    "router_z_loss",
]
