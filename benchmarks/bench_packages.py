"""Adding and removing an expert of 1 GB on a loaded model, with all checks that `add_expert` makes by default.

A Llama-shaped model with public alone is loaded from its graft. Then one new process alternately reads and hashes the
package from a warm page cache (the floor, since the hash must be checked), adds it, and removes it. Time is the median
over the runs. Memory is RssAnon, sampled in the process: the peak while the expert is added beyond that of the model,
and the rest after its removal.

The floor reuses one buffer; adding allocates a gigabyte. Under a hypervisor that reclaims freed memory, first accesses
can be ten times slower, so as much memory is allocated and freed right before the timing. Adding without that is
measured, too, and reported without a threshold.

Asserts that adding takes at most 1.3 times as long as reading and hashing, and its peak private memory is at most 1.15
times the package beyond that of the model; that removing takes less than 50 ms, and at most 2 % of the package remain
allocated. Needs 4 GB of disk and 3 GB of memory. Linux only.

Run: python benchmarks/bench_packages.py [--out JSON].
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from llama_files import noise_source
from machine import keep, machine
from transformers import LlamaConfig, LlamaForCausalLM

from flexmoe.conversion.graft import graft
from flexmoe.io.tensors import tensor_info
from flexmoe.io.writer import source_from_tensor, write_checkpoint
from flexmoe.modeling import FlexMoeConfig
from flexmoe.packages.package import ExpertManifest, ExpertPackage, stream_package

RESULT = Path(__file__).parents[1] / "docs" / "benchmarks" / "packages.json"
SHAPE = {"num_hidden_layers": 15, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16}
RUNS = 5
LIMITS = {
    "add_over_reading_and_hashing": 1.3,
    "peak_private_over_package": 1.15,
    "remove_seconds": 0.05,
    "left_after_removal_over_package": 0.02,
}

WORK = """
import gc, hashlib, json, statistics, sys, threading, time
from pathlib import Path
import torch, transformers
from flexmoe.io.tensors import empty_tensor
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.packages.package import ExpertPackage

def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

class Peak:
    def __enter__(self):
        self.bytes, self.done = private(), threading.Event()
        self.thread = threading.Thread(target=self.sample)
        self.thread.start()
        return self
    def sample(self):
        while not self.done.wait(0.005):
            self.bytes = max(self.bytes, private())
    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        self.bytes = max(self.bytes, private())

def read_and_hash(path):
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()

def timed(action):
    start = time.perf_counter()
    action()
    return time.perf_counter() - start

torch.set_num_threads(2)
transformers.utils.logging.disable_progress_bar()
def allocate_and_free(infos):
    for tensor in [empty_tensor(info) for info in infos]:
        tensor.view(torch.uint8)[..., ::4096].fill_(1)

grafted, package, runs = sys.argv[1], sys.argv[2], int(sys.argv[3])
infos = list(ExpertPackage.open(package).infos.values())
model = FlexMoeForCausalLM.from_pretrained(grafted)
weights = Path(package) / "expert.safetensors"
rows = {"read_and_hash": [], "add": [], "remove": [], "add_to_memory_never_touched": []}
peaks, left = [], []
for run in range(runs + 1):
    rows["read_and_hash"].append(timed(lambda: read_and_hash(weights)))
    before = private()
    allocate_and_free(infos)
    rows["add"].append(timed(lambda: model.add_expert(package)))
    rows["remove"].append(timed(lambda: model.remove_expert("math")))
    left.append(private() - before)
    # once more with the sampling thread, which would slow the timed call
    with Peak() as peak:
        model.add_expert(package)
    peaks.append(peak.bytes - before)
    model.remove_expert("math")
    time.sleep(3)  # a hypervisor reclaims free memory within seconds
    rows["add_to_memory_never_touched"].append(timed(lambda: model.add_expert(package)))
    model.remove_expert("math")
print(json.dumps({
    "seconds": {name: statistics.median(values[1:]) for name, values in rows.items()},
    "all_seconds": rows,
    "peak_private_bytes": max(peaks[1:]),
    "left_bytes": max(left[1:]),
    "model_private_bytes": before,
}))
"""


def write_model_and_package(folder: Path) -> tuple[Path, Path]:
    """Writes a graft with public alone, and a package whose networks have the size of public."""
    config = LlamaConfig(**SHAPE, vocab_size=1000, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        dense = LlamaForCausalLM(config).to(torch.bfloat16)
    infos = [tensor_info(name, tensor) for name, tensor in dense.state_dict().items()]
    (folder / "anchor").mkdir()
    write_checkpoint(folder / "anchor", [noise_source(info, i) for i, info in enumerate(infos)], flush=False)
    config.save_pretrained(folder / "anchor")
    grafted = graft(folder / "anchor", folder / "grafted")
    anchor = FlexMoeConfig.from_pretrained(grafted).anchor
    sources = []
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}.mlp."
        for number, info in enumerate(info for info in infos if info.name.startswith(prefix)):
            name = f"layers.{layer}.ffn.{info.name.removeprefix(prefix)}"
            renamed = tensor_info(name, dense.state_dict()[info.name])
            sources.append(noise_source(renamed, 1000 + 10 * layer + number))
        row = torch.randn(1, config.hidden_size, generator=torch.Generator().manual_seed(layer)) / 100
        sources.append(source_from_tensor(f"layers.{layer}.router.weight", row))
        sources.append(source_from_tensor(f"layers.{layer}.router.bias", torch.zeros(1)))
    manifest = ExpertManifest(
        name="math",
        layers=list(range(config.num_hidden_layers)),
        ffn={"class": "LlamaMLP", "hidden": config.hidden_size, "intermediate": config.intermediate_size},
        dtype="bfloat16",
        anchor={**{key: anchor.get(key) for key in ("repo", "revision", "fingerprint")}, "model_type": "llama"},
    )
    return grafted, stream_package(folder / "package", manifest, sources)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="folder for 4 GB of temporary files")
    parser.add_argument("--out", type=Path, default=RESULT, help="output file")
    arguments = parser.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory(prefix="flexmoe-bench-", dir=arguments.folder) as folder:
        grafted, package = write_model_and_package(Path(folder))
        size = sum(info.nbytes for info in ExpertPackage.open(package).infos.values())
        command = [sys.executable, "-c", WORK, str(grafted), str(package), str(RUNS)]
        measured = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8").stdout
        )
    seconds = measured["seconds"]
    figures = {
        "add_over_reading_and_hashing": round(seconds["add"] / seconds["read_and_hash"], 3),
        "peak_private_over_package": round(measured["peak_private_bytes"] / size, 3),
        "remove_seconds": round(seconds["remove"], 4),
        "left_after_removal_over_package": round(measured["left_bytes"] / size, 4),
    }
    cold = round(seconds["add_to_memory_never_touched"] / seconds["read_and_hash"], 3)
    missed = [name for name, figure in figures.items() if figure > LIMITS[name]]
    result = {
        "figures": figures,
        "add_to_memory_never_touched_over_reading_and_hashing": cold,
        "bars": LIMITS,
        "passed": not missed,
        "package_bytes": size,
        "measured": measured,
        "runs": RUNS,
        "shapes": SHAPE,
        "dtype": "bfloat16",
        "path": "model.add_expert(folder) with its defaults, model.remove_expert; page cache warm, 2 threads",
        **before,
    }
    keep(result, arguments.out)
    assert not missed, f"thresholds exceeded: {missed}"


if __name__ == "__main__":
    main()
