"""The router and the expert step as operators of torch: one name for each, and what runs it depends on the device.

On CUDA it is a kernel (`kernels_route_flexmoe`, `kernels_decode_flexmoe`, `kernels_prefill_flexmoe`,
`kernels_low_rank_flexmoe`; Triton is imported when one runs for the first time), on a CPU the reference
(`routing_flexmoe`). torch.compile takes each as it is.
`route` has a gradient. `mix` and `mix_low_rank` have none: experts train through torch. Autocast leaves all alone.

The operators' namespace ends in a hash of these sources, because the model may be there twice, as a package and as
remote code from the Hub, and the second would take the place of the first without a word. Where the sources are the
same, the second finds the first's operators and uses them.

Shapes: T tokens, H hidden, I intermediate, E experts, K = min(k, E) slots, M low-rank experts and public, R rank.

Does not cover which of this a model uses, and when (`implementations_flexmoe`), other devices, or second derivatives.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .routing_flexmoe import ACTIVATIONS, ExpertTensors, LowRankTensors, Routing, route_logits
from .routing_flexmoe import mix as reference_mix
from .routing_flexmoe import mix_low_rank as reference_mix_low_rank
from .routing_flexmoe import route as reference_route

MOST_EXPERTS = 64
"""As many as the kernels take."""

FEW_TOKENS = 64
"""As many as `mix_low_rank` takes."""

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels compute with."""


def _namespace() -> str:
    folder = Path(__file__).parent
    files = [folder / "ops_flexmoe.py", folder / "routing_flexmoe.py", *sorted(folder.glob("kernels*_flexmoe.py"))]
    return f"flexmoe_{hashlib.sha256(b''.join(file.read_bytes() for file in files)).hexdigest()[:8]}"


NAMESPACE = _namespace()
"""Of the operators in `torch.ops`."""

SCHEMAS = {
    "route": "(Tensor x, Tensor[] rows, Tensor[] biases, Tensor? offset, int k, bool renormalize)"
    " -> (Tensor logits, Tensor weights, Tensor top_weights, Tensor top_ids)",
    "route_backward": "(Tensor? d_logits, Tensor? d_weights, Tensor? d_top_weights, Tensor x, Tensor[] rows,"
    " Tensor logits, Tensor weights, Tensor top_weights, Tensor top_ids, int k, bool renormalize)"
    " -> (Tensor dx, Tensor d_offset)",
    "mix": "(Tensor x, Tensor weights, Tensor top_weights, Tensor top_ids, Tensor[] gate, Tensor[] up, Tensor[] down,"
    " Tensor[] gate_bias, Tensor[] up_bias, Tensor[] down_bias, str activation) -> Tensor",
    "mix_low_rank": "(Tensor x, Tensor weights, Tensor[] gate, Tensor[] up, Tensor[] down,"
    " Tensor[] gate_bias, Tensor[] up_bias, Tensor[] down_bias, str activation,"
    " Tensor[] a_gate, Tensor[] a_up, Tensor[] a_down, Tensor[] b_gate, Tensor[] b_up, Tensor[] b_down,"
    " Tensor[] b_gate_bias, Tensor[] b_up_bias, Tensor[] b_down_bias, float[] scales, int? public_column) -> Tensor",
    "redirect": "(int[] old, int[] new) -> ()",
}


def _route_cpu(
    x_TH: Tensor, rows: list[Tensor], biases: list[Tensor], offset_TE: Tensor | None, k: int, renormalize: bool
) -> tuple[Tensor, ...]:
    with torch.autocast("cpu", enabled=False):
        return tuple(reference_route(x_TH, rows, biases, offset_TE, k, renormalize))


def _route_cuda(
    x_TH: Tensor, rows: list[Tensor], biases: list[Tensor], offset_TE: Tensor | None, k: int, renormalize: bool
) -> tuple[Tensor, ...]:
    from .kernels_route_flexmoe import route as launch

    return tuple(launch(x_TH, rows, biases, offset_TE, k, renormalize))


