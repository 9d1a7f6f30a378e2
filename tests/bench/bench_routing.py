"""The fused router and experts on a GPU, against PyTorch's operations and FlexOlmo's implementations, in one run.

Hidden 4096, FFN 11008, 7 experts, k = 5, bfloat16. First what the device does at most (copies, matrix products, one
launch), then whether the operators are right (float64, fresh inputs, poisoned outputs, a second run with equal bits),
then times: medians of CUDA-graph replays that rotate among inputs which no cache holds together; an expert's weights
flush it alone. What asks the host cannot be captured and is timed with events. A case's floor follows from its bytes
and operations and from what was measured first.

Ratios are asserted on compute capability 9.0, microseconds on an H200, for which they were written; the JSON is there
before that. Without a GPU this says so and writes nothing. `--warm` only compiles, `--tune` tries other launch
constants, `--tiny` runs a small model anywhere, to check this program: what it prints then says nothing.

Run: python tests/bench/bench_routing.py [--out JSON]. Needs 25 GB of GPU memory and some 3 minutes.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import routing_contenders as contenders
import torch
from gpu_clock import MOST, Call, Ceilings, Timed, by_events, by_replay, ceilings, on_gpu
from machine import machine
from routing_contenders import K, Shapes
from torch import Tensor, nn

from flexmoe.modeling import ops_flexmoe
from flexmoe.modeling import routing_flexmoe as reference

RESULT = Path(__file__).parents[2] / "docs" / "benchmarks" / "routing.json"
OURS, SEQUENCE, COMPILED = "flexmoe", "torch op sequence", "torch op sequence, compiled"
LOOP, MODULES, BEST = "cuBLAS loop", "flexmoe's modules", "best of grouped_mm and cuBLAS loop"
RATIOS_ON, GOALS_ON = (9, 0), "H200"

# ||ours - exact|| / ||exact||: float32 sums of 4096 products (TF32 alone is 3e-4 off); roundings to the dtype between
EXACT = {"logits": 5e-5, "weights": 5e-5, "slots": 5e-5}
EXPERTS_EXACT = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CHECKED = (1, 8, 16, 33, 64, 65, 512, 4096)  # tokens: each class of launches
MOST_BATCHED = 8  # tokens: batched_mm copies the chosen experts for each, 1.35 GB
SWEEP = tuple(2**n for n in range(14))  # tokens: 1 to 8192
AT_LEAST = 0.95  # times the speed of modules: there "auto" takes the kernels
MOST_SETS = 1024
CONTEXT, CACHED = 32, 512  # tokens of a prompt, and of the cache: each repetition is a step further into it
assert MOST + 16 < CACHED - CONTEXT


@dataclass(frozen=True)
class Case:
    """One row: what is run with how many tokens, and what it promises.

    Attributes:
        kind: "route" or "block".
        goal_us: at most so many microseconds on a device that `GOALS_ON` names; None: none.
        ratios: the least speed over a contender, on `RATIOS_ON`.
        stretch: the goal is reported, and not asserted.
    """

    kind: str
    tokens: int
    goal_us: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    stretch: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.tokens} token{'s' if self.tokens > 1 else ''}"


CASES = (
    Case("route", 1, 5.0, {SEQUENCE: 4.0}),
    Case("route", 8, 5.0, {SEQUENCE: 4.0}),
    Case("route", 64, 5.0, {SEQUENCE: 4.0}),
    Case("route", 4096, 12.0, {SEQUENCE: 3.0}),
    Case("block", 1, 380.0, {"grouped_mm": 1.3, "batched_mm": 2.4, "eager": 1.8}),
    Case("block", 8, 520.0, {"grouped_mm": 1.2}),
    Case("block", 64, 540.0, {"grouped_mm": 1.2}),
    Case("block", 512),
    Case("block", 4096, 8800.0, {BEST: 1.0}, stretch=True),
)


class Bench:
    """The models, the device and what it does at most; one method for each part of the result."""

    def __init__(self, sizes: Mapping[str, Any], device: torch.device, limits: Ceilings) -> None:
        self.sizes, self.device, self.limits = sizes, device, limits
        self.ours, self.theirs = contenders.models(sizes, device)
        self.block: Any = self.ours.flexmoe_blocks()[0]
        self.shapes = Shapes(sizes["hidden_size"], sizes["intermediate_size"], len(contenders.NAMES), K)

    def draw(self, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(tokens, self.shapes.hidden, device=self.device).to(dtype)

    def correctness(self, counts: Sequence[int]) -> dict[str, dict[str, Any]]:
        """By number of tokens: how far from float64, and whether that is near enough."""
        limits = {**EXACT, "experts": EXPERTS_EXACT[torch.bfloat16]}
        found = {}
        for tokens in counts:
            try:
                far = contenders.distances(self.draw(tokens), self.block)
                passed = far["same_bits_again"] is True and all(far[name] <= limit for name, limit in limits.items())
                found[str(tokens)] = {**far, "passed": passed}
            except Exception as error:  # of a compiler or a driver; other numbers of tokens may still tell something
                found[str(tokens)] = {"error": words_of(error), "passed": False}
            say(f"correct with {tokens} tokens: {found[str(tokens)]}")
        return found

    def row(self, case: Case) -> dict[str, Any]:
        """A case's figures, without a verdict."""
        runs = {"route": self._route_runs, "block": self._block_runs}[case.kind]
        times: dict[str, Timed] = {}
        errors: dict[str, str] = {}
        n_sets = 0
        for name, clock, calls in runs(case.tokens):
            n_sets = len(calls) if name == OURS else n_sets
            try:
                times[name] = clock(calls)
            except (RuntimeError, ValueError) as error:  # of a contender: it has no figure, and its bar is missed
                if name == OURS:
                    raise
                errors[name] = words_of(error)
        ours = times.pop(OURS)
        others = {
            name: {**t.as_json(), "ratio": round(t.microseconds / ours.microseconds, 3)} for name, t in times.items()
        }
        say(f"{case.name}: {ours.microseconds:.1f} us; " + ", ".join(f"{n} {o['ratio']}x" for n, o in others.items()))
        row = {"case": case.name, "kind": case.kind, "tokens": case.tokens, **ours.as_json()}
        return {**row, **self._against_floor(case, ours), "input_sets": n_sets, "others": others, "errors": errors}

    def _against_floor(self, case: Case, ours: Timed) -> dict[str, Any]:
        if case.kind == "route":
            n_bytes, flops, path = self.shapes.route_bytes(case.tokens), 0, route_path(case.tokens)
        else:
            rows, biases = contenders.router_of(self.block)
            chosen = (ops_flexmoe.route(self.draw(case.tokens), rows, biases, None, K, True).weights_TE > 0).any(0)
            n_bytes = self.shapes.block_bytes(case.tokens, int(chosen.sum()))
            flops, path = (
                self.shapes.block_flops(case.tokens),
                {**route_path(case.tokens), **mix_path(case.tokens, self)},
            )
        floor = self.limits.floor_us(n_bytes, flops)
        seconds = ours.microseconds / 1e6
        return {
            "floor_us": round(floor, 3),
            "share_of_floor": round(floor / ours.microseconds, 3),
            "gb_per_second": round(n_bytes / seconds / 1e9, 1),
            "tflops": round(flops / seconds / 1e12, 1),
            "path": path,
        }

    def _route_runs(self, tokens: int) -> Iterator[tuple[str, Callable[..., Timed], list[Call]]]:
        size = self.shapes.route_bytes(tokens)
        n_sets = min(MOST_SETS, max(4, math.ceil(2 * self.limits.l2_bytes / size)))
        sets = [(self.draw(tokens), *copied(contenders.router_of(self.block)), None, K, True) for _ in range(n_sets)]
        compiled = torch.compile(reference.route, dynamic=False)
        gate = self.theirs.model.layers[0].mlp.gate
        ways: dict[str, Callable[..., Any]] = {
            OURS: ops_flexmoe.route,
            SEQUENCE: reference.route,
            COMPILED: compiled,
            "FlexOlmo's router, in bfloat16": lambda x_TH, *rest: gate(x_TH),
        }
        if not on_gpu():
            del ways[COMPILED]  # it takes a C++ compiler half a minute
        for name, way in ways.items():
            yield name, by_replay, [lambda way=way, args=args: way(*args) for args in sets]

    def _block_runs(self, tokens: int) -> Iterator[tuple[str, Callable[..., Timed], list[Call]]]:
        inputs = [self.draw(tokens) for _ in range(4)]
        ours = contenders.our_layer(self.block, "triton")
        grouped = contenders.their_layer(self.theirs, "grouped_mm")
        ways: list[tuple[str, Callable[..., Timed], contenders.Layer]] = [
            (OURS, by_replay, ours),
            ("grouped_mm", by_replay, grouped),
            ("eager", by_events, contenders.their_layer(self.theirs, "eager")),
            (LOOP, by_events, contenders.loop_layer(self.block)),
            (MODULES, by_events, contenders.our_layer(self.block, "torch")),
            (f"{OURS}, launched by the host", by_events, ours),
            ("grouped_mm, launched by the host", by_events, grouped),
        ]
        if tokens <= MOST_BATCHED:
            ways.append(("batched_mm", by_replay, contenders.their_layer(self.theirs, "batched_mm")))
        for name, clock, layer in ways:
            yield name, clock, [lambda layer=layer, x=x: layer(x) for x in inputs]

    def sweep(self, counts: Sequence[int], dtypes: Sequence[torch.dtype]) -> dict[str, dict[str, dict[str, Any]]]:
        """By dtype and number of tokens: microseconds of modules and of kernels, both launched by the host."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for dtype in dtypes:
            block = self._block_of(dtype)
            layers = [contenders.our_layer(block, name) for name in ("torch", "triton")]
            of_dtype = found[str(dtype)] = {}
            for tokens in counts:
                try:
                    of_dtype[str(tokens)] = self._side_by_side(layers, self.draw(tokens, dtype))
                except Exception as error:  # such a number of tokens is for modules
                    of_dtype[str(tokens)] = {"ratio": 0.0, "error": words_of(error)}
            say(f"sweep of {dtype}: { {tokens: figures['ratio'] for tokens, figures in of_dtype.items()} }")
            del block, layers
        return found

    def _side_by_side(self, layers: Sequence[contenders.Layer], x_TH: Tensor) -> dict[str, Any]:
        outputs = [layer(x_TH) for layer in layers]
        modules, kernels = (by_events([lambda f=f: f(x_TH)], 0.15).microseconds for f in layers)
        return {
            "modules_us": round(modules, 1),
            "kernels_us": round(kernels, 1),
            "ratio": round(modules / kernels, 3),
            "distance": contenders.distance(outputs[1], outputs[0].double()),
        }

    def _block_of(self, dtype: torch.dtype) -> nn.Module:
        block = copy.deepcopy(self.block).to(dtype)
        block.router.float()
        return block

    def decode(self) -> dict[str, dict[str, Any]]:
        """Microseconds of a step of the whole model with a static cache, per way to run its experts."""
        found: dict[str, dict[str, Any]] = {}
        ways: list[tuple[str, Any, str | None]] = [(f"flexmoe, {way}", self.ours, way) for way in ("triton", "torch")]
        ways += [(f"FlexOlmo, {way}", self.theirs, way) for way in ("eager", "grouped_mm", "batched_mm")]
        for clock, batch in itertools.product((by_events, by_replay), (1, 8)):
            how = "launched by the host" if clock is by_events else "in a graph"
            for name, model, way in ways:
                if clock is by_replay and way in ("eager", "torch"):
                    continue
                key = f"batch {batch}, {name}, {how}"
                try:
                    found[key] = self._steps(model, way, batch, clock)
                except Exception as error:  # capturing a whole model is up to transformers
                    found[key] = {"error": words_of(error)}
                say(f"decode, {key}: {found[key]}")
        return found

    def _steps(self, model: Any, way: str | None, batch: int, clock: Callable[..., Timed]) -> dict[str, Any]:
        from transformers import StaticCache

        if model is self.ours:
            model.config._flexmoe_implementation = way
        else:
            model.config._experts_implementation = way
        cache = StaticCache(config=model.config, max_cache_len=CACHED)
        tokens = torch.randint(3, self.sizes["vocab_size"], (batch, CONTEXT + 1), device="cpu").to(self.device)
        if model is self.theirs and way == "batched_mm":
            model.config._experts_implementation = "eager"  # it would copy experts for each token of the prompt
        model(tokens[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        if model is self.theirs:
            model.config._experts_implementation = way
        step = tokens[:, -1:]
        timed = clock([lambda: model(step, past_key_values=cache, use_cache=True)], 0.3)
        return timed.as_json()


def say(words: str) -> None:
    """Progress, for whoever waits."""
    sys.stderr.write(f"{words}\n")
    sys.stderr.flush()


def words_of(error: Exception) -> str:
    """Its kind and its first line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def copied(router: tuple[list[Tensor], list[Tensor]]) -> Iterator[list[Tensor]]:
    """Rows and biases at addresses of their own."""
    return ([tensor.detach().clone() for tensor in tensors] for tensors in router)


