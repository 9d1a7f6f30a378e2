"""Which implementation each layer runs, the fused operators or PyTorch's modules, and why: decided in this one place.

`experts_implementation="flexmoe_triton"` runs the operators wherever they take a layer: kernels on CUDA, their
reference on a CPU, which is slow and meant for tests. "auto" runs them where they have been measured to be faster.
What they do not take runs as modules, and the reason is given in words.

Does not cover which networks the operators take (`plans.py`), or how a layer is run (`forward.py`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexmoe.kernels.low_rank.op import MAX_TOKENS as MAX_LOW_RANK_TOKENS
from flexmoe.kernels.operators import KERNEL_DTYPES, MAX_EXPERTS
from flexmoe.kernels.plans import (
    FusedPlan,
    LowRankPlan,
    UnsupportedError,
    expert_plan,
    low_rank_plan,
    parameters_in,
)
from flexmoe.modeling.configuration_flexmoe import PUBLIC
from flexmoe.modeling.experts_flexmoe import FlexMoeBlock, names_sharing_public
from flexmoe.modeling.low_rank_flexmoe import FfnStructure
from flexmoe.structures import is_plain_row

AUTO, EAGER, CPU, TRITON = "auto", "eager", "flexmoe_cpu", "flexmoe_triton"
"""Names of implementations, as `experts_implementation` takes them."""

MEASURED: dict[tuple[int, int], dict[torch.dtype, tuple[int, int]]] = {}
"""Where "auto" uses the kernels: by compute capability and dtype, the smallest and largest number of tokens for which
`benchmarks/bench_kernels.py` measured them to be at least as fast as modules. They have not been run on a GPU yet, so
this is empty, and "auto" does not use them."""

DEVICES = ("cuda", "cpu")
"""The devices on which the operators run."""

HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class LayerPath:
    """The implementation that a layer runs.

    Attributes:
        reason: why, in words.
        implementation: "eager", "flexmoe_cpu" or "flexmoe_triton".
        fuses_router: whether the operator routes; otherwise the rows are called as modules.
        plan: how the operator reads the full experts; None if they run as modules, or there are none.
        low_rank: how the operator reads the low-rank experts; None if they run as modules, or there are none.
        runs_modules: whether some experts run as modules behind the fused router. A captured graph would keep the
            addresses of their weights.
    """

    reason: str
    implementation: str = EAGER
    fuses_router: bool = False
    plan: FusedPlan | None = None
    low_rank: LowRankPlan | None = None
    runs_modules: bool = False

    @property
    def fuses_experts(self) -> bool:
        """Whether an operator runs some of the experts."""
        return self.plan is not None or self.low_rank is not None


@dataclass(frozen=True)
class Inputs:
    """The properties of the hidden states that matter for the choice.

    Attributes:
        device: "cuda", "cpu" ...
        dtype: None is that of the experts.
        tokens: None stands for any number.
        capability: compute capability of a CUDA device.
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


# The choice


def implementation_paths(
    model: Any,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    capability: tuple[int, int] | None = None,
    tokens: int | None = None,
) -> list[LayerPath]:
    """The implementation that inference runs in each layer of a FlexMoE model with its active experts, and why.

    Args:
        device: a device type; by default, where the model is.
        dtype: of the hidden states; by default that of the experts.
        capability: compute capability of a CUDA device, as (9, 0).
        tokens: of all sequences together; None stands for any number.
    """
    implementation = model.config._experts_implementation or EAGER
    inputs = Inputs(device or model.device.type, dtype, tokens, capability)
    path = None
    if implementation == AUTO:
        if (reason := unmeasured_reason(inputs)) is not None:
            path = LayerPath(reason, CPU if inputs.device == "cpu" else EAGER)
    elif implementation != TRITON:
        path = LayerPath(f"experts_implementation is {implementation!r}", implementation)
    if path is not None:
        return [path] * len(model.flexmoe_blocks())
    with torch.no_grad():
        return [choose_path(block, tuple(model.active_experts), inputs) for block in model.flexmoe_blocks()]


