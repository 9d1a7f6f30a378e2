"""Other launch constants for the kernels of the router and the experts, timed: `bench_routing.py --tune` runs it.

A launcher takes its constants from a function of its module; here that function is replaced by one that changes some.
A variant that does not compile, needs more shared memory than there is, or says something else than the constants in
force, is left out and named. Does not cover constants that two kernels share (BLOCK_M), or dtypes but bfloat16.
"""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import routing_contenders as contenders
import torch
from gpu_clock import by_replay
from routing_contenders import FULL, K
from torch import Tensor

from flexmoe.modeling import ops_flexmoe

CLOSE = 5e-3  # ||variant - default|| / ||default||: sums in another order, rounded to bfloat16


@dataclass(frozen=True)
class Tuned:
    """A launch function of a module, with whom it is timed, and what may take the place of its constants."""

    module: str
    launch: str
    tokens: Sequence[int]
    options: Mapping[str, Sequence[int]]

    def variants(self) -> Iterator[dict[str, int]]:
        for values in itertools.product(*self.options.values()):
            yield dict(zip(self.options, values, strict=True))


LAUNCHES = (
    Tuned("decode", "gate_up_launch", (1, 64), {"ROWS": (64, 128), "DEPTH": (64, 128), "num_stages": (3, 4, 6)}),
    Tuned("decode", "down_launch", (1, 64), {"ROWS": (16, 32, 64), "DEPTH": (64, 128), "num_warps": (2, 4)}),
    Tuned("prefill", "gate_up_launch", (4096,), {"GROUP": (4, 8, 16), "num_stages": (3, 4), "num_warps": (4, 8)}),
    Tuned("prefill", "down_launch", (4096,), {"GROUP": (4, 8, 16), "num_stages": (3, 4), "num_warps": (4, 8)}),
    Tuned("route", "few_launch", (1, 64), {"BLOCK_H": (512, 1024, 2048), "num_warps": (4, 8)}),
    Tuned("route", "many_launch", (4096,), {"BLOCK_T": (16, 32), "BLOCK_H": (16, 32), "num_stages": (3, 4, 5)}),
)


@contextmanager
def changed(tuned: Tuned, variant: Mapping[str, int]) -> Iterator[None]:
    """Within it, the launch function gives these constants in the place of its own."""
    module = importlib.import_module(f"flexmoe.modeling.kernels_{tuned.module}_flexmoe")
    own = getattr(module, tuned.launch)
    setattr(module, tuned.launch, lambda *args, **kwargs: {**own(*args, **kwargs), **variant})
    try:
        yield
    finally:
        setattr(module, tuned.launch, own)


def tune(device: torch.device, sizes: Mapping[str, Any] = FULL, only: Sequence[Tuned] = LAUNCHES) -> None:
    """Prints, for each launch and number of tokens, the constants in force, the best, and what was left out."""
    model, _ = contenders.models({**sizes, "num_hidden_layers": 1}, device)
    block = model.flexmoe_blocks()[0]
    for tuned in only:
        for tokens in tuned.tokens:
            x_TH = torch.randn(tokens, sizes["hidden_size"], device=device).bfloat16()
            print_best(tuned, tokens, step(tuned, block, x_TH))


def step(tuned: Tuned, block: Any, x_TH: Tensor) -> Callable[[], Tensor]:
    """What is timed: the router alone, or the experts alone."""
    (rows, biases), experts = contenders.router_of(block), contenders.experts_of(block)
    if tuned.module == "route":
        return lambda: ops_flexmoe.route(x_TH, rows, biases, None, K, True).weights_TE
    routing = ops_flexmoe.route(x_TH, rows, biases, None, K, True)
    return lambda: ops_flexmoe.mix(x_TH, routing, experts)


def print_best(tuned: Tuned, tokens: int, call: Callable[[], Tensor]) -> None:
    right = call().double()
    calls = [call] * (64 if tuned.module == "route" else 4)
    found = {"in force": by_replay(calls, 0.1).microseconds}
    left_out = []
    for variant in tuned.variants():
        words = ", ".join(f"{name} {value}" for name, value in variant.items())
        with changed(tuned, variant):
            try:
                far = contenders.distance(call(), right)
                if not far <= CLOSE:
                    left_out.append(f"{words}: wrong by {far:.2g}")
                    continue
                found[words] = by_replay(calls, 0.1).microseconds
            except Exception as error:  # whatever the compiler or the driver says of such constants
                left_out.append(f"{words}: {type(error).__name__}")
    best = sorted(found, key=found.__getitem__)[:3]
    lines = [f"{tuned.module}.{tuned.launch}, {tokens} tokens: in force {found['in force']:.2f} us"]
    lines += [f"    {found[name]:9.2f} us  {name}" for name in best]
    lines += [f"    left out: {words}" for words in left_out]
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


__all__ = ["LAUNCHES", "Tuned", "changed", "tune"]
