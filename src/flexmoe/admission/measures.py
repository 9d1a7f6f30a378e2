"""Sizes of live tensors: norms, root mean squares over a sample of rows, and tensors beneath adapters.

Does not cover thresholds (`flexmoe.admission.rows`), or what networks compute (`flexmoe.admission.outputs`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flexmoe.modeling.adapters_flexmoe import beneath_adapter
from flexmoe.modeling.experts_flexmoe import is_quantized
from flexmoe.modeling.low_rank_flexmoe import matrices

PUBLIC_ROWS = 256
"""Rows that are sampled, at even distances, of each of public's tensors; public is trusted, so a sample suffices."""

_PIECE = 1 << 18  # numbers that are cast to float32 at a time


def unreadable_reason(tensor: Tensor) -> str | None:
    """Why the values of a tensor cannot be read here; None if they can."""
    if tensor.is_meta:
        return "is on the meta device (offloaded)"
    if hasattr(tensor, "full_tensor"):  # a DTensor: gathering it would need all ranks
        return "is sharded over several ranks"
    return "is quantised" if is_quantized(tensor) else None


def norm(tensor: Tensor) -> float:
    """The Euclidean norm, computed in float64."""
    return torch.linalg.vector_norm(tensor.detach().double()).item()


def rms(tensor: Tensor, rows: int | None = None) -> float:
    """The root mean square, to half a percent; with `rows`, of a sample of at least that many rows.

    torch accumulates bfloat16 in float32, at memory bandwidth unless a dtype is passed for the sum; smaller formats
    are cast here in pieces that stay in the cache.
    """
    tensor = tensor.detach()
    if rows is not None and tensor.dim() > 1:
        tensor = tensor[:: sample_step(len(tensor), rows)]
    if not tensor.numel():
        return 0.0
    if tensor.dtype == torch.float16 or tensor.dtype.itemsize == 1:
        pieces = tensor.flatten().split(_PIECE)
        squares = sum((_norm32(piece) ** 2 for piece in pieces), torch.zeros((), device=tensor.device))
        length = squares.sqrt()
    else:
        length = torch.linalg.vector_norm(tensor)
    return length.item() / tensor.numel() ** 0.5


def sample_step(length: int, rows: int = PUBLIC_ROWS) -> int:
    """The distance between sampled rows. Of a tensor that is such a sample already, all rows are taken."""
    return max(1, length // rows)


def find_tensor(module: nn.Module, name: str) -> Tensor | None:
    """The tensor `name` of a live network, beneath the adapters around its parts; None if there is none."""
    *path, leaf = name.split(".")
    found: Any = beneath_adapter(module)
    for step in path:
        found = getattr(found, step, None)
        if found is None:
            return None
        found = beneath_adapter(found)
    tensor = getattr(found, leaf, None)
    return tensor.detach() if isinstance(tensor, Tensor) else None


def input_matrix_name(public: nn.Module, hidden_size: int) -> str | None:
    """The name of the first matrix of public's network with the hidden size as a side: it has the router's input.

    Args:
        public: may be on the meta device.

    Returns:
        None if there is no such unquantised matrix.
    """
    try:
        paths = [path for path, _ in matrices(public)]
    except ValueError:  # no matrices: quantised, or of another structure
        return None
    for name in (f"{path.removesuffix('.base_layer')}.weight" for path in paths):
        if (matrix := find_tensor(public, name)) is not None and hidden_size in matrix.shape:
            return name
    return None


def input_matrix(public: nn.Module, hidden_size: int) -> Tensor | None:
    """The matrix of `input_matrix_name`, or None."""
    name = input_matrix_name(public, hidden_size)
    return None if name is None else find_tensor(public, name)


def _norm32(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor.float())


__all__ = [
    "PUBLIC_ROWS",
    "find_tensor",
    "input_matrix",
    "input_matrix_name",
    "norm",
    "rms",
    "sample_step",
    "unreadable_reason",
]
