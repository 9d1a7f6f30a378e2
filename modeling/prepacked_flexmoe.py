"""A model made ready for fast inference on this CPU: `model.prepack_for_cpu()`, and how it is undone.

Two things, each where it wins, for the experts and for the anchor's own matrices. Those in half precision are laid out
as oneDNN wants them, which it would otherwise do anew in each product: the products have the same bits. And a single
token, as when decoding, goes through compiled loops (`one_token_flexmoe`).

What was made of tensors is used only while they are what they were: one that is replaced, moved or written to takes
the ordinary way at once. Does not cover training (gradients go through torch's own products), autocast, or models
under `torch.compile`, whose compiler does such things itself ("freezing").
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .forms_flexmoe import is_plain_linear
from .linear_flexmoe import HALVES, SMALLEST_WEIGHT, has_instructions, may_be_faster
from .one_token_flexmoe import compiled_loop, compiled_product, is_plain, parts_of
from .plain_flexmoe import PlainNetwork, plain_network

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


class Prepacked:
    """What has been made of a model's tensors for this CPU. Copies and pickles of the model come without it."""

    def __init__(self) -> None:
        self._packs: dict[int, _Made] = {}
        self._products: dict[int, _Made] = {}
        self._networks: dict[int, tuple[PlainNetwork, _Made]] = {}

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def __reduce__(self) -> Any:
        return type(None), ()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that this takes beside the model's own tensors."""
        return sum(source.nbytes for made in self._packs.values() for source in made.sources)

    def pack(self, weight_OI: Tensor) -> None:
        """Lays a matrix out for `product`, if oneDNN has instructions for its dtype."""
        if weight_OI.dtype in HALVES and has_instructions(weight_OI.dtype):
            packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI.detach(), 1)
            self._packs[id(weight_OI)] = _Made(packed, [weight_OI])

    def compile_product(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        """Compiles the product of this matrix with one row."""
        sources = [weight_OI] if bias_O is None else [weight_OI, bias_O]
        self._products[id(weight_OI)] = _Made(compiled_product(weight_OI, bias_O), sources)

    def compile_network(self, network: nn.Module) -> None:
        """Compiles the way of one token through `network`, if all its parts are plain."""
        plain = plain_network(network)
        if plain is not None and (tensors := parts_of(network, plain.form)):
            loop = compiled_loop(network, plain.form, tensors)
            if loop is not None:
                self._networks[id(network)] = plain, _Made(loop, tensors)

    def product(self, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor | None:
        """`F.linear`, for several rows to the same bits; None if there is nothing of this weight as it is now."""
        is_row = x.numel() == x.shape[-1]
        made = (self._products if is_row else self._packs).get(id(weight_OI))
        if made is None or x.dtype != weight_OI.dtype or not made.is_current():
            return None
        if not is_row:
            return torch.ops.mkldnn._linear_pointwise.default(x, made.value, bias_O, "none", [], "")
        if bias_O is not made.sources[-1] and (bias_O is not None or len(made.sources) > 1):
            return None
        return made.value(x.reshape(-1), *made.sources).view(*x.shape[:-1], len(weight_OI))

    def one_token(self, network: nn.Module) -> Callable[[Tensor], Tensor] | None:
        """What `network` says of one token, [H] or [1, H], float32; None if nothing is compiled of what it is now."""
        compiled = self._networks.get(id(network))
        if compiled is None:
            return None
        (then, made), now = compiled, plain_network(network)
        if now is None or not now.has_the_parts_of(then) or not made.is_current():
            return None
        return lambda x: made.value(x.reshape(-1).float(), *made.sources).view(x.shape)


class _PrepackedForward:
    """The `forward` of a linear layer that is none of an expert's; a copy of the model has the ordinary one."""

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


class CpuInference(_Model):
    """The part of a FlexMoE model that makes it ready for a CPU, and says whether it is."""

    _prepacked: Prepacked | None = None

    def prepack_for_cpu(self) -> int:
        """Makes decoding on this CPU as fast as its memory allows, until the model is changed.

        Half-precision matrices are laid out for the CPU's instructions (several tokens at a time: the same bits), and
        the way of one token through experts and matrices is compiled, which takes some seconds once (in float32:
        closer to the exact result, not the same bits). Training, `add_expert`, `remove_expert`,
        `replace_expert` and `undo_prepacking` undo it; what is saved is never affected.

        Returns:
            Bytes of memory that the laid-out matrices take beside the model: as much again as its matrices in half
            precision, or 0 where the CPU has no instructions for them.

        Raises:
            ValueError: the model trains, or is not on a CPU.
        """
        if self.training:
            raise ValueError("prepack_for_cpu is for inference, and this model trains: call eval() first.")
        if self.device.type != "cpu":
            raise ValueError(f"prepack_for_cpu is for models on a CPU; this one is on {self.device}.")
        self.undo_prepacking()
        made = Prepacked()
        linears = [part for part in self.modules() if is_plain_linear(part) and is_plain(part.weight)]
        linears = [linear for linear in linears if linear.weight.numel() >= SMALLEST_WEIGHT]
        chosen = set(linears)
        for linear in linears:
            made.pack(linear.weight)
        try:
            for linear in linears:
                made.compile_product(linear.weight, linear.bias)
            for block in self.flexmoe_blocks():
                for network in block.experts.values():
                    made.compile_network(network)
        except RuntimeError as error:  # Inductor's errors are of this kind
            logger.warning("Single tokens take the ordinary way: no C++ compiler that works was found (%s).", error)
        self._prepacked = made
        for linear in self._linears_of_the_anchor():
            if linear in chosen:
                linear.forward = _PrepackedForward(linear, made)
        return made.nbytes

    def undo_prepacking(self) -> None:
        """Gives back the memory that `prepack_for_cpu` took; nothing happens if it took none."""
        if self._prepacked is not None:
            self._prepacked = None
            for linear in self._linears_of_the_anchor():
                if isinstance(linear.__dict__.get("forward"), _PrepackedForward):
                    del linear.forward

    def _linears_of_the_anchor(self) -> list[Any]:
        """Its linear layers outside of experts, which are called as modules by code that is not ours."""
        within = {part for block in self.flexmoe_blocks() for part in block.modules()}
        return [part for part in self.modules() if isinstance(part, nn.Linear) and part not in within]

    def train(self, mode: bool = True) -> Any:
        """As torch's own; a model that trains is not prepacked."""
        if mode:
            self.undo_prepacking()
        return super().train(mode)


__all__ = ["CpuInference", "Prepacked"]
