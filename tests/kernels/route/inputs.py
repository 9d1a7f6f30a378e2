"""Random inputs for the tests of the router, and its results in float64, which share nothing with the implementations.

The float64 reference is a matrix product, a softmax and a stable sort. Does not cover tolerances (`flexmoe.testing`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MASKS = ("no offset", "evidence", "one masked", "random", "fewer than k", "one allowed", "nothing allowed")


@dataclass(frozen=True)
class Inputs:
    """Arguments of `route`."""

    x: Tensor
    rows: list[Tensor]
    biases: list[Tensor]
    offset: Tensor | None


def draw(
    tokens: int,
    experts: int,
    k: int,
    hidden: int,
    mask: str = "no offset",
    x_dtype: torch.dtype = torch.float32,
    row_dtype: torch.dtype = torch.float32,
    integers: bool = False,
    seed: int = 0,
) -> Inputs:
    """Random inputs; `mask` is one of `MASKS`, `integers` produce many ties."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        if integers:
            return torch.randint(-1, 2, shape, generator=generator).float()
        return torch.randn(shape, generator=generator)

    x = noise(tokens, hidden).to(x_dtype)
    rows = [(noise(1, hidden) if integers else noise(1, hidden) / math.sqrt(hidden)) for _ in range(experts)]
    biases = [noise(1).to(row_dtype) for _ in range(experts)]
    offset = None if mask == "no offset" else _offset(mask, tokens, experts, k, generator)
    return Inputs(x, [row.to(row_dtype) for row in rows], biases, offset)


def arguments(tokens: int = 5, experts: int = 3, k: int = 2, mask: str = "random") -> tuple[Any, ...]:
    """The first arguments of `route`, with a hidden size of 8."""
    inputs = draw(tokens, experts, k, 8, mask)
    return inputs.x, inputs.rows, inputs.biases, inputs.offset


def require_grad(*tensors: Tensor) -> None:
    """Makes gradients of these leaves be recorded."""
    for tensor in tensors:
        tensor.requires_grad_()


def _offset(mask: str, tokens: int, experts: int, k: int, generator: torch.Generator) -> Tensor:
    if mask == "evidence":
        return torch.randn(tokens, experts, generator=generator)
    if mask == "random":
        return torch.zeros(tokens, experts).masked_fill(
            torch.rand(tokens, experts, generator=generator) < 0.5, -math.inf
        )
    counts = {"one masked": experts - 1, "fewer than k": max(1, k - 1), "one allowed": 1, "nothing allowed": 0}
    order = torch.rand(tokens, experts, generator=generator).argsort(-1)
    return torch.zeros(tokens, experts).masked_fill(order >= min(counts[mask], experts), -math.inf)


def route_in_float64(
    x: Tensor, rows: Tensor, biases: Tensor, offset: Tensor | None, k: int, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, weights, weights of the slots and their experts, differentiable; arguments float64, rows [E, H]."""
    experts = rows.shape[0]
    logits = x @ rows.t() + biases
    if offset is not None:
        logits = torch.where(offset == -math.inf, -math.inf, logits + offset)
    invalid = (logits.isnan() | (logits == math.inf)).any(-1, keepdim=True)
    order = torch.where(invalid, 0.0, logits.detach()).sort(dim=-1, descending=True, stable=True).indices[:, :k]
    none = (logits == -math.inf).all(-1, keepdim=True)
    probabilities = torch.where(none, 0.0, torch.softmax(torch.where(none, 0.0, logits), -1))
    kept = torch.zeros_like(probabilities).scatter(1, order, 1.0)
    weights = probabilities * kept
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    weights = torch.where(invalid, math.nan, weights)
    top = weights.gather(1, order)
    return logits, weights, top, torch.where(top == 0, experts, order).to(torch.int32)


def expected(inputs: Inputs, k: int, renormalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`route_in_float64` of `inputs`."""
    rows, biases = (torch.cat(tensors).double() for tensors in (inputs.rows, inputs.biases))
    offset = None if inputs.offset is None else inputs.offset.double()
    return route_in_float64(inputs.x.double(), rows, biases, offset, k, renormalize)


def all_gradients(
    gradients: Sequence[Tensor | None], x: Tensor, rows: list[Tensor], routing: Any, k: int, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel's gradients of x [T, H], rows [E, H], biases [E] and offset [T, E]."""
    from flexmoe.kernels.route.kernel import input_gradients

    dx, d_offset = input_gradients(gradients, x, rows, routing, k, renormalize)
    return dx, d_offset.t() @ x.float(), d_offset.sum(0), d_offset


@contextmanager
def poisoned() -> Iterator[None]:
    """Within it, uninitialised memory holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # `fill_uninitialized_memory` is on by default
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(before)
