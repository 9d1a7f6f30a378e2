"""Which implementation a layer runs, PyTorch's modules or the fused operators, and why: chosen in this one place.

`config._flexmoe_implementation` is "auto", "torch" or "triton"; the environment variable FLEXMOE_IMPLEMENTATION, for
debugging, goes before it. "torch" calls experts as modules. "triton" runs the operators of `ops_flexmoe` wherever they
can take what is there: kernels on CUDA, their reference on a CPU, which is for tests and slow. "auto" runs them where
they have been measured to be faster. Whatever they cannot take runs as modules, and the reason is given in words.

Shapes: H hidden, I intermediate, E experts. Does not cover how a layer then runs (`experts_flexmoe`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .configuration_flexmoe import IMPLEMENTATIONS, PUBLIC
from .forms_flexmoe import FfnForm, form_of, is_plain_linear, is_untouched
from .low_rank_flexmoe import Factor, LowRankDelta, LowRankExpert
from .ops_flexmoe import FEW_TOKENS, KERNEL_DTYPES, MOST_EXPERTS
from .routing_flexmoe import ACTIVATIONS, ExpertTensors, LowRankTensors

AUTO, MODULES, OPERATORS = IMPLEMENTATIONS

ENVIRONMENT = "FLEXMOE_IMPLEMENTATION"

MEASURED: dict[tuple[int, int], dict[torch.dtype, tuple[int, int]]] = {}
"""By compute capability and dtype, from how many tokens to how many "auto" takes the kernels: where they were measured
(`tests/bench/bench_routing.py`) to be at least as fast as modules. Nobody has run them on a GPU yet, so nothing is
here, and "auto" takes modules."""


DEVICES = ("cuda", "cpu")
"""Where the operators run."""


TRITON_IS_THERE = importlib.util.find_spec("triton") is not None


class Unfit(Exception):
    """Why the operators cannot take a layer; its message is a sentence without a full stop."""


@dataclass(frozen=True)
class FusedPlan:
    """How the operators take a layer: only names, so it holds for whatever tensors the modules have.

    Attributes:
        form: of the experts' networks.
        activation: a key of `ACTIVATIONS`.
        biases: whether up, down and gate have one.
    """

    form: FfnForm
    activation: str
    biases: tuple[bool, bool, bool]

    def tensors(self, networks: Sequence[nn.Module]) -> ExpertTensors:
        """The matrices of `networks`, as they are now."""
        form, (up, down, gate) = self.form, self.biases
        return ExpertTensors(
            up=_parameters(networks, form.up, "weight"),
            down=_parameters(networks, form.down, "weight"),
            gate=[] if form.gate is None else _parameters(networks, form.gate, "weight"),
            up_bias=_parameters(networks, form.up, "bias") if up else [],
            down_bias=_parameters(networks, form.down, "bias") if down else [],
            gate_bias=_parameters(networks, form.gate, "bias") if gate and form.gate is not None else [],
            activation=self.activation,
        )


@dataclass(frozen=True)
class LowRankPlan:
    """How the operator takes those that share the public network's products.

    Attributes:
        public: how it takes the public network.
        scales: of the low-rank experts.
    """

    public: FusedPlan
    scales: tuple[float, ...]

    def tensors(self, public: nn.Module, members: Sequence[nn.Module | None]) -> LowRankTensors:
        """The matrices as they are now; None among the members is the public network."""
        low_rank = [member for member in members if member is not None]
        (up, down, gate), form = self.public.biases, self.public.form
        of_up, of_down = ([getattr(member, part) for member in low_rank] for part in (form.up, form.down))
        of_gate = [] if form.gate is None else [getattr(member, form.gate) for member in low_rank]
        a = ExpertTensors(
            up=_parameters(of_up, "A", "weight"),
            down=_parameters(of_down, "A", "weight"),
            gate=_parameters(of_gate, "A", "weight"),
        )
        b = ExpertTensors(
            up=_parameters(of_up, "B", "weight"),
            down=_parameters(of_down, "B", "weight"),
            gate=_parameters(of_gate, "B", "weight"),
            up_bias=_parameters(of_up, "B", "bias") if up else [],
            down_bias=_parameters(of_down, "B", "bias") if down else [],
            gate_bias=_parameters(of_gate, "B", "bias") if gate else [],
        )
        column = next((i for i, member in enumerate(members) if member is None), None)
        return LowRankTensors(self.public.tensors([public]), a, b, self.scales, column)


@dataclass(frozen=True)
class LayerPath:
    """The way that a layer takes.

    Attributes:
        reason: why so, in words.
        fuses_router: whether the operator routes; else the rows are called as modules.
        plan: how the operator mixes the experts; None: they are called as modules.
        low_rank: how it mixes those that share the public network's products; None: in PyTorch.
        partly: whether some of its experts run in PyTorch all the same, which a captured graph can't be told to leave.
    """

    reason: str
    fuses_router: bool = False
    plan: FusedPlan | None = None
    low_rank: LowRankPlan | None = None
    partly: bool = False

    @property
    def fuses_experts(self) -> bool:
        """Whether there are experts that an operator mixes."""
        return self.plan is not None or self.low_rank is not None


NO_OPERATORS = LayerPath("the implementation 'torch' was asked for")


def _parameters(networks: Sequence[nn.Module], part: str, name: str) -> list[Tensor]:
    return [getattr(getattr(network, part), name) for network in networks]


def _parameters_in(module: nn.Module) -> Iterator[Tensor]:
    """All parameters, shared ones more than once; `parameters()` takes longer, and this is asked at each step."""
    yield from (p for p in module._parameters.values() if p is not None)
    for child in module._modules.values():
        if child is not None:
            yield from _parameters_in(child)


def asked_for(config: Any) -> str:
    """The implementation that the environment, or else the config of a model, asks for.

    Raises:
        ValueError: the environment asks for one that is unknown.
    """
    name = os.environ.get(ENVIRONMENT) or config._flexmoe_implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(
            f"{ENVIRONMENT} asks for {name!r}, which is unknown: it must be one of {list(IMPLEMENTATIONS)}."
        )
    return name


@dataclass(frozen=True)
class Inputs:
    """What a choice has to know of the hidden states.

    Attributes:
        device: "cuda", "cpu" ...
        dtype: None is that of the experts.
        tokens: None stands for any number.
        capability: of a CUDA device.
        requires_grad: whether they need a gradient.
    """

    device: str
    dtype: torch.dtype | None = None
    tokens: int | None = None
    capability: tuple[int, int] | None = None
    requires_grad: bool = False

    @classmethod
    def of(cls, x_TH: Tensor) -> Inputs:
        """Those of hidden states [T, H]."""
        capability = _capability(x_TH.device) if x_TH.is_cuda else None
        return cls(x_TH.device.type, x_TH.dtype, x_TH.shape[0], capability, x_TH.requires_grad)


def may_fuse(implementation: str, x_TH: Tensor) -> bool:
    """Whether `choose_path` might take an operator for `x_TH`: while decoding on a CPU, to ask takes time."""
    return implementation == OPERATORS or (implementation == AUTO and x_TH.is_cuda)


def choose_path(
    implementation: str,
    inputs: Inputs,
    names: tuple[str, ...],
    others: tuple[str, ...],
    experts: nn.ModuleDict,
    router: nn.ModuleDict,
) -> LayerPath:
    """The way through a layer.

    Args:
        implementation: "auto" or "triton".
        names: the allowed experts.
        others: those of them that do not share the public network's products.
        experts: the layer's networks by name.
        router: its router rows by name.
    """
    reason = _unmeasured(inputs) if implementation == AUTO else None
    if reason is None and inputs.device not in DEVICES:
        reason = f"no operator runs on {inputs.device}"
    if reason is None and inputs.device == "cuda" and not _has_triton():
        reason = "Triton is not installed"
    if reason is None and torch.is_autocast_enabled(inputs.device):
        reason = "autocast decides the dtypes of products, and an operator has its own"
    if reason is None and len(names) == 1:
        reason = "a single expert is a dense model, and has its bits"
    if reason is None:
        reason = row_reason(names, router, inputs.dtype)
    if reason is not None:
        return LayerPath(reason)
    if _needs_gradient(inputs, [experts[name] for name in others] + [router[name] for name in names]):
        reason = "the router is fused; experts train through PyTorch's modules"
        return LayerPath(reason, fuses_router=True, partly=True)
    plan = None
    if others:
        found = plan_or_reason(others, experts, inputs.dtype)
        if isinstance(found, str):
            return LayerPath(found)
        plan = _plan_of_fields(*found)
    sharing = tuple(name for name in names if name not in others)
    if not sharing:
        return LayerPath("router and experts are fused", fuses_router=True, plan=plan)
    low_rank = _low_rank_or_reason(sharing, inputs, experts)
    if isinstance(low_rank, str):
        fused = "the router is" if plan is None else "router and experts are"
        reason = f"{fused} fused; low-rank experts share the public network's products in PyTorch: {low_rank}"
        return LayerPath(reason, fuses_router=True, plan=plan, partly=True)
    limit = f", low-rank ones of up to {FEW_TOKENS} tokens" if inputs.tokens is None else ""
    return LayerPath(f"router and experts are fused{limit}", fuses_router=True, plan=plan, low_rank=low_rank)


def _low_rank_or_reason(names: tuple[str, ...], inputs: Inputs, experts: nn.ModuleDict) -> LowRankPlan | str:
    if _needs_gradient(inputs, [experts[name] for name in {*names, PUBLIC}]):
        return "they or the public network train"
    if inputs.tokens is not None and inputs.tokens > FEW_TOKENS:
        return f"the operator takes {FEW_TOKENS} tokens at most"
    found = low_rank_plan_or_reason(names, experts, inputs.dtype)
    if isinstance(found, str):
        return found
    public, scales = found
    return LowRankPlan(_plan_of_fields(*public), scales)


def _plan_of_fields(form: tuple[Any, ...], activation: str, biases: tuple[bool, bool, bool]) -> FusedPlan:
    return FusedPlan(FfnForm(*form), activation, biases)


def _needs_gradient(inputs: Inputs, networks: Sequence[nn.Module]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return inputs.requires_grad or any(p.requires_grad for network in networks for p in _parameters_in(network))


def _unmeasured(inputs: Inputs) -> str | None:
    """Why "auto" does not take the operators; None if it does."""
    if inputs.device not in DEVICES:
        return None  # the next reason is better
    if inputs.device == "cpu":
        return "on a CPU the operators are a reference, and slow"
    if torch.version.hip:  # an MI200 says that its compute capability is 9.0, as an H100 does
        return "nobody has measured the kernels on AMD's GPUs"
    fastest = MEASURED.get(inputs.capability, {}).get(inputs.dtype or torch.bfloat16) if inputs.capability else None
    if fastest is None:
        where = f"compute capability {'.'.join(map(str, inputs.capability))}" if inputs.capability else "this GPU"
        return (
            f"nobody has measured the kernels on {where} with {inputs.dtype or 'this dtype'} yet: "
            'config._flexmoe_implementation = "triton" takes them all the same'
        )
    if inputs.tokens is not None and not fastest[0] <= inputs.tokens <= fastest[1]:
        return f"modules are faster with {inputs.tokens} tokens (the kernels from {fastest[0]} to {fastest[1]})"
    return None


@torch.compiler.assume_constant_result
def _has_triton() -> bool:
    return TRITON_IS_THERE


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def plan_or_reason(names: tuple[str, ...], experts: nn.ModuleDict, dtype: torch.dtype | None) -> tuple[Any, ...] | str:
    """The fields of a plan, or why there is none: a constant in compiled code, hence no object."""
    try:
        return astuple(plan(names, [experts[name] for name in names], dtype))
    except Unfit as reason:
        return str(reason)


@torch.compiler.assume_constant_result
def low_rank_plan_or_reason(
    names: tuple[str, ...], experts: nn.ModuleDict, dtype: torch.dtype | None
) -> tuple[Any, ...] | str:
    """`plan_or_reason` of those that share the public network's products."""
    try:
        return astuple(low_rank_plan(names, experts, dtype))
    except Unfit as reason:
        return str(reason)