def route_path(tokens: int) -> dict[str, Any]:
    """Which kernel routes so many tokens, with which constants."""
    try:
        from flexmoe.modeling import kernels_route_flexmoe as kernels
    except ImportError:
        return {"route": "the reference"}
    experts = len(contenders.NAMES)
    if tokens <= kernels.MOST_FEW:
        return {"route_few": constants(kernels.few_launch(experts, torch.float32))}
    return {"route_many": constants(kernels.many_launch(experts, torch.float32, tokens))}


def mix_path(tokens: int, bench: Bench) -> dict[str, Any]:
    """Which kernels run the experts for so many tokens, with which constants, and why."""
    inputs = (tuple(contenders.NAMES), bench.draw(tokens))
    reason = bench.block.path(inputs[0], _inputs_of(inputs[1]), "triton").reason
    if not on_gpu():
        return {"experts": "the reference", "reason": reason}
    from flexmoe.modeling import kernels_decode_flexmoe as decode
    from flexmoe.modeling import kernels_prefill_flexmoe as prefill

    sms, shared = decode.device_limits(inputs[1].device)
    if tokens <= decode.MOST_TOKENS:
        launches = {
            "gate_up_kernel": decode.gate_up_launch(2, tokens, True, shared),
            "down_kernel": decode.down_launch(2, tokens, bench.shapes.hidden, sms, shared),
        }
    else:
        rows_each = tokens * K / len(contenders.NAMES)
        launches = {
            "gate_up_rows_kernel": prefill.gate_up_launch(2, rows_each, True, shared),
            "down_rows_kernel": prefill.down_launch(2, rows_each, shared),
        }
    return {**{name: constants(launch) for name, launch in launches.items()}, "reason": reason}


