"""Loading a 1 GB checkpoint with 7 experts against FlexOlmo of transformers with the same shapes and bytes.

Both are written by `save_pretrained` in bfloat16 (shards of 300 MB) with the same tensors. FlexOlmo is written in two
formats: with one tensor per expert and matrix, which are stacked while loading (the default), and with one stack per
layer as in memory (`save_original_format=False`), which has a quarter of the tensors. Each load is a new process, in
alternation, with a warm page cache; the imports are not timed. Two rows: `load` is
`AutoModelForCausalLM.from_pretrained` alone, which maps the files; `load and forward` also runs one token through all
experts (k = 7), which reads every page.

Asserts for both rows at most 1.1 times the median time of FlexOlmo in its default format, and at most 1.1 times the
median peaks of both formats: resident memory (VmHWM, with mapped files) and private memory (RssAnon, sampled in the
process). The time against the stacked format is reported without a threshold: separate tensors of experts cost a
fraction of a millisecond each. Needs 4 GB of disk. Linux only.

Run: python benchmarks/bench_loading.py [--out JSON].
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from bench_forward import EXPERTS, NAMES, SIZES, with_its_tensors
from machine import keep, machine
from transformers import FlexOlmoConfig, FlexOlmoForCausalLM

RESULT = Path(__file__).parents[1] / "docs" / "benchmarks" / "loading.json"
RUNS = 5
LIMIT = 1.1  # times the seconds and bytes of FlexOlmo
WRITTEN, STACKED = "flex_olmo", "flex_olmo, stacked"
FIGURES = ("seconds", "peak_resident_bytes", "peak_private_bytes")

LOAD = """
import json, sys, threading, time
from pathlib import Path
import flexmoe, torch, transformers
from flexmoe.modeling import FlexMoeForCausalLM
from transformers import AutoModelForCausalLM, FlexOlmoForCausalLM

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

torch.set_num_threads(2)
transformers.utils.logging.disable_progress_bar()
folder, forward = sys.argv[1], sys.argv[2] == "forward"
peak, done = status("RssAnon:"), threading.Event()
def sample():
    global peak
    while not done.wait(0.002):
        peak = max(peak, status("RssAnon:"))
private_before = peak
sampler = threading.Thread(target=sample)
sampler.start()
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
resident_before = status("VmRSS:")
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(folder)
if forward:
    with torch.no_grad():
        logits = model(torch.tensor([[7]])).logits
seconds = time.perf_counter() - start
done.set()
sampler.join()
print(json.dumps({
    "seconds": seconds,
    "peak_resident_bytes": status("VmHWM:"),
    "peak_private_bytes": max(peak, status("RssAnon:")),
    "before": {"resident_bytes": resident_before, "private_bytes": private_before},
    "logits": logits.float().flatten()[:8].tolist() if forward else None,
}))
"""


def write_checkpoints(folder: Path) -> dict[str, Path]:
    """Writes the same model three times: as FlexMoE, and as FlexOlmo in both formats."""
    torch.manual_seed(0)
    config = FlexOlmoConfig(**SIZES, num_experts=EXPERTS, num_experts_per_tok=EXPERTS, norm_topk_prob=True)
    theirs = FlexOlmoForCausalLM(config).to(torch.bfloat16)
    ours = with_its_tensors(theirs)
    ours.config.num_experts_per_tok = EXPERTS
    folders = {name: folder / name for name in ("flexmoe", WRITTEN, STACKED)}
    ours.save_pretrained(folders["flexmoe"], max_shard_size="300MB")
    theirs.save_pretrained(folders[WRITTEN], max_shard_size="300MB")
    theirs.save_pretrained(folders[STACKED], max_shard_size="300MB", save_original_format=False)
    return folders


def load(folder: Path, what: str) -> dict[str, object]:
    """The measurements of one new process."""
    command = [sys.executable, "-c", LOAD, str(folder), what]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, encoding="utf-8").stdout)


def measure(folders: dict[str, Path]) -> dict[str, object]:
    rows: dict[str, object] = {}
    for what in ("load", "forward"):
        runs: dict[str, list[dict]] = {name: [] for name in folders}
        for run in range(RUNS + 1):
            for name, folder in folders.items():
                measured = load(folder, what)
                if run:  # the first round fills the page cache
                    runs[name].append(measured)
        if what == "forward":
            check_logits({name: measured[0]["logits"] for name, measured in runs.items()})
        rows["load" if what == "load" else "load and forward"] = row(runs)
    return rows


def check_logits(logits: dict[str, list[float]]) -> None:
    """Checks that all three are the same model."""
    first, *others = (torch.tensor(values) for values in logits.values())
    for other in others:
        torch.testing.assert_close(first, other, rtol=5e-2, atol=5e-2)


def row(runs: dict[str, list[dict]]) -> dict[str, object]:
    """Medians, ratios of FlexMoE to each format of FlexOlmo, and whether the thresholds are met."""
    medians = {
        figure: {name: statistics.median(run[figure] for run in measured) for name, measured in runs.items()}
        for figure in FIGURES
    }
    ratios = {
        other: {figure: round(values["flexmoe"] / values[other], 3) for figure, values in medians.items()}
        for other in (WRITTEN, STACKED)
    }
    limited = [ratios[WRITTEN]["seconds"], *(ratios[o][f] for o in ratios for f in FIGURES if f != "seconds")]
    before = {name: measured[0]["before"] for name, measured in runs.items()}
    return {"ratios": ratios, "medians": medians, "before": before, "passed": max(limited) <= LIMIT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=None, help="folder for 4 GB of temporary files")
    parser.add_argument("--out", type=Path, default=RESULT, help="output file")
    arguments = parser.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory(prefix="flexmoe-bench-", dir=arguments.folder) as folder:
        folders = write_checkpoints(Path(folder))
        sizes = {name: sum(f.stat().st_size for f in at.glob("*.safetensors")) for name, at in folders.items()}
        rows = measure(folders)
    result = {
        "rows": rows,
        "bars": dict.fromkeys(FIGURES, LIMIT),
        "bytes": sizes,
        "runs": RUNS,
        "dtype": "bfloat16",
        "shapes": {**SIZES, "experts": len(NAMES)},
        "path": "AutoModelForCausalLM.from_pretrained, fresh processes in turns, page cache warm, 2 threads",
        **before,
    }
    keep(result, arguments.out)
    missed = [name for name, values in rows.items() if not values["passed"]]
    assert not missed, f"loading costs more than {LIMIT} times FlexOlmo's: {missed}"


if __name__ == "__main__":
    main()
