"""A model prepared for fast inference on this CPU, `model.prepack_for_cpu()`, and how it is undone.

For the experts and for the anchor's own matrices: those in half precision are laid out as oneDNN wants them, which it
would otherwise do again in each product (the products have the same bits), and a single token, as when decoding, runs
through compiled loops (`flexmoe.cpu.compiled`).

What was made from a tensor is used only while the tensor is unchanged: one that was replaced, moved or written to
takes the ordinary path at once. Does not cover training, autocast, or models under `torch.compile`, whose compiler
does such things itself ("freezing").

Shapes: H hidden, I inputs, O outputs.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn

from flexmoe.cpu.compiled import Loop, compiled_loop, compiled_product, is_ordinary, parts_of
from flexmoe.cpu.linear import HALVES, SMALLEST_WEIGHT, has_instructions, may_be_faster
from flexmoe.modeling.low_rank_flexmoe import FfnStructure, is_plain_linear, is_unwrapped
from flexmoe.structures import settings_of, structure_of

logger = logging.getLogger(__name__)


class _Made:
    """A value made from tensors, which it keeps alive, and whether they are unchanged."""

    def __init__(self, value: Any, sources: Sequence[Tensor]) -> None:
        self.value = value
        self.sources = tuple(sources)
        self._states = tuple((source, source.data_ptr(), source._version) for source in sources)

    def is_current(self) -> bool:
        return all(source.data_ptr() == address and source._version == then for source, address, then in self._states)


@dataclass(frozen=True)
class _CompiledNetwork:
    """A compiled network, and what it was compiled from."""

    structure: FfnStructure
    activation: nn.Module
    settings: dict[str, Any]
    made: _Made

    def is_current(self, network: nn.Module) -> bool:
        if structure_of(network) != self.structure:
            return False
        activation: Any = network._modules[self.structure.activation]
        if activation is not self.activation or not is_unwrapped(activation):
            return False
        return (
            settings_of(activation) == self.settings
            and _same_tensors(parts_of(network, self.structure), self.made.sources)
            and self.made.is_current()
        )


def _same_tensors(ours: Sequence[Tensor] | None, others: Sequence[Tensor]) -> bool:
    return ours is not None and len(ours) == len(others) and all(a is b for a, b in zip(ours, others, strict=True))


class Prepacked:
    """What was made from a model's tensors for this CPU."""

    def __init__(self) -> None:
        self._packs: dict[int, _Made] = {}
        self._products: dict[int, _Made] = {}
        self._networks: dict[int, _CompiledNetwork] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of memory that this takes in addition to the model's own tensors."""
        return sum(source.nbytes for made in self._packs.values() for source in made.sources)

    def pack(self, weight_OI: Tensor) -> None:
        """Lays a matrix out for `product`, if the CPU has instructions for its dtype."""
        if weight_OI.dtype in HALVES and has_instructions(weight_OI.dtype):
            packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), 1)
            self._packs[id(weight_OI)] = _Made(packed, [weight_OI])

    def compile_product(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        """Compiles the product of this matrix with one row."""
        sources = [weight_OI] if bias_O is None else [weight_OI, bias_O]
        self._products[id(weight_OI)] = _Made(compiled_product(weight_OI, bias_O), sources)

    def compile_network(self, network: nn.Module) -> None:
        """Compiles the path of one token through `network`, if all its parts are plain."""
        structure = structure_of(network)
        tensors = None if structure is None else parts_of(network, structure)
        if structure is None or tensors is None:
            return
        loop: Loop | None = compiled_loop(network, structure, tensors)
        if loop is not None:
            activation: Any = network._modules[structure.activation]
            made = _Made(loop, tensors)
            self._networks[id(network)] = _CompiledNetwork(structure, activation, settings_of(activation), made)

    def product(self, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor | None:
        """`F.linear`, with the same bits for several rows; None if nothing was made from this weight as it is now."""
        is_row = x_NI.numel() == x_NI.shape[-1]
        made = (self._products if is_row else self._packs).get(id(weight_OI))
        if made is None or x_NI.dtype != weight_OI.dtype or not made.is_current():
            return None
        if not is_row:
            return torch.ops.mkldnn._linear_pointwise.default(x_NI, made.value, bias_O, "none", [], "")
        if bias_O is not made.sources[-1] and (bias_O is not None or len(made.sources) > 1):
            return None
        return made.value(x_NI.reshape(-1), *made.sources).view(*x_NI.shape[:-1], len(weight_OI))

    def one_token(self, network: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """The network for one token, [H] or [1, H] to float32; None if nothing was compiled from it as it is now."""
        compiled = self._networks.get(id(network))
        if compiled is None or not compiled.is_current(network):
            return None
        made = compiled.made
        return lambda x: made.value(x.reshape(-1).float(), *made.sources).view(x.shape)


class _PrepackedForward:
    """The `forward` of one of the anchor's linear layers; a copy of the model gets the ordinary one."""

    def __init__(self, linear: nn.Module, prepacked: Prepacked | None) -> None:
        self._linear = linear
        self._prepacked = prepacked

    def __call__(self, x: Tensor) -> Tensor:
        linear: Any = self._linear
        if self._prepacked is not None and type(x) is Tensor and may_be_faster(x):
            product = self._prepacked.product(x, linear.weight, linear.bias)
            if product is not None:
                return product
        return type(linear).forward(linear, x)

    def __deepcopy__(self, memo: Any) -> _PrepackedForward:
        return _PrepackedForward(copy.deepcopy(self._linear, memo), None)

    def __reduce__(self) -> Any:
        return _PrepackedForward, (self._linear, None)


# By block; weak, and outside of the modules, so that copies and pickles of a model are not prepacked.
_prepacked: WeakKeyDictionary[nn.Module, Prepacked] = WeakKeyDictionary()


def prepacked_of(block: nn.Module) -> Prepacked | None:
    """What `prepack_for_cpu` made for a block's model; None if nothing."""
    return _prepacked.get(block) if _prepacked else None


def prepack_for_cpu(model: Any) -> int:
    """Makes decoding on this CPU as fast as its memory allows, until the model changes: `model.prepack_for_cpu()`.

    Half-precision matrices are laid out for the CPU's instructions (same bits for several tokens), and the path of one
    token through experts and matrices is compiled, which takes some seconds once (in float32: closer to the exact
    result, not the same bits). Training, `add_expert`, `remove_expert`, `replace_expert` and `undo_prepacking` undo
    it; what is saved is never affected.

    Returns:
        Bytes of memory for the laid-out matrices: as much again as the half-precision matrices, or 0 where the CPU has
        no instructions for them.

    Raises:
        ValueError: the model is in training mode, or not on a CPU.
    """
    if model.training:
        raise ValueError("prepack_for_cpu is for inference, and this model is in training mode: call eval() first.")
    if model.device.type != "cpu":
        raise ValueError(f"prepack_for_cpu is for models on a CPU; this one is on {model.device}.")
    undo_prepacking(model)
    made = Prepacked()
    linears = [part for part in model.modules() if is_plain_linear(part) and is_ordinary(part.weight)]
    linears = [linear for linear in linears if linear.weight.numel() >= SMALLEST_WEIGHT]
    for linear in linears:
        made.pack(linear.weight)
    try:
        for linear in linears:
            made.compile_product(linear.weight, linear.bias)
        for block in model.flexmoe_blocks():
            for network in block.experts.values():
                made.compile_network(network)
    except RuntimeError as error:  # the base class of Inductor's errors
        logger.warning("Single tokens take the ordinary path: no working C++ compiler was found (%s).", error)
    for block in model.flexmoe_blocks():
        _prepacked[block] = made
    chosen = set(linears)
    for linear in _linears_of_anchor(model):
        if linear in chosen:
            linear.forward = _PrepackedForward(linear, made)
    _undo_on_change(model)
    return made.nbytes


def undo_prepacking(model: Any) -> None:
    """Frees the memory that `prepack_for_cpu` took; does nothing otherwise."""
    if not any(block in _prepacked for block in model.flexmoe_blocks()):
        return
    for block in model.flexmoe_blocks():
        _prepacked.pop(block, None)
    for linear in _linears_of_anchor(model):
        if isinstance(linear.__dict__.get("forward"), _PrepackedForward):
            del linear.forward


_observed: WeakSet[nn.Module] = WeakSet()


def _undo_on_change(model: Any) -> None:
    if model in _observed:
        return
    _observed.add(model)
    watched = ref(model)  # the callback must not keep the model alive

    def undo() -> None:
        if (changed := watched()) is not None:
            undo_prepacking(changed)

    model.on_experts_changed(undo)


def _linears_of_anchor(model: Any) -> list[Any]:
    """The linear layers outside of experts, which code of the anchor's family calls as modules."""
    within = {part for block in model.flexmoe_blocks() for part in block.modules()}
    return [part for part in model.modules() if isinstance(part, nn.Linear) and part not in within]


__all__ = ["Prepacked", "prepack_for_cpu", "prepacked_of", "undo_prepacking"]
