"""The fused router and experts on a GPU, against PyTorch's operations and FlexOlmo's implementations, in one run.

Hidden 4096, FFN 11008, 7 experts, k = 5, bfloat16. First the limits of the device (copies, matrix products, one
launch), then the errors of the operators (against float64, with new inputs, poisoned outputs, and a second run that
must be bit-equal), then times: medians of CUDA graph replays that rotate among more inputs than fit into a cache;
reading an expert's weights flushes the caches anyway. Contenders that synchronize with the host cannot be captured and
are timed with events. The floor of a case follows from its bytes and operations and the measured limits.

The cases are in `kernel_route.py`, `kernel_experts.py` and `kernel_low_rank.py`; `kernel_verdicts.py` checks their
thresholds after the JSON is written. Without a GPU nothing is measured or written. `--warm` only compiles, `--tune`
tries other launch constants, `--tiny` runs a small model on any device to test this program; its results are
meaningless.

Run: python benchmarks/bench_kernels.py [--out JSON]. Needs 25 GB of GPU memory and some 3 minutes.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import kernel_contenders as contenders
import kernel_experts
import kernel_low_rank
import kernel_route
import torch
from gpu_clock import MOST, Timed, by_events, by_replay, ceilings, on_gpu
from kernel_cases import OURS, Case, Setup
from kernel_contenders import K
from kernel_verdicts import entry, missed, ranges, table, with_verdict
from machine import machine
from torch import Tensor, nn

from flexmoe.kernels.experts.op import mix
from flexmoe.kernels.experts.reference import ExpertTensors
from flexmoe.kernels.route import op as route_op
from flexmoe.kernels.route import reference as route_reference

RESULT = Path(__file__).parents[1] / "docs" / "benchmarks" / "routing.json"

MODULES = {"route": kernel_route, "block": kernel_experts, "low_rank": kernel_low_rank}
CASES: tuple[Case, ...] = (*kernel_route.CASES, *kernel_experts.CASES, *kernel_low_rank.CASES)

# ||ours - exact|| / ||exact||: float32 sums of 4096 products (TF32 alone is 3e-4 off); intermediate rounding to the
# dtype of the experts
EXACT = {"logits": 5e-5, "weights": 5e-5, "slots": 5e-5}
EXPERTS_EXACT = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CHECKED = (1, 8, 16, 33, 64, 65, 512, 4096)  # tokens: covers every kind of launch
SWEEP = tuple(2**n for n in range(14))  # tokens: 1 to 8192
CONTEXT, CACHED = 32, 512  # tokens of a prompt and of the cache: each repetition fills one more position
assert MOST + 16 < CACHED - CONTEXT


def correctness(setup: Setup, counts: Sequence[int]) -> dict[str, dict[str, Any]]:
    """The errors relative to float64 by number of tokens, and whether they are within the limits."""
    limits = {**EXACT, "experts": EXPERTS_EXACT[torch.bfloat16]}
    found = {}
    for tokens in counts:
        try:
            errors = contenders.distances(setup.draw(tokens), setup.block)
            passed = errors["same_bits_again"] is True and all(errors[name] <= limit for name, limit in limits.items())
            found[str(tokens)] = {**errors, "passed": passed}
        except Exception as error:  # from a compiler or a driver; other numbers of tokens may still run
            found[str(tokens)] = {"error": described_error(error), "passed": False}
        log(f"correctness with {tokens} tokens: {found[str(tokens)]}")
    return found


def measured(setup: Setup, case: Case) -> dict[str, Any]:
    """The results of a case, without its thresholds."""
    times: dict[str, Timed] = {}
    errors: dict[str, str] = {}
    n_sets = 0
    for name, clock, calls in MODULES[case.kind].runs(setup, case.tokens):
        n_sets = len(calls) if name == OURS else n_sets
        try:
            times[name] = clock(calls)
        except (RuntimeError, ValueError) as error:  # from a contender: it has no result, and its threshold is missed
            if name == OURS:
                raise
            errors[name] = described_error(error)
    ours = times.pop(OURS)
    others = {
        name: {**t.as_json(), "ratio": round(t.microseconds / ours.microseconds, 3)} for name, t in times.items()
    }
    log(f"{case.name}: {ours.microseconds:.1f} us; " + ", ".join(f"{n} {o['ratio']}x" for n, o in others.items()))
    row = {"case": case.name, "kind": case.kind, "tokens": case.tokens, **ours.as_json()}
    return {**row, **_against_floor(setup, case, ours), "input_sets": n_sets, "others": others, "errors": errors}


def _against_floor(setup: Setup, case: Case, ours: Timed) -> dict[str, Any]:
    work = MODULES[case.kind].work(setup, case.tokens)
    floor = setup.limits.floor_us(work.n_bytes, work.flops)
    seconds = ours.microseconds / 1e6
    return {
        "floor_us": round(floor, 3),
        "share_of_floor": round(floor / ours.microseconds, 3),
        "gb_per_second": round(work.n_bytes / seconds / 1e9, 1),
        "tflops": round(work.flops / seconds / 1e12, 1),
        "path": work.path,
    }


def sweep(setup: Setup, counts: Sequence[int], dtypes: Sequence[torch.dtype]) -> dict[str, dict[str, dict[str, Any]]]:
    """Microseconds of modules and of kernels, both launched by the host, by dtype and number of tokens."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for dtype in dtypes:
        block = _block_of(setup, dtype)
        layers = [contenders.our_layer(block, name) for name in ("eager", "flexmoe_triton")]
        of_dtype = found[str(dtype)] = {}
        for tokens in counts:
            try:
                of_dtype[str(tokens)] = _side_by_side(layers, setup.draw(tokens, dtype))
            except Exception as error:  # modules are used for this number of tokens
                of_dtype[str(tokens)] = {"ratio": 0.0, "error": described_error(error)}
        log(f"sweep of {dtype}: { {tokens: figures['ratio'] for tokens, figures in of_dtype.items()} }")
        del block, layers
    return found


