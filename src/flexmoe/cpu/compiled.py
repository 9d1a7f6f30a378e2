"""A single token through an FFN, or through one matrix, in a loop that Inductor compiles for the CPU.

Decoding reads every weight of the chosen experts once per token, and can be no faster than that. torch's products of
one row reach a third of the memory bandwidth, oneDNN's on weights laid out for it half; the loop reads the weights
where they are, gate and up together, and reaches nine tenths (2 cores of a Zen 4, bfloat16, [2816, 1024]). It computes
in float32 throughout; the output of an expert is not rounded.

Does not cover several tokens, or when this is used (`flexmoe.cpu.prepack`). Needs a C++ compiler, as Inductor does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flexmoe.modeling.low_rank_flexmoe import FfnStructure, is_plain_linear, is_unwrapped
from flexmoe.structures import settings_of

Loop = Callable[..., Tensor]

OPTIONS = {
    "compile_threads": 1,  # no pool of processes for one function
    "cpp.enable_floating_point_contract_flag": "fast",  # a product and a sum in one instruction, rounded once
}


def parts_of(network: nn.Module, structure: FfnStructure) -> list[Tensor] | None:
    """Weights and biases of up, down and gate, as far as they exist; None unless all are plain matrices on a CPU."""
    linears = [network._modules[name] for name in (structure.up, structure.down, structure.gate) if name is not None]
    if not all(linear is not None and is_plain_linear(linear) for linear in linears):
        return None
    found = [p for linear in linears if linear for p in (linear._parameters["weight"], linear._parameters["bias"])]
    tensors: list[Tensor] = [tensor for tensor in found if tensor is not None]
    return tensors if all(map(is_ordinary, tensors)) else None


def is_ordinary(tensor: Tensor) -> bool:
    """Whether this is an ordinary, contiguous parameter on the CPU."""
    on_cpu = type(tensor) is nn.Parameter and tensor.device.type == "cpu"
    return on_cpu and tensor.is_contiguous() and tensor.dtype.is_floating_point and not tensor.is_inference()


def compiled_loop(network: nn.Module, structure: FfnStructure, tensors: Sequence[Tensor]) -> Loop | None:
    """`network` for one token: a function of `x_H` in float32 and of its tensors, to float32 [H].

    Compiled once for all networks of one structure, activation, and shapes. None if the activation has state beyond
    plain values.

    Raises:
        RuntimeError: there is no working C++ compiler.
    """
    activation = network._modules[structure.activation]
    if activation is None or not is_unwrapped(activation) or any(True for _ in activation.state_dict()):
        return None
    settings = tuple(sorted(settings_of(activation).items()))
    has_bias = tuple(
        name is not None and network._modules[name]._parameters["bias"] is not None  # type: ignore[union-attr]
        for name in (structure.up, structure.down, structure.gate)
    )
    shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
    key = (type(activation), settings, has_bias, structure.gate is not None, shapes, torch.get_num_threads())
    try:
        hash(key)
    except TypeError:
        return None
    if key not in _loops:
        _loops[key] = _compile(functools.partial(_output, activation, has_bias, structure.gate is not None), tensors)
    return _loops[key]


def compiled_product(weight_OI: Tensor, bias_O: Tensor | None) -> Loop:
    """`F.linear` of one row: a function of `x_I` in any dtype, the weight, and the bias if there is one, to `x_I`'s.

    Compiled once for all matrices of these shapes.

    Raises:
        RuntimeError: there is no working C++ compiler.
    """
    tensors = [weight_OI] if bias_O is None else [weight_OI, bias_O]
    key = ("product", *((tensor.shape, tensor.dtype) for tensor in tensors), torch.get_num_threads())
    if key not in _loops:
        _loops[key] = _compile(_rounded_product, tensors, weight_OI.dtype)
    return _loops[key]


_loops: dict[Any, Loop] = {}


def _rounded_product(x_I: Tensor, weight_OI: Tensor, *bias_O: Tensor) -> Tensor:
    return _product(x_I.float(), weight_OI, *bias_O).to(x_I.dtype)


def _output(activation: nn.Module, has_bias: tuple[bool, ...], gated: bool, x_H: Tensor, *tensors: Tensor) -> Tensor:
    rest = iter(tensors)
    weights = [(next(rest), next(rest) if bias else None) for bias in has_bias[: 3 if gated else 2]]
    up_I = _product(x_H, *weights[0])
    h_I = activation(_product(x_H, *weights[2])) * up_I if gated else activation(up_I)
    return _product(h_I, *weights[1])


def _product(x_I: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    y_O = (weight_OI.float() * x_I).sum(-1)  # Inductor makes one loop of this; for a product it would call torch
    return y_O if bias_O is None else y_O + bias_O.float()


def _compile(output: Callable[..., Tensor], tensors: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> Loop:
    import torch._inductor
    from torch.fx.experimental.proxy_tensor import make_fx

    hidden = tensors[0].shape[1]
    examples: list[Any] = [torch.zeros(hidden, dtype=dtype), *(torch.empty_like(tensor) for tensor in tensors)]
    with torch.no_grad():
        return torch._inductor.compile(make_fx(output)(*examples), examples, options=OPTIONS)


__all__ = ["Loop", "compiled_loop", "compiled_product", "is_ordinary", "parts_of"]