@torch.compiler.assume_constant_result
def row_reason(names: tuple[str, ...], router: nn.ModuleDict, dtype: torch.dtype | None) -> str | None:
    """Why the operator cannot take these router rows; None if it can; a constant in compiled code.

    Args:
        dtype: of the hidden states; None is any that it takes.
    """
    rows: list[Any] = [router[name] for name in names]
    for name, row in zip(names, rows, strict=True):
        if not is_plain_linear(row) or any(type(p) is not nn.Parameter for p in _parameters_in(row)):
            return f"the router row of {name!r} is wrapped or watched ({type(row).__name__})"
    dtypes = {p.dtype for row in rows for p in _parameters_in(row)}
    if len(dtypes) > 1:
        return f"router rows are of several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    if others := (dtypes | ({dtype} if dtype else set())) - set(KERNEL_DTYPES):
        return f"no kernel routes {others.pop()}"
    if (hidden := rows[0].weight.shape[-1]) % 8:
        return f"the hidden size is {hidden}, and a kernel takes multiples of 8"
    for name, row in zip(names, rows, strict=True):
        places = ((row.weight, 16), (row.bias, 4))
        if any(not p.is_meta and p.data_ptr() % alignment for p, alignment in places):
            return f"the router row of {name!r} is not aligned to 16 bytes, or its bias not to 4"
    if len(names) > MOST_EXPERTS:
        return f"{len(names)} experts are more than the {MOST_EXPERTS} that a kernel takes"
    return None


