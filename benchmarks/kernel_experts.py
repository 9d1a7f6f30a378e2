"""A block with full experts on a GPU: router and `flexmoe::mix` against FlexOlmo's implementations and cuBLAS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import kernel_contenders as contenders
import kernel_route
from gpu_clock import Timed, by_events, by_replay, on_gpu
from kernel_cases import BEST, LOOP, MODULES, OURS, Case, Run, Setup, Work, constants
from kernel_contenders import K

from flexmoe.kernels.dispatch import Inputs, choose_path
from flexmoe.kernels.route.op import route

MAX_BATCHED = 8  # tokens: batched_mm copies 1.35 GB of weights per token

CASES = (
    Case("block", 1, 380.0, {"grouped_mm": 1.3, "batched_mm": 2.4, "eager": 1.8}),
    Case("block", 8, 520.0, {"grouped_mm": 1.2}),
    Case("block", 64, 540.0, {"grouped_mm": 1.2}),
    Case("block", 512),
    Case("block", 4096, 8800.0, {BEST: 1.0}, stretch=True),
)


def runs(setup: Setup, tokens: int) -> Iterator[Run]:
    """The contenders. Reading the weights of an expert flushes the caches."""
    inputs = [setup.draw(tokens) for _ in range(4)]
    ours = contenders.our_layer(setup.block, "flexmoe_triton")
    grouped = contenders.their_layer(setup.theirs, "grouped_mm")
    layers: list[tuple[str, Callable[..., Timed], contenders.Layer]] = [
        (OURS, by_replay, ours),
        ("grouped_mm", by_replay, grouped),
        ("eager", by_events, contenders.their_layer(setup.theirs, "eager")),
        (LOOP, by_events, contenders.loop_layer(setup.block)),
        (MODULES, by_events, contenders.our_layer(setup.block, "eager")),
        (f"{OURS}, launched by the host", by_events, ours),
        ("grouped_mm, launched by the host", by_events, grouped),
    ]
    if tokens <= MAX_BATCHED:
        layers.append(("batched_mm", by_replay, contenders.their_layer(setup.theirs, "batched_mm")))
    for name, clock, layer in layers:
        yield name, clock, [lambda layer=layer, x=x: layer(x) for x in inputs]


def work(setup: Setup, tokens: int) -> Work:
    """Bytes of the experts that random tokens select, operations, and the kernels with their constants."""
    rows, biases = contenders.router_of(setup.block)
    selected = (route(setup.draw(tokens), rows, biases, None, K, True).weights_TE > 0).any(0)
    n_bytes = setup.shapes.block_bytes(tokens, int(selected.sum()))
    return Work(n_bytes, setup.shapes.block_flops(tokens), {**kernel_route.path(tokens), **path(setup, tokens)})


def path(setup: Setup, tokens: int) -> dict[str, Any]:
    """The kernels that run the experts for this number of tokens, their constants, and why they are used."""
    x_TH = setup.draw(tokens)
    reason = choose_path(setup.block, tuple(contenders.NAMES), Inputs.of(x_TH)).reason
    if not on_gpu():
        return {"experts": "the reference", "reason": reason}
    from flexmoe.kernels.experts import decode_kernel as decode
    from flexmoe.kernels.experts import prefill_kernel as prefill

    sms, shared = decode.device_limits(x_TH.device)
    if tokens <= decode.MAX_TOKENS:
        launches = {
            "gate_up_kernel": decode.gate_up_launch(2, tokens, True, shared),
            "down_kernel": decode.down_launch(2, tokens, setup.shapes.hidden, sms, shared),
        }
    else:
        rows_each = tokens * K / len(contenders.NAMES)
        launches = {
            "gate_up_rows_kernel": prefill.gate_up_launch(2, rows_each, True, shared),
            "down_rows_kernel": prefill.down_launch(2, rows_each, shared),
        }
    return {**{name: constants(launch) for name, launch in launches.items()}, "reason": reason}


__all__ = ["CASES", "path", "runs", "work"]