def _route_fake(
    x_TH: Tensor, rows: list[Tensor], biases: list[Tensor], offset_TE: Tensor | None, k: int, renormalize: bool
) -> tuple[Tensor, ...]:
    tokens, experts = x_TH.shape[0], len(rows)
    dtypes = (torch.float32, torch.float32, torch.float32, torch.int32)
    widths = (experts, experts, min(k, experts), min(k, experts))
    return tuple(x_TH.new_empty(tokens, n, dtype=dtype) for n, dtype in zip(widths, dtypes, strict=True))


def _route_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TH, rows, biases, _, ctx.k, ctx.renormalize = inputs
    ctx.bias_dtypes = [bias.dtype for bias in biases]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_TH, *output, *rows)


def _route_gradients(
    ctx: Any, d_logits_TE: Tensor | None, d_weights_TE: Tensor | None, d_top_weights_TK: Tensor | None, _: None
) -> tuple[Any, ...]:
    x_TH, *saved = ctx.saved_tensors
    routing, rows = saved[:4], saved[4:]
    needs_x, needs_rows, needs_biases, needs_offset = ctx.needs_input_grad[:4]
    gradients = (d_logits_TE, d_weights_TE, d_top_weights_TK)
    dx_TH, dz_TE = _op("route_backward")(*gradients, x_TH, rows, *routing, ctx.k, ctx.renormalize)
    d_rows: list[Tensor | None] = [None] * len(rows)
    if any(needs_rows):
        with torch.autocast(x_TH.device.type, enabled=False):
            d_rows_EH = dz_TE.t() @ x_TH.float()
        d_rows = [
            d_1H.to(row.dtype) if needed else None
            for d_1H, row, needed in zip(d_rows_EH.split(1), rows, needs_rows, strict=True)
        ]
    d_biases = [
        d_T1.sum(0).to(dtype) if needed else None
        for d_T1, dtype, needed in zip(dz_TE.split(1, -1), ctx.bias_dtypes, needs_biases, strict=True)
    ]
    return dx_TH if needs_x else None, d_rows, d_biases, dz_TE if needs_offset else None, None, None


def _route_backward_cpu(
    d_logits_TE: Tensor | None,
    d_weights_TE: Tensor | None,
    d_top_weights_TK: Tensor | None,
    x_TH: Tensor,
    rows: list[Tensor],
    logits_TE: Tensor,
    weights_TE: Tensor,
    top_weights_TK: Tensor,
    top_ids_TK: Tensor,
    k: int,
    renormalize: bool,
) -> tuple[Tensor, Tensor]:
    """The formula in plain torch, because an operator is called where autograd does not record."""
    experts = len(rows)
    dz_TE = torch.zeros_like(logits_TE)
    if d_weights_TE is not None or d_top_weights_TK is not None:
        dw_TE = torch.zeros_like(logits_TE) if d_weights_TE is None else d_weights_TE
        if d_top_weights_TK is not None:  # surplus slots have a column of their own, which nobody sees
            in_slots_TE = dw_TE.new_zeros(len(dw_TE), experts + 1).scatter_add(1, top_ids_TK.long(), d_top_weights_TK)
            dw_TE = dw_TE + in_slots_TE[:, :-1]
        own_TE = torch.where(weights_TE == 0, 0.0, weights_TE * dw_TE)
        shares_TE = weights_TE if renormalize else route_logits(logits_TE, experts, renormalize=False)
        dz_TE = own_TE - shares_TE * own_TE.sum(-1, keepdim=True)
    if d_logits_TE is not None:
        dz_TE = dz_TE + d_logits_TE
    dz_TE = dz_TE.masked_fill(logits_TE == -torch.inf, 0.0)
    dx_TH = x_TH.new_zeros(x_TH.shape, dtype=torch.float32)
    for dz_T1, row in zip(dz_TE.split(1, -1), rows, strict=True):
        dx_TH += torch.where(dz_T1 == 0, 0.0, dz_T1 * row.float())  # a masked expert may hold NaN
    return dx_TH.to(x_TH.dtype), dz_TE