def plan(names: Sequence[str], networks: Sequence[nn.Module], dtype: torch.dtype | None = None) -> FusedPlan:
    """How the operators take these experts.

    Args:
        names: what the experts are called, for reasons.
        networks: one per expert.
        dtype: of the hidden states; None is the experts'.

    Raises:
        Unfit: they cannot.
    """
    plans = {name: _plan_of_one(name, network) for name, network in zip(names, networks, strict=True)}
    first = plans[names[0]]
    if odd := [name for name, other in plans.items() if other != first]:
        raise Unfit(f"the network of {odd[0]!r} is of another form than that of {names[0]!r}")
    _check_dtypes(networks, dtype)
    return first


def low_rank_plan(names: Sequence[str], experts: nn.ModuleDict, dtype: torch.dtype | None = None) -> LowRankPlan:
    """How the operator takes those that share the public network's products.

    Args:
        names: low-rank experts, and the public network where it is one of them.
        experts: the layer's networks by name.
        dtype: of the hidden states; None is the experts'.

    Raises:
        Unfit: it cannot.
    """
    public: Any = experts[PUBLIC]
    plan = _plan_of_one(PUBLIC, public)
    scales = tuple(_scale_of(name, experts[name], public, plan) for name in names if name != PUBLIC)
    _check_dtypes([public, *(experts[name] for name in names)], dtype)
    return LowRankPlan(plan, scales)


