"""Launches every kernel at small, odd shapes, for a memory checker: the tests would take too long under it.

Each result is compared with the reference, with a large tolerance. Does not cover speed (`bench_kernels.py`), or exact
results (`tests/kernels`).

Run: compute-sanitizer --tool memcheck python benchmarks/every_kernel.py
"""

from __future__ import annotations

import dataclasses
import itertools
import sys

import torch
from torch import Tensor

from flexmoe.kernels.experts import reference as experts_reference
from flexmoe.kernels.experts.decode_kernel import decode
from flexmoe.kernels.experts.prefill_kernel import prefill
from flexmoe.kernels.experts.reference import ExpertTensors
from flexmoe.kernels.low_rank import reference as low_rank_reference
from flexmoe.kernels.low_rank.kernel import decode_low_rank
from flexmoe.kernels.low_rank.reference import LowRankTensors
from flexmoe.kernels.route import reference as route_reference
from flexmoe.kernels.route.kernel import input_gradients, route
from flexmoe.kernels.triton_common import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
HIDDEN, WIDTHS, K = 136, (40, 264, 8), 2
TOKENS = (1, 33, 67)  # few, few in a larger tile, and many
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape) / shape[-1] ** 0.5).to(DEVICE, dtype)


def some_experts(dtype: torch.dtype) -> ExpertTensors:
    return ExpertTensors(
        gate=[drawn(i, HIDDEN, dtype=dtype) for i in WIDTHS],
        up=[drawn(i, HIDDEN, dtype=dtype) for i in WIDTHS],
        down=[drawn(HIDDEN, i, dtype=dtype) for i in WIDTHS],
        gate_bias=[drawn(i, dtype=dtype) for i in WIDTHS],
        up_bias=[drawn(i, dtype=dtype) for i in WIDTHS],
        down_bias=[drawn(HIDDEN, dtype=dtype) for _ in WIDTHS],
    )


def some_low_rank_experts(dtype: torch.dtype, public: ExpertTensors) -> LowRankTensors:
    """Of a small and an odd rank, with `public` between them."""
    width, ranks = len(public.up[0]), (8, 35)
    a = ExpertTensors(
        gate=[drawn(r, HIDDEN, dtype=dtype) for r in ranks],
        up=[drawn(r, HIDDEN, dtype=dtype) for r in ranks],
        down=[drawn(r, width, dtype=dtype) for r in ranks],
    )
    b = ExpertTensors(
        gate=[drawn(width, r, dtype=dtype) for r in ranks],
        up=[drawn(width, r, dtype=dtype) for r in ranks],
        down=[drawn(HIDDEN, r, dtype=dtype) for r in ranks],
        gate_bias=[drawn(width, dtype=dtype) for _ in ranks],
        up_bias=[drawn(width, dtype=dtype) for _ in ranks],
        down_bias=[drawn(HIDDEN, dtype=dtype) for _ in ranks],
    )
    return LowRankTensors(public, a, b, scales=(0.5, 1.0), public_column=1)


def to_cpu(experts: ExpertTensors) -> ExpertTensors:
    on_cpu = {key: [t.cpu() for t in value] for key, value in vars(experts).items() if key != "activation"}
    return ExpertTensors(**on_cpu)


def check(name: str, ours: Tensor, theirs: Tensor, close: float) -> None:
    """Compares on the host, so that the checker sees our kernels only."""
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
    expected = route_reference.route(x_TH.cpu(), *rows_and_biases, offset_TE, K, True)
    check(f"route, {name}", routing.weights_TE, expected.weights_TE, 1e-4)
    assert torch.equal(routing.top_ids_TK.cpu(), expected.top_ids_TK), name
    d_results = torch.randn(tokens, len(WIDTHS)).to(DEVICE)
    slots = torch.randn(tokens, K).to(DEVICE)
    dx_TH, dz_TE = input_gradients((d_results, d_results, slots), x_TH, rows, routing, K, True)
    assert dx_TH.isfinite().all(), name
    assert dz_TE.isfinite().all(), name
    expected_TH = experts_reference.mix(x_TH.cpu(), expected.weights_TE, to_cpu(experts))
    if tokens <= 64:
        check(f"decode, {name}", decode(x_TH, routing.weights_TE, experts), expected_TH, CLOSE[dtype])
        one = {key: value[:1] for key, value in vars(experts).items() if key != "activation"}
        low_rank = some_low_rank_experts(dtype, ExpertTensors(**one))
        on_cpu = {part: to_cpu(getattr(low_rank, part)) for part in ("public", "a", "b")}
        theirs_TH = low_rank_reference.mix_low_rank(
            x_TH.cpu(), expected.weights_TE, dataclasses.replace(low_rank, **on_cpu)
        )
        ours_TH = decode_low_rank(x_TH, routing.weights_TE, low_rank)
        check(f"decode_low_rank, {name}", ours_TH, theirs_TH, CLOSE[dtype])
    mixed_TH = prefill(x_TH, routing.top_weights_TK, routing.top_ids_TK, experts)
    check(f"prefill, {name}", mixed_TH, expected_TH, CLOSE[dtype])


def main() -> None:
    torch.manual_seed(0)
    for tokens, dtype in itertools.product(TOKENS, CLOSE):
        run(tokens, dtype)
    if not INTERPRETED:
        torch.cuda.synchronize()
    sys.stdout.write("every kernel ran\n")


if __name__ == "__main__":
    main()