def _route_backward_cuda(
    d_logits_TE: Tensor | None,
    d_weights_TE: Tensor | None,
    d_top_weights_TK: Tensor | None,
    x_TH: Tensor,
    rows: list[Tensor],
    logits_TE: Tensor,
    weights_TE: Tensor,
    top_weights_TK: Tensor,
    top_ids_TK: Tensor,
    k: int,
    renormalize: bool,
) -> tuple[Tensor, Tensor]:
    from .kernels_route_flexmoe import input_gradients as launch

    routing = Routing(logits_TE, weights_TE, top_weights_TK, top_ids_TK)
    return launch(d_logits_TE, d_weights_TE, d_top_weights_TK, x_TH, rows, routing, k, renormalize)


def _route_backward_fake(
    d_logits_TE: Tensor | None,
    d_weights_TE: Tensor | None,
    d_top_weights_TK: Tensor | None,
    x_TH: Tensor,
    rows: list[Tensor],
    logits_TE: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    return x_TH.new_empty(x_TH.shape), logits_TE.new_empty(logits_TE.shape)


def _mix_cpu(x_TH: Tensor, weights_TE: Tensor, top_weights_TK: Tensor, top_ids_TK: Tensor, *matrices: Any) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return reference_mix(x_TH, weights_TE, _experts(*matrices)).contiguous()


def _mix_cuda(x_TH: Tensor, weights_TE: Tensor, top_weights_TK: Tensor, top_ids_TK: Tensor, *matrices: Any) -> Tensor:
    from .kernels_decode_flexmoe import MOST_TOKENS, decode
    from .kernels_prefill_flexmoe import prefill

    experts = _experts(*matrices)
    x_TH = x_TH.contiguous()
    if len(x_TH) <= MOST_TOKENS:
        return decode(x_TH, weights_TE.contiguous(), experts)
    return prefill(x_TH, top_weights_TK.contiguous(), top_ids_TK.contiguous(), experts)


def _mix_fake(x_TH: Tensor, *rest: Any) -> Tensor:
    return x_TH.new_empty(x_TH.shape)


def _mix_low_rank_cpu(x_TH: Tensor, weights_TM: Tensor, *matrices: Any) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return reference_mix_low_rank(x_TH, weights_TM, _low_rank(*matrices)).contiguous()


def _mix_low_rank_cuda(x_TH: Tensor, weights_TM: Tensor, *matrices: Any) -> Tensor:
    from .kernels_low_rank_flexmoe import decode_low_rank

    return decode_low_rank(x_TH.contiguous(), weights_TM.contiguous(), _low_rank(*matrices))


def _low_rank(*fields: Any) -> LowRankTensors:
    public, b = _experts(*fields[:7]), _experts(*(*fields[10:16], fields[6]))
    a = ExpertTensors(gate=fields[7], up=fields[8], down=fields[9])
    scales, public_column = fields[16:]
    return LowRankTensors(public, a, b, scales, public_column)


def _experts(
    gate: list[Tensor],
    up: list[Tensor],
    down: list[Tensor],
    gate_bias: list[Tensor],
    up_bias: list[Tensor],
    down_bias: list[Tensor],
    activation: str,
) -> ExpertTensors:
    return ExpertTensors(
        gate=gate,
        up=up,
        down=down,
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=down_bias,
        activation=activation,
    )


def _redirect(old: list[int], new: list[int]) -> None:
    kernels = sys.modules.get(f"{__package__}.kernels_flexmoe")
    if kernels is not None:  # else no kernel has run, and there are no tables
        kernels.TABLES.redirect(dict(zip(old, new, strict=True)))


IMPLEMENTATIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("route", "CPU"): _route_cpu,
    ("route", "CUDA"): _route_cuda,
    ("route_backward", "CPU"): _route_backward_cpu,
    ("route_backward", "CUDA"): _route_backward_cuda,
    ("mix", "CPU"): _mix_cpu,
    ("mix", "CUDA"): _mix_cuda,
    ("mix_low_rank", "CPU"): _mix_low_rank_cpu,
    ("mix_low_rank", "CUDA"): _mix_low_rank_cuda,
    ("redirect", "CompositeExplicitAutograd"): _redirect,
}
FAKES: dict[str, Callable[..., Any]] = {
    "route": _route_fake,
    "route_backward": _route_backward_fake,
    "mix": _mix_fake,
    "mix_low_rank": _mix_fake,
}
WITHOUT_GRADIENT = {
    "route_backward": "route() has no second derivative: call backward() without create_graph.",
    **{
        name: f"{name}() has no gradient, and one of its tensors requires it: train experts with the implementation "
        f"'torch', or call {name}() under torch.no_grad()."
        for name in ("mix", "mix_low_rank")
    },
}