def auto_takes_triton(x_TH: Tensor) -> bool:
    """Whether "auto" runs the kernels for these hidden states: on CUDA, where they were measured to be faster."""
    return x_TH.is_cuda and bool(MEASURED) and unmeasured_reason(Inputs.of(x_TH)) is None


def choose_path(
    block: FlexMoeBlock, names: tuple[str, ...], inputs: Inputs, sharing: Sequence[str] | None = None
) -> LayerPath:
    """The parts of a layer that "flexmoe_triton" runs as operators for such inputs, and why not all of it.

    Args:
        block: the layer.
        names: the allowed experts.
        inputs: properties of the hidden states.
        sharing: `names_sharing_public(block.experts, names)`, if it is known already.
    """
    experts, router = block.experts, block.router
    reason = _general_reason(names, inputs) or router_reason(names, router, inputs.dtype)
    if reason is not None:
        return LayerPath(reason)
    sharing = names_sharing_public(experts, names) if sharing is None else tuple(sharing)
    full = tuple(name for name in names if name not in sharing)
    if _needs_gradient(inputs, [experts[name] for name in full] + [router[name] for name in names]):
        reason = "the router is fused; experts train as PyTorch modules"
        return LayerPath(reason, TRITON, fuses_router=True, runs_modules=True)
    plan = None
    if full:
        found = plan_or_reason(full, experts, inputs.dtype)
        if isinstance(found, str):
            return LayerPath(found)
        plan = _plan_of_fields(*found)
    if not sharing:
        return LayerPath("router and experts are fused", TRITON, fuses_router=True, plan=plan)
    low_rank = _low_rank_or_reason(sharing, inputs, experts)
    if isinstance(low_rank, str):
        fused = "the router is" if plan is None else "router and experts are"
        reason = f"{fused} fused; low-rank experts run as PyTorch modules: {low_rank}"
        return LayerPath(reason, TRITON, fuses_router=True, plan=plan, runs_modules=True)
    limit = f", low-rank experts up to {MAX_LOW_RANK_TOKENS} tokens" if inputs.tokens is None else ""
    reason = f"router and experts are fused{limit}"
    return LayerPath(reason, TRITON, fuses_router=True, plan=plan, low_rank=low_rank)


def unmeasured_reason(inputs: Inputs) -> str | None:
    """Why "auto" does not use the operators for these inputs; None if it does."""
    if inputs.device not in DEVICES:
        return f"no operator runs on {inputs.device}"
    if inputs.device == "cpu":
        return "on a CPU the operators run their reference, which is slow"
    if torch.version.hip:  # an MI200 reports compute capability 9.0, as an H100 does
        return "the kernels have not been measured on AMD GPUs"
    fastest = MEASURED.get(inputs.capability, {}).get(inputs.dtype or torch.bfloat16) if inputs.capability else None
    if fastest is None:
        where = f"compute capability {'.'.join(map(str, inputs.capability))}" if inputs.capability else "this GPU"
        return (
            f"the kernels have not been measured on {where} with {inputs.dtype or 'this dtype'}: "
            f'experts_implementation="{TRITON}" uses them anyway'
        )
    if inputs.tokens is not None and not fastest[0] <= inputs.tokens <= fastest[1]:
        return f"modules are faster with {inputs.tokens} tokens (the kernels from {fastest[0]} to {fastest[1]})"
    return None


def _general_reason(names: Sequence[str], inputs: Inputs) -> str | None:
    """Why no operator runs, whatever the modules are; None if one may."""
    if inputs.device not in DEVICES:
        return f"no operator runs on {inputs.device}"
    if inputs.device == "cuda" and not _has_triton():
        return "Triton is not installed"
    if torch.is_autocast_enabled(inputs.device):
        return "autocast chooses the dtypes of products, and operators ignore it"
    if len(names) == 1:
        return "a single expert runs as the dense model, to the same bits"
    return None


