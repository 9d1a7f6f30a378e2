"""A model made ready for fast inference on this CPU: `model.prepack_for_cpu()`, and how it is undone.

Two things, each where it wins. Matrices in half precision are laid out as oneDNN wants them, which it would otherwise
do anew in each product: the products have the same bits. And a single token, as when decoding, goes through each
expert in one compiled loop (`one_token_flexmoe`).

What was made of tensors is used only while they are what they were: one that is replaced, moved or written to takes
the ordinary way at once. Does not cover training (gradients go through torch's own products), autocast, or models
under `torch.compile`, whose compiler does such things itself ("freezing").
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .forms_flexmoe import FfnForm, form_of, is_plain_linear, is_untouched
from .linear_flexmoe import HALVES, SMALLEST_WEIGHT, has_instructions
from .one_token_flexmoe import compiled_loop, parts_of

# For type checkers alone: at run time the model classes bring PreTrainedModel in themselves.
if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Model
else:
    _Model = object

logger = logging.getLogger(__name__)


class _Made:
    """A value made of tensors that it keeps alive, and whether they are still as they were."""

    def __init__(self, value: Any, sources: Sequence[Tensor]) -> None:
        self.value = value
        self.sources = tuple(sources)
        self._states = tuple((source, source.data_ptr(), source._version) for source in sources)

    def is_current(self) -> bool:
        return all(source.data_ptr() == address and source._version == then for source, address, then in self._states)


class _MadeOfParts(_Made):
    """A value made of the parts of a network: also, whether those are still there, and nobody watches them."""

    def __init__(self, value: Any, network: nn.Module, sources: Sequence[Tensor]) -> None:
        super().__init__(value, sources)
        self._parts = tuple(network._modules.items())
        self._parameters = tuple(
            (part._parameters, name, p) for part in network.children() for name, p in part._parameters.items()
        )

    def is_current_in(self, network: nn.Module) -> bool:
        return (
            all(network._modules.get(name) is part and is_untouched(part) for name, part in self._parts if part)
            and all(parameters.get(name) is parameter for parameters, name, parameter in self._parameters)
            and self.is_current()
        )


class Prepacked:
    """What has been made of a model's tensors for this CPU. Copies and pickles of the model come without it."""

    def __init__(self) -> None:
        self._packs: dict[int, _Made] = {}
        self._loops: dict[int, _MadeOfParts] = {}

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that this takes beside the model's own tensors."""
        return sum(source.nbytes for made in self._packs.values() for source in made.sources)

    def pack(self, weight_OI: Tensor) -> None:
        """Lays a matrix out for `product`, unless it is too small, or oneDNN has no instructions for its dtype."""
        if weight_OI.dtype in HALVES and has_instructions(weight_OI.dtype) and weight_OI.numel() >= SMALLEST_WEIGHT:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), 1)
            self._packs[id(weight_OI)] = _Made(packed, [weight_OI])

    def product(self, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor | None:
        """`F.linear` to the same bits; None if there is nothing of this weight, or it has changed since."""
        made = self._packs.get(id(weight_OI))
        if made is None or not made.is_current():
            return None
        return torch.ops.mkldnn._linear_pointwise.default(x_NI, made.value, bias_O, "none", [], "")

    def compile(self, network: nn.Module, form: FfnForm) -> None:
        """Compiles the loop of one token through `network`, if all its parts are plain."""
        tensors = parts_of(network, form)
        if tensors and (loop := compiled_loop(network, form, tensors)) is not None:
            self._loops[id(network)] = _MadeOfParts(loop, network, tensors)

    def one_token(self, network: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """What `network` says of one token [H], in float32; None if nothing was compiled of what it is now."""
        made = self._loops.get(id(network))
        if made is None or not made.is_current_in(network):
            return None
        return lambda x_H: made.value(x_H.float(), *made.sources)


class CpuInference(_Model):
    """The part of a FlexMoE model that makes it ready for a CPU, and says whether it is."""

    _prepacked: Prepacked | None = None

    def prepack_for_cpu(self) -> int:
        """Makes decoding on this CPU as fast as its memory allows, until the model is changed.

        Half-precision matrices of all experts are laid out for the CPU's instructions (several tokens at a time: the
        same bits), and the way of one token through an expert is compiled, which takes some seconds once (float32
        throughout: closer to the exact result, not the same bits). Training, `add_expert`, `remove_expert`,
        `replace_expert` and `undo_prepacking` undo it; what is saved is never affected.

        Returns:
            Bytes of memory that the laid-out matrices take beside the model: as much again as the experts' matrices
            in half precision, or 0 where the CPU has no instructions for them.

        Raises:
            ValueError: the model trains, or is not on a CPU.
        """
        if self.training:
            raise ValueError("prepack_for_cpu is for inference, and this model trains: call eval() first.")
        if self.device.type != "cpu":
            raise ValueError(f"prepack_for_cpu is for models on a CPU; this one is on {self.device}.")
        made = Prepacked()
        for block in self.flexmoe_blocks():
            for network in block.experts.values():
                for part in network.modules():
                    if is_plain_linear(part) and not part.weight.is_inference():
                        made.pack(part.weight)
        self._compile_loops(made)
        self._prepacked = made
        return made.nbytes

    def _compile_loops(self, made: Prepacked) -> None:
        try:
            for block in self.flexmoe_blocks():
                for network in block.experts.values():
                    if (form := form_of(network)) is not None:
                        made.compile(network, form)
        except RuntimeError as error:  # Inductor's errors are of this kind
            logger.warning(
                "Single tokens take the ordinary way: Inductor found no C++ compiler that works (%s).", error
            )

    def undo_prepacking(self) -> None:
        """Gives back the memory that `prepack_for_cpu` took; nothing happens if it took none."""
        self._prepacked = None

    def train(self, mode: bool = True) -> Any:
        """As torch's own; a model that trains is not prepacked."""
        if mode:
            self.undo_prepacking()
        return super().train(mode)


__all__ = ["CpuInference", "Prepacked"]
