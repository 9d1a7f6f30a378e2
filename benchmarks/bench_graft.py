"""Streaming graft against `cp -r`, on a random Llama in bfloat16 and shards, by default with 7 B parameters.

Asserts that grafting needs less than 1 GB of private memory, independent of the size of the model, and has at least
0.4 times the speed of `cp -r` of the same folder, 0.9 times with `fingerprint=False`. Medians of alternating runs,
each from the same state: no output folder, no pending writes, the anchor read once. The time is that of the call of
`graft`, which like cp does not flush to disk. It does not include starting Python and importing torch
(`process_seconds`, and `bench_graft_start.py`).

Run: python benchmarks/bench_graft.py [--size 1b] [--folder WHERE] [--out JSON]. WHERE needs space for two models,
27 GB for 7b. Linux only.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llama_files import SHAPES, write_llama
from machine import keep, machine
from process_usage import run_command

from flexmoe.io.tensors import CheckpointFolder

RUNS = 3
MEMORY_LIMIT = 1_000_000_000  # bytes
SPEED_FLOORS = {"graft": 0.4, "graft without fingerprint": 0.9}  # times the speed of cp -r
RESULT = Path(__file__).parents[1] / "docs" / "benchmarks" / "graft.json"

GRAFT = """
import sys, time
from flexmoe.conversion.graft import graft
start = time.perf_counter()
graft(sys.argv[1], sys.argv[2], fingerprint=sys.argv[3] == "graft")
print(time.perf_counter() - start)
"""


def prepare(source: Path, target: Path) -> None:
    """Creates the state from which each run starts."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    buffer = bytearray(4 << 20)
    for path in sorted(source.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def time_copy(source: Path, target: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    return time.perf_counter() - start


def check_bytes(source: Path, target: Path) -> None:
    """Checks that every tensor of the anchor is in the graft, byte for byte."""
    with CheckpointFolder(source) as anchor, CheckpointFolder(target) as grafted:
        public = {name.removeprefix("anchor.").replace(".experts.public.", "."): name for name in grafted.infos}
        for name in anchor.infos:
            pairs = zip(anchor.chunks(name), grafted.chunks(public[name]), strict=True)
            assert all(chunk == copied for chunk, copied in pairs), f"{name} differs"


def measure(folder: Path, size: str, runs: int) -> dict[str, object]:
    source, target = folder / "anchor", folder / "out"
    infos = write_llama(source, size)
    copies: list[float] = []
    calls: dict[str, list[float]] = {way: [] for way in SPEED_FLOORS}
    processes, peak = [], 0
    for run in range(runs + 1):
        prepare(source, target)
        copies.append(time_copy(source, target))
        for way, seconds in calls.items():
            prepare(source, target)
            grafted = run_command([sys.executable, "-c", GRAFT, source, target, way], OMP_WAIT_POLICY="PASSIVE")
            if run == 0:
                check_bytes(source, target)
            seconds.append(float(grafted.output.split()[-1]))
            processes.append(grafted.seconds)
            peak = max(peak, grafted.private_bytes)
    for values in (copies, *calls.values()):
        del values[0]  # the first round warms the caches of Python
    total = sum(info.nbytes for info in infos)
    copy = statistics.median(copies)
    speeds = {way: round(copy / statistics.median(seconds), 3) for way, seconds in calls.items()}
    layers, hidden, ffn, _, _, vocabulary = SHAPES[size]
    return {
        "bytes": total,
        "parameters": total // 2,
        "tensors": len(infos),
        "shards": len(list(source.glob("*.safetensors"))),
        "dtype": "bfloat16",
        "shapes": {"layers": layers, "hidden": hidden, "ffn": ffn, "vocabulary": vocabulary},
        "path": "flexmoe.graft in a fresh process: pread and write in chunks, SHA-256 per tensor, no fsync",
        "page_cache": "before each run: no output, sync, the anchor read once",
        "copy_seconds": [round(value, 3) for value in copies],
        "graft_seconds": {way: [round(value, 3) for value in seconds] for way, seconds in calls.items()},
        "process_seconds": round(statistics.median(processes), 3),
        "copy_gb_per_second": round(total / copy / 1e9, 3),
        "speed_over_copy": speeds,
        "speed_floors": SPEED_FLOORS,
        "peak_private_bytes": peak,
        "private_bytes_limit": MEMORY_LIMIT,
        "passed": all(speeds[way] >= floor for way, floor in SPEED_FLOORS.items()) and peak < MEMORY_LIMIT,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="7b", help="of the anchor")
    parser.add_argument("--runs", type=int, default=RUNS, help="runs of each command, after one for warmup")
    parser.add_argument("--folder", type=Path, default=None, help="folder for two temporary models")
    parser.add_argument("--out", type=Path, default=RESULT, help="output file")
    arguments = parser.parse_args()
    before = machine()  # the load slows the graft more than cp, because it hashes in a second thread
    with tempfile.TemporaryDirectory(prefix="flexmoe-bench-", dir=arguments.folder) as folder:
        result = measure(Path(folder), arguments.size, arguments.runs) | before
    keep(result, arguments.out)
    assert result["passed"], "grafting is slower, or needs more memory, than allowed"


if __name__ == "__main__":
    main()