def _inputs_of(x_TH: Tensor) -> Any:
    from flexmoe.modeling.implementations_flexmoe import Inputs

    return Inputs.of(x_TH)


def constants(launch: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a launch that JSON can say."""
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in launch.items()}


def judged(row: Mapping[str, Any], case: Case, device: str, capability: Sequence[int]) -> dict[str, Any]:
    """The row with its bars: each with whether it holds, and whether it is asserted on this device.

    `passed` is None where nothing is asserted.
    """
    others = row["others"]
    best = [others[name]["ratio"] for name in ("grouped_mm", LOOP) if name in others]
    ratios = {name: other["ratio"] for name, other in others.items()} | ({BEST: min(best)} if len(best) == 2 else {})
    bars = [
        {
            "speed_over": name,
            "bar": bar,
            "measured": ratios.get(name),
            "met": ratios.get(name, 0.0) >= bar,
            "asserted": tuple(capability) == RATIOS_ON,
        }
        for name, bar in case.ratios.items()
    ]
    if case.goal_us is not None:
        bars.append(
            {
                "microseconds_at_most": case.goal_us,
                "measured": row["microseconds"],
                "met": row["microseconds"] <= case.goal_us,
                "asserted": GOALS_ON in device and not case.stretch,
            }
        )
    asserted = [bar["met"] for bar in bars if bar["asserted"]]
    return {**row, "bars": bars, "passed": all(asserted) if asserted else None}


def ranges(sweep: Mapping[str, Mapping[str, Mapping[str, float]]]) -> dict[str, tuple[int, int] | None]:
    """By dtype: the longest stretch of token counts in which kernels are at least `AT_LEAST` as fast as modules."""
    found: dict[str, tuple[int, int] | None] = {}
    for dtype, counts in sweep.items():
        best: list[int] = []
        stretch: list[int] = []
        for tokens, figures in counts.items():
            stretch = [*stretch, int(tokens)] if figures["ratio"] >= AT_LEAST else []
            best = max(best, stretch, key=len)
        found[dtype] = (best[0], best[-1]) if best else None
    return found


def entry(found: Mapping[str, tuple[int, int] | None], capability: Sequence[int]) -> str:
    """The line for `MEASURED` in modeling/implementations_flexmoe.py."""
    dtypes = ", ".join(f"{dtype}: {bounds}" for dtype, bounds in found.items() if bounds is not None)
    return f"({capability[0]}, {capability[1]}): {{{dtypes}}},"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """What is printed at the end: a line for each case."""
    lines = [f"{'case':20} {'us':>9} {'floor':>9} {'share':>6} {'goal':>8}  bars"]
    for row in rows:
        goal = next((bar["microseconds_at_most"] for bar in row["bars"] if "microseconds_at_most" in bar), None)
        words = [
            f"{bar['speed_over']} {bar['measured'] or 0:.2f}x >= {bar['bar']}{'' if bar['met'] else ' MISSED'}"
            for bar in row["bars"]
            if "speed_over" in bar
        ]
        late = any(not bar["met"] for bar in row["bars"] if "microseconds_at_most" in bar)
        lines.append(
            f"{row['case']:20} {row['microseconds']:9.1f} {row['floor_us']:9.1f} {row['share_of_floor']:6.0%} "
            f"{'' if goal is None else f'{goal:.0f}':>7}{'!' if late else ' '}  {'; '.join(words)}"
        )
    return "\n".join(lines)


def missed(result: Mapping[str, Any]) -> list[str]:
    """What does not hold of what is asserted."""
    wrong = [f"wrong with {tokens} tokens" for tokens, far in result["correctness"].items() if not far["passed"]]
    return wrong + [row["case"] for row in result["rows"] if row["passed"] is False] + list(result["failed"])


def described(device: torch.device) -> dict[str, Any]:
    """Device and versions, beside what `machine` says."""
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
    """All parts, each kept in `out` as soon as it is there."""
    result: dict[str, Any] = described(device)
    tiny = {} if on_gpu() else {"copied": 1 << 20, "side": 64}
    limits = ceilings(device, **tiny)
    say(f"{result['device']}: {limits.as_json()}")
    bench = Bench(sizes, device, limits)
    shapes = {
        "hidden": bench.shapes.hidden,
        "intermediate": bench.shapes.intermediate,
        "experts": bench.shapes.experts,
    }
    result |= {
        "complete": False,
        "ceilings": limits.as_json(),
        "shapes": {**shapes, "k": K, "dtype": "torch.bfloat16"},
    }
    result |= {"correctness": bench.correctness(counts["checked"]), "rows": [], "failed": {}}
    for case in (case for case in CASES if case.tokens <= max(counts["cases"])):
        try:
            result["rows"].append(judged(bench.row(case), case, result["device"], result["capability"]))
        except Exception as error:  # of our own kernels: the case is missed, and the others may still tell something
            result["failed"][case.name] = words_of(error)
            say(f"{case.name}: {words_of(error)}")
        keep(result, out)
    result["sweep"] = bench.sweep(counts["sweep"], tuple(EXPERTS_EXACT)[::-1])
    result["auto"] = entry(ranges(result["sweep"]), result["capability"])
    keep(result, out)
    result["decode"] = bench.decode()  # last, because a capture that fails may leave the device useless
    result["complete"] = True
    keep(result, out)
    return result


def keep(result: Mapping[str, Any], out: Path) -> None:
    """Writes what there is."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")


