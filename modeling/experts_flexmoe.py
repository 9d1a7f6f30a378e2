"""The block that replaces a decoder layer's feed-forward network (FFN): named experts, and one router row per expert.

Experts and rows are ordinary modules and are called as modules, so that LoRA, quantisation, hooks and offload work on
each of them. `eager_experts_forward` is the reference. Other implementations are entries of `EXPERTS_FORWARDS` that
the package `flexmoe` adds; the block knows nothing of hardware.

Shapes: B batch, S sequence, T = B * S tokens, N tokens of one expert, H hidden, I intermediate, E experts, A allowed
experts.

Does not cover loading or changing experts (`lifecycle_flexmoe`), or which experts are allowed (`masking_flexmoe`).
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils.generic import maybe_autocast

from .configuration_flexmoe import EXPERTS_FORWARDS, PUBLIC, FlexMoeConfig
from .distributed_flexmoe import must_run_on_all_ranks
from .evidence_flexmoe import EvidenceRow
from .low_rank_flexmoe import Dispatch, LowRankExpert, is_low_rank, is_unwrapped, mix_sharing
from .masking_flexmoe import ForwardContext, forward_context, is_capturing
from .routing_flexmoe import route_logits

# Making experts


def full_expert(ffn: nn.Module, record: Mapping[str, Any], *, layer: int, hidden_size: int) -> nn.Module:
    """A copy of the anchor's FFN, of the record's own width if it has one; the config is shared, not copied."""
    configs = (value for part in ffn.modules() for value in vars(part).values() if isinstance(value, PreTrainedConfig))
    network = copy.deepcopy(ffn, {id(config): config for config in configs})
    if (width := _of_layer(record, "intermediate", layer)) is not None:
        resize(network, hidden_size, width)
    return network


def low_rank_expert(ffn: nn.Module, record: Mapping[str, Any], *, layer: int, hidden_size: int) -> nn.Module:
    """A difference from the anchor's FFN, of the record's rank for this layer."""
    return LowRankExpert(ffn, _of_layer(record, "rank", layer), record.get("alpha"))


def _of_layer(record: Mapping[str, Any], key: str, layer: int) -> Any:
    values = record.get(key)
    if not isinstance(values, list):
        return values
    if layer >= len(values):
        raise ValueError(
            f"Expert {record['name']!r} has {len(values)} entries in {key!r}, and none for layer {layer}."
        )
    return values[layer]


EXPERT_KINDS: dict[str, Callable[..., nn.Module]] = {"full": full_expert, "low_rank": low_rank_expert}
"""Factories of experts by kind: next to the anchor's FFN of a layer, as described by the expert's record."""


def make_expert(ffn: nn.Module, record: Mapping[str, Any], *, layer: int, hidden_size: int) -> nn.Module:
    """An expert as described by `record`, next to the anchor's FFN of this layer.

    Raises:
        ValueError: the record's kind is unknown to this version, or it has no entry for this layer.
    """
    kind = record["kind"]
    if kind not in EXPERT_KINDS:
        raise ValueError(
            f"Expert {record['name']!r} is of kind {kind!r}; this version of FlexMoE knows {sorted(EXPERT_KINDS)}: "
            "update flexmoe."
        )
    return EXPERT_KINDS[kind](ffn, record, layer=layer, hidden_size=hidden_size)


def router_row(
    hidden_size: int,
    evidence: Mapping[str, Any] | None = None,
    layer: int = 0,
    device: torch.device | None = None,
    dtype: torch.dtype | None = torch.float32,
) -> nn.Linear:
    """A router row [1, H] with a bias [1], both zero: the expert is then as likely as the public one.

    With `evidence` of its record, also the weights of the evidence and, in layer 0, its table.

    Rows are float32 even if the model is not, because they are tiny and decide everything. Each is a Linear of its
    own, not a row of a matrix, so that a logit has the same bits whatever other experts there are.
    """
    at: dict[str, Any] = {"device": device, "dtype": dtype}
    row = nn.Linear(hidden_size, 1, **at) if evidence is None else EvidenceRow(hidden_size, evidence, layer, **at)
    nn.init.zeros_(row.weight)
    nn.init.zeros_(row.bias)
    for part in (row, *row.parameters()):
        part.__dict__["_is_hf_initialized"] = True  # the anchor's `_init_weights` would randomise it
    return row


_SIZES = ("in_features", "out_features", "nf", "nx")  # the attributes of Linear, Conv1D and the like


def intermediate_size(network: nn.Module, hidden: int) -> int:
    """Width of an FFN: the smallest side of its matrices other than `hidden`; a fused gate_up has twice the width."""
    sides = itertools.chain.from_iterable(p.shape for p in network.parameters() if p.dim() == 2)
    return min((side for side in sides if side != hidden), default=hidden)


def resize(network: nn.Module, hidden: int, width: int) -> None:
    """Gives `network` this width in place; tensors that change their shape become zeros.

    Raises:
        ValueError: its width cannot be told from its hidden size.
    """
    old = intermediate_size(network, hidden)
    if old == width:
        return
    is_square = any(set(parameter.shape) == {hidden} for parameter in network.parameters() if parameter.dim() == 2)
    if is_square or 2 * old == hidden:
        raise ValueError(
            f"{type(network).__name__} has a hidden size of {hidden} and an intermediate size of {old}, which cannot "
            f"be told apart, so its width cannot be changed to {width}."
        )
    sizes = {old: width, 2 * old: 2 * width}
    for module in network.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not sizes.keys().isdisjoint(tensor.shape):
                setattr(module, name, _zeros_like(tensor, [sizes.get(side, side) for side in tensor.shape]))
                module.__dict__.pop("_is_hf_initialized", None)  # it has to be initialised or loaded
        for name in _SIZES:
            if (size := getattr(module, name, None)) in sizes:
                setattr(module, name, sizes[size])


def _zeros_like(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    zeros = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(zeros, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else zeros


# Dtypes


def floating_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of a module's input, taken from its first floating-point parameter.

    None if it has none, as quantised modules may: those take their input as it is.
    """
    weight = module._parameters.get("weight")  # iterating over a row's parameters takes longer than its product
    if weight is not None and weight.dtype.is_floating_point:
        return weight.dtype
    return next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), None)


