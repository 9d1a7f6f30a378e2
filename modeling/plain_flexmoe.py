"""Networks of plain matrices, looked up once: from then on, a glance tells whether they still are what they were.

Each weight that is read flushes the caches, and each object that Python touches afterwards costs: on 2 cores, looking
up the parts of seven networks took a third of the time of one network's products. So the parts are remembered, beside
the few things that tell when that is over.

Where gate and up lie one behind the other, as in a file that is mapped into memory, both are one matrix: the start of
a product takes 30 us. Its bits are those of two. Does not cover networks some part of which is watched, wrapped or
trains (`forms_flexmoe`), or gradients.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from operator import attrgetter, contains, is_
from types import BuiltinFunctionType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .forms_flexmoe import LINEAR_FORWARD, FfnForm, form_of, is_plain_linear, is_untouched, settings_of
from .linear_flexmoe import HALVES, SMALLEST_WEIGHT

_FORWARD = repeat("forward")
_COMPARABLE = (bool, int, float, str, type(None), FunctionType, BuiltinFunctionType)
_dtype_of = attrgetter("dtype")
_kind_of = attrgetter("dtype", "is_cpu")


@dataclass(frozen=True, slots=True)
class Matrices:
    """A network whose matrices have no biases and are in half precision, for few rows.

    Attributes:
        kind: networks of equal kinds differ in nothing but the values of their matrices.
        is_gated: whether what goes through the activation is multiplied with what does not.
        activation: one of the network's modules.
        before: gate and up in one [2 I, H], or gate [I, H] and up [I, H], or up [I, H].
        down: [H, I].
    """

    kind: tuple[Any, ...]
    is_gated: bool
    activation: nn.Module
    before: tuple[Tensor, ...]
    down: Tensor

    def __call__(self, x_NH: Tensor) -> Tensor:
        """What the network says of `x_NH`, without gradients."""
        return F.linear(self.between([F.linear(x_NH, matrix) for matrix in self.before]), self.down)

    def between(self, products: Sequence[Tensor]) -> Tensor:
        """What goes into the last product, [N, I], of what came out of those before it."""
        gate, *up = products[0].chunk(2, -1) if self.is_gated and len(products) == 1 else products
        h_NI = self.activation.forward(gate)
        return h_NI.mul_(up[0]) if up else h_NI


def side_by_side(networks: Sequence[Matrices], x_SH: Tensor, counts: Sequence[int]) -> Tensor:
    """What networks of one kind say of their rows, [S, H]: the first `counts[0]` are the first one's, and so on.

    They write to one tensor, so that what lies between the products is done once for all. Each row has the bits that
    its network says of it alone.
    """
    products = [x_SH.new_empty(len(x_SH), len(matrix)) for matrix in networks[0].before]
    said_SH = torch.empty_like(x_SH)
    parts = zip(networks, x_SH.split(counts), *(product.split(counts) for product in products), strict=True)
    for network, x_NH, *outs in parts:
        for matrix, out in zip(network.before, outs, strict=True):
            torch.mm(x_NH, matrix.t(), out=out)
    h_parts = networks[0].between(products).split(counts)
    for network, h_NI, out in zip(networks, h_parts, said_SH.split(counts), strict=True):
        torch.mm(h_NI, network.down.t(), out=out)
    return said_SH


class _Parts:
    """The children of a module, that nobody watches, and whether they still are what they were."""

    def __init__(self, module: nn.Module) -> None:
        self._hooks_so_far = RemovableHandle.next_id
        self.children: dict[str, Any] = module._modules
        self._parts: tuple[Any, ...] = tuple(self.children.values())
        self._types = [*map(type, self._parts)]
        self._states: list[dict[str, Any]] = [part.__dict__ for part in self._parts]

    def are_what_they_were(self, *also: nn.Module) -> bool:
        """Whether that is still so; `also`: modules that nobody watched, either."""
        parts = (*self.children.values(),)
        return (
            parts == self._parts
            and [*map(type, parts)] == self._types  # a parametrisation changes the class of what it is put on
            and not any(map(contains, self._states, _FORWARD))
            and nn.Linear.forward is LINEAR_FORWARD
            and (self._hooks_so_far == RemovableHandle.next_id or self._are_unwatched(*also))
        )

    def _are_unwatched(self, *also: nn.Module) -> bool:
        """Asked once hooks have been set anywhere, which torch numbers: to look at each module takes much longer."""
        hooks_so_far = RemovableHandle.next_id
        if not all(map(is_untouched, (*self._parts, *also))):
            return False
        self._hooks_so_far = hooks_so_far
        return True


class PlainNetwork(_Parts):
    """A network of a known form with plain parts. It holds those, but not the network, under which it is remembered.

    Attributes:
        form: of the network.
        matrices: None if there are biases, or the matrices are small or in another dtype than half precision.
    """

    def __init__(self, network: nn.Module, form: FfnForm) -> None:
        super().__init__(network)
        self.form = form
        linears = form.linears(network)
        self._type, self._forward, self._state = type(network), type(network).forward, vars(network)
        self._states.append(self._state)
        activation = self.children[form.activation]
        self._activation_state = vars(activation)
        self._settings = settings_of(activation)
        self._parameters = [linear._parameters for linear in linears]
        self._tensors = [tensor for parameters in self._parameters for tensor in parameters.values()]
        weights = [linear.weight for linear in linears]
        self._kind = _kind_of(weights[0])
        self._both: Tensor | None = None  # gate and up, which must be at `_place` for it to be read
        self.matrices: Matrices | None = None
        if all(_is_large_half(linear.weight, linear.bias) for linear in linears):
            *before, down = weights
            if len(before) == 2:
                self._both, self._place = _over(*before), _place_of(*before)
            before = before if self._both is None else [self._both]
            settings = ((name, _comparable(value)) for name, value in self._settings.items())
            kind = (type(activation), *settings, *(matrix.shape for matrix in before))
            self.matrices = Matrices(kind, form.gate is not None, activation, tuple(before), down)

    def is_still(self, network: nn.Module) -> bool:
        """Whether all of this is still true of the network that it was made of."""
        if not self.are_what_they_were(network):
            return False
        tensors = [*chain.from_iterable(map(dict.values, self._parameters))]
        return (
            type(network) is self._type
            and self._type.forward is self._forward
            and not self._state["training"]
            and len(tensors) == len(self._tensors)
            and all(map(is_, tensors, self._tensors))
            and self._settings.items() <= self._activation_state.items()
            and _kind_of(tensors[0]) == self._kind  # `to` changes what a parameter holds
            and (self._both is None or _place_of(tensors[0], tensors[2]) == self._place)
        )

    def has_the_parts_of(self, other: PlainNetwork) -> bool:
        """Whether both were made of the same modules with the same parameters."""
        if self is other:
            return True
        return self._parts == other._parts and all(map(is_, self._tensors, other._tensors))


def plain_network(network: nn.Module) -> PlainNetwork | None:
    """What is known of it; None unless it is of a known form, doesn't train, and has nothing but plain parts."""
    known = _networks.get(network)
    if known is not None and known.is_still(network):
        return known
    _networks.pop(network, None)
    form = form_of(network)
    if form is None:
        return None
    activation: Any = network._modules[form.activation]
    linears = form.linears(network)
    if not all(map(is_plain_linear, linears)) or not is_untouched(activation) or activation.state_dict():
        return None
    if not all(type(linear.weight) is nn.Parameter for linear in linears):
        return None
    known = _networks[network] = PlainNetwork(network, form)
    return known