def warm(sizes: Mapping[str, Any], device: torch.device, dtype: torch.dtype, counts: Sequence[int]) -> None:
    """Compiles every kernel that a run launches with `dtype` into Triton's cache, beside what else goes on."""
    hidden, intermediate, experts = sizes["hidden_size"], sizes["intermediate_size"], len(contenders.NAMES)

    def drawn(*shape: int) -> list[Tensor]:
        return [torch.randn(shape, device=device, dtype=dtype) / math.sqrt(shape[-1]) for _ in range(experts)]

    rows = [row.float() for row in drawn(1, hidden)]
    biases = [torch.zeros(1, device=device) for _ in rows]
    matrices = reference.ExpertTensors(
        gate=drawn(intermediate, hidden), up=drawn(intermediate, hidden), down=drawn(hidden, intermediate)
    )
    for tokens in sorted(set(counts)):
        x_TH = torch.randn(tokens, hidden, device=device).to(dtype)
        routing = ops_flexmoe.route(x_TH, rows, biases, None, K, True)
        ops_flexmoe.mix(x_TH, routing, matrices)
        say(f"compiled for {tokens} tokens of {dtype}")
    if dtype == torch.bfloat16 and on_gpu():
        compiled = torch.compile(reference.route, dynamic=False)
        for case in (case for case in CASES if case.kind == "route"):
            compiled(torch.randn(case.tokens, hidden, device=device).to(dtype), rows, biases, None, K, True)


