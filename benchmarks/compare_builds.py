"""Forward passes of this checkout against another checkout on the same checkpoint, in one run.

    python benchmarks/compare_builds.py --other CHECKOUT [--rows decode] [--out JSON]

Each build runs in a separate process, which loads the same checkpoint; the parent requests alternating steps, so that
other load affects both. Memory is placed differently in each process, so the processes are started `STARTS` times,
this checkout's first and second in turn. A ratio is the median over all rounds of (theirs / ours): above 1, this
checkout is faster; `per_start` holds those of the starts.
Rows: prefill of 512 tokens and decoding with a KV cache at batch 1 and 8, in float32 and bfloat16, as loaded and after
`prepack_for_cpu`.

With --rows, the other rows of an existing output file are kept. Asserts the limits of `LIMITS`. Does not cover GPUs,
or comparison with other libraries (`bench_forward.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from checkouts import commit_of, link_checkout
from machine import keep, machine

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "docs" / "benchmarks" / "builds.json"
THREADS = 2
EXPERTS, K = 7, 5
SIZES = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROWS = {
    f"{kind}, {dtype}{prepacked}": (kind, dtype, bool(prepacked))
    for dtype in ("float32", "bfloat16")
    for kind in ("prefill 512", "decode batch 1", "decode batch 8")
    for prepacked in ("", ", prepacked")
}
STARTS = 4
ROUNDS = {"prefill 512": 6, "decode batch 1": 40, "decode batch 8": 20}  # of each start
WARMUP = 2
# Minimum speed relative to the other checkout: a few percent are noise; decoding in bfloat16 may be 10 % slower.
LIMITS = {name: 0.9 if name.startswith("decode") and name.endswith("bfloat16") else 0.97 for name in ROWS}


def write_checkpoint(folder: Path, dtype: str) -> None:
    """A random OLMo-2 model of `SIZES` with `EXPERTS` experts."""
    import torch
    from transformers import Olmo2Config

    from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM

    torch.manual_seed(0)
    names = ["public", *(f"owner-{i}" for i in range(1, EXPERTS))]
    config = FlexMoeConfig(
        anchor_config=Olmo2Config(**SIZES), experts=names, num_experts_per_tok=K, norm_topk_prob=True
    )
    model = FlexMoeForCausalLM(config)
    with torch.no_grad():
        for block in model.flexmoe_blocks():
            for name in names[1:]:
                for parameter in block.experts[name].parameters():
                    parameter.normal_(std=0.02)
                block.router[name].weight.normal_(std=0.05)
    model.to(getattr(torch, dtype)).save_pretrained(folder)


def work(folder: str) -> None:
    """A worker: reads commands from stdin, and writes the seconds they took to stdout."""
    import torch
    from transformers import AutoModelForCausalLM

    import flexmoe  # noqa: F401 - registers the model

    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    model, state = AutoModelForCausalLM.from_pretrained(folder).eval(), {}

    def tokens(batch: int, length: int) -> torch.Tensor:
        return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(length))

    def step() -> None:
        if state["kind"] == "prefill 512":
            model(tokens(1, 512), use_cache=False, logits_to_keep=1)
        else:
            model(next(state["tokens"]), past_key_values=state["cache"], use_cache=True)

    for line in sys.stdin:
        command, *arguments = line.split("|")
        if command == "prepack":
            model.prepack_for_cpu()
            seconds: Any = 0
        elif command == "prepare":
            state["kind"] = arguments[0].strip()
            if state["kind"] != "prefill 512":
                batch = int(state["kind"].split()[-1])
                state["cache"] = model(tokens(batch, 32), use_cache=True, logits_to_keep=1).past_key_values
                state["tokens"] = iter(tokens(batch, 512).split(1, -1))
            seconds = 0
        else:
            start = time.perf_counter()
            step()
            seconds = time.perf_counter() - start
        sys.stdout.write(f"{seconds}\n")
        sys.stdout.flush()


class Worker:
    """A build in a separate process."""

    def __init__(self, checkout: Path, folder: Path, site: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(link_checkout(checkout, site)), "OMP_WAIT_POLICY": "PASSIVE"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
        )

    def send(self, command: str) -> float:
        """Sends a command, and returns its seconds."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def stop(self) -> None:
        """Stops the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def race(ours: Worker, theirs: Worker, kind: str) -> list[tuple[float, float]]:
    """The seconds of our steps and of theirs."""
    for worker in (ours, theirs):
        worker.send(f"prepare|{kind}")
    seconds = []
    for number in range(ROUNDS[kind] + WARMUP):
        if number % 2:
            seconds.append((ours.send("step"), theirs.send("step")))
        else:
            their = theirs.send("step")
            seconds.append((ours.send("step"), their))
    return seconds[WARMUP:]


def summarize(starts: list[list[tuple[float, float]]], limit: float) -> dict[str, Any]:
    """The median of the ratios, and both medians in milliseconds."""
    ratios = [[their / our for our, their in seconds] for seconds in starts]
    speed = statistics.median(ratio for start in ratios for ratio in start)
    ours, theirs = zip(*(pair for seconds in starts for pair in seconds), strict=True)
    return {
        "speed_over_other": round(speed, 3),
        "per_start": [round(statistics.median(start), 3) for start in ratios],
        "milliseconds": {
            "ours": round(1000 * statistics.median(ours), 2),
            "theirs": round(1000 * statistics.median(theirs), 2),
        },
        "rounds": len(ours),
        "limit": limit,
        "passed": speed >= limit,
    }


def measure(other: Path, wanted: str) -> dict[str, Any]:
    """All rows whose names contain `wanted`."""
    rows: dict[str, Any] = {}
    checkouts = {"ours": ROOT, "theirs": other}
    for dtype in ("float32", "bfloat16"):
        here = {name: row for name, row in ROWS.items() if row[1] == dtype and wanted in name}
        if not here:
            continue
        starts: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in here}
        with tempfile.TemporaryDirectory(prefix="flexmoe-builds-") as temporary:
            folder = Path(temporary) / "model"
            write_checkpoint(folder, dtype)
            for start in range(STARTS):
                order = list(checkouts)[:: -1 if start % 2 else 1]
                workers = {
                    name: Worker(checkouts[name], folder, Path(temporary) / f"site-{start}-{name}") for name in order
                }
                for prepacked in (False, True):
                    if prepacked:
                        for name in order:
                            workers[name].send("prepack")
                    for row, (kind, _, row_prepacked) in here.items():
                        if row_prepacked == prepacked:
                            starts[row].append(race(workers["ours"], workers["theirs"], kind))
                for worker in workers.values():
                    worker.stop()
        for name, seconds in starts.items():
            rows[name] = summarize(seconds, LIMITS[name])
            sys.stderr.write(f"{name}: {rows[name]}\n")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, help="the checkout to compare with")
    parser.add_argument("--rows", default="", help="only rows whose names contain this")
    parser.add_argument("--out", type=Path, default=RESULT, help="output file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
        return
    before = machine()
    rows = measure(arguments.other.resolve(), arguments.rows)
    commit = commit_of(arguments.other)
    shapes = {**SIZES, "experts": EXPERTS, "k": K, "threads": THREADS}
    if arguments.rows and arguments.out.is_file():
        kept = json.loads(arguments.out.read_text(encoding="utf-8"))
        assert kept["other"] == commit, f"{arguments.out} compares with {kept['other']}"
        rows = {**kept["rows"], **rows}
    keep({"rows": rows, "other": commit, "shapes": shapes, **before}, arguments.out)
    missed = [name for name, values in rows.items() if not values["passed"]]
    assert not missed, f"slower than {commit[:12]} by more than allowed: {missed}"


if __name__ == "__main__":
    main()