def _scale_of(name: str, expert: Any, public: Any, plan: FusedPlan) -> float:
    """The scale of a low-rank expert that the operator takes."""
    found = set()
    form = plan.form
    for part, is_biased in zip((form.up, form.down, form.gate), plan.biases, strict=True):
        if part is None:
            continue
        delta = expert._modules.get(part)
        where = f"{name}.{part}"
        if type(delta) is not LowRankDelta or not is_untouched(delta):
            raise Unfit(f"{where} is wrapped or watched ({type(delta).__module__}.{type(delta).__name__})")
        for factor in (delta.A, delta.B):
            if type(factor) is not Factor or not is_untouched(factor):
                raise Unfit(f"{where} is wrapped or watched ({type(factor).__module__}.{type(factor).__name__})")
            _check_places(where, factor)
        rank, (out_features, in_features) = len(delta.A.weight), public._modules[part].weight.shape
        if delta.A.weight.shape != (rank, in_features) or delta.B.weight.shape != (out_features, rank):
            raise Unfit(f"{where} does not fit {PUBLIC}.{part}")
        if (delta.B.bias is not None) != is_biased:
            raise Unfit(f"one of {where} and {PUBLIC}.{part} has a bias")
        found.add((rank, float(delta.scale)))
    if len(found) > 1:
        raise Unfit(f"ranks or scales of {name!r} differ from matrix to matrix")
    return found.pop()[1]


