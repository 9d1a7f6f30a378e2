"""How wide a feed-forward network is inside, and the same one at another width: experts may differ from public in it.

Shapes: H hidden, I intermediate. A network of width I has matrices with a side of I, or 2 * I where a gate and an up
projection are one matrix. Does not cover what the numbers in a network are: a network of another width has none yet.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_SIZES = ("in_features", "out_features", "nf", "nx")  # what Linear, Conv1D and their kin say of their weight


def intermediate_size(network: nn.Module, hidden: int) -> int:
    """Width of a feed-forward network: of its matrices' sides that are not `hidden`, the least, because a fused
    gate_up has twice the width."""
    sides = itertools.chain.from_iterable(p.shape for p in network.parameters() if p.dim() == 2)
    return min((side for side in sides if side != hidden), default=hidden)


def resize(network: nn.Module, hidden: int, width: int) -> None:
    """Makes `network` one of this width, in place; tensors that change their shape lose their numbers.

    Raises:
        ValueError: its width cannot be told from its hidden size.
    """
    old = intermediate_size(network, hidden)
    if old == width:
        return
    is_square = any(set(parameter.shape) == {hidden} for parameter in network.parameters() if parameter.dim() == 2)
    if is_square or 2 * old == hidden:
        raise ValueError(
            f"{type(network).__name__} has a hidden size of {hidden} and an intermediate size of {old}, which cannot "
            f"be told apart, so it cannot be made {width} wide."
        )
    sizes = {old: width, 2 * old: 2 * width}
    for module in network.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not sizes.keys().isdisjoint(tensor.shape):
                setattr(module, name, _of_shape(tensor, [sizes.get(side, side) for side in tensor.shape]))
                module.__dict__.pop("_is_hf_initialized", None)  # it is to be drawn, or loaded
        for name in _SIZES:
            if (size := getattr(module, name, None)) in sizes:
                setattr(module, name, sizes[size])


def _of_shape(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    other = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(other, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else other


__all__ = ["intermediate_size", "resize"]