def is_quantized(parameter: Tensor) -> bool:
    """Whether a parameter encodes other numbers: integers (bitsandbytes), or a tensor subclass that decodes (torchao).

    A DTensor, a shard of ordinary numbers, does not.
    """
    decodes = hasattr(parameter, "__tensor_flatten__") and not hasattr(parameter, "full_tensor")
    return decodes or not (parameter.dtype.is_floating_point or parameter.dtype.is_complex)


def has_quantized_weights(module: nn.Module) -> bool:
    """Whether any parameter of `module` is quantised."""
    return any(is_quantized(parameter) for parameter in module.parameters())


# The block


class FlexMoeRouter(nn.ModuleDict):
    """One row and one bias per expert."""

    def forward(self, x_TH: Tensor, names: Iterable[str], evidence: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits of the experts `names`, float32 [T, A], regardless of autocast.

        `evidence`: the features [T, F] of the experts that have it.
        """
        rows = [self[name] for name in names]
        dtypes = [floating_dtype(row) or torch.float32 for row in rows]
        with maybe_autocast(x_TH.device.type, enabled=False):
            x_as = {dtype: x_TH.to(dtype) for dtype in set(dtypes)}
            given = [(evidence[name],) if evidence and name in evidence else () for name in names]
            logits = [row(x_as[dtype], *e).float() for row, dtype, e in zip(rows, dtypes, given, strict=True)]
        return torch.cat(logits, -1)


class FlexMoeBlock(nn.Module):
    """Routes each token to its experts and sums their outputs: `y = sum_i weight_i * expert_i(x)`.

    Source: FlexOlmo, arXiv 2507.07024, section 3.
    """

    def __init__(self, ffn: nn.Module, config: FlexMoeConfig, layer_index: int) -> None:
        super().__init__()
        hidden_size = config.get_text_config().hidden_size
        self.layer_index = layer_index
        self.hidden_size = hidden_size
        self.config = config  # for calls outside of the model's own forward pass
        self.experts = nn.ModuleDict()
        self.router = FlexMoeRouter()
        for record in config.expert_records:
            name = record["name"]
            at = {"layer": layer_index, "hidden_size": hidden_size}
            self.experts[name] = ffn if name == PUBLIC else make_expert(ffn, record, **at)
            self.router[name] = router_row(hidden_size, record.get("evidence"), layer_index)

    def forward(self, hidden_states: Tensor, *residual: Tensor) -> Tensor:
        """The mixture of the experts' outputs for `hidden_states` [B, S, H] (or [T, H], as OPT passes it).

        `residual` is an argument of the FFNs of BLOOM and MPT; it is added once, whatever the routing weights.
        """
        context = forward_context()
        active = self.config.active_experts
        names = context.names or tuple(name for name in self.experts if active is None or name in active)
        x_TH = hidden_states.reshape(-1, self.hidden_size)
        zeros = [x_TH.new_zeros(()) for _ in residual]
        mixed_TH = EXPERTS_FORWARDS[context.implementation](self, x_TH, names, context, zeros)
        return sum(residual, mixed_TH.view(hidden_states.shape))

    def route(self, x_TH: Tensor, names: Sequence[str], context: ForwardContext) -> Tensor:
        """Routing weights float32 [T, A]: router logits, mask, softmax, top-k."""
        logits_TA = self.router(x_TH, names, context.evidence)
        if (allowed_TA := self.allowed(context, x_TH)) is not None:
            logits_TA = logits_TA.masked_fill(~allowed_TA, float("-inf"))  # also where a row computes NaN
        weights_TA = route_logits(logits_TA, self.num_chosen(context), self.renormalizes(context))
        self.record(context, names, logits_TA, weights_TA)
        return weights_TA

    def num_chosen(self, context: ForwardContext) -> int:
        """Experts per token; more than there are means all."""
        return context.top_k or self.config.num_experts_per_tok

    def renormalizes(self, context: ForwardContext) -> bool:
        """Whether the chosen experts' weights are divided by their sum."""
        return bool(self.config.norm_topk_prob) if context.renormalize is None else context.renormalize

    def allowed(self, context: ForwardContext, x_TH: Tensor) -> Tensor | None:
        """Whether each token's sequence may use each expert, bool [T, A]; None if all may."""
        if (mask_BA := context.row_mask) is None:
            return None
        # the batch size comes from the mask: OPT passes flat tokens (and len() would fix an exported shape)
        return mask_BA.to(x_TH.device).repeat_interleave(x_TH.shape[0] // mask_BA.shape[0], 0)

    def call_expert(self, name: str, x_TH: Tensor, zeros: Sequence[Tensor] = ()) -> Tensor:
        """The output [T, H] of one expert, called as a module; `zeros` are passed for the FFN's residual."""
        if not x_TH.shape[0]:  # some kernels crash on no tokens, for example bitsandbytes' 4-bit one with AVX-512
            return self.call_expert(name, nn.functional.pad(x_TH, (0, 0, 0, 1)), zeros)[:0]
        expert = self.experts[name]
        public = [self.experts[PUBLIC]] if is_low_rank(expert) else []
        return expert(x_TH.unsqueeze(0), *public, *zeros).squeeze(0)

    def record(self, context: ForwardContext, names: Sequence[str], logits_TA: Tensor, weights_TA: Tensor) -> None:
        """Reports router logits and weights to what the forward pass collects."""
        if context.router_logits is not None:
            context.router_logits.append(_columns_of_all(logits_TA, names, tuple(self.experts)))
        for usage in context.usage:
            usage.record(self.layer_index, names, weights_TA.detach(), context.token_mask)


CallExpert = Callable[[str, Tensor], Tensor]  # from a name and x_NH to y_NH


def eager_experts_forward(
    block: FlexMoeBlock, x_TH: Tensor, names: Sequence[str], context: ForwardContext, zeros: Sequence[Tensor] = ()
) -> Tensor:
    """The reference implementation: routes, and calls the chosen experts as modules.

    Args:
        names: the allowed experts, in the model's order.
        zeros: one for each residual that the FFNs take.

    Returns: [T, H], in the dtype of `x_TH`.
    """
    weights_TA = block.route(x_TH, names, context).to(x_TH.dtype)
    return mix_modules(block, x_TH, names, weights_TA, context, zeros)


def mix_modules(
    block: FlexMoeBlock,
    x_TH: Tensor,
    names: Sequence[str],
    weights_TA: Tensor,
    context: ForwardContext,
    zeros: Sequence[Tensor] = (),
    call: CallExpert | None = None,
) -> Tensor:
    """The weighted sum [T, H] of the experts' outputs, called as modules, or as `call(name, x_NH)` calls them."""
    call = call or functools.partial(block.call_expert, zeros=zeros)
    if len(names) == 1 and not torch.compiler.is_compiling():  # no gathering: the bits of the dense anchor
        return call(names[0], x_TH) * weights_TA
    dispatch = _choose_dispatch(block, names, context)
    sharing = () if zeros else names_sharing_public(block.experts, names)
    if not sharing:
        return _mix_each(block, x_TH, names, weights_TA, dispatch, call)
    weights = dict(zip(names, weights_TA.split(1, -1), strict=True))
    mixed_TH = mix_low_rank(block, x_TH, sharing, torch.cat([weights[name] for name in sharing], -1), dispatch)
    if others := [name for name in names if name not in sharing]:
        weights_TO = torch.cat([weights[name] for name in others], -1)
        mixed_TH = mixed_TH + _mix_each(block, x_TH, others, weights_TO, dispatch, call)
    return mixed_TH


def _choose_dispatch(block: FlexMoeBlock, names: Sequence[str], context: ForwardContext) -> Dispatch:
    """The tokens that each expert computes in this pass."""
    if is_capturing():
        return "masked"
    return "all" if block.num_chosen(context) >= len(names) and context.row_mask is None else "chosen"


def names_sharing_public(experts: nn.ModuleDict, names: Sequence[str]) -> tuple[str, ...]:
    """The low-rank experts among `names`, and "public" with them: they share the public network's products."""
    sharing = {n for n in names if is_low_rank(experts[n]) and experts[n].structure and is_unwrapped(experts[n])}
    if sharing and PUBLIC in names and is_unwrapped(experts[PUBLIC]):
        sharing.add(PUBLIC)
    return tuple(name for name in names if name in sharing)


def mix_low_rank(
    block: FlexMoeBlock, x_TH: Tensor, names: Sequence[str], weights_TM: Tensor, dispatch: Dispatch
) -> Tensor:
    """The weighted sum [T, H] of the experts of `names_sharing_public`."""
    experts: dict[str, Any] = block.experts._modules
    members = [None if name == PUBLIC else experts[name] for name in names]
    structure = next(member.structure for member in members if member is not None)
    if dispatch != "chosen":
        return mix_sharing(x_TH, weights_TM, members, experts[PUBLIC], structure, dispatch)
    mixed_TH = torch.zeros_like(x_TH)
    tokens = weights_TM.any(-1).nonzero().squeeze(-1)  # the others need no products of the public network
    if not len(tokens) and any(must_run_on_all_ranks(experts[name]) for name in names):
        tokens = tokens.new_zeros(1)  # of weight 0
    if len(tokens):
        y_NH = mix_sharing(x_TH[tokens], weights_TM[tokens], members, experts[PUBLIC], structure, dispatch)
        mixed_TH.index_add_(0, tokens, y_NH)
    return mixed_TH


def _mix_each(
    block: FlexMoeBlock, x_TH: Tensor, names: Sequence[str], weights_TA: Tensor, dispatch: Dispatch, call: CallExpert
) -> Tensor:
    """Each expert on its own; their outputs are added in the order of `names`."""
    if dispatch == "chosen":
        return _mix_chosen(block, x_TH, names, weights_TA, call)
    mixed_TH: Tensor | None = None
    for name, weight_T1 in zip(names, weights_TA.split(1, -1), strict=True):
        y_TH = call(name, x_TH)
        if dispatch == "masked":  # a product with 0 alone would keep the NaN of a masked expert
            y_TH = torch.where(weight_T1 != 0, y_TH, 0.0)
        y_TH = y_TH * weight_T1
        mixed_TH = y_TH if mixed_TH is None else mixed_TH + y_TH
    assert mixed_TH is not None
    return mixed_TH


def _mix_chosen(
    block: FlexMoeBlock, x_TH: Tensor, names: Sequence[str], weights_TA: Tensor, call: CallExpert
) -> Tensor:
    """Each expert computes the tokens that are routed to it, which are gathered once for all experts."""
    experts_S, tokens_S = weights_TA.t().nonzero(as_tuple=True)
    counts = experts_S.bincount(minlength=len(names)).tolist()
    x_SH, weights_S1 = x_TH[tokens_S], weights_TA[tokens_S, experts_S, None]
    mixed_TH = torch.zeros_like(x_TH)
    parts = zip(names, x_SH.split(counts), weights_S1.split(counts), tokens_S.split(counts), strict=True)
    for name, x_NH, weights_N1, tokens_N in parts:
        if len(tokens_N) or must_run_on_all_ranks(block.experts[name]):
            # one expert at a time, so that the bits of a sum do not depend on the dispatch
            mixed_TH.index_add_(0, tokens_N, call(name, x_NH) * weights_N1)
    return mixed_TH


def _columns_of_all(logits_TA: Tensor, names: Sequence[str], all_names: Sequence[str]) -> Tensor:
    """The logits as columns of all experts [T, E], -inf for those that were not allowed."""
    if tuple(names) == tuple(all_names):
        return logits_TA
    columns = dict(zip(names, logits_TA.unbind(-1), strict=True))
    masked = logits_TA.new_full(logits_TA.shape[:1], float("-inf"))
    return torch.stack([columns.get(name, masked) for name in all_names], -1)


EXPERTS_FORWARDS["eager"] = eager_experts_forward
