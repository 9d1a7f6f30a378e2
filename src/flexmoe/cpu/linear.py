"""Linear layers on CPUs where torch's own product is slow: float32 with few rows, and half precision.

Within `faster_linears` modules are called as usual, so adapters, hooks, quantisers and offload stay in force; only the
arithmetic behind `torch.nn.functional.linear` is replaced, for ordinary tensors.

Measured on 2 cores of a Zen 3, which has no half-precision instructions, with torch 2.13 and weights [2816, 1024], in
milliseconds, torch's own against this module:

| rows | float32 | bfloat16 |
|---|---|---|
| 1 | 1.1 / 0.5: a product with one row runs in one thread | the same |
| 8 | 2.3 / 1.2: two threads split the rows, not the weight | 2.6 / 2.2 |
| 64 | 3.9 / 2.8 | 20 / 5: without instructions, one dot product at a time |
| 365 | 15 / 13 | 115 / 17 |

Where the CPU has the instructions (AVX512-BF16), half-precision products are left to torch.

Does not cover training (gradients need torch's own products), autocast or other devices.

Shapes: N rows, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

HALVES = (torch.bfloat16, torch.float16)
SMALLEST_WEIGHT = 1 << 18  # elements; below, splitting costs more than it saves
MOST_ROWS = 512  # of a float32 input; above, torch distributes the work well
FEWEST_HALF_ROWS = 4  # of a half-precision input; below, widening the weight costs more than it saves
WIDENED = 1 << 22  # elements of a weight that are widened at a time: 16 MB, which the last-level cache holds

_of_thread = threading.local()


class Packs(Protocol):
    """Products that were prepared for particular weights (`prepack`)."""

    def product(self, x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor | None:
        """The prepared product; None if there is none."""


def may_be_faster(x: Tensor) -> bool:
    """Whether products of `x` may be replaced: inference on a CPU, neither compiled nor under autocast."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return not torch.compiler.is_compiling()


def faster_linears(x: Tensor, packs: Packs | None = None) -> contextlib.AbstractContextManager[Any]:
    """Within it, linear layers with inputs like `x`, or with fewer rows, use the faster product if there is one."""
    if may_be_faster(x) and (packs is not None or (_splits(x) if x.dtype == torch.float32 else _widens(x))):
        return _FasterLinears(packs)
    return contextlib.nullcontext()


class _FasterLinears(TorchFunctionMode):
    def __init__(self, packs: Packs | None) -> None:
        super().__init__()
        self._packs = packs

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.linear and not kwargs and len(args) >= 2:
            return linear(*args, packs=self._packs)
        return func(*args, **(kwargs or {}))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, packs: Packs | None = None) -> Tensor:
    """`F.linear` for an input of which `may_be_faster` holds; the weight may be of any kind."""
    if not _is_ordinary(x, weight):
        return F.linear(x, weight, bias)
    x_NI = x.reshape(-1, x.shape[-1])
    y_NO = None if packs is None else packs.product(x_NI, weight, bias)
    if y_NO is None:
        if x.dtype == torch.float32 and _splits(x):
            y_NO = split_linear(x_NI, weight, bias)
        elif x.dtype != torch.float32 and _widens(x):
            y_NO = widened_linear(x_NI, weight, bias)
        else:
            return F.linear(x, weight, bias)
    return y_NO.view(*x.shape[:-1], len(weight))


def _is_ordinary(x: Tensor, weight: Tensor) -> bool:
    """Both are ordinary tensors of one dtype: quantised, distributed and fake ones have types of their own."""
    return (
        type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.dtype == weight.dtype
        and weight.numel() >= SMALLEST_WEIGHT
        and weight.is_contiguous()
    )


def _splits(x: Tensor) -> bool:
    return torch.get_num_threads() > 1 and x.numel() <= MOST_ROWS * x.shape[-1]


def _widens(x: Tensor) -> bool:
    return not has_instructions(x.dtype) and x.numel() >= FEWEST_HALF_ROWS * x.shape[-1]


@functools.cache
def has_instructions(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of `dtype` with instructions of the CPU; True if torch does not report it."""
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in known or not torch.backends.mkldnn.is_available():
        return True
    return bool(getattr(torch.ops.mkldnn, known[dtype])())


def split_linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear` as a batch of products that threads share: the weight's rows are split, not the input's."""
    blocks = 2 * torch.get_num_threads()
    if len(weight_OI) % blocks:
        return F.linear(x_NI, weight_OI, bias_O)
    weight_BIO = weight_OI.view(blocks, -1, weight_OI.shape[1]).transpose(1, 2)
    y_NO = x_NI.expand(blocks, *x_NI.shape).bmm(weight_BIO).transpose(0, 1).reshape(len(x_NI), len(weight_OI))
    return y_NO if bias_O is None else y_NO + bias_O


def widened_linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear` in half precision, computed in float32 and rounded once; the weight is widened piece by piece."""
    product = split_linear if _splits(x_NI) else F.linear
    rows = max(WIDENED // weight_OI.shape[1], 1)
    wide_x_NI = x_NI.float()
    wide_OI = _scratch(min(rows, len(weight_OI)), weight_OI.shape[1])
    y_NO = x_NI.new_empty(len(x_NI), len(weight_OI))
    for start in range(0, len(weight_OI), rows):
        part = slice(start, start + rows)
        wide_part = wide_OI[: len(weight_OI[part])].copy_(weight_OI[part])
        y_NO[:, part] = product(wide_x_NI, wide_part, None if bias_O is None else bias_O[part].float())
    return y_NO


def _scratch(rows: int, columns: int) -> Tensor:
    """A float32 tensor [rows, columns] of any content, which this thread uses again.

    Allocating it for each product cost up to 40 % of a decoding step: malloc returns so large a block to the system,
    whose pages are then mapped and cleared once more, or keeps it, depending on what was allocated before.
    """
    scratch: Tensor | None = getattr(_of_thread, "scratch", None)
    if scratch is None or scratch.numel() < rows * columns:
        with torch.inference_mode(False):  # else it could not be written to outside of inference mode
            scratch = _of_thread.scratch = torch.empty(rows * columns, dtype=torch.float32, device="cpu")
    return scratch[: rows * columns].view(rows, columns)


__all__ = [
    "HALVES",
    "SMALLEST_WEIGHT",
    "Packs",
    "faster_linears",
    "has_instructions",
    "linear",
    "may_be_faster",
    "split_linear",
    "widened_linear",
]
