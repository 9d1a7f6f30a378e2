"""Low-rank experts: a difference from the public network, `W_public x + scale * B(A x)` for each of its matrices.

The public network is passed in at each call and registered nowhere here, so its weights exist once. Its parts are
called as modules, so adapters, quantisers and offload hooks on them stay in force; it is not called as a whole.

Low-rank experts share the first products of the public network, and its last product where that is linear:

    h_i = act(gate x + dgate_i x) * (up x + dup_i x)        y = down(sum_i w_i h_i) + sum_i w_i ddown_i h_i

For this the structure of the FFN has to be known; `read_structure` finds it by running the FFN's `forward` on symbols.

Shapes: T tokens, N tokens of one expert, M members, H hidden, I intermediate, R rank.

Does not cover making a low-rank expert from a full one (`flexmoe.conversion.low_rank`), or parameters of an FFN that
are not matrices: those are the public network's.

Source: FlexMoRE, arXiv 2602.08818; LoRA, arXiv 2106.09685, for the initialisation (A random, B zero).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules
from transformers.pytorch_utils import Conv1D

from .distributed_flexmoe import is_distributed, is_fully_sharded, must_run_on_all_ranks

Dispatch = Literal["all", "chosen", "masked"]
"""The tokens that an expert computes: all, those routed to it, or all with the outputs of the others masked (those may
be NaN). Compiled code and captured graphs need "masked", because they cannot have data-dependent shapes."""

_LINEAR_FORWARD = nn.Linear.forward  # the value at load time: a later patch of the class has to be called


# The structure of a feed-forward network


@dataclass(frozen=True)
class FfnStructure:
    """Names of the parts in `down(activation(gate(x)) * up(x))`, or in `down(activation(up(x)))` without a gate."""

    up: str
    down: str
    activation: str
    gate: str | None = None


def read_structure(network: nn.Module) -> FfnStructure | None:
    """The structure of `network`, read by running its `forward` on symbols; None if it is of another structure."""
    copied = object.__new__(type(network))
    copied.__dict__.update(network.__dict__)
    copied.__dict__["_modules"] = {name: functools.partial(_apply_part, name) for name in network._modules}
    try:
        output = type(network).forward(copied, _Symbol("x"))
    except Exception:  # whatever a forward does with its input that a symbol does not support
        return None
    match getattr(output, "terms", None):
        case (down, ("*", (activation, (gate, "x")), (up, "x"))) | (down, ("*", (up, "x"), (activation, (gate, "x")))):
            return FfnStructure(up, down, activation, gate)
        case (down, (activation, (up, "x"))):
            return FfnStructure(up, down, activation)
    return None


class _Symbol:
    """A value that is not computed. Its terms: "x", (part, terms of its input) or ("*", factor, factor)."""

    def __init__(self, terms: Any) -> None:
        self.terms = terms

    def __mul__(self, other: _Symbol) -> _Symbol:
        return _Symbol(("*", self.terms, other.terms))


def _apply_part(name: str, value: _Symbol) -> _Symbol:
    return _Symbol((name, value.terms))


def is_unwrapped(module: nn.Module) -> bool:
    """Whether calling `module` runs the forward of its class and nothing else: no hooks, no replaced forward."""
    state = module.__dict__
    return not (
        "forward" in state
        or state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or torch_modules._has_any_global_hook()
    )


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether `layer` is an `nn.Linear` without hooks: its weight and bias determine what it computes."""
    return type(layer) is nn.Linear and nn.Linear.forward is _LINEAR_FORWARD and is_unwrapped(layer)


# Low-rank experts


class Factor(nn.Module):
    """A thin matrix, [N, in] to [N, out]. Not an `nn.Linear`: PEFT's "all-linear" and quantisers look for those, and a
    factor is too thin for an adapter of its own or for a quantiser's groups."""

    def __init__(self, in_features: int, out_features: int, bias: bool, **like: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features  # tensor parallelism divides them
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **like))
        self.bias = nn.Parameter(torch.zeros(out_features, **like)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """The product with `x`, and the bias."""
        return F.linear(x, self.weight, self.bias)


class LowRankDelta(nn.Module):
    """The difference from one matrix of the public network: `B(scale * A(x))`, and a bias if the matrix has one."""

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, bias: bool, **like: Any) -> None:
        super().__init__()
        self.scale = scale
        self.A = Factor(in_features, rank, bias=False, **like)
        self.B = Factor(rank, out_features, bias=bias, **like)
        self.reset_parameters()
        for part in (self.A, self.B, *self.parameters()):
            part.__dict__["_is_hf_initialized"] = True  # no family's `_init_weights` may initialise them again

    def reset_parameters(self) -> None:
        """A random and B zero: no difference yet."""
        nn.init.kaiming_uniform_(self.A.weight, a=5**0.5)
        for parameter in self.B.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """The difference from the matrix's product with `x`."""
        inner = self.A(x)
        return self.B(inner if self.scale == 1 else inner * self.scale)


