"""What the tests of the router's kernel share: inputs by kind, and a witness in float64.

The witness knows nothing of the kernel or of `routing_flexmoe`: matrix product, softmax and a stable sort.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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
    """Random inputs; `mask` is one of `MASKS`, `integers` make many ties."""
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


def witness(
    x: Tensor, rows: Tensor, biases: Tensor, offset: Tensor | None, k: int, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, weights, weights of the slots and their experts, differentiable; arguments float64, rows [E, H]."""
    experts = rows.shape[0]
    logits = x @ rows.t() + biases
    if offset is not None:
        logits = torch.where(offset == -math.inf, -math.inf, logits + offset)
    odd = (logits.isnan() | (logits == math.inf)).any(-1, keepdim=True)
    order = torch.where(odd, 0.0, logits.detach()).sort(dim=-1, descending=True, stable=True).indices[:, :k]
    none = (logits == -math.inf).all(-1, keepdim=True)
    probabilities = torch.where(none, 0.0, torch.softmax(torch.where(none, 0.0, logits), -1))
    kept = torch.zeros_like(probabilities).scatter(1, order, 1.0)
    weights = probabilities * kept
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    weights = torch.where(odd, math.nan, weights)
    top = weights.gather(1, order)
    return logits, weights, top, torch.where(top == 0, experts, order).to(torch.int32)


def witness_of(inputs: Inputs, k: int, renormalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`witness` of the numbers in `inputs`."""
    rows, biases = (torch.cat(tensors).double() for tensors in (inputs.rows, inputs.biases))
    offset = None if inputs.offset is None else inputs.offset.double()
    return witness(inputs.x.double(), rows, biases, offset, k, renormalize)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that is not initialised holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # `fill_uninitialized_memory` is on by default
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(before)
