"""Linear layers on CPUs where torch's own product is slow: float32 with few rows, and half precision.

Within `faster_linears` modules are called as ever, so adapters, hooks, quantisers and offload stay in force; only the
arithmetic behind `torch.nn.functional.linear` is another, for plain tensors. `fastest_product` is the same arithmetic
for a weight at hand.

Measured on 2 cores of a Zen 3, which has no instructions for half precision, with torch 2.13, weights [2816, 1024],
milliseconds, torch's own against this:

| rows | float32 | bfloat16 |
|---|---|---|
| 1 | 1.1 / 0.5: a product with one row runs in one thread | the same |
| 8 | 2.3 / 1.2: two threads split the rows, not the weight | 2.6 / 2.2 |
| 64 | 3.9 / 2.8 | 20 / 5: without instructions for it, one dot product at a time |
| 365 | 15 / 13 | 115 / 17 |

On 2 cores of a Zen 4, which has them (AVX512-BF16), bfloat16, to the same bits. There oneDNN lays a weight out anew in
each product, as the factor on the right; as the factor on the left, `(W x^T)^T`, it is read where it lies:

| rows | [2816, 1024] | [1024, 2816] |
|---|---|---|
| 1 | 0.45 (`torch.mv`: 0.63) | 0.34 |
| 8 | 0.54 | 0.37 |
| 16 | 0.71 | 0.47 / 0.35 |
| 64 | 1.4 / 1.2 | 1.1 / 0.93 |
| 128 | 2.2 / 2.1 | 1.9 / 1.8 |

Does not cover training (gradients go through torch's own), autocast or other devices.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .context_flexmoe import forward_values

HALVES = (torch.bfloat16, torch.float16)
SMALLEST_WEIGHT = 1 << 18  # elements; below, splitting costs more than it saves
MOST_ROWS = 512  # of a float32 input; above, torch splits the work well
FEWEST_HALF_ROWS = 4  # of a half-precision input; below, widening the weight costs more than it saves
FEWEST_LEFT_ROWS = 32  # of a half-precision input whose weight is then the factor on the left
FEWEST_LEFT_ROWS_WIDE = 12  # the same for a weight [O, I] with I > O
MOST_LEFT_ROWS = 256  # above, products take so long that what comes before them no longer counts
WIDENED = 1 << 22  # elements of a weight that are widened at a time: 16 MB, which the last cache holds


def may_be_faster(x: Tensor) -> bool:
    """Whether products of `x` may take another way than torch's own: inference on a CPU, not compiled."""
    if torch.is_grad_enabled() or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return not torch.compiler.is_compiling()


