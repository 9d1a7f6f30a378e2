"""How the operators read the networks of a layer, or why they cannot: structure, activation, dtypes, alignment.

A plan holds names only; the tensors are taken from the modules at each call. Does not cover the router, the device, or
whether gradients are needed (`dispatch.py`).

Shapes: H hidden, I intermediate, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from flexmoe.kernels.experts.reference import ACTIVATIONS, ExpertTensors
from flexmoe.kernels.low_rank.reference import LowRankTensors
from flexmoe.kernels.operators import KERNEL_DTYPES
from flexmoe.modeling.configuration_flexmoe import PUBLIC
from flexmoe.modeling.low_rank_flexmoe import (
    Factor,
    FfnStructure,
    LowRankDelta,
    is_low_rank,
    is_plain_linear,
    is_unwrapped,
)
from flexmoe.structures import structure_of


class UnsupportedError(Exception):
    """The operators do not take a layer; the message is the reason, without a full stop."""


@dataclass(frozen=True)
class FusedPlan:
    """How the operators read the networks of a layer: names only, so it holds for whatever tensors the modules have.

    Attributes:
        structure: of the networks.
        activation: a key of `ACTIVATIONS`.
        biases: whether up, down and gate have one.
    """

    structure: FfnStructure
    activation: str
    biases: tuple[bool, bool, bool]

    def tensors(self, networks: Sequence[nn.Module]) -> ExpertTensors:
        """The current matrices of `networks`."""
        structure, (up, down, gate) = self.structure, self.biases
        return ExpertTensors(
            up=_parameters(networks, structure.up, "weight"),
            down=_parameters(networks, structure.down, "weight"),
            gate=[] if structure.gate is None else _parameters(networks, structure.gate, "weight"),
            up_bias=_parameters(networks, structure.up, "bias") if up else [],
            down_bias=_parameters(networks, structure.down, "bias") if down else [],
            gate_bias=_parameters(networks, structure.gate, "bias") if gate and structure.gate is not None else [],
            activation=self.activation,
        )


@dataclass(frozen=True)
class LowRankPlan:
    """How the operator reads low-rank experts.

    Attributes:
        public: the plan of the public network.
        scales: of the low-rank experts.
    """

    public: FusedPlan
    scales: tuple[float, ...]

    def tensors(self, public: nn.Module, members: Sequence[nn.Module | None]) -> LowRankTensors:
        """The current matrices; None among the members is the public network."""
        low_rank = [member for member in members if member is not None]
        (up, down, gate), structure = self.public.biases, self.public.structure
        of_up, of_down = ([getattr(member, part) for member in low_rank] for part in (structure.up, structure.down))
        of_gate = [] if structure.gate is None else [getattr(member, structure.gate) for member in low_rank]
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


def expert_plan(names: Sequence[str], networks: Sequence[nn.Module], dtype: torch.dtype | None = None) -> FusedPlan:
    """How the operators read these full experts.

    Args:
        names: of the experts, for reasons.
        networks: one per expert.
        dtype: of the hidden states; None is the experts'.

    Raises:
        UnsupportedError: they do not take them.
    """
    plans = {name: _plan_of_one(name, network) for name, network in zip(names, networks, strict=True)}
    first = plans[names[0]]
    if different := [name for name, other in plans.items() if other != first]:
        raise UnsupportedError(f"the network of {different[0]!r} has another structure than that of {names[0]!r}")
    _check_dtypes(networks, dtype)
    return first


def low_rank_plan(names: Sequence[str], experts: nn.ModuleDict, dtype: torch.dtype | None = None) -> LowRankPlan:
    """How the operator reads low-rank experts.

    Args:
        names: of the low-rank experts, and "public" where it is one of the members.
        experts: the layer's networks by name.
        dtype: of the hidden states; None is the experts'.

    Raises:
        UnsupportedError: it does not take them.
    """
    public: Any = experts[PUBLIC]
    plan = _plan_of_one(PUBLIC, public)
    scales = tuple(_scale_of(name, experts[name], public, plan) for name in names if name != PUBLIC)
    _check_dtypes([public, *(experts[name] for name in names)], dtype)
    return LowRankPlan(plan, scales)


def _scale_of(name: str, expert: Any, public: Any, plan: FusedPlan) -> float:
    """The scale of a low-rank expert that the operator takes."""
    found = set()
    structure = plan.structure
    for part, has_bias in zip((structure.up, structure.down, structure.gate), plan.biases, strict=True):
        if part is None:
            continue
        delta = expert._modules.get(part)
        where = f"{name}.{part}"
        if type(delta) is not LowRankDelta or not is_unwrapped(delta):
            raise UnsupportedError(f"{where} is wrapped or has hooks ({_class_name(delta)})")
        for factor in (delta.A, delta.B):
            if type(factor) is not Factor or not is_unwrapped(factor):
                raise UnsupportedError(f"{where} is wrapped or has hooks ({_class_name(factor)})")
            _check_alignment(where, factor)
        rank, (out_features, in_features) = len(delta.A.weight), public._modules[part].weight.shape
        if delta.A.weight.shape != (rank, in_features) or delta.B.weight.shape != (out_features, rank):
            raise UnsupportedError(f"the shapes of {where} do not match those of {PUBLIC}.{part}")
        if (delta.B.bias is not None) != has_bias:
            raise UnsupportedError(f"only one of {where} and {PUBLIC}.{part} has a bias")
        found.add((rank, float(delta.scale)))
    if len(found) > 1:
        raise UnsupportedError(f"ranks or scales of {name!r} differ between its matrices")
    return found.pop()[1]


def _check_dtypes(networks: Sequence[nn.Module], dtype: torch.dtype | None) -> None:
    dtypes = {p.dtype for network in networks for p in parameters_in(network)} | ({dtype} if dtype else set())
    if len(dtypes) > 1:
        names = ", ".join(sorted(map(str, dtypes)))
        raise UnsupportedError(f"experts and hidden states are of several dtypes: {names}")
    if not dtypes <= set(KERNEL_DTYPES):
        raise UnsupportedError(f"the kernels do not take {dtypes.pop()}")


def _plan_of_one(name: str, network: nn.Module) -> FusedPlan:
    if is_low_rank(network):
        raise UnsupportedError(f"{name!r} is a low-rank expert whose network has no known structure, or is wrapped")
    structure = structure_of(network)
    if structure is None:
        kind = type(network).__name__
        raise UnsupportedError(
            f"the network of {name!r} ({kind}) has a structure that no kernel computes, or is wrapped"
        )
    biases = []
    for part_name in (structure.up, structure.down, structure.gate):
        part: Any = None if part_name is None else network._modules[part_name]
        if part is not None:
            _check_linear(f"{name}.{part_name}", part)
        biases.append(part is not None and part.bias is not None)
    activation = activation_name(network._modules[structure.activation])
    if activation is None:
        raise UnsupportedError(f"the activation of {name!r} is none of {', '.join(ACTIVATIONS)}, or wrapped")
    return FusedPlan(structure, activation, (biases[0], biases[1], biases[2]))


def _check_linear(name: str, part: Any) -> None:
    if not is_plain_linear(part):
        raise UnsupportedError(f"{name} is wrapped or has hooks ({_class_name(part)})")
    _check_alignment(name, part)
    if any(size % 8 for size in part.weight.shape):
        raise UnsupportedError(f"{name} is {list(part.weight.shape)}, and the kernels take multiples of 8")


def _check_alignment(name: str, part: Any) -> None:
    if type(part.weight) is not nn.Parameter:
        raise UnsupportedError(f"{name} holds a {type(part.weight).__name__}")
    for parameter in parameters_in(part):
        if not parameter.is_meta and not (parameter.is_contiguous() and parameter.data_ptr() % 16 == 0):
            raise UnsupportedError(f"a tensor of {name} is not contiguous or not aligned to 16 bytes")


def _class_name(module: object) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def _parameters(networks: Sequence[nn.Module], part: str, name: str) -> list[Tensor]:
    return [getattr(getattr(network, part), name) for network in networks]


def parameters_in(module: nn.Module) -> Iterator[Tensor]:
    """All parameters, shared ones repeatedly; faster than `parameters()`, and this runs in every forward pass."""
    yield from (p for p in module._parameters.values() if p is not None)
    for child in module._modules.values():
        if child is not None:
            yield from parameters_in(child)


_activations: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()


def activation_name(module: nn.Module | None) -> str | None:
    """The key of `ACTIVATIONS` whose function has the values of `module`; None if there is none, or it has hooks."""
    if module is None or not is_unwrapped(module):
        return None
    if module not in _activations:
        _activations[module] = _by_values(module)
    return _activations[module]


def _by_values(module: nn.Module) -> str | None:
    x = torch.linspace(-16, 16, 1025, dtype=torch.float64, device="cpu")
    try:
        with torch.no_grad():
            y = module(x)
    except Exception:  # an activation with parameters may reject float64 on a CPU
        return None
    # formulas of one function differ by the digits of a constant, different functions by far more
    close = (name for name, own in ACTIVATIONS.items() if torch.allclose(own(x), y, rtol=0, atol=1e-8))
    return next(close, None)


__all__ = [
    "FusedPlan",
    "LowRankPlan",
    "UnsupportedError",
    "activation_name",
    "expert_plan",
    "low_rank_plan",
    "parameters_in",
]
