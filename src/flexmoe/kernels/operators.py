"""Registration and argument checks shared by the operators in `torch.ops.flexmoe`.

On CUDA an operator runs a Triton kernel, imported on its first launch, and on a CPU its reference. torch.compile does
not trace into operators, and autocast does not change them.

Does not cover the operators themselves (`route/op.py`, `experts/op.py`, `low_rank/op.py`), or other devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "flexmoe"

MAX_EXPERTS = 64
"""The most experts that a kernel takes."""

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that the kernels take."""

Operator = Callable[..., Any]


def register(name: str, schema: str, *, cpu: Operator, cuda: Operator, fake: Operator) -> Any:
    """Registers `flexmoe::<name>` and returns the operator.

    Args:
        schema: arguments and results, as `torch.library.define` takes them.
        cpu, cuda: the implementations; autocast is off while the one for CPUs runs.
        fake: returns empty results of the right shapes and dtypes.
    """
    torch.library.define(f"{NAMESPACE}::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"{NAMESPACE}::{name}", "CPU", without_autocast(cpu))
    torch.library.impl(f"{NAMESPACE}::{name}", "CUDA", cuda)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def register_without_gradient(name: str, operator: Any, message: str) -> None:
    """Makes `operator` raise a RuntimeError with `message` where autograd would need its gradient."""

    def forward(*args: Any) -> Any:
        tensors = (t for arg in args for t in (arg if isinstance(arg, list) else [arg]) if isinstance(t, Tensor))
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise RuntimeError(message)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    torch.library.impl(f"{NAMESPACE}::{name}", "Autograd", forward)


def without_autocast(function: Operator) -> Operator:
    """`function` with autocast for CPUs off while it runs."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return function(*args)

    return run


def check_hidden_states(x_TH: Tensor) -> None:
    """Raises ValueError unless `x_TH` is a matrix, and TypeError unless it is floating-point."""
    if x_TH.ndim != 2:
        raise ValueError(f"x is {list(x_TH.shape)}, must be [tokens, hidden]: flatten batch and sequence.")
    if not x_TH.is_floating_point():
        raise TypeError(f"x is {x_TH.dtype}, must be a floating dtype.")


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, x_TH: Tensor) -> None:
    """Raises ValueError for another shape, or another device than that of `x_TH`, and TypeError for another dtype."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}, must be {list(shape)} for x of {list(x_TH.shape)}.")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}, must be {dtype}: cast it.")
    if tensor.device != x_TH.device:
        raise ValueError(f"{name} is on {tensor.device}, x on {x_TH.device}: move one of them.")


def check_kernel_limits(experts: int, sizes: Mapping[str, int], *dtypes: torch.dtype) -> None:
    """Raises ValueError or TypeError, naming what a kernel does not take; `sizes` are named for the message."""
    instead = 'Use experts_implementation="eager".'
    if experts > MAX_EXPERTS:
        raise ValueError(f"{experts} experts: the kernels take at most {MAX_EXPERTS}. {instead}")
    for name, size in sizes.items():
        if size % 8:
            raise ValueError(f"{name} is {size}: the kernels take multiples of 8. {instead}")
    for dtype in dtypes:
        if dtype not in KERNEL_DTYPES:
            raise TypeError(f"The kernels take {', '.join(map(str, KERNEL_DTYPES))}, not {dtype}. {instead}")


__all__ = [
    "KERNEL_DTYPES",
    "MAX_EXPERTS",
    "NAMESPACE",
    "check_hidden_states",
    "check_kernel_limits",
    "check_tensor",
    "register",
    "register_without_gradient",
    "without_autocast",
]