def _low_rank_or_reason(names: tuple[str, ...], inputs: Inputs, experts: nn.ModuleDict) -> LowRankPlan | str:
    if _needs_gradient(inputs, [experts[name] for name in {*names, PUBLIC}]):
        return "they or the public network train"
    if inputs.tokens is not None and inputs.tokens > MAX_LOW_RANK_TOKENS:
        return f"the operator takes at most {MAX_LOW_RANK_TOKENS} tokens"
    found = low_rank_plan_or_reason(names, experts, inputs.dtype)
    if isinstance(found, str):
        return found
    public, scales = found
    return LowRankPlan(_plan_of_fields(*public), scales)


def _plan_of_fields(structure: tuple[Any, ...], activation: str, biases: tuple[bool, bool, bool]) -> FusedPlan:
    return FusedPlan(FfnStructure(*structure), activation, biases)


def _needs_gradient(inputs: Inputs, networks: Sequence[nn.Module]) -> bool:
    if not torch.is_grad_enabled():
        return False
    return inputs.requires_grad or any(p.requires_grad for network in networks for p in parameters_in(network))


# Constants in compiled code, which cannot contain the functions that inspect modules; hence tuples, not objects.


@torch.compiler.assume_constant_result
def _has_triton() -> bool:
    return HAS_TRITON


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def plan_or_reason(names: tuple[str, ...], experts: nn.ModuleDict, dtype: torch.dtype | None) -> tuple[Any, ...] | str:
    """The fields of `expert_plan`, or why there is none."""
    try:
        return astuple(expert_plan(names, [experts[name] for name in names], dtype))
    except UnsupportedError as reason:
        return str(reason)


@torch.compiler.assume_constant_result
def low_rank_plan_or_reason(
    names: tuple[str, ...], experts: nn.ModuleDict, dtype: torch.dtype | None
) -> tuple[Any, ...] | str:
    """The fields of `low_rank_plan`, or why there is none."""
    try:
        return astuple(low_rank_plan(names, experts, dtype))
    except UnsupportedError as reason:
        return str(reason)


@torch.compiler.assume_constant_result
def router_reason(names: tuple[str, ...], router: nn.ModuleDict, dtype: torch.dtype | None) -> str | None:
    """Why the operator does not take these router rows; None if it does.

    Args:
        dtype: of the hidden states; None is any supported one.
    """
    rows: list[Any] = [router[name] for name in names]
    for name, row in zip(names, rows, strict=True):
        if not is_plain_row(row) or any(type(p) is not nn.Parameter for p in parameters_in(row)):
            return f"the router row of {name!r} is wrapped or has hooks ({type(row).__name__})"
    dtypes = {p.dtype for row in rows for p in parameters_in(row)}
    if len(dtypes) > 1:
        return f"router rows are of several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    if others := (dtypes | ({dtype} if dtype else set())) - set(KERNEL_DTYPES):
        return f"no kernel routes {others.pop()}"
    if (hidden := rows[0].weight.shape[-1]) % 8:
        return f"the hidden size is {hidden}, and the kernels take multiples of 8"
    for name, row in zip(names, rows, strict=True):
        alignments = ((row.weight, 16), (row.bias, 4))
        if any(not p.is_meta and p.data_ptr() % alignment for p, alignment in alignments):
            return f"the router row of {name!r} is not aligned to 16 bytes, or its bias not to 4"
    if len(names) > MAX_EXPERTS:
        return f"there are {len(names)} experts, and the kernels take at most {MAX_EXPERTS}"
    return None


__all__ = [
    "AUTO",
    "CPU",
    "EAGER",
    "MEASURED",
    "TRITON",
    "Inputs",
    "LayerPath",
    "auto_takes_triton",
    "choose_path",
    "implementation_paths",
    "low_rank_plan_or_reason",
    "plan_or_reason",
    "router_reason",
    "unmeasured_reason",
]
