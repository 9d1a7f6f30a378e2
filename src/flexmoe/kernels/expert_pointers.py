"""Keeps the kernels' pointer tables in step with the experts of a model, for CUDA graphs that were captured with it.

A captured graph contains the addresses of the pointer tables, and the tables those of the experts' tensors. When an
expert is replaced by one of the same shapes, or moves, its new addresses are written into the tables. When it is
removed, or its tensors change their shape, dtype or device, the tables get 0, and the kernels return NaN. Until then
the old tensors are kept alive, so a graph never reads freed memory.

Does not cover other parameters of the model (`graphs.py`), or experts that run as modules: the addresses of their
weights are in the graph itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flexmoe.kernels.pointers import update_pointers
from flexmoe.modeling.low_rank_flexmoe import LowRankDelta

Key = tuple[int, str, str]
"""The layer, the serial of an expert, and the path of a parameter of its network or router row."""

Slot = tuple[dict[str, Any], str]
"""A parameter or module, as a dictionary of its parent and its key there."""


@dataclass(frozen=True)
class _Captured:
    """A tensor whose address may be in a table; holding it keeps its memory allocated.

    Attributes:
        kind: what a tensor that takes its place must have in common with it.
    """

    tensor: Tensor
    kind: tuple[Any, ...]


class ExpertPointers:
    """The tensors of a model's experts and router rows at the time of a capture, and where they are now.

    `update` runs whenever the model's experts are changed by its own methods. A user of a bare `torch.cuda.CUDAGraph`
    creates one before capturing, keeps it as long as the graph, and calls `update` after any other change.

    Args:
        model: a FlexMoE model.

    Attributes:
        intact: False after the first update that found an expert removed, or changed in more than its values.
    """

    def __init__(self, model: Any) -> None:
        self.intact = True
        self._model = model
        self._names = {model.serial_of(name): name for name in model.expert_names}
        self._tensors = {key: _captured(*found) for key, found in _expert_tensors(model).items()}
        self._remember()
        update = weakref.WeakMethod(self.update)  # the model must not keep this, and with it the tensors, alive
        model.on_experts_changed(lambda: (method := update()) and method())

    @property
    def serials(self) -> tuple[str, ...]:
        """The serials of the captured experts in order, or of those that replaced them."""
        return tuple(self._names)

    def update(self) -> bool:
        """Writes the current addresses into the pointer tables, if any has changed; returns `intact`."""
        if self._is_unchanged():
            return self.intact
        current, replaced = _expert_tensors(self._model), self._replaced()
        tensors: dict[Key, _Captured] = {}
        moves: dict[int, int] = {}
        for (layer, serial, path), captured in self._tensors.items():
            key = (layer, replaced.get(serial, serial), path)
            found = _captured(*current[key]) if key in current else None
            old, new = captured.tensor.data_ptr(), 0
            if found is not None and found.kind == captured.kind:
                new = found.tensor.data_ptr()
                tensors[key] = found
            if moves.setdefault(old, new) != new:  # experts shared a tensor and no longer do: its column is unknown
                moves[old] = 0
        moves = {old: new for old, new in moves.items() if old != new}
        update_pointers(moves)
        self.intact = self.intact and 0 not in moves.values()
        self._tensors = tensors
        present = {self._model.serial_of(name): name for name in self._model.expert_names}
        serials = (replaced.get(serial, serial) for serial in self._names)
        self._names = {serial: present.get(serial, "") for serial in serials}
        self._remember()
        return self.intact

    def _replaced(self) -> dict[str, str]:
        """By the serial of an expert that was replaced: the serial of the expert that has its name now."""
        new = {name: self._model.serial_of(name) for name in self._model.expert_names}
        present = set(new.values())
        new = {name: serial for name, serial in new.items() if serial not in self._names}
        return {serial: new[name] for serial, name in self._names.items() if serial not in present and name in new}

    def _remember(self) -> None:
        """Notes what `_is_unchanged` compares."""
        self._state = _named_serials(self._model)
        self._modules = [(slot, slot[0][slot[1]]) for slot in _module_slots(self._model)]
        self._slots = [slot for _, module in self._modules for slot in parameter_slots(module)]
        self._addresses = addresses(self._slots)

    def _is_unchanged(self) -> bool:
        """Compares names, serials, the networks and rows themselves, and the addresses of their parameters."""
        return (
            self._state == _named_serials(self._model)
            and all(parent.get(key) is module for (parent, key), module in self._modules)
            and addresses(self._slots) == self._addresses
        )


def addresses(slots: list[Slot]) -> list[int] | None:
    """The address of each parameter, in some 0.3 microseconds each; None if one is missing."""
    try:
        return [parent[key].data_ptr() for parent, key in slots]
    except (KeyError, AttributeError):  # deleted, or set to None
        return None


def parameter_slots(module: nn.Module) -> list[Slot]:
    """Where the ordinary parameters of `module` are: no subclasses, such as quantised or sharded ones."""
    return [
        (part._parameters, name)
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if type(parameter) is nn.Parameter and not parameter.is_meta
    ]


def _module_slots(model: Any) -> Iterator[Slot]:
    for block in model.flexmoe_blocks():
        for container in (block.experts, block.router):
            for name in container:
                yield container._modules, name


def _named_serials(model: Any) -> list[tuple[str, str]]:
    return [(name, model.serial_of(name)) for name in model.expert_names]


def _expert_tensors(model: Any) -> dict[Key, tuple[Tensor, float | None]]:
    """The ordinary parameters of all experts and rows; with the scale of the low-rank delta that they belong to."""
    found: dict[Key, tuple[Tensor, float | None]] = {}
    for block in model.flexmoe_blocks():
        for name in model.expert_names:
            serial = model.serial_of(name)
            for part, container in (("experts", block.experts), ("router", block.router)):
                module = container[name]
                scales = {path: d.scale for path, d in module.named_modules() if isinstance(d, LowRankDelta)}
                for path, parameter in module.named_parameters():
                    if type(parameter) is nn.Parameter and not parameter.is_meta:
                        delta = path.rpartition(".")[0].rpartition(".")[0]
                        found[block.layer_index, serial, f"{part}.{path}"] = parameter.detach(), scales.get(delta)
    return found


def _captured(tensor: Tensor, scale: float | None) -> _Captured:
    # a table of low-rank experts holds their scales: with another scale, new tensors would give wrong results
    kind = (tensor.device, tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % 16, scale)
    return _Captured(tensor, kind)


__all__ = ["ExpertPointers", "addresses", "parameter_slots"]
