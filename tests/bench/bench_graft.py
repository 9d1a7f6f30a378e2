"""Streaming graft against `cp -r`: a random bf16 Llama of 1.1 B parameters in 4 shards, made here, chunk by chunk.

Asserts that grafting keeps under 1 GB of private memory (RssAnon of a fresh process, sampled from outside) and runs
at 0.4 times the speed of `cp -r` of the same folder or faster: medians of 3 alternating runs with a warm page cache,
dirty pages flushed before each. The time is that of the call to `graft`, which reads, writes and hashes every tensor;
like cp it leaves the flushing to the system. Starting Python and importing torch comes on top (`process_seconds`).

Run: python tests/bench/bench_graft.py [--folder WHERE] [--out JSON]. Needs 7 GB of disk in WHERE. Linux only.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from machine import machine
from transformers import LlamaConfig, LlamaForCausalLM

from flexmoe.modeling.tensor_writer_flexmoe import TensorSource, write_checkpoint
from flexmoe.modeling.tensors_flexmoe import (
    CHUNK_BYTES,
    CheckpointFolder,
    Chunk,
    TensorInfo,
    tensor_bytes,
    tensor_info,
)

RUNS = 3
MEMORY_LIMIT = 1_000_000_000  # bytes
SPEED_FLOOR = 0.4  # times the speed of cp -r
RESULT = Path(__file__).parents[2] / "docs" / "benchmarks" / "graft.json"

GRAFT = """
import json, sys, time
from flexmoe.conversion.graft import graft
start = time.perf_counter()
graft(sys.argv[1], sys.argv[2])
print(json.dumps(time.perf_counter() - start))
"""


def llama_1b() -> LlamaConfig:
    """The shapes of TinyLlama: 22 layers, hidden 2048, FFN 5632, an untied head."""
    return LlamaConfig(
        vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=2048, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def make_anchor(folder: Path, shards: int = 4) -> list[TensorInfo]:
    """Writes the random checkpoint; a few megabytes of it are in memory at a time."""
    config = llama_1b()
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    infos = [tensor_info(name, tensor) for name, tensor in model.state_dict().items()]
    total, largest = sum(info.nbytes for info in infos), max(info.nbytes for info in infos)
    folder.mkdir()
    sources = [TensorSource(info, lambda info=info: random_chunks(info, generator)) for info in infos]
    written = write_checkpoint(folder, sources, max_shard_size=(total + shards * largest) // shards)
    assert len(written.files) == shards, sorted(written.files)
    config.save_pretrained(folder)
    return infos


def random_chunks(info: TensorInfo, generator: torch.Generator) -> Iterator[Chunk]:
    """bf16 normal noise, as much as the tensor takes."""
    for start in range(0, info.nbytes, CHUNK_BYTES):
        values = torch.randn(min(CHUNK_BYTES, info.nbytes - start) // 2, generator=generator)
        yield tensor_bytes((values * 0.02).bfloat16())


def time_copy(source: Path, target: Path) -> float:
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def time_graft(source: Path, target: Path) -> tuple[float, float, int]:
    """Seconds of the call, seconds of the whole process, peak RssAnon in bytes; the output stays at `target`."""
    os.sync()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    start = time.perf_counter()
    command = [sys.executable, "-c", GRAFT, str(source), str(target)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, private_bytes(process.pid))
        time.sleep(0.01)
    assert process.stdout is not None
    output = process.stdout.read()
    assert process.returncode == 0, f"the graft failed: exit code {process.returncode}"
    return json.loads(output), time.perf_counter() - start, peak


def private_bytes(pid: int) -> int:
    """RssAnon: resident memory that is the process's own, mapped files left out. 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)


def check_bytes(source: Path, target: Path) -> None:
    """Every tensor of the anchor is in the graft, byte for byte."""
    with CheckpointFolder(source) as anchor, CheckpointFolder(target) as grafted:
        public = {name.removeprefix("anchor.").replace(".experts.public.", "."): name for name in grafted.infos}
        for name in anchor.infos:
            pairs = zip(anchor.chunks(name), grafted.chunks(public[name]), strict=True)
            assert all(one == other for one, other in pairs), f"{name} is not what it was"
    assert json.loads((target / "config.json").read_text())["anchor"]["fingerprint"]


def measure(folder: Path) -> dict[str, object]:
    source, target = folder / "anchor", folder / "out"
    infos = make_anchor(source)
    copies, calls, processes, peaks = [], [], [], []
    for run in range(RUNS + 1):
        copies.append(time_copy(source, target))
        seconds, whole, peak = time_graft(source, target)
        if run == 0:
            check_bytes(source, target)
        shutil.rmtree(target)
        calls.append(seconds)
        processes.append(whole)
        peaks.append(peak)
    del copies[0], calls[0], processes[0]  # the first round warms the page cache and Python's own caches
    total = sum(info.nbytes for info in infos)
    copy, call = statistics.median(copies), statistics.median(calls)
    return {
        "bytes": total,
        "parameters": total // 2,
        "tensors": len(infos),
        "shards": 4,
        "dtype": "bfloat16",
        "shapes": {"layers": 22, "hidden": 2048, "ffn": 5632, "vocabulary": 32_000},
        "path": "flexmoe.graft in a fresh process: pread and write in chunks, SHA-256 per tensor, no fsync",
        "copy_seconds": [round(value, 3) for value in copies],
        "graft_seconds": [round(value, 3) for value in calls],
        "process_seconds": [round(value, 3) for value in processes],
        "copy_gb_per_second": round(total / copy / 1e9, 3),
        "graft_gb_per_second": round(total / call / 1e9, 3),
        "speed_over_copy": round(copy / call, 3),
        "speed_floor": SPEED_FLOOR,
        "passed": copy / call >= SPEED_FLOOR and max(peaks) < MEMORY_LIMIT,
        "peak_private_bytes": max(peaks),
        "private_bytes_limit": MEMORY_LIMIT,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="where to put 7 GB for a while")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the result goes")
    arguments = parser.parse_args()
    before = machine()  # its load: other work slows the graft more than cp, because it hashes in a second thread
    with tempfile.TemporaryDirectory(prefix="flexmoe-bench-", dir=arguments.folder) as folder:
        result = measure(Path(folder)) | before
    text = json.dumps(result, indent=2)
    sys.stdout.write(text + "\n")
    assert result["peak_private_bytes"] < MEMORY_LIMIT, "grafting takes too much memory"
    assert result["speed_over_copy"] >= SPEED_FLOOR, "grafting is too slow"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