def plain_rows(router: nn.ModuleDict, names: Sequence[str]) -> list[dict[str, Any]] | None:
    """The parameters of the router rows `names`; None unless the router has nothing but plain rows, in float32."""
    known = _routers.get(router)
    if known is None or not known.are_what_they_were():
        _routers.pop(router, None)
        if not all(map(is_plain_linear, router.values())):
            return None
        known = _routers[router] = _Parts(router)
    rows = [known.children[name]._parameters for name in names]
    tensors = [*chain.from_iterable(map(dict.values, rows))]
    is_plain = {*map(type, tensors)} == {nn.Parameter} and {*map(_dtype_of, tensors)} == {torch.float32}
    return rows if is_plain else None


_networks: WeakKeyDictionary[nn.Module, PlainNetwork] = WeakKeyDictionary()
_routers: WeakKeyDictionary[nn.Module, _Parts] = WeakKeyDictionary()


def _comparable(setting: Any) -> Any:
    """What equals that of another network whose activation has the same setting; nothing does where that is open."""
    if isinstance(setting, functools.partial):
        return setting.func, setting.args, *setting.keywords.items()
    return setting if isinstance(setting, _COMPARABLE) else object()


def _is_large_half(weight: Tensor, bias: Tensor | None) -> bool:
    is_large = bias is None and weight.numel() >= SMALLEST_WEIGHT and weight.is_contiguous()
    return is_large and weight.dtype in HALVES and weight.device.type == "cpu"


def _over(first_OI: Tensor, second_OI: Tensor) -> Tensor | None:
    """One matrix [2 O, I] over both, if the second lies right behind the first; it does not keep them alive."""
    address, rows, columns = first_OI.data_ptr(), *first_OI.shape
    is_next = second_OI.data_ptr() == address + first_OI.nbytes
    if not is_next or second_OI.shape != first_OI.shape or second_OI.dtype != first_OI.dtype:
        return None
    memory = (ctypes.c_char * (2 * first_OI.nbytes)).from_address(address)
    return torch.frombuffer(memory, dtype=first_OI.dtype).view(2 * rows, columns)


def _place_of(first_OI: Tensor, second_OI: Tensor) -> tuple[Any, ...]:
    """What tells whether two matrices are still where a third was laid over them: only then is its memory theirs."""
    return (
        first_OI.data_ptr(),
        second_OI.data_ptr(),
        first_OI.numel(),
        second_OI.numel(),
        first_OI.is_contiguous() and second_OI.is_contiguous(),
    )


__all__ = ["Matrices", "PlainNetwork", "plain_network", "plain_rows", "side_by_side"]