def _check_dtypes(networks: Sequence[nn.Module], dtype: torch.dtype | None) -> None:
    dtypes = {p.dtype for network in networks for p in _parameters_in(network)} | ({dtype} if dtype else set())
    if len(dtypes) > 1:
        raise Unfit(f"experts and hidden states are of several dtypes: {', '.join(sorted(map(str, dtypes)))}")
    if not dtypes <= set(KERNEL_DTYPES):
        raise Unfit(f"a kernel takes no {dtypes.pop()}")


def _plan_of_one(name: str, network: nn.Module) -> FusedPlan:
    if isinstance(network, LowRankExpert):
        raise Unfit(f"{name!r} is a low-rank expert whose network is of no known form, or wrapped")
    form = form_of(network)
    if form is None:
        raise Unfit(
            f"the network of {name!r} ({type(network).__name__}) is of no form that a kernel computes, or wrapped"
        )
    biases = []
    for part_name in (form.up, form.down, form.gate):
        part: Any = None if part_name is None else network._modules[part_name]
        if part is not None:
            _check_part(f"{name}.{part_name}", part)
        biases.append(part is not None and part.bias is not None)
    activation = activation_name(network._modules[form.activation])
    if activation is None:
        raise Unfit(f"the activation of {name!r} is none of {', '.join(ACTIVATIONS)}, or wrapped")
    return FusedPlan(form, activation, (biases[0], biases[1], biases[2]))


def _check_part(name: str, part: Any) -> None:
    if not is_plain_linear(part):
        raise Unfit(f"{name} is wrapped or watched ({type(part).__module__}.{type(part).__name__})")
    _check_places(name, part)
    if any(size % 8 for size in part.weight.shape):
        raise Unfit(f"{name} is {list(part.weight.shape)}, and a kernel takes multiples of 8")


def _check_places(name: str, part: Any) -> None:
    if type(part.weight) is not nn.Parameter:
        raise Unfit(f"{name} holds a {type(part.weight).__name__}")
    for parameter in _parameters_in(part):
        if not parameter.is_meta and not (parameter.is_contiguous() and parameter.data_ptr() % 16 == 0):
            raise Unfit(f"a tensor of {name} is not contiguous or not aligned to 16 bytes")


def activation_name(module: nn.Module | None) -> str | None:
    """The key of `ACTIVATIONS` that computes what `module` does; None if none does. Told by its values."""
    if module is None or not is_untouched(module):
        return None
    if module not in _activations:
        _activations[module] = _by_values(module)
    return _activations[module]


_activations: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def _by_values(module: nn.Module) -> str | None:
    x = torch.linspace(-16, 16, 1025, dtype=torch.float64, device="cpu")
    try:
        with torch.no_grad():
            said = module(x)
    except Exception:  # whatever an activation with parameters of its own may say to float64 on a CPU
        return None
    # formulas of the same function differ by the digits of a constant, those of two functions by far more
    close = (name for name, own in ACTIVATIONS.items() if torch.allclose(own(x), said, rtol=0, atol=1e-8))
    return next(close, None)


__all__ = [
    "AUTO",
    "ENVIRONMENT",
    "MEASURED",
    "MODULES",
    "NO_OPERATORS",
    "OPERATORS",
    "FusedPlan",
    "Inputs",
    "LayerPath",
    "LowRankPlan",
    "Unfit",
    "activation_name",
    "asked_for",
    "choose_path",
    "low_rank_plan",
    "low_rank_plan_or_reason",
    "may_fuse",
    "plan",
    "plan_or_reason",
    "row_reason",
]
