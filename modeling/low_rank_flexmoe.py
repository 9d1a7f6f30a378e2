"""Low-rank experts: a difference from the public network, `W_public x + scale * B(A x)` for each of its matrices.

The public network is handed in at each call and registered nowhere here, so there is one copy of it, and what replaces
it is seen at once. Its parts are called as modules, so an adapter, a quantiser or offload around them stays in force.
The network as a whole is not called: hooks on it do not run, and one that must run to move weights is refused.

Shapes: T tokens, N those of one expert, M members, H hidden, I intermediate, R rank. Experts that share a public
network make its first products once per token, and its last one once for their weighted sum where that is linear:

    h_i = act(gate x + dgate_i x) * (up x + dup_i x)        y = down(sum_i w_i h_i) + sum_i w_i ddown_i h_i

Source: FlexMoRE, arXiv 2602.08818; LoRA, arXiv 2106.09685, for the start (A random, B zero). Does not cover making one
of a full expert (`flexmoe.conversion.low_rank`), or parameters of a network that are no matrices: those are public's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .forms_flexmoe import FfnForm, is_plain_linear, read_form
from .linear_flexmoe import faster_linears
from .parallel_flexmoe import has_company, is_awaited, is_fully_sharded

Spread = Literal["all", "chosen", "masked"]
"""Which tokens an expert computes: all, those that chose it (how many is data), or all, of which those that did not
choose it are masked: they may hold NaN. Compiled code and captured graphs have no shapes that depend on data."""

_PACKED = ((".A.weight", ".lora_A.weight"), (".B.weight", ".lora_B.weight"), (".B.bias", ".bias_delta"))


class Factor(nn.Module):
    """A thin matrix: what `nn.Linear` computes, [N, in] to [N, out].

    Not one, because whoever looks for those (PEFT's "all-linear", quantisers) means the matrices of networks: a factor
    is too thin for an adapter of its own or for a quantiser's groups, and small as it is.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, **like: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features  # tensor parallelism divides them
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **like))
        self.bias = nn.Parameter(torch.zeros(out_features, **like)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """The product with `x`, and the bias."""
        return F.linear(x, self.weight, self.bias)


class LowRankDelta(nn.Module):
    """The difference from one matrix of the public network: `B(scale * A(x))`, [N, in] to [N, out].

    B has a bias where the matrix has one: the difference of the biases.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, bias: bool, **like: Any) -> None:
        super().__init__()
        self.scale = scale
        self.A = Factor(in_features, rank, bias=False, **like)
        self.B = Factor(rank, out_features, bias=bias, **like)
        self.reset_parameters()
        for part in (self.A, self.B, *self.parameters()):
            part.__dict__["_is_hf_initialized"] = True  # they have begun: no family's `_init_weights` is to draw them

    def reset_parameters(self) -> None:
        """A at random and B zero: no difference yet."""
        nn.init.kaiming_uniform_(self.A.weight, a=5**0.5)
        for parameter in self.B.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """The difference that this makes to the matrix's product with `x`."""
        within = self.A(x)
        return self.B(within if self.scale == 1 else within * self.scale)


class LowRankExpert(nn.Module):
    """An expert that is its difference from the public network; one `LowRankDelta` under the name of each matrix."""

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
        form = read_form(ffn)
        known = form is not None and all(
            isinstance(self._modules.get(name), LowRankDelta) for name in (form.gate or form.up, form.up, form.down)
        )
        self.form = form if known else None

    def delta(self, name: str) -> nn.Module:
        """The difference from the public network's part of this name."""
        return cast(nn.Module, self._modules[name])

    def forward(self, x: Tensor, public: nn.Module, *residual: Tensor) -> Tensor:
        """What the public network says of `x` with this expert's differences; `residual` as the network takes it."""
        _check_readable(public)
        if self.form is not None and not residual:
            x_TH = x.reshape(-1, x.shape[-1])
            return mix_sharing(x_TH, x_TH.new_ones(len(x_TH), 1), [self], public, self.form).view(x.shape)
        return _adjusted(public, self)(x, *residual)


def mix_sharing(
    x_TH: Tensor,
    weights_TM: Tensor,
    members: Sequence[LowRankExpert | None],
    public: nn.Module,
    form: FfnForm,
    spread: Spread = "all",
) -> Tensor:
    """The weighted sum [T, H] of what `members` say: low-rank experts, and None for the public network itself.

    Args:
        weights_TM: 0 where a member does not see a token.
        form: of the public network.
        spread: which tokens a member sees.

    Raises:
        ValueError: the public network cannot be read without being called: FSDP2 shards it on its own, or a hook on
            the whole of it brings its weights.
    """
    _check_readable(public)
    parts: dict[str, Any] = public._modules
    down, joins = parts[form.down], is_plain_linear(parts[form.down])
    mixed_TH, hidden_TI = torch.zeros_like(x_TH), None
    with faster_linears(x_TH):
        products = {name: parts[name](x_TH) for name in (form.gate, form.up) if name is not None}
        for member, weight_T1 in zip(members, weights_TM.split(1, -1), strict=True):
            tokens = weight_T1.squeeze(-1).nonzero().squeeze(-1) if spread == "chosen" else None
            if tokens is not None and not len(tokens):
                if not is_awaited(public if member is None else member):
                    continue
                tokens = tokens.new_zeros(1)  # of weight 0; no rows at all are more than some kernels can take
            h_NI = _hidden(x_TH, products, member, parts, form, tokens)
            weight_N1 = _rows(weight_T1, tokens)
            said_NH = None if member is None else member.delta(form.down)(h_NI)
            if joins:
                hidden_TI = torch.zeros_like(products[form.up]) if hidden_TI is None else hidden_TI
                _add(hidden_TI, h_NI, weight_N1, tokens, spread)
            else:
                said_NH = down(h_NI) if said_NH is None else down(h_NI) + said_NH
            if said_NH is not None:
                _add(mixed_TH, said_NH, weight_N1, tokens, spread)
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
    form: FfnForm,
    tokens: Tensor | None,
) -> Tensor:
    """What goes into a member's last matrix [N, I], made of the public network's products with all tokens."""
    made = {name: _rows(product_TI, tokens) for name, product_TI in products.items()}
    if member is not None:
        x_NH = _rows(x_TH, tokens)
        made = {name: product_NI + member.delta(name)(x_NH) for name, product_NI in made.items()}
    activation = parts[form.activation]
    return activation(made[form.up]) if form.gate is None else activation(made[form.gate]) * made[form.up]


