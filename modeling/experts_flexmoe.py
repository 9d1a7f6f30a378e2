"""The block that stands where a decoder layer's feed-forward network stood: named experts, and a router row for each.

Shapes: B batch, S sequence, T = B * S tokens, H hidden, E experts, A allowed experts. Experts and rows are ordinary
modules and are called as modules, so that LoRA, quantisation, hooks and offload work on each. Does not cover loading
or changing experts (`lifecycle_flexmoe`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils.generic import maybe_autocast

from .configuration_flexmoe import PUBLIC, FlexMoeConfig
from .context_flexmoe import forward_values, is_recording
from .forms_flexmoe import form_of, is_untouched
from .fused_flexmoe import columns_of, fused_low_rank, fused_mix, fused_route, redirecting
from .implementations_flexmoe import MODULES, NO_OPERATORS, OPERATORS, Inputs, LayerPath, choose_path, may_fuse
from .linear_flexmoe import faster_linears, is_best_as_it_is, may_be_faster, one_row
from .low_rank_flexmoe import LowRankExpert, Spread, mix_sharing
from .parallel_flexmoe import is_awaited
from .plain_flexmoe import Matrices, plain_network, plain_rows, side_by_side
from .prepacked_flexmoe import Prepacked
from .routing_flexmoe import Routing, route_logits, route_one
from .widths_flexmoe import resize


class ExpertKind(Protocol):
    """Makes an expert beside the anchor's network `ffn` of a layer, as the expert's record says."""

    def __call__(self, ffn: nn.Module, record: Mapping[str, Any], *, layer: int, hidden_size: int) -> nn.Module: ...


def full_expert(ffn: nn.Module, record: Mapping[str, Any], *, layer: int, hidden_size: int) -> nn.Module:
    """A copy of the anchor's network `ffn`, but for the config, which they share, and the width, if it has its own."""
    configs = (value for part in ffn.modules() for value in vars(part).values() if isinstance(value, PreTrainedConfig))
    network = copy.deepcopy(ffn, {id(config): config for config in configs})
    if (width := _of_layer(record, "intermediate", layer)) is not None:
        resize(network, hidden_size, width)
    return network


def low_rank_expert(ffn: nn.Module, record: Mapping[str, Any], *, layer: int, hidden_size: int) -> nn.Module:
    """A difference from the anchor's network, of the rank that the record has for this layer."""
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


EXPERT_KINDS: dict[str, ExpertKind] = {"full": full_expert, "low_rank": low_rank_expert}
"""How an expert of each kind is made."""


def make_expert(ffn: nn.Module, record: Mapping[str, Any], *, layer: int, hidden_size: int) -> nn.Module:
    """An expert as `record` says, beside the anchor's network `ffn` of this layer.

    Raises:
        ValueError: the record's kind is unknown to this version, or it says nothing of this layer.
    """
    kind = record["kind"]
    if kind not in EXPERT_KINDS:
        raise ValueError(
            f"Expert {record['name']!r} is of kind {kind!r}; this version of FlexMoE knows {sorted(EXPERT_KINDS)}: "
            "update flexmoe."
        )
    return EXPERT_KINDS[kind](ffn, record, layer=layer, hidden_size=hidden_size)


def router_row(
    hidden_size: int, device: torch.device | None = None, dtype: torch.dtype | None = torch.float32
) -> nn.Linear:
    """A router row [1, H] and its bias [1], zero: the expert is then as likely as the public one.

    In float32 also where a model is made in another dtype: rows are tiny and decide everything.

    It is a Linear of its own, not a row of a matrix, so a logit has the same bits whoever else is there.
    """
    row = nn.Linear(hidden_size, 1, device=device, dtype=dtype)
    nn.init.zeros_(row.weight)
    nn.init.zeros_(row.bias)
    for part in (row, *row.parameters()):
        part.__dict__["_is_hf_initialized"] = True  # the anchor's `_init_weights` would draw it at random
    return row