class LowRankExpert(nn.Module):
    """An expert that is a difference from the public network: one `LowRankDelta` under the name of each matrix.

    Attributes:
        structure: of the public network; None if unknown, or if a part is no matrix.
    """

    kind = "low_rank"

    def __init__(self, ffn: nn.Module, rank: int, alpha: float | None) -> None:
        """`ffn` is a network like the public one; the scale is `alpha / rank`, and 1 without an `alpha`."""
        super().__init__()
        scale = low_rank_scale(rank, alpha)
        for path, matrix in matrices(ffn):
            *parents, leaf = path.split(".")
            parent: nn.Module = self
            for name in parents:
                if name not in parent._modules:
                    parent.add_module(name, nn.Module())
                parent = parent.get_submodule(name)
            parent.add_module(leaf, _delta(matrix, rank, scale))
        found = read_structure(ffn)
        has_deltas = found is not None and all(
            isinstance(self._modules.get(name), LowRankDelta)
            for name in (found.gate or found.up, found.up, found.down)
        )
        self.structure = found if has_deltas else None

    def delta(self, name: str) -> nn.Module:
        """The difference from the public network's part of this name."""
        return cast(nn.Module, self._modules[name])

    def forward(self, x: Tensor, public: nn.Module, *residual: Tensor) -> Tensor:
        """The output of the public network with this expert's differences; `residual` as that network takes it."""
        _check_readable(public)
        if self.structure is not None and not residual:
            x_TH = x.reshape(-1, x.shape[-1])
            return mix_sharing(x_TH, x_TH.new_ones(len(x_TH), 1), [self], public, self.structure).view(x.shape)
        return _adjusted(public, self)(x, *residual)


def is_low_rank(expert: nn.Module) -> bool:
    """Whether an expert is a `LowRankExpert`, of this module or of its copy in remote code."""
    return getattr(expert, "kind", None) == LowRankExpert.kind


def mix_sharing(
    x_TH: Tensor,
    weights_TM: Tensor,
    members: Sequence[LowRankExpert | None],
    public: nn.Module,
    structure: FfnStructure,
    dispatch: Dispatch = "all",
) -> Tensor:
    """The weighted sum [T, H] of the outputs of `members`: low-rank experts, and None for the public network itself.

    Args:
        weights_TM: 0 where a token is not routed to a member.
        structure: of the public network.
        dispatch: the tokens that a member computes.

    Raises:
        ValueError: the public network cannot be read without calling it: FSDP2 shards it on its own, or a hook on the
            whole of it loads its weights.
    """
    _check_readable(public)
    parts: dict[str, Any] = public._modules
    down, is_linear = parts[structure.down], is_plain_linear(parts[structure.down])
    mixed_TH, hidden_TI = torch.zeros_like(x_TH), None
    products = {name: parts[name](x_TH) for name in (structure.gate, structure.up) if name is not None}
    for member, weight_T1 in zip(members, weights_TM.split(1, -1), strict=True):
        tokens = weight_T1.squeeze(-1).nonzero().squeeze(-1) if dispatch == "chosen" else None
        if tokens is not None and not len(tokens):
            if not must_run_on_all_ranks(public if member is None else member):
                continue
            tokens = tokens.new_zeros(1)  # of weight 0; some kernels cannot take zero rows
        h_NI = _hidden(x_TH, products, member, parts, structure, tokens)
        weight_N1 = _rows(weight_T1, tokens)
        y_NH = None if member is None else member.delta(structure.down)(h_NI)
        if is_linear:
            hidden_TI = torch.zeros_like(products[structure.up]) if hidden_TI is None else hidden_TI
            _add(hidden_TI, h_NI, weight_N1, tokens, dispatch)
        else:
            y_NH = down(h_NI) if y_NH is None else down(h_NI) + y_NH
        if y_NH is not None:
            _add(mixed_TH, y_NH, weight_N1, tokens, dispatch)
    if hidden_TI is not None:
        mixed_TH = mixed_TH + F.linear(hidden_TI, down.weight)
        if down.bias is not None:
            mixed_TH = mixed_TH + down.bias * weights_TM.sum(-1, keepdim=True)
    return mixed_TH