def _op(name: str) -> Any:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _refusing(name: str, message: str) -> Callable[..., Any]:
    """What autograd sees of an operator without gradient: it works as long as none is asked for."""

    def without_gradient(*args: Any) -> Any:
        tensors = (t for arg in args for t in (arg if isinstance(arg, list) else [arg]) if isinstance(t, Tensor))
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise RuntimeError(message)
        with torch._C._AutoDispatchBelowAutograd():
            return _op(name)(*args)

    return without_gradient


def _register() -> None:
    for name, schema in SCHEMAS.items():
        torch.library.define(f"{NAMESPACE}::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    for (name, key), function in IMPLEMENTATIONS.items():
        torch.library.impl(f"{NAMESPACE}::{name}", key, function)
    for name, function in FAKES.items():
        torch.library.register_fake(f"{NAMESPACE}::{name}", function)
    for name, message in WITHOUT_GRADIENT.items():
        torch.library.impl(f"{NAMESPACE}::{name}", "Autograd", _refusing(name, message))
    torch.library.register_autograd(f"{NAMESPACE}::route", _route_gradients, setup_context=_route_setup)


if not hasattr(getattr(torch.ops, NAMESPACE), "route"):
    _register()
ROUTE, MIX, MIX_LOW_RANK, REDIRECT = (_op(name) for name in ("route", "mix", "mix_low_rank", "redirect"))


def route(
    x_TH: Tensor, rows: Sequence[Tensor], biases: Sequence[Tensor], offset_TE: Tensor | None, k: int, renormalize: bool
) -> Routing:
    """`routing_flexmoe.route`, by the kernel on CUDA; arguments and results as there. Differentiable, once.

    Raises:
        ValueError: shapes, devices or numbers don't fit, or the kernel can't take them.
        TypeError: dtypes don't fit.
    """
    _check_x(x_TH)
    if not rows or len(rows) != len(biases):
        raise ValueError(f"{len(rows)} rows and {len(biases)} biases: each expert has one of each, and one must be.")
    if k < 1:
        raise ValueError(f"k is {k}: a token keeps at least one expert.")
    tokens, hidden = x_TH.shape
    for e, (row, bias) in enumerate(zip(rows, biases, strict=True)):
        _check(f"rows[{e}]", row, (1, hidden), rows[0].dtype, x_TH)
        _check(f"biases[{e}]", bias, (1,), rows[0].dtype, x_TH)
    if not rows[0].is_floating_point():
        raise TypeError(f"rows are {rows[0].dtype}: only floating-point rows have products.")
    if offset_TE is not None:
        _check("offset_TE", offset_TE, (tokens, len(rows)), torch.float32, x_TH)
    if x_TH.is_cuda:
        _check_for_kernels(len(rows), {"hidden": hidden}, x_TH.dtype, rows[0].dtype)
    return Routing(*ROUTE(x_TH, list(rows), list(biases), offset_TE, k, renormalize))


def mix(x_TH: Tensor, routing: Routing, experts: ExpertTensors) -> Tensor:
    """`routing_flexmoe.mix`, by a kernel on CUDA: the weighted sum [tokens, hidden] of what the experts say.

    Args:
        x_TH: in the dtype of the experts.
        routing: of `route`, for the same experts.

    Raises:
        ValueError: shapes, devices or numbers don't fit, or the kernel can't take them.
        TypeError: dtypes don't fit.
        RuntimeError: a gradient would be needed.
    """
    _check_x(x_TH)
    tokens, n_experts = len(x_TH), len(experts.up)
    top_shape = tuple(routing.top_ids_TK.shape)
    _check("routing.weights_TE", routing.weights_TE, (tokens, n_experts), torch.float32, x_TH)
    _check("routing.top_weights_TK", routing.top_weights_TK, (tokens, *top_shape[1:]), torch.float32, x_TH)
    _check("routing.top_ids_TK", routing.top_ids_TK, (tokens, *top_shape[1:]), torch.int32, x_TH)
    _check_experts(experts, x_TH)
    if x_TH.is_cuda:
        sizes = {"hidden": x_TH.shape[1], **{f"intermediate of {e}": len(up) for e, up in enumerate(experts.up)}}
        _check_for_kernels(n_experts, sizes, x_TH.dtype)
    matrices = (experts.gate, experts.up, experts.down, experts.gate_bias, experts.up_bias, experts.down_bias)
    return MIX(x_TH, *routing[1:], *(list(tensors) for tensors in matrices), experts.activation)


def mix_low_rank(x_TH: Tensor, weights_TM: Tensor, experts: LowRankTensors) -> Tensor:
    """`routing_flexmoe.mix_low_rank`, by a kernel on CUDA: the weighted sum [tokens, hidden] of what the experts say.

    Args:
        x_TH: `FEW_TOKENS` at most, in the dtype of the experts.
        weights_TM: float32 [tokens, members]: low-rank experts, and the public network where it is one of them.

    Raises:
        ValueError: shapes, devices or numbers don't fit, or the kernel can't take them.
        TypeError: dtypes don't fit.
        RuntimeError: a gradient would be needed.
    """
    _check_x(x_TH)
    if len(x_TH) > FEW_TOKENS:
        raise ValueError(f"{len(x_TH)} tokens: mix_low_rank() takes {FEW_TOKENS} at most. Call it in parts.")
    public, a, b, at = experts.public, experts.a, experts.b, experts.public_column
    members = len(experts.scales) + (at is not None)
    if at is not None and not 0 <= at < members:
        raise ValueError(f"public_column is {at}, must be one of the {members} members, or None.")
    _check_experts(public, x_TH)
    _check_differences(experts, x_TH)
    _check("weights_TM", weights_TM, (len(x_TH), members), torch.float32, x_TH)
    if x_TH.is_cuda:
        _check_for_kernels(members, {"hidden": x_TH.shape[1], "intermediate": len(public.up[0])}, x_TH.dtype)
    of_public = (public.gate, public.up, public.down, public.gate_bias, public.up_bias, public.down_bias)
    of_members = (a.gate, a.up, a.down, b.gate, b.up, b.down, b.gate_bias, b.up_bias, b.down_bias)
    matrices = (*map(list, of_public), public.activation, *map(list, of_members))
    return MIX_LOW_RANK(x_TH, weights_TM, *matrices, list(experts.scales), at)


def kernels_have_run() -> bool:
    """Whether there may be tables of addresses, of this copy of the sources or of another."""
    return any(name.endswith(".kernels_flexmoe") for name in list(sys.modules))


def redirect(moves: Mapping[int, int]) -> None:
    """`kernels_flexmoe.TABLES.redirect`, of the tables that these operators read.

    They are another module's where the same sources are loaded twice: its operators are used, which came first.
    """
    REDIRECT(list(moves), list(moves.values()))


def _check_x(x_TH: Tensor) -> None:
    if x_TH.ndim != 2:
        raise ValueError(f"x is {list(x_TH.shape)}, must be [tokens, hidden]: flatten batch and sequence.")
    if not x_TH.is_floating_point():
        raise TypeError(f"x is {x_TH.dtype}, must be a floating dtype.")


def _check_experts(experts: ExpertTensors, x_TH: Tensor) -> None:
    if experts.activation not in ACTIVATIONS:
        raise ValueError(f"The activation {experts.activation!r} is not one of {sorted(ACTIVATIONS)}.")
    if not experts.up:
        raise ValueError("There are no experts: one must be.")
    hidden = x_TH.shape[1]
    widths = [len(up) for up in experts.up]
    shapes: dict[str, list[tuple[int, ...]]] = {
        "gate": [(width, hidden) for width in widths],
        "up": [(width, hidden) for width in widths],
        "down": [(hidden, width) for width in widths],
        "gate_bias": [(width,) for width in widths],
        "up_bias": [(width,) for width in widths],
        "down_bias": [(hidden,) for _ in widths],
    }
    for name, expected in shapes.items():
        tensors = getattr(experts, name)
        if len(tensors) != len(widths) and (tensors or name == "down"):
            raise ValueError(f"{len(tensors)} of `{name}` for {len(widths)} experts: each has one, or none has.")
        for e, tensor in enumerate(tensors):
            _check(f"{name}[{e}]", tensor, expected[e], x_TH.dtype, x_TH)


def _check_differences(experts: LowRankTensors, x_TH: Tensor) -> None:
    public, hidden, width = experts.public, x_TH.shape[1], len(experts.public.up[0])
    if len(public.up) != 1 or not experts.scales:
        raise ValueError(
            f"{len(public.up)} public networks and {len(experts.scales)} low-rank experts: one, and some."
        )
    ranks = [len(up) for up in experts.a.up]
    if not all(ranks):
        raise ValueError(f"Ranks are {ranks}: each must be 1 at least.")
    shapes: dict[str, list[tuple[int, ...]]] = {
        "a.gate": [(rank, hidden) for rank in ranks],
        "a.up": [(rank, hidden) for rank in ranks],
        "a.down": [(rank, width) for rank in ranks],
        "b.gate": [(width, rank) for rank in ranks],
        "b.up": [(width, rank) for rank in ranks],
        "b.down": [(hidden, rank) for rank in ranks],
        "b.gate_bias": [(width,) for _ in ranks],
        "b.up_bias": [(width,) for _ in ranks],
        "b.down_bias": [(hidden,) for _ in ranks],
    }
    for path, expected in shapes.items():
        factor, name = path.split(".")
        tensors = getattr(getattr(experts, factor), name)
        count = len(experts.scales) if getattr(public, name) else 0
        if len(tensors) != count:
            raise ValueError(f"{len(tensors)} of `{path}`, must be {count}: as the public network and scales have it.")
        for e, tensor in enumerate(tensors):
            _check(f"{path}[{e}]", tensor, expected[e], x_TH.dtype, x_TH)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, x_TH: Tensor) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}, must be {list(shape)} for x of {list(x_TH.shape)}.")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}, must be {dtype}: cast it.")
    if tensor.device != x_TH.device:
        raise ValueError(f"{name} is on {tensor.device}, x on {x_TH.device}: move one of them.")


def _check_for_kernels(experts: int, sizes: Mapping[str, int], *dtypes: torch.dtype) -> None:
    instead = "Use the implementation 'torch'."
    if experts > MOST_EXPERTS:
        raise ValueError(f"{experts} experts: the kernels take {MOST_EXPERTS} at most. {instead}")
    for name, size in sizes.items():
        if size % 8:
            raise ValueError(f"{name} is {size}: the kernels take multiples of 8. {instead}")
    for dtype in dtypes:
        if dtype not in KERNEL_DTYPES:
            raise TypeError(f"The kernels take {', '.join(map(str, KERNEL_DTYPES))}, not {dtype}. {instead}")


__all__ = ["FEW_TOKENS", "MOST_EXPERTS", "NAMESPACE", "kernels_have_run", "mix", "mix_low_rank", "redirect", "route"]