def faster_linears(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Within it, linear layers whose input is like `x`, or has fewer rows, take the faster way if there is one."""
    if may_be_faster(x) and (
        "prepacked" in forward_values() or (_splits(x) if x.dtype == torch.float32 else _widens(x) or _turns(x))
    ):
        return _FasterLinears()
    return contextlib.nullcontext()


def fastest_product(like: Tensor, weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """`F.linear` with this weight and bias, for inputs with the rows and the dtype of `like` that `may_be_faster`.

    What is decided here is not decided again in the product, when its weight has flushed the caches. Where `torch.mv`
    is what `F.linear` comes down to, one row, as a vector [I], is spared the shuffling of shapes.
    """
    is_half_row = like.dim() == 1 and like.dtype in HALVES
    if is_half_row and bias is None and type(weight) is nn.Parameter and not has_instructions(like.dtype):
        return functools.partial(torch.mv, weight)
    is_decided = like.dim() == 2 and _is_plain(like, weight) and "prepacked" not in forward_values()
    if is_decided and _way_of(like, weight, bias) is F.linear:
        return functools.partial(F.linear, weight=weight, bias=bias)
    return functools.partial(_linear, weight=weight, bias=bias)


def is_best_as_it_is(dtype: torch.dtype, rows: int) -> bool:
    """Whether no product of so few rows takes another way than torch's own, whatever the weight."""
    is_few = 0 < rows < FEWEST_LEFT_ROWS_WIDE
    return is_few and dtype in HALVES and has_instructions(dtype) and "prepacked" not in forward_values()


def one_row(x_I: Tensor) -> Tensor:
    """The row as products of its dtype like it best on this CPU: [I] or [1, I]."""
    return x_I.unsqueeze(0) if x_I.dtype in HALVES and has_instructions(x_I.dtype) else x_I


class _FasterLinears(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.linear and not kwargs and len(args) >= 2:
            return _linear(*args)
        return func(*args, **(kwargs or {}))


def _is_plain(x: Tensor, weight: Tensor) -> bool:
    """Both are ordinary tensors of one dtype: quantised, distributed and fake ones have types of their own."""
    return (
        type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.dtype == weight.dtype
        and weight.numel() >= SMALLEST_WEIGHT
        and weight.is_contiguous()
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not _is_plain(x, weight):
        return F.linear(x, weight, bias)
    x_NI = x.reshape(-1, x.shape[-1])
    prepacked = forward_values().get("prepacked")
    y_NO = None if prepacked is None else prepacked.product(x_NI, weight, bias)
    if y_NO is None:
        y_NO = _way_of(x_NI, weight, bias)(x_NI, weight, bias)
    return y_NO.view(*x.shape[:-1], len(weight))


def _way_of(x_NI: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[..., Tensor]:
    """What computes `F.linear` of plain tensors like these fastest: a function of input, weight and bias."""
    if x_NI.dtype == torch.float32:
        return split_linear if _splits(x_NI) else F.linear
    if _widens(x_NI):
        return widened_linear
    if bias is None and _turns(x_NI, weight):
        return lambda x, weight, _: turned_linear(x, weight)
    return F.linear


def _splits(x: Tensor) -> bool:
    return torch.get_num_threads() > 1 and x.numel() <= MOST_ROWS * x.shape[-1]


def _widens(x: Tensor) -> bool:
    return not has_instructions(x.dtype) and x.numel() >= FEWEST_HALF_ROWS * x.shape[-1]


def _turns(x: Tensor, weight_OI: Tensor | None = None) -> bool:
    fewest = FEWEST_LEFT_ROWS_WIDE if weight_OI is None or _is_wide(weight_OI) else FEWEST_LEFT_ROWS
    is_half = x.dtype in HALVES and has_instructions(x.dtype)
    return is_half and fewest * x.shape[-1] <= x.numel() <= MOST_LEFT_ROWS * x.shape[-1]


def _is_wide(weight_OI: Tensor) -> bool:
    return weight_OI.shape[1] > weight_OI.shape[0]


@functools.cache
def has_instructions(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of `dtype` as fast as this CPU can; True where it does not say."""
    known = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in known or not torch.backends.mkldnn.is_available():
        return True
    return bool(getattr(torch.ops.mkldnn, known[dtype])())


def split_linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear` in as many products as threads can share: the weight's rows are split, not the input's."""
    blocks = 2 * torch.get_num_threads()
    if len(weight_OI) % blocks:
        return F.linear(x_NI, weight_OI, bias_O)
    weight_BIO = weight_OI.view(blocks, -1, weight_OI.shape[1]).transpose(1, 2)
    y_NO = x_NI.expand(blocks, *x_NI.shape).bmm(weight_BIO).transpose(0, 1).reshape(len(x_NI), len(weight_OI))
    return y_NO if bias_O is None else y_NO + bias_O


def turned_linear(x_NI: Tensor, weight_OI: Tensor) -> Tensor:
    """`F.linear` with the weight as the factor on the left.

    What a narrow weight returns [N, O] lies in memory as [O, N], as the product after it would have it; what a wide
    one returns is laid out as ever, because adding it up row by row would take longer than that.
    """
    y_NO = torch.mm(weight_OI, x_NI.t()).t()
    return y_NO.contiguous() if _is_wide(weight_OI) else y_NO


def widened_linear(x_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear` in half precision, computed in float32 and rounded once; the weight is widened a piece at a time."""
    product = split_linear if _splits(x_NI) else F.linear
    rows = max(WIDENED // weight_OI.shape[1], 1)
    wide_x_NI = x_NI.float()
    wide_OI = torch.empty(min(rows, len(weight_OI)), weight_OI.shape[1])
    y_NO = x_NI.new_empty(len(x_NI), len(weight_OI))
    for start in range(0, len(weight_OI), rows):
        part = slice(start, start + rows)
        wide_part = wide_OI[: len(weight_OI[part])].copy_(weight_OI[part])
        y_NO[:, part] = product(wide_x_NI, wide_part, None if bias_O is None else bias_O[part].float())
    return y_NO


__all__ = [
    "HALVES",
    "SMALLEST_WEIGHT",
    "faster_linears",
    "fastest_product",
    "has_instructions",
    "is_best_as_it_is",
    "may_be_faster",
    "one_row",
    "split_linear",
    "turned_linear",
    "widened_linear",
]