def _hidden(
    x_TH: Tensor,
    products: dict[str, Tensor],
    member: LowRankExpert | None,
    parts: dict[str, Any],
    structure: FfnStructure,
    tokens: Tensor | None,
) -> Tensor:
    """The input [N, I] of a member's last matrix, from the public network's products with all tokens."""
    own = {name: _rows(product_TI, tokens) for name, product_TI in products.items()}
    if member is not None:
        x_NH = _rows(x_TH, tokens)
        own = {name: product_NI + member.delta(name)(x_NH) for name, product_NI in own.items()}
    activation, up = parts[structure.activation], own[structure.up]
    return activation(up) if structure.gate is None else activation(own[structure.gate]) * up


def _rows(x: Tensor, tokens: Tensor | None) -> Tensor:
    return x if tokens is None else x[tokens]


def _add(total: Tensor, y: Tensor, weight_N1: Tensor, tokens: Tensor | None, dispatch: Dispatch) -> None:
    """Adds the weighted rows to `total`."""
    if tokens is not None:
        total.index_add_(0, tokens, (y * weight_N1).to(total.dtype))  # under autocast the dtypes differ
    elif dispatch == "masked":
        total += torch.where(weight_N1 != 0, y, 0.0) * weight_N1
    else:
        total += y * weight_N1


def _check_readable(public: nn.Module) -> None:
    if is_distributed() and is_fully_sharded(public):
        raise ValueError(
            "A low-rank expert reads the public network, which FSDP2 shards on its own here: apply fully_shard to the "
            "decoder layers, not to the networks in them."
        )
    hook = public.__dict__.get("_hf_hook")  # accelerate's
    if hook is not None and any(getattr(part, "place_submodules", False) for part in getattr(hook, "hooks", (hook,))):
        raise ValueError(
            "A low-rank expert reads the public network, whose weights are loaded by a hook on the whole of it: "
            "offload without preload_module_classes, so that each of its parts has a hook of its own."
        )


class _Adjusted:
    """A part of the public network with a difference added to its output; other attributes are the part's."""

    def __init__(self, part: nn.Module, delta: nn.Module) -> None:
        self._part = part
        self._delta = delta

    def __call__(self, x: Tensor) -> Tensor:
        return self._part(x) + self._delta(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


def _adjusted(public: nn.Module, deltas: nn.Module) -> Callable[..., Tensor]:
    """The forward of the public network's class over parts with the differences added; works for any family."""
    shell = object.__new__(type(public))
    shell.__dict__.update(public.__dict__)
    parts: dict[str, Any] = dict(public._modules)
    shell.__dict__["_modules"] = parts
    for name, delta in deltas.named_children():
        part = parts[name]
        parts[name] = _Adjusted(part, delta) if isinstance(delta, LowRankDelta) else _adjusted(part, delta)
    return functools.partial(type(public).forward, shell)


def matrices(ffn: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts of an FFN that multiply by a matrix (Linear, Conv1D and the like), with their paths.

    Raises:
        ValueError: there is none.
    """
    found = [
        (path, part)
        for path, part in ffn.named_modules()
        if path and isinstance(weight := part._parameters.get("weight"), Tensor) and weight.dim() == 2
    ]
    if not found:
        raise ValueError(f"{type(ffn).__name__} has no part with a matrix, so no expert of it can be low-rank.")
    yield from found


def as_out_in(part: nn.Module, weight: Tensor) -> Tensor:
    """The matrix [out, in] that is stored as the `weight` of such a part; applied twice, the stored one again."""
    return weight.T if isinstance(part, Conv1D) else weight


def _delta(matrix: nn.Module, rank: int, scale: float) -> LowRankDelta:
    weight: Any = matrix._parameters["weight"]
    out_features, in_features = as_out_in(matrix, weight).shape
    dtype = weight.dtype if weight.dtype.is_floating_point else None
    has_bias = matrix._parameters.get("bias") is not None
    return LowRankDelta(in_features, out_features, rank, scale, has_bias, device=weight.device, dtype=dtype)


def low_rank_scale(rank: int, alpha: float | None) -> float:
    """The factor of a difference of this rank: `alpha / rank`, as in LoRA, and 1 without an `alpha`."""
    return 1.0 if alpha is None else alpha / rank
