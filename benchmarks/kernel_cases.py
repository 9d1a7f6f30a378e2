"""The cases of `bench_kernels.py` and what they share: models, device, and the limits measured on it.

The cases of each operator are in `kernel_route.py`, `kernel_experts.py` and `kernel_low_rank.py`. Does not cover
timing (`gpu_clock.py`), or whether a case passes (`kernel_verdicts.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import kernel_contenders as contenders
import torch
from gpu_clock import Call, Ceilings, Timed
from kernel_contenders import K, Shapes
from torch import Tensor

OURS, SEQUENCE, COMPILED = "flexmoe", "torch op sequence", "torch op sequence, compiled"
LOOP, MODULES, BEST = "cuBLAS loop", "flexmoe's modules", "best of grouped_mm and cuBLAS loop"

Run = tuple[str, Callable[..., Timed], list[Call]]
"""A contender, the clock that measures it, and one call for each of several inputs."""


@dataclass(frozen=True)
class Case:
    """An operator or a block with a number of tokens, and its thresholds.

    Attributes:
        kind: "route", "block" or "low_rank".
        goal_us: maximum microseconds on a device whose name contains `GOALS_ON`; None: no goal.
        ratios: minimum speed relative to a contender, on `RATIOS_ON`.
        stretch: the goal is reported, not asserted.
    """

    kind: str
    tokens: int
    goal_us: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    stretch: bool = False

    @property
    def name(self) -> str:
        """For example "route, 8 tokens"."""
        return f"{self.kind}, {self.tokens} token{'s' if self.tokens > 1 else ''}"


@dataclass(frozen=True)
class Work:
    """The work of a case: minimum bytes to transfer, operations, and the kernels with their constants."""

    n_bytes: int
    flops: int
    path: Mapping[str, Any]


class Setup:
    """The models, the device, and its measured limits."""

    def __init__(self, sizes: Mapping[str, Any], device: torch.device, limits: Ceilings) -> None:
        self.sizes, self.device, self.limits = sizes, device, limits
        self.ours, self.theirs = contenders.models(sizes, device)
        self.block: Any = self.ours.flexmoe_blocks()[0]
        self.shapes = Shapes(sizes["hidden_size"], sizes["intermediate_size"], len(contenders.NAMES), K)

    @cached_property
    def low_rank_block(self) -> Any:
        """A block with low-rank experts."""
        return contenders.low_rank_block(self.sizes, self.device)

    def draw(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Random hidden states."""
        return torch.randn(tokens, self.shapes.hidden, device=self.device).to(dtype)


def constants(launch: Mapping[str, Any]) -> dict[str, Any]:
    """The constants of a launch as JSON values."""
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in launch.items()}


def copied(router: tuple[list[Tensor], list[Tensor]]) -> Iterator[list[Tensor]]:
    """Copies of rows and biases at other addresses."""
    return ([tensor.detach().clone() for tensor in tensors] for tensors in router)


__all__ = [
    "BEST",
    "COMPILED",
    "LOOP",
    "MODULES",
    "OURS",
    "SEQUENCE",
    "Case",
    "Run",
    "Setup",
    "Work",
    "constants",
    "copied",
]
