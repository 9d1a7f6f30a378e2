"""The router on a GPU: `flexmoe::route` against the same PyTorch operations, and the router of FlexOlmo."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import kernel_contenders as contenders
import torch
from gpu_clock import by_replay, on_gpu
from kernel_cases import COMPILED, OURS, SEQUENCE, Case, Run, Setup, Work, constants, copied
from kernel_contenders import K

from flexmoe.kernels.route import op, reference

MAX_SETS = 1024

CASES = (
    Case("route", 1, 5.0, {SEQUENCE: 4.0}),
    Case("route", 8, 5.0, {SEQUENCE: 4.0}),
    Case("route", 64, 5.0, {SEQUENCE: 4.0}),
    Case("route", 4096, 12.0, {SEQUENCE: 3.0}),
)


def runs(setup: Setup, tokens: int) -> Iterator[Run]:
    """The contenders, on more input sets than fit into a cache."""
    size = setup.shapes.route_bytes(tokens)
    n_sets = min(MAX_SETS, max(4, math.ceil(2 * setup.limits.l2_bytes / size)))
    sets = [(setup.draw(tokens), *copied(contenders.router_of(setup.block)), None, K, True) for _ in range(n_sets)]
    gate = setup.theirs.model.layers[0].mlp.gate
    functions: dict[str, Callable[..., Any]] = {
        OURS: op.route,
        SEQUENCE: reference.route,
        COMPILED: torch.compile(reference.route, dynamic=False),
        "FlexOlmo's router, in bfloat16": lambda x_TH, *rest: gate(x_TH),
    }
    if not on_gpu():
        del functions[COMPILED]  # compiling C++ takes half a minute
    for name, function in functions.items():
        yield name, by_replay, [lambda function=function, args=args: function(*args) for args in sets]


def work(setup: Setup, tokens: int) -> Work:
    """Bytes, and the kernel with its constants."""
    return Work(setup.shapes.route_bytes(tokens), 0, path(tokens))


def path(tokens: int) -> dict[str, Any]:
    """The kernel that routes this number of tokens, and its constants."""
    try:
        from flexmoe.kernels.route import kernel
    except ImportError:
        return {"route": "the reference"}
    experts = len(contenders.NAMES)
    if tokens <= kernel.MAX_FEW:
        return {"route_few": constants(kernel.few_launch(experts, torch.float32))}
    return {"route_many": constants(kernel.many_launch(experts, torch.float32, tokens))}


__all__ = ["CASES", "path", "runs", "work"]