COUNTS: dict[str, dict[str, Sequence[int]]] = {
    "full": {"checked": CHECKED, "cases": (4096,), "sweep": SWEEP},
    "tiny": {"checked": (1, 3, 65), "cases": (64,), "sweep": (1, 2)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, help=f"where the result goes (default: {RESULT.relative_to(RESULT.parents[2])})"
    )
    parser.add_argument("--warm", metavar="DTYPE", help="only compile the kernels for it: bfloat16, float16, float32")
    parser.add_argument("--tune", action="store_true", help="only try other launch constants, and print the best")
    parser.add_argument(
        "--tiny", action="store_true", help="a small model on any device; asserts nothing, needs --out"
    )
    arguments = parser.parse_args()
    if not on_gpu() and not arguments.tiny:
        sys.stdout.write(
            "bench_routing.py needs a GPU with CUDA, and there is none: nothing measured, nothing written.\n"
        )
        return
    if arguments.tiny and arguments.out is None and not arguments.warm:
        parser.error("--tiny measures nothing that belongs into docs: give --out.")
    device = torch.device("cuda" if on_gpu() else "cpu")
    sizes = contenders.TINY if arguments.tiny else contenders.FULL
    counts = COUNTS["tiny" if arguments.tiny else "full"]
    with torch.no_grad():
        if arguments.warm:
            warm(sizes, device, getattr(torch, arguments.warm), [*counts["sweep"], *counts["checked"]])
            return
        if arguments.tune:
            from routing_tuning import tune

            tune(device)
            return
        result = measure(sizes, device, arguments.out or RESULT, counts)
    sys.stdout.write(f"{table(result['rows'])}\n\nFor MEASURED in implementations_flexmoe.py:\n    {result['auto']}\n")
    if not arguments.tiny:
        assert not missed(result), f"missed: {missed(result)}"


if __name__ == "__main__":
    main()
