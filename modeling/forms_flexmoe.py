"""What a feed-forward network computes, read by running its own `forward` on symbols instead of numbers.

Two forms are known, `down(activation(gate(x)) * up(x))` and `down(activation(up(x)))`, whatever the parts are called.
A network of such a form can be run on its weights, without calling the modules that hold them: with one token, as when
decoding, those calls take a tenth of the time. Parts that somebody watches or has wrapped (hooks, adapters, offload,
parametrisations) are called as ever. Does not cover which arithmetic a product takes (`linear_flexmoe`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_modules

from .linear_flexmoe import faster_linears, fastest_product

LINEAR_FORWARD = nn.Linear.forward
"""What it was when this was loaded: whoever patches it later wants to be called."""

_MODULE_STATE = frozenset(vars(nn.Module()))


@dataclass(frozen=True)
class FfnForm:
    """The parts of a network, by their names among its children; without a gate, `up` goes through the activation."""

    up: str
    down: str
    activation: str
    gate: str | None = None

    def linears(self, network: nn.Module) -> list[Any]:
        """The modules that gate (if there is one), up and down are."""
        parts: dict[str, Any] = network._modules
        return [parts[name] for name in (self.gate, self.up, self.down) if name is not None]

    def bind(self, network: nn.Module, like: Tensor) -> Callable[[Tensor], Tensor]:
        """What calling `network` does to inputs with the rows and the dtype of `like`, its parts looked up once."""
        parts: dict[str, Any] = network._modules
        up, down = product_of(parts[self.up], like), product_of(parts[self.down], like)
        activation = parts[self.activation]
        if is_untouched(activation):
            activation = activation.forward
        if self.gate is None:
            return lambda x: down(activation(up(x)))
        gate = product_of(parts[self.gate], like)
        if like.requires_grad or torch.is_grad_enabled():
            return lambda x: down(activation(gate(x)) * up(x))
        return lambda x: down(activation(gate(x)).mul_(up(x)))  # large tensors are new pages each time


def product_of(layer: nn.Module, like: Tensor) -> Callable[[Tensor], Tensor]:
    """What calling `layer` does to inputs with the rows and the dtype of `like`; a plain `nn.Linear` is not called."""
    if is_plain_linear(layer):
        parameters: dict[str, Any] = layer._parameters
        return fastest_product(like, parameters["weight"], parameters["bias"])
    return functools.partial(_call_faster, layer)


def _call_faster(layer: nn.Module, x: Tensor) -> Tensor:
    with faster_linears(x):
        return layer(x)


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether `layer` is an `nn.Linear` that its weight and bias say everything about."""
    return type(layer) is nn.Linear and nn.Linear.forward is LINEAR_FORWARD and is_untouched(layer)


def is_untouched(module: nn.Module) -> bool:
    """Whether calling `module` runs the forward of its class and nothing else."""
    state = module.__dict__
    return not (
        "forward" in state
        or state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or torch_modules._has_any_global_hook()
    )


def settings_of(module: nn.Module) -> dict[str, Any]:
    """The attributes that `module` has beside those of every module, as an activation's slope."""
    return {name: value for name, value in vars(module).items() if name not in _MODULE_STATE}


def form_of(network: nn.Module) -> FfnForm | None:
    """The form of `network`; None if it is of no known form, trains, or is not untouched."""
    if network.training or not is_untouched(network):
        return None
    forward = type(network).forward
    known = _known.get(network)
    if known is None or known[0] is not forward:
        known = _known[network] = (forward, read_form(network))
    return known[1]


_known: WeakKeyDictionary[nn.Module, tuple[Callable[..., Any], FfnForm | None]] = WeakKeyDictionary()


def read_form(network: nn.Module) -> FfnForm | None:
    """The form of `network`, None if it is of no known one: its forward runs on parts that write down their input."""
    copied = object.__new__(type(network))
    copied.__dict__.update(network.__dict__)
    copied.__dict__["_modules"] = {name: functools.partial(_called, name) for name in network._modules}
    try:
        said = type(network).forward(copied, _Symbol("x"))
    except Exception:  # whatever a forward may do with its input that symbols cannot
        return None
    match getattr(said, "terms", None):
        case (down, ("*", (activation, (gate, "x")), (up, "x"))) | (down, ("*", (up, "x"), (activation, (gate, "x")))):
            return FfnForm(up, down, activation, gate)
        case (down, (activation, (up, "x"))):
            return FfnForm(up, down, activation)
    return None


class _Symbol:
    """A value that is not computed. Its terms: "x", (part, terms of its input) or ("*", factor, factor)."""

    def __init__(self, terms: Any) -> None:
        self.terms = terms

    def __mul__(self, other: _Symbol) -> _Symbol:
        return _Symbol(("*", self.terms, other.terms))


def _called(name: str, value: _Symbol) -> _Symbol:
    return _Symbol((name, value.terms))


__all__ = [
    "LINEAR_FORWARD",
    "FfnForm",
    "form_of",
    "is_plain_linear",
    "is_untouched",
    "product_of",
    "read_form",
    "settings_of",
]