def _rows(x: Tensor, tokens: Tensor | None) -> Tensor:
    return x if tokens is None else x[tokens]


def _add(total: Tensor, said: Tensor, weight_N1: Tensor, tokens: Tensor | None, spread: Spread) -> None:
    """Adds the weighted rows to `total`."""
    if tokens is not None:
        total.index_add_(0, tokens, (said * weight_N1).to(total.dtype))  # autocast leaves two dtypes
    elif spread == "masked":
        total += torch.where(weight_N1 != 0, said, 0.0) * weight_N1
    else:
        total += said * weight_N1


def _check_readable(public: nn.Module) -> None:
    if has_company() and is_fully_sharded(public):
        raise ValueError(
            "A low-rank expert reads the public network, which FSDP2 shards on its own here: give fully_shard the "
            "decoder layers, not the networks in them."
        )
    hook = public.__dict__.get("_hf_hook")  # accelerate's
    if hook is not None and any(getattr(part, "place_submodules", False) for part in getattr(hook, "hooks", (hook,))):
        raise ValueError(
            "A low-rank expert reads the public network, whose weights a hook on the whole of it brings here: offload "
            "without preload_module_classes, so that each of its parts has a hook of its own."
        )


class _Adjusted:
    """A part of the public network whose product has a difference added to it; all else of it shows through."""

    def __init__(self, part: nn.Module, delta: nn.Module) -> None:
        self._part = part
        self._delta = delta

    def __call__(self, x: Tensor) -> Tensor:
        return self._part(x) + self._delta(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)


def _adjusted(public: nn.Module, deltas: nn.Module) -> Callable[..., Tensor]:
    """The forward of the public network's class, over parts with the differences added: any family's, unread."""
    shell = object.__new__(type(public))
    shell.__dict__.update(public.__dict__)
    parts: dict[str, Any] = dict(public._modules)
    shell.__dict__["_modules"] = parts
    for name, delta in deltas.named_children():
        part = parts[name]
        parts[name] = _Adjusted(part, delta) if isinstance(delta, LowRankDelta) else _adjusted(part, delta)
    return functools.partial(type(public).forward, shell)


def matrices(ffn: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a network that multiply by a matrix (Linear, Conv1D and their kin), by their paths in it.

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
    """The matrix [out, in] that is stored as the `weight` of such a part, or the other way round."""
    return weight.T if isinstance(part, Conv1D) else weight


def _delta(matrix: nn.Module, rank: int, scale: float) -> LowRankDelta:
    weight: Any = matrix._parameters["weight"]
    out_features, in_features = as_out_in(matrix, weight).shape
    dtype = weight.dtype if weight.dtype.is_floating_point else None
    has_bias = matrix._parameters.get("bias") is not None
    return LowRankDelta(in_features, out_features, rank, scale, has_bias, device=weight.device, dtype=dtype)


def low_rank_scale(rank: int, alpha: float | None) -> float:
    """What a difference of this rank is multiplied by: `alpha / rank`, as LoRA has it, and 1 without an `alpha`."""
    return 1.0 if alpha is None else alpha / rank


def packed_name(key: str) -> str:
    """What an expert package calls the tensor `key` of a low-rank expert: PEFT's words.

    Not the names in the model, because PEFT takes whatever has its words in its name for a part of its own adapters.
    """
    return next((key.removesuffix(ours) + theirs for ours, theirs in _PACKED if key.endswith(ours)), key)


def unpacked_name(key: str) -> str:
    """What a low-rank expert calls the tensor that a package has as `key`."""
    return next((key.removesuffix(theirs) + ours for ours, theirs in _PACKED if key.endswith(theirs)), key)


__all__ = [
    "Factor",
    "LowRankDelta",
    "LowRankExpert",
    "Spread",
    "as_out_in",
    "low_rank_scale",
    "matrices",
    "mix_sharing",
    "packed_name",
    "unpacked_name",
]
