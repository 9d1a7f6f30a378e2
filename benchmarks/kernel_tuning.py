"""Times other launch constants for the kernels of the router and the experts (`bench_kernels.py --tune`).

A launcher gets its constants from a function of its module, which is replaced here to change some of them. Variants
that do not compile, need too much shared memory, or change the result are reported as excluded. Does not cover
constants that two kernels share (BLOCK_M), low-rank experts, or dtypes other than bfloat16.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import kernel_contenders as contenders
import torch
from gpu_clock import by_replay
from kernel_contenders import FULL, K
from torch import Tensor

from flexmoe.kernels.experts.op import mix
from flexmoe.kernels.route.op import route

CLOSE = 5e-3  # ||variant - current|| / ||current||: another order of sums, rounded to bfloat16


@dataclass(frozen=True)
class Tuned:
    """A launch function of a module in `flexmoe.kernels`, numbers of tokens, and values to try."""

    module: str
    launch: str
    tokens: Sequence[int]
    options: Mapping[str, Sequence[int]]

    def variants(self) -> Iterator[dict[str, int]]:
        for values in itertools.product(*self.options.values()):
            yield dict(zip(self.options, values, strict=True))


LAUNCHES = (
    Tuned(
        "experts.decode_kernel",
        "gate_up_launch",
        (1, 64),
        {"ROWS": (64, 128), "DEPTH": (64, 128), "num_stages": (3, 4, 6)},
    ),
    Tuned(
        "experts.decode_kernel",
        "down_launch",
        (1, 64),
        {"ROWS": (16, 32, 64), "DEPTH": (64, 128), "num_warps": (2, 4)},
    ),
    Tuned(
        "experts.prefill_kernel",
        "gate_up_launch",
        (4096,),
        {"GROUP": (4, 8, 16), "num_stages": (3, 4), "num_warps": (4, 8)},
    ),
    Tuned(
        "experts.prefill_kernel",
        "down_launch",
        (4096,),
        {"GROUP": (4, 8, 16), "num_stages": (3, 4), "num_warps": (4, 8)},
    ),
    Tuned("route.kernel", "few_launch", (1, 64), {"BLOCK_H": (512, 1024, 2048), "num_warps": (4, 8)}),
    Tuned("route.kernel", "many_launch", (4096,), {"BLOCK_T": (16, 32), "BLOCK_H": (16, 32), "num_stages": (3, 4, 5)}),
)


@contextmanager
def changed(tuned: Tuned, variant: Mapping[str, int]) -> Iterator[None]:
    """Makes the launch function return the constants of `variant` in the context."""
    module = importlib.import_module(f"flexmoe.kernels.{tuned.module}")
    own = getattr(module, tuned.launch)
    setattr(module, tuned.launch, lambda *args, **kwargs: {**own(*args, **kwargs), **variant})
    try:
        yield
    finally:
        setattr(module, tuned.launch, own)


def tune(device: torch.device, sizes: Mapping[str, Any] = FULL, only: Sequence[Tuned] = LAUNCHES) -> None:
    """Prints, for each launch and number of tokens, the current constants, the best, and the excluded variants."""
    model, _ = contenders.models({**sizes, "num_hidden_layers": 1}, device)
    block = model.flexmoe_blocks()[0]
    for tuned in only:
        for tokens in tuned.tokens:
            x_TH = torch.randn(tokens, sizes["hidden_size"], device=device).bfloat16()
            print_best(tuned, tokens, step(tuned, block, x_TH))


def step(tuned: Tuned, block: Any, x_TH: Tensor) -> Callable[[], Tensor]:
    """The function to time: the router alone, or the experts alone."""
    (rows, biases), experts = contenders.router_of(block), contenders.experts_of(block)
    if tuned.module == "route.kernel":
        return lambda: route(x_TH, rows, biases, None, K, True).weights_TE
    routing = route(x_TH, rows, biases, None, K, True)
    return lambda: mix(x_TH, routing, experts)


def print_best(tuned: Tuned, tokens: int, call: Callable[[], Tensor]) -> None:
    current = call().double()
    calls = [call] * (64 if tuned.module == "route.kernel" else 4)
    found = {"current": by_replay(calls, 0.1).microseconds}
    excluded = []
    for variant in tuned.variants():
        text = ", ".join(f"{name} {value}" for name, value in variant.items())
        with changed(tuned, variant):
            try:
                error = contenders.distance(call(), current)
                if not error <= CLOSE:
                    excluded.append(f"{text}: wrong by {error:.2g}")
                    continue
                found[text] = by_replay(calls, 0.1).microseconds
            except Exception as exception:  # from the compiler or the driver
                excluded.append(f"{text}: {type(exception).__name__}")
    best = sorted(found, key=found.__getitem__)[:3]
    lines = [f"{tuned.module}.{tuned.launch}, {tokens} tokens: current {found['current']:.2f} us"]
    lines += [f"    {found[name]:9.2f} us  {name}" for name in best]
    lines += [f"    excluded: {text}" for text in excluded]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


__all__ = ["LAUNCHES", "Tuned", "changed", "tune"]
