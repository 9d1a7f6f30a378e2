"""Launches every kernel at small, odd shapes: what a memory checker runs, because a whole test run is too slow for it.

Each result is compared with the reference, loosely. Does not cover speed (`bench_routing.py`), or whether results are
right to the last bits (`tests/kernels`).

Run: compute-sanitizer --tool memcheck python tests/bench/every_kernel.py
"""

from __future__ import annotations

import dataclasses
import itertools
import sys

import torch
from torch import Tensor

from flexmoe.modeling import routing_flexmoe as reference
from flexmoe.modeling.kernels_decode_flexmoe import decode
from flexmoe.modeling.kernels_flexmoe import INTERPRETED
from flexmoe.modeling.kernels_low_rank_flexmoe import decode_low_rank
from flexmoe.modeling.kernels_prefill_flexmoe import prefill
from flexmoe.modeling.kernels_route_flexmoe import input_gradients, route

DEVICE = "cpu" if INTERPRETED else "cuda"
HIDDEN, WIDTHS, K = 136, (40, 264, 8), 2
TOKENS = (1, 33, 67)  # few, few in a larger tile, and many
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape) / shape[-1] ** 0.5).to(DEVICE, dtype)


def some_experts(dtype: torch.dtype) -> reference.ExpertTensors:
    return reference.ExpertTensors(
        gate=[drawn(i, HIDDEN, dtype=dtype) for i in WIDTHS],
        up=[drawn(i, HIDDEN, dtype=dtype) for i in WIDTHS],
        down=[drawn(HIDDEN, i, dtype=dtype) for i in WIDTHS],
        gate_bias=[drawn(i, dtype=dtype) for i in WIDTHS],
        up_bias=[drawn(i, dtype=dtype) for i in WIDTHS],
        down_bias=[drawn(HIDDEN, dtype=dtype) for _ in WIDTHS],
    )


def some_low_rank_experts(dtype: torch.dtype, public: reference.ExpertTensors) -> reference.LowRankTensors:
    """Of one rank that is short and one that is odd, and `public` between them."""
    width, ranks = len(public.up[0]), (8, 35)
    a = reference.ExpertTensors(
        gate=[drawn(r, HIDDEN, dtype=dtype) for r in ranks],
        up=[drawn(r, HIDDEN, dtype=dtype) for r in ranks],
        down=[drawn(r, width, dtype=dtype) for r in ranks],
    )
    b = reference.ExpertTensors(
        gate=[drawn(width, r, dtype=dtype) for r in ranks],
        up=[drawn(width, r, dtype=dtype) for r in ranks],
        down=[drawn(HIDDEN, r, dtype=dtype) for r in ranks],
        gate_bias=[drawn(width, dtype=dtype) for _ in ranks],
        up_bias=[drawn(width, dtype=dtype) for _ in ranks],
        down_bias=[drawn(HIDDEN, dtype=dtype) for _ in ranks],
    )
    return reference.LowRankTensors(public, a, b, scales=(0.5, 1.0), public_column=1)


def on_host(experts: reference.ExpertTensors) -> reference.ExpertTensors:
    of_host = {key: [t.cpu() for t in value] for key, value in vars(experts).items() if key != "activation"}
    return reference.ExpertTensors(**of_host)


def check(name: str, ours: Tensor, theirs: Tensor, close: float) -> None:
    """Compared on the host, so that a checker watches our kernels and no library's."""
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    far = ((ours - theirs).norm() / theirs.norm()).item()
    assert far <= close, f"{name}: off by {far}"
    sys.stdout.write(f"{name}: {far:.1e}\n")


def run(tokens: int, dtype: torch.dtype) -> None:
    x_TH = (torch.randn(tokens, HIDDEN)).to(DEVICE, dtype)
    rows, biases = [drawn(1, HIDDEN) for _ in WIDTHS], [drawn(1) for _ in WIDTHS]
    offset_TE = torch.zeros(tokens, len(WIDTHS))
    offset_TE[tokens // 2 :, 1] = -torch.inf
    experts = some_experts(dtype)
    name = f"{tokens} tokens, {dtype}"
    routing = route(x_TH, rows, biases, offset_TE.to(DEVICE), K, True)
    rows_and_biases = [[t.cpu() for t in tensors] for tensors in (rows, biases)]
    expected = reference.route(x_TH.cpu(), *rows_and_biases, offset_TE, K, True)
    check(f"route, {name}", routing.weights_TE, expected.weights_TE, 1e-4)
    assert torch.equal(routing.top_ids_TK.cpu(), expected.top_ids_TK), name
    towards = torch.randn(tokens, len(WIDTHS)).to(DEVICE)
    slots = torch.randn(tokens, K).to(DEVICE)
    dx_TH, dz_TE = input_gradients(towards, towards, slots, x_TH, rows, routing, K, True)
    assert dx_TH.isfinite().all(), name
    assert dz_TE.isfinite().all(), name
    said_TH = reference.mix(x_TH.cpu(), expected.weights_TE, on_host(experts))
    if tokens <= 64:
        check(f"decode, {name}", decode(x_TH, routing.weights_TE, experts), said_TH, CLOSE[dtype])
        one = {key: value[:1] for key, value in vars(experts).items() if key != "activation"}
        low_rank = some_low_rank_experts(dtype, reference.ExpertTensors(**one))
        of_host = {part: on_host(getattr(low_rank, part)) for part in ("public", "a", "b")}
        theirs_TH = reference.mix_low_rank(x_TH.cpu(), expected.weights_TE, dataclasses.replace(low_rank, **of_host))
        ours_TH = decode_low_rank(x_TH, routing.weights_TE, low_rank)
        check(f"decode_low_rank, {name}", ours_TH, theirs_TH, CLOSE[dtype])
    mixed_TH = prefill(x_TH, routing.top_weights_TK, routing.top_ids_TK, experts)
    check(f"prefill, {name}", mixed_TH, said_TH, CLOSE[dtype])


def main() -> None:
    torch.manual_seed(0)
    for tokens, dtype in itertools.product(TOKENS, CLOSE):
        run(tokens, dtype)
    if not INTERPRETED:
        torch.cuda.synchronize()
    sys.stdout.write("every kernel ran\n")


if __name__ == "__main__":
    main()
