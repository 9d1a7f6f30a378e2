"""`flexmoe graft --expert` against mergekit-moe: a Llama anchor and two fine-tunes of it as one MoE model.

The anchor is random, in bfloat16 and shards, by default with 1.1 B parameters; the fine-tunes have other feed-forward
networks and share the rest. FlexMoE writes three experts per layer (including that of the anchor), rows of zeros and
the fingerprint; mergekit-moe writes two, with `gate_mode: random`, its fastest mode. Asserts that FlexMoE needs at
most a third of its wall time and of its peak private memory (RssAnon, sampled; ru_maxrss, which includes mapped files,
is reported, too). Medians of alternating runs of the complete commands on the CPU. Also reported: seconds beyond the
import of torch and the model's class, per gigabyte written.

mergekit needs a separate environment, whose Python is given as MERGEKIT_PYTHON or --mergekit-python:

    python -m venv mergekit-venv && mergekit-venv/bin/python -m pip install mergekit
    MERGEKIT_PYTHON=mergekit-venv/bin/python make bench

Without mergekit this fails, unless --skip is given.

Run: python benchmarks/bench_mergekit.py [--size 100m] [--folder WHERE] [--out JSON]. WHERE needs space for about six
models, 14 GB for 1b. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llama_files import SHAPES, write_fine_tune, write_llama
from machine import keep, machine
from process_usage import ProcessUsage, run_command
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

RUNS = 3
SHARE = 1 / 3  # of mergekit's time and memory
RESULT = Path(__file__).parents[1] / "docs" / "benchmarks" / "mergekit.json"
OWNERS = ("math", "code")

START = "from transformers import LlamaForCausalLM"

VERSIONS = """
import importlib.metadata as found, json
print(json.dumps({name: found.version(name) for name in ("mergekit", "torch", "transformers", "safetensors")}))
"""


def write_models(folder: Path, size: str) -> int:
    """Writes the fine-tunes, and the anchor with a tokenizer for mergekit-moe. Returns the bytes of the anchor."""
    infos = write_llama(folder / "anchor", size)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder / "anchor")
    for number, owner in enumerate(OWNERS, 1):
        write_fine_tune(folder / "anchor", folder / owner, 1000 * number)
    return sum(info.nbytes for info in infos)


def write_recipe(folder: Path) -> Path:
    """Writes the recipe of mergekit-moe."""
    experts = "".join(f"  - source_model: {folder / owner}\n    positive_prompts: ['']\n" for owner in OWNERS)
    recipe = folder / "recipe.yml"
    recipe.write_text(
        f"base_model: {folder / 'anchor'}\ngate_mode: random\ndtype: bfloat16\nexperts:\n{experts}", encoding="utf-8"
    )
    return recipe


def commands(folder: Path, mergekit: Path) -> dict[str, list[str | Path]]:
    """Both commands, writing to `folder/out`."""
    experts = [word for owner in OWNERS for word in ("--expert", f"{owner}={folder / owner}")]
    graft = [sys.executable, "-m", "flexmoe", "graft", folder / "anchor", *experts, "--shared", "anchor"]
    merge = [mergekit.parent / "mergekit-moe", write_recipe(folder), folder / "out", "--quiet"]
    return {"flexmoe graft": [*graft, "--out", folder / "out"], "mergekit-moe": merge}


def check_experts(out: Path, name: str) -> int:
    """Checks the experts of the written model; returns the bytes of its weights."""
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    if name == "mergekit-moe":
        assert (config["model_type"], config["num_local_experts"]) == ("mixtral", len(OWNERS))
    else:
        assert [expert["name"] for expert in config["experts"]] == ["public", *OWNERS]
    return sum(path.stat().st_size for path in out.glob("*.safetensors"))


def measure(folder: Path, size: str, runs: int, mergekit: Path) -> dict[str, object]:
    anchor_bytes = write_models(folder, size)
    took: dict[str, list[ProcessUsage]] = {}
    written: dict[str, int] = {}
    for run in range(runs + 1):
        for name, command in commands(folder, mergekit).items():
            shutil.rmtree(folder / "out", ignore_errors=True)
            os.sync()
            usage = run_command(command, HF_HUB_OFFLINE="1")
            written[name] = check_experts(folder / "out", name)
            if run:  # the first round warms the page cache
                took.setdefault(name, []).append(usage)
    rows = {
        name: {
            "seconds": statistics.median(run.seconds for run in ran),
            "processor_seconds": statistics.median(run.cpu_seconds for run in ran),
            "peak_private_bytes": max(run.private_bytes for run in ran),
            "peak_resident_bytes": max(run.resident_bytes for run in ran),
            "written_bytes": written[name],
        }
        for name, ran in took.items()
    }
    for name, python in {"flexmoe graft": Path(sys.executable), "mergekit-moe": mergekit}.items():
        start = statistics.median(run_command([python, "-c", START]).seconds for _ in range(runs + 1))
        beyond = (rows[name]["seconds"] - start) / (rows[name]["written_bytes"] / 1e9)
        rows[name] |= {"start_seconds": start, "seconds_beyond_start_per_gigabyte": beyond}
    ours, theirs = rows["flexmoe graft"], rows["mergekit-moe"]
    ratios = {figure: round(ours[figure] / theirs[figure], 3) for figure in ours}
    limits = {"seconds": round(SHARE, 3), "peak_private_bytes": round(SHARE, 3)}
    return {
        "parameters": anchor_bytes // 2,
        "bytes": anchor_bytes,
        "dtype": "bfloat16",
        "experts": {"flexmoe graft": 1 + len(OWNERS), "mergekit-moe": len(OWNERS)},
        "rows": {name: {figure: round(value, 2) for figure, value in row.items()} for name, row in rows.items()},
        "ratios": ratios,
        "bars": limits,
        "passed": all(ratios[figure] <= limit for figure, limit in limits.items()),
        "runs": runs,
        "path": "whole commands in turns, page cache warm, sync before each; ratios are FlexMoE's over mergekit's",
        "mergekit_versions": json.loads(run_command([mergekit, "-c", VERSIONS]).output),
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="1b", help="of the anchor")
    parser.add_argument("--runs", type=int, default=RUNS, help="runs of each command, after one for warmup")
    parser.add_argument("--mergekit-python", type=Path, default=os.environ.get("MERGEKIT_PYTHON"))
    parser.add_argument("--skip", action="store_true", help="do nothing without mergekit")
    parser.add_argument("--folder", type=Path, default=None, help="folder for six temporary models")
    parser.add_argument("--out", type=Path, default=RESULT, help="output file")
    arguments = parser.parse_args(words)
    if arguments.mergekit_python is None:
        text = "No mergekit: set MERGEKIT_PYTHON to its Python. The docstring of this file shows how to install it.\n"
        sys.stdout.write(text)
        sys.exit(0 if arguments.skip else 2)
    before = machine()
    with tempfile.TemporaryDirectory(prefix="flexmoe-bench-", dir=arguments.folder) as folder:
        result = measure(Path(folder), arguments.size, arguments.runs, arguments.mergekit_python) | before
    keep(result, arguments.out)
    assert result["passed"], "grafting needs more than a third of mergekit's time or memory"


if __name__ == "__main__":
    main()