def _side_by_side(layers: Sequence[contenders.Layer], x_TH: Tensor) -> dict[str, Any]:
    outputs = [layer(x_TH) for layer in layers]
    modules, kernels = (by_events([lambda f=f: f(x_TH)], 0.15).microseconds for f in layers)
    return {
        "modules_us": round(modules, 1),
        "kernels_us": round(kernels, 1),
        "ratio": round(modules / kernels, 3),
        "distance": contenders.distance(outputs[1], outputs[0].double()),
    }


def _block_of(setup: Setup, dtype: torch.dtype) -> nn.Module:
    block = copy.deepcopy(setup.block).to(dtype)
    block.router.float()
    return block


def decode(setup: Setup) -> dict[str, dict[str, Any]]:
    """Microseconds of a decoding step of the model with a static cache, by implementation of the experts."""
    found: dict[str, dict[str, Any]] = {}
    models: list[tuple[str, Any, str]] = [(f"flexmoe, {way}", setup.ours, way) for way in ("flexmoe_triton", "eager")]
    models += [(f"FlexOlmo, {way}", setup.theirs, way) for way in ("eager", "grouped_mm", "batched_mm")]
    for clock, batch in itertools.product((by_events, by_replay), (1, 8)):
        how = "launched by the host" if clock is by_events else "in a graph"
        for name, model, way in models:
            if clock is by_replay and way == "eager":
                continue
            key = f"batch {batch}, {name}, {how}"
            try:
                found[key] = _steps(setup, model, way, batch, clock)
            except Exception as error:  # whether a model can be captured depends on transformers
                found[key] = {"error": described_error(error)}
            log(f"decode, {key}: {found[key]}")
    return found


