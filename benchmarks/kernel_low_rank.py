"""A block with low-rank experts on a GPU: router and `flexmoe::mix_low_rank` against modules that share products.

Without thresholds: the results are only reported.
"""

from __future__ import annotations

from collections.abc import Iterator

import kernel_contenders as contenders
import kernel_route
from gpu_clock import by_events, by_replay
from kernel_cases import MODULES, OURS, Case, Run, Setup, Work
from kernel_contenders import K

from flexmoe.kernels.dispatch import Inputs, choose_path
from flexmoe.kernels.route.op import route

CASES = (Case("low_rank", 1), Case("low_rank", 8), Case("low_rank", 64))


def runs(setup: Setup, tokens: int) -> Iterator[Run]:
    """The contenders. Reading the weights of the public network flushes the caches."""
    inputs = [setup.draw(tokens) for _ in range(4)]
    ours = contenders.our_layer(setup.low_rank_block, "flexmoe_triton")
    layers = [
        (OURS, by_replay, ours),
        (MODULES, by_events, contenders.our_layer(setup.low_rank_block, "eager")),
        (f"{OURS}, launched by the host", by_events, ours),
    ]
    for name, clock, layer in layers:
        yield name, clock, [lambda layer=layer, x=x: layer(x) for x in inputs]


def work(setup: Setup, tokens: int) -> Work:
    """Bytes of public and of the factors that random tokens select, operations, and why the kernel is used."""
    x_TH, block = setup.draw(tokens), setup.low_rank_block
    rows, biases = contenders.router_of(block)
    selected = (route(x_TH, rows, biases, None, K, True).weights_TE > 0).any(0)
    n_bytes = setup.shapes.low_rank_bytes(tokens, int(selected[1:].sum()))
    reason = choose_path(block, tuple(block.experts), Inputs.of(x_TH)).reason
    return Work(n_bytes, setup.shapes.block_flops(tokens), {**kernel_route.path(tokens), "reason": reason})


__all__ = ["CASES", "runs", "work"]