def floating_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype in which a module takes its input, by its first floating-point parameter.

    None if it has none, as quantised modules may: those take what they are given.
    """
    weight = module._parameters.get("weight")  # walking over a row's parameters takes longer than its product
    if weight is not None and weight.dtype.is_floating_point:
        return weight.dtype
    return next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), None)


class FlexMoeRouter(nn.ModuleDict):
    """One row and one bias per expert."""

    def forward(self, x_TH: Tensor, names: Sequence[str]) -> Tensor:
        """Logits of the experts `names`, float32 [T, A], whatever autocast says."""
        if may_be_faster(x_TH) and (plain := plain_rows(self, names)):  # to call one takes longer than its product
            x32_TH = x_TH.float()
            return torch.cat([nn.functional.linear(x32_TH, row["weight"], row["bias"]) for row in plain], -1)
        rows = [self[name] for name in names]
        dtypes = [floating_dtype(row) or torch.float32 for row in rows]
        with maybe_autocast(x_TH.device.type, enabled=False):
            x_as = {dtype: x_TH.to(dtype) for dtype in set(dtypes)}
            logits = [row(x_as[dtype]).float() for row, dtype in zip(rows, dtypes, strict=True)]
        return torch.cat(logits, -1)

    def of_one(self, x_H: Tensor, names: Sequence[str]) -> Tensor:
        """`forward` of one token without autocast, [A]."""
        if plain := plain_rows(self, names):
            x32_H = x_H.float()
            return torch.cat([torch.addmv(row["bias"], row["weight"], x32_H) for row in plain])
        return self(x_H[None], names)[0]


class FlexMoeBlock(nn.Module):
    """Routes each token to its experts and mixes what they say: `y = sum_i weight_i * expert_i(x)`."""

    def __init__(self, ffn: nn.Module, config: FlexMoeConfig, layer_index: int) -> None:
        super().__init__()
        hidden_size = config.get_text_config().hidden_size
        self.layer_index = layer_index
        self.changes = 0  # those after which a captured CUDA graph of this layer is worth nothing
        self.hidden_size = hidden_size
        self.top_k = config.num_experts_per_tok
        self.norm_topk_prob = bool(config.norm_topk_prob)
        self.experts = nn.ModuleDict()
        self.router = FlexMoeRouter()
        for record in config.expert_records:
            name = record["name"]
            at = {"layer": layer_index, "hidden_size": hidden_size}
            self.experts[name] = ffn if name == PUBLIC else make_expert(ffn, record, **at)
            self.router[name] = router_row(hidden_size)

    def forward(self, hidden_states: Tensor, *residual: Tensor) -> Tensor:
        """Mixes the experts' outputs for `hidden_states` [B, S, H] (or [T, H], as OPT hands it).

        `residual` is what BLOOM and MPT have their network add; it is added once, whatever the experts' weights.
        """
        values = forward_values()
        names = values.get("allowed") or tuple(self.experts)
        k = values.get("top_k") or self.top_k
        renormalize = values.get("renormalize", self.norm_topk_prob)
        row_mask_BA = values.get("row_mask")
        sharing = () if residual else self._sharing(names)
        implementation = MODULES if residual else values.get("implementation", MODULES)
        is_one_token = hidden_states.numel() == self.hidden_size and row_mask_BA is None
        if (
            is_one_token
            and implementation != OPERATORS
            and len(names) > 1
            and not sharing
            and may_be_faster(hidden_states)
        ):
            mixed_H = self._mix_one(hidden_states.reshape(-1), names, k, renormalize, values, residual)
            return sum(residual, mixed_H.to(hidden_states.dtype).view(hidden_states.shape))
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        allowed_TA = _allowed(row_mask_BA, x_TH.shape[0], x_TH.device)
        path = NO_OPERATORS
        if may_fuse(implementation, x_TH):
            path = self.path(names, Inputs.of(x_TH), implementation, sharing)
        if path.fuses_router:
            rows = [self.router[name] for name in names]
            routing = fused_route(x_TH, rows, allowed_TA, k, renormalize)
            logits_TA, weights_TA = routing.logits_TE, routing.weights_TE
        else:
            logits_TA = self.router(x_TH, names)
            if allowed_TA is not None:
                logits_TA = logits_TA.masked_fill(~allowed_TA, float("-inf"))  # also where a row holds NaN
            weights_TA = route_logits(logits_TA, k, renormalize)
        self._report_logits(values, names, logits_TA)
        self._report_weights(values, names, weights_TA.detach())
        weights_TA = weights_TA.to(x_TH.dtype)
        if path.fuses_experts:
            mixed_TH = self._mix_fused(x_TH, names, routing, sharing, path)
        elif len(names) == 1 and not torch.compiler.is_compiling():  # torch's own products: the dense anchor's bits
            mixed_TH = self._call(names[0], residual, x_TH) * weights_TA
        else:
            everyone = k >= len(names) and allowed_TA is None
            spread: Spread = "masked" if is_recording() else "all" if everyone else "chosen"
            mixed_TH = self._mix(x_TH, names, weights_TA, spread, residual, sharing)
        return sum(residual, mixed_TH.view(hidden_states.shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FlexMoeBlock:
        with redirecting(self):  # `to` moves tensors
            return super()._apply(fn, recurse)

    def path(
        self, names: Sequence[str], inputs: Inputs, implementation: str, sharing: Sequence[str] | None = None
    ) -> LayerPath:
        """Which way `forward` takes such inputs through the experts `names`, and why.

        `sharing`: those of them that share the public network's products, if that is known already.
        """
        if implementation == MODULES:
            return NO_OPERATORS
        sharing = self._sharing(names) if sharing is None else sharing
        others = tuple(name for name in names if name not in sharing)
        return choose_path(implementation, inputs, tuple(names), others, self.experts, self.router)

    def _mix_fused(
        self, x_TH: Tensor, names: Sequence[str], routing: Routing, sharing: Sequence[str], path: LayerPath
    ) -> Tensor:
        """Those of `sharing` through the public network's products, all others through the experts' operator."""
        mixed = []
        if path.plan is not None:
            columns = [i for i, name in enumerate(names) if name not in sharing]
            mixed.append(fused_mix(x_TH, routing, [self.experts[names[i]] for i in columns], columns, path.plan))
        columns = [names.index(name) for name in sharing]
        if path.low_rank is not None:
            members = self._members(sharing)
            mixed.append(fused_low_rank(x_TH, routing, members, columns, self.experts[PUBLIC], path.low_rank))
        elif sharing:
            weights_TM = columns_of(routing.weights_TE, columns).to(x_TH.dtype)
            mixed.append(self._mix_sharing(x_TH, weights_TM, sharing, "masked"))
        return _add_up(iter(mixed))

    def _mix(
        self,
        x_TH: Tensor,
        names: Sequence[str],
        weights_TA: Tensor,
        spread: Spread,
        zeros: Sequence[Tensor],
        sharing: Sequence[str] = (),
    ) -> Tensor:
        """Those of `sharing` together, all others each on its own."""
        if not sharing:
            return self._mix_as(spread, x_TH, names, weights_TA, zeros)
        columns = dict(zip(names, weights_TA.split(1, -1), strict=True))
        weights_TM = torch.cat([columns[name] for name in sharing], -1)
        others = [name for name in names if name not in sharing]
        if not others:
            return self._mix_sharing(x_TH, weights_TM, sharing, spread)
        if spread != "chosen":
            mixed_TH = self._mix_sharing(x_TH, weights_TM, sharing, spread)
        else:  # tokens of the others alone need no products of the public network
            mixed_TH = torch.zeros_like(x_TH)
            tokens = weights_TM.any(-1).nonzero().squeeze(-1)
            if not len(tokens) and any(is_awaited(self.experts[name]) for name in sharing):
                tokens = tokens.new_zeros(1)  # of weight 0
            if len(tokens):
                said_NH = self._mix_sharing(x_TH[tokens], weights_TM[tokens], sharing, spread)
                mixed_TH.index_add_(0, tokens, said_NH)
        weights_TO = torch.cat([columns[name] for name in others], -1)
        return mixed_TH + self._mix_as(spread, x_TH, others, weights_TO, ())

    def _mix_as(
        self, spread: Spread, x_TH: Tensor, names: Sequence[str], weights_TA: Tensor, zeros: Sequence[Tensor]
    ) -> Tensor:
        mixers = {"all": self._mix_all, "chosen": self._mix_chosen, "masked": self._mix_masked}
        return mixers[spread](x_TH, names, weights_TA, zeros)

    def _mix_sharing(self, x_TH: Tensor, weights_TM: Tensor, sharing: Sequence[str], spread: Spread) -> Tensor:
        """The members of `sharing`, with one product of the public network for all of them."""
        members = self._members(sharing)
        form = next(member.form for member in members if member is not None)
        return mix_sharing(x_TH, weights_TM, members, self.experts[PUBLIC], form, spread)

    def _members(self, sharing: Sequence[str]) -> list[Any]:
        return [None if name == PUBLIC else self.experts[name] for name in sharing]

    def _sharing(self, names: Sequence[str]) -> tuple[str, ...]:
        """Which of `names` make the public network's products once for all of them: low-rank experts, and public."""
        experts: dict[str, Any] = self.experts._modules
        if not any(isinstance(experts[name], LowRankExpert) for name in names):
            return ()
        experts = {name: experts[name] for name in names}
        low_rank = [name for name, expert in experts.items() if isinstance(expert, LowRankExpert) and expert.form]
        sharing = {name for name in low_rank if is_untouched(experts[name])}
        if not sharing:
            return ()
        if PUBLIC in experts and is_untouched(experts[PUBLIC]):
            sharing.add(PUBLIC)
        return tuple(name for name in names if name in sharing)

    def _mix_all(self, x_TH: Tensor, names: Sequence[str], weights_TA: Tensor, zeros: Sequence[Tensor]) -> Tensor:
        """Every token goes to every expert: nothing to gather."""
        return _add_up(self._expert(name, x_TH, zeros)(x_TH) * weights_TA[:, i, None] for i, name in enumerate(names))

    def _mix_masked(self, x_TH: Tensor, names: Sequence[str], weights_TA: Tensor, zeros: Sequence[Tensor]) -> Tensor:
        """Every expert sees every token, because compiled code has no shapes that depend on data."""
        outputs = (self._call(name, zeros, x_TH) for name in names)
        # where, not a product with 0 alone: an expert that is masked may hold NaN
        chosen = (
            torch.where(w_T1 != 0, y, 0.0) * w_T1 for y, w_T1 in zip(outputs, weights_TA.split(1, -1), strict=True)
        )
        return _add_up(chosen)

    def _mix_chosen(self, x_TH: Tensor, names: Sequence[str], weights_TA: Tensor, zeros: Sequence[Tensor]) -> Tensor:
        """Each expert sees the tokens that chose it, which are gathered once for all."""
        experts_S, tokens_S = weights_TA.t().nonzero(as_tuple=True)
        everyone = experts_S.bincount(minlength=len(names)).tolist()
        x_SH, weights_S1 = x_TH[tokens_S], weights_TA[tokens_S, experts_S, None]
        chosen = {name: n for name, n in zip(names, everyone, strict=True) if n or is_awaited(self.experts[name])}
        counts = [*chosen.values()]
        said: Iterable[Tensor]
        if not zeros and (networks := self._of_one_kind(chosen, x_SH)):
            said_SH = side_by_side(networks, x_SH, counts).mul_(weights_S1)
            if len(tokens_S) == len(x_TH) * min(forward_values().get("top_k") or self.top_k, len(names)):
                return _sums(said_SH, tokens_S, len(x_TH))
            said = said_SH.split(counts)
        else:  # all experts are looked up before any weights are read, which flush the caches
            x_parts, weights = x_SH.split(counts), weights_S1.split(counts)
            experts = [self._expert(name, x_NH, zeros) for name, x_NH in zip(chosen, x_parts, strict=True)]
            said = (e(x_NH) * weight_N1 for e, x_NH, weight_N1 in zip(experts, x_parts, weights, strict=True))
        mixed_TH = torch.zeros_like(x_TH)
        for tokens_N, said_NH in zip(tokens_S.split(counts), said, strict=True):
            # one expert at a time: so a sum has the same bits where each token goes to each expert
            mixed_TH.index_add_(0, tokens_N, said_NH)
        return mixed_TH

    def _of_one_kind(self, chosen: Mapping[str, int], x_SH: Tensor) -> list[Matrices] | None:
        """The experts, if they are `chosen` by few rows each, and differ in nothing but their matrices."""
        counts = chosen.values()
        if not (counts and min(counts) and is_best_as_it_is(x_SH.dtype, max(counts)) and may_be_faster(x_SH)):
            return None
        networks = self._matrices([*chosen])
        return networks if networks and all(one.kind == networks[0].kind for one in networks) else None

    def _matrices(self, names: Sequence[str]) -> list[Matrices] | None:
        """The experts `names`, if all of them are nothing but large matrices in half precision."""
        experts: dict[str, Any] = self.experts._modules
        matrices = []
        for name in names:
            plain = plain_network(experts[name])
            if plain is None or plain.matrices is None:
                return None
            matrices.append(plain.matrices)
        return matrices

    def _mix_one(
        self,
        x_H: Tensor,
        names: Sequence[str],
        k: int,
        renormalize: bool,
        values: dict[str, Any],
        zeros: Sequence[Tensor],
    ) -> Tensor:
        """All of `forward` for one token on a CPU, as when decoding: there, starting a kernel is what takes long."""
        logits_A = self.router.of_one(x_H, names)
        weights = route_one(logits_A.tolist(), k, renormalize)
        if "router_logits" in values:
            self._report_logits(values, names, logits_A[None])
        if "usage" in values:
            self._report_weights(values, names, torch.tensor([weights]))
        x = one_row(x_H)
        chosen = {name: weight for name, weight in zip(names, weights, strict=True) if weight}
        for name in names:
            if name not in chosen and is_awaited(self.experts[name]):
                self._call(name, zeros, x_H[None][:0])
        # all parts are looked up before any weights are read, which flush the caches
        experts = self._experts_of_one([*chosen], x, zeros, values.get("prepacked"))
        if not experts:
            return torch.zeros_like(x_H)
        (weight, expert), *others = zip(chosen.values(), experts, strict=True)
        mixed_H = expert(x) * weight
        for weight, expert in others:
            mixed_H.add_(expert(x), alpha=weight)
        return mixed_H.view(x_H.shape)

    def _experts_of_one(
        self, names: Sequence[str], x: Tensor, zeros: Sequence[Tensor], prepacked: Prepacked | None
    ) -> tuple[Callable[[Tensor], Tensor], ...]:
        """The experts for one token, [H] or [1, H]; those that `prepacked` has compiled answer in float32."""
        if not zeros and prepacked is not None:
            return tuple(prepacked.one_token(self.experts[name]) or self._expert(name, x, zeros) for name in names)
        matrices = self._matrices(names) if not zeros and is_best_as_it_is(x.dtype, 1) else None
        return tuple(matrices) if matrices else tuple(self._expert(name, x, zeros) for name in names)

    def _expert(self, name: str, like: Tensor, zeros: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
        """The expert for inputs like `like`, [T, H] or [H], in the fastest way that there is for its network here."""
        expert = self.experts[name]
        if not zeros and like.numel() and may_be_faster(like) and (form := form_of(expert)):
            return form.bind(expert, like)
        return functools.partial(self._call_faster, name, zeros)

    def _call_faster(self, name: str, zeros: Sequence[Tensor], x: Tensor) -> Tensor:
        with faster_linears(x):
            return self._call(name, zeros, x.reshape(-1, self.hidden_size)).view(x.shape)

    def _call(self, name: str, zeros: Sequence[Tensor], x_TH: Tensor) -> Tensor:
        if not x_TH.shape[0]:  # a kernel may die of no tokens: bitsandbytes' 4-bit one on CPUs with AVX-512 does
            return self._call(name, zeros, nn.functional.pad(x_TH, (0, 0, 0, 1)))[:0]
        expert = self.experts[name]
        public = [self.experts[PUBLIC]] if isinstance(expert, LowRankExpert) else []
        return expert(x_TH.unsqueeze(0), *public, *(x_TH.new_zeros(()) for _ in zeros)).squeeze(0)

    def _report_logits(self, values: dict[str, Any], names: Sequence[str], logits_TA: Tensor) -> None:
        if (collected := values.get("router_logits")) is not None:
            collected.append(_among_all(logits_TA, names, tuple(self.experts)))

    def _report_weights(self, values: dict[str, Any], names: Sequence[str], weights_TA: Tensor) -> None:
        for usage in values.get("usage", ()):
            usage.record(self.layer_index, names, weights_TA, values.get("token_mask"))


def _allowed(row_mask_BA: Tensor | None, tokens: int, device: torch.device) -> Tensor | None:
    """Whether the token's sequence may use the expert: bool [T, A]."""
    if row_mask_BA is None:
        return None
    # the batch size comes from the mask: OPT hands its network flat tokens (and len() would fix an exported shape)
    return row_mask_BA.to(device).repeat_interleave(tokens // row_mask_BA.shape[0], 0)


def _among_all(logits_TA: Tensor, names: Sequence[str], everyone: Sequence[str]) -> Tensor:
    """The logits as columns of all experts [T, E], -inf for those that were not allowed."""
    if tuple(names) == tuple(everyone):
        return logits_TA
    columns = dict(zip(names, logits_TA.unbind(-1), strict=True))
    nothing = logits_TA.new_full(logits_TA.shape[:1], float("-inf"))
    return torch.stack([columns.get(name, nothing) for name in everyone], -1)


def _sums(said_SH: Tensor, tokens_S: Tensor, tokens: int) -> Tensor:
    """What is said to each token, added up in its order [T, H]; all tokens have equally many rows."""
    order_KT = tokens_S.sort(stable=True).indices.view(tokens, -1).t()
    return _add_up(iter(said_SH[order_KT].unbind()))


def _add_up(outputs: Iterator[Tensor]) -> Tensor:
    total = next(outputs)
    for output in outputs:
        total = total + output
    return total


__all__ = [
    "EXPERT_KINDS",
    "FlexMoeBlock",
    "FlexMoeRouter",
    "floating_dtype",
    "full_expert",
    "low_rank_expert",
    "make_expert",
    "router_row",
]