def _steps(setup: Setup, model: Any, way: str, batch: int, clock: Callable[..., Timed]) -> dict[str, Any]:
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=CACHED)
    tokens = torch.randint(3, setup.sizes["vocab_size"], (batch, CONTEXT + 1), device="cpu").to(setup.device)
    # batched_mm would copy the weights of the experts for each token of the prompt
    model.config._experts_implementation = "eager" if way == "batched_mm" else way
    model(tokens[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
    model.config._experts_implementation = way
    step = tokens[:, -1:]
    timed = clock([lambda: model(step, past_key_values=cache, use_cache=True)], 0.3)
    return timed.as_json()


def log(text: str) -> None:
    """Reports progress on standard error."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def described_error(error: Exception) -> str:
    """The class and the first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def described_device(device: torch.device) -> dict[str, Any]:
    """The metadata of `machine`, with the GPU and its versions."""
    here = machine()
    try:
        import triton

        here["versions"] |= {"triton": triton.__version__, "cuda": torch.version.cuda}
    except ImportError:
        here["versions"] |= {"triton": None}
    if device.type == "cuda":
        here |= {
            "device": torch.cuda.get_device_name(device),
            "capability": list(torch.cuda.get_device_capability(device)),
        }
    return {"capability": [0, 0], **here}


def measure(
    sizes: Mapping[str, Any], device: torch.device, out: Path, counts: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Runs all parts; writes each to `out` as soon as it is measured."""
    result: dict[str, Any] = described_device(device)
    tiny = {} if on_gpu() else {"copied": 1 << 20, "side": 64}
    limits = ceilings(device, **tiny)
    log(f"{result['device']}: {limits.as_json()}")
    setup = Setup(sizes, device, limits)
    shapes = {
        "hidden": setup.shapes.hidden,
        "intermediate": setup.shapes.intermediate,
        "experts": setup.shapes.experts,
    }
    result |= {
        "complete": False,
        "ceilings": limits.as_json(),
        "shapes": {**shapes, "k": K, "dtype": "torch.bfloat16"},
    }
    result |= {"correctness": correctness(setup, counts["checked"]), "rows": [], "failed": {}}
    for case in (case for case in CASES if case.tokens <= max(counts["cases"])):
        try:
            row = measured(setup, case)
            result["rows"].append(with_verdict(row, case, result["device"], result["capability"]))
        except Exception as error:  # from our kernels: this case fails, and the others may still run
            result["failed"][case.name] = described_error(error)
            log(f"{case.name}: {described_error(error)}")
        keep(result, out)
    result["sweep"] = sweep(setup, counts["sweep"], tuple(EXPERTS_EXACT)[::-1])
    result["auto"] = entry(ranges(result["sweep"]), result["capability"])
    keep(result, out)
    result["decode"] = decode(setup)  # last, because a failed capture may leave the device unusable
    result["complete"] = True
    keep(result, out)
    return result


def keep(result: Mapping[str, Any], out: Path) -> None:
    """Writes the parts measured so far."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def warm(sizes: Mapping[str, Any], device: torch.device, dtype: torch.dtype, counts: Sequence[int]) -> None:
    """Compiles every kernel that a run launches with `dtype`, into the cache of Triton."""
    hidden, intermediate, experts = sizes["hidden_size"], sizes["intermediate_size"], len(contenders.NAMES)

    def drawn(*shape: int) -> list[Tensor]:
        return [torch.randn(shape, device=device, dtype=dtype) / math.sqrt(shape[-1]) for _ in range(experts)]

    rows = [row.float() for row in drawn(1, hidden)]
    biases = [torch.zeros(1, device=device) for _ in rows]
    matrices = ExpertTensors(
        gate=drawn(intermediate, hidden), up=drawn(intermediate, hidden), down=drawn(hidden, intermediate)
    )
    for tokens in sorted(set(counts)):
        x_TH = torch.randn(tokens, hidden, device=device).to(dtype)
        routing = route_op.route(x_TH, rows, biases, None, K, True)
        mix(x_TH, routing, matrices)
        log(f"compiled for {tokens} tokens of {dtype}")
    if dtype == torch.bfloat16 and on_gpu():
        compiled = torch.compile(route_reference.route, dynamic=False)
        for case in kernel_route.CASES:
            compiled(torch.randn(case.tokens, hidden, device=device).to(dtype), rows, biases, None, K, True)
        layer = contenders.our_layer(contenders.low_rank_block(sizes, device), "flexmoe_triton")
        for case in kernel_low_rank.CASES:
            layer(torch.randn(case.tokens, hidden, device=device).to(dtype))


COUNTS: dict[str, dict[str, Sequence[int]]] = {
    "full": {"checked": CHECKED, "cases": (4096,), "sweep": SWEEP},
    "tiny": {"checked": (1, 3, 65), "cases": (64,), "sweep": (1, 2)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"output file (default: {RESULT.relative_to(RESULT.parents[1])})")
    parser.add_argument("--warm", metavar="DTYPE", help="only compile the kernels for it: bfloat16, float16, float32")
    parser.add_argument("--tune", action="store_true", help="only try other launch constants, and print the best")
    parser.add_argument(
        "--tiny", action="store_true", help="a small model on any device; asserts nothing, needs --out"
    )
    arguments = parser.parse_args()
    if not on_gpu() and not arguments.tiny:
        sys.stdout.write("bench_kernels.py needs a GPU with CUDA: nothing measured, nothing written.\n")
        return
    if arguments.tiny and arguments.out is None and not arguments.warm:
        parser.error("--tiny does not write to docs/: give --out.")
    device = torch.device("cuda" if on_gpu() else "cpu")
    sizes = contenders.TINY if arguments.tiny else contenders.FULL
    counts = COUNTS["tiny" if arguments.tiny else "full"]
    with torch.no_grad():
        if arguments.warm:
            warm(sizes, device, getattr(torch, arguments.warm), [*counts["sweep"], *counts["checked"]])
            return
        if arguments.tune:
            from kernel_tuning import tune

            tune(device)
            return
        result = measure(sizes, device, arguments.out or RESULT, counts)
    sys.stdout.write(f"{table(result['rows'])}\n\nFor MEASURED in kernels/dispatch.py:\n    {result['auto']}\n")
    if not arguments.tiny:
        assert not missed(result), f"missed: {missed(result)}"


if __name__ == "__main__":
    main()
