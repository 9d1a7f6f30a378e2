"""`flexmoe graft --expert` against mergekit-moe: a Llama anchor and two fine-tunes of it become one mixture.

The anchor is random, in bf16 and shards, of 1.1 B parameters unless told otherwise; the fine-tunes have other networks
and share the rest. FlexMoE writes three experts per layer (the anchor's own is one), rows of zeros and the
fingerprint; mergekit-moe writes the two, with `gate_mode: random`, which is its cheapest. Asserts that FlexMoE takes
at most a third of its wall time and of its peak private memory (RssAnon, sampled from outside; ru_maxrss, which counts
mapped files, stands beside it). Both are whole commands in turns, on the CPU, their start included; medians. Beside
them stands the work alone: seconds beyond the import of torch and the model's class, per gigabyte written.

mergekit wants an environment of its own, whose Python is given as MERGEKIT_PYTHON or --mergekit-python:

    python -m venv mergekit-venv && mergekit-venv/bin/python -m pip install mergekit
    MERGEKIT_PYTHON=mergekit-venv/bin/python make bench

Without one this fails, unless --skip says that it may do nothing.

Run: python tests/bench/bench_mergekit.py [--size 100m] [--folder WHERE] [--out JSON]. WHERE needs room for some six
models, which for 1b are 14 GB. Linux only.
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
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from watched import Watched, watch

RUNS = 3
SHARE = 1 / 3  # of mergekit's time and memory
RESULT = Path(__file__).parents[2] / "docs" / "benchmarks" / "mergekit.json"
OWNERS = ("math", "code")

START = "from transformers import LlamaForCausalLM"

VERSIONS = """
import importlib.metadata as found, json
print(json.dumps({name: found.version(name) for name in ("mergekit", "torch", "transformers", "safetensors")}))
"""


def write_models(folder: Path, size: str) -> int:
    """The anchor with a tokenizer, which mergekit-moe asks for, and the fine-tunes. Returns the anchor's bytes."""
    infos = write_llama(folder / "anchor", size)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder / "anchor")
    for number, owner in enumerate(OWNERS, 1):
        write_fine_tune(folder / "anchor", folder / owner, 1000 * number)
    return sum(info.nbytes for info in infos)


def write_recipe(folder: Path) -> Path:
    """What mergekit-moe is told."""
    experts = "".join(f"  - source_model: {folder / owner}\n    positive_prompts: ['']\n" for owner in OWNERS)
    recipe = folder / "recipe.yml"
    recipe.write_text(f"base_model: {folder / 'anchor'}\ngate_mode: random\ndtype: bfloat16\nexperts:\n{experts}")
    return recipe


def commands(folder: Path, mergekit: Path) -> dict[str, list[str | Path]]:
    """Each way, writing to `folder/out`."""
    experts = [word for owner in OWNERS for word in ("--expert", f"{owner}={folder / owner}")]
    graft = [sys.executable, "-m", "flexmoe", "graft", folder / "anchor", *experts, "--shared", "anchor"]
    merge = [mergekit.parent / "mergekit-moe", write_recipe(folder), folder / "out", "--quiet"]
    return {"flexmoe graft": [*graft, "--out", folder / "out"], "mergekit-moe": merge}


def check_experts(out: Path, way: str) -> int:
    """The mixture is what was asked for; its bytes of weights."""
    config = json.loads((out / "config.json").read_text())
    if way == "mergekit-moe":
        assert (config["model_type"], config["num_local_experts"]) == ("mixtral", len(OWNERS))
    else:
        assert [expert["name"] for expert in config["experts"]] == ["public", *OWNERS]
    return sum(path.stat().st_size for path in out.glob("*.safetensors"))


def measure(folder: Path, size: str, runs: int, mergekit: Path) -> dict[str, object]:
    anchor_bytes = write_models(folder, size)
    took: dict[str, list[Watched]] = {}
    written: dict[str, int] = {}
    for run in range(runs + 1):
        for way, command in commands(folder, mergekit).items():
            shutil.rmtree(folder / "out", ignore_errors=True)
            os.sync()
            watched = watch(command, HF_HUB_OFFLINE="1")
            written[way] = check_experts(folder / "out", way)
            if run:  # the first round warms the page cache
                took.setdefault(way, []).append(watched)
    rows = {
        way: {
            "seconds": statistics.median(run.seconds for run in ran),
            "processor_seconds": statistics.median(run.cpu_seconds for run in ran),
            "peak_private_bytes": max(run.private_bytes for run in ran),
            "peak_resident_bytes": max(run.resident_bytes for run in ran),
            "written_bytes": written[way],
        }
        for way, ran in took.items()
    }
    for way, python in {"flexmoe graft": Path(sys.executable), "mergekit-moe": mergekit}.items():
        start = statistics.median(watch([python, "-c", START]).seconds for _ in range(runs + 1))
        beyond = (rows[way]["seconds"] - start) / (rows[way]["written_bytes"] / 1e9)
        rows[way] |= {"start_seconds": start, "seconds_beyond_start_per_gigabyte": beyond}
    ours, theirs = rows["flexmoe graft"], rows["mergekit-moe"]
    ratios = {figure: round(ours[figure] / theirs[figure], 3) for figure in ours}
    bars = {"seconds": round(SHARE, 3), "peak_private_bytes": round(SHARE, 3)}
    return {
        "parameters": anchor_bytes // 2,
        "bytes": anchor_bytes,
        "dtype": "bfloat16",
        "experts": {"flexmoe graft": 1 + len(OWNERS), "mergekit-moe": len(OWNERS)},
        "rows": {way: {name: round(value, 2) for name, value in row.items()} for way, row in rows.items()},
        "ratios": ratios,
        "bars": bars,
        "passed": all(ratios[figure] <= bar for figure, bar in bars.items()),
        "runs": runs,
        "path": "whole commands in turns, page cache warm, sync before each; ratios are FlexMoE's over mergekit's",
        "mergekit_versions": json.loads(watch([mergekit, "-c", VERSIONS]).output),
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="1b", help="of the anchor")
    parser.add_argument("--runs", type=int, default=RUNS, help="of each, after one that does not count")
    parser.add_argument("--mergekit-python", type=Path, default=os.environ.get("MERGEKIT_PYTHON"))
    parser.add_argument("--skip", action="store_true", help="do nothing where there is no mergekit")
    parser.add_argument("--folder", type=Path, default=None, help="where to put six models for a while")
    parser.add_argument("--out", type=Path, default=RESULT, help="where the result goes")
    arguments = parser.parse_args(words)
    if arguments.mergekit_python is None:
        text = "No mergekit: give its Python as MERGEKIT_PYTHON. How to make one stands at the top of this file.\n"
        sys.stdout.write(text)
        sys.exit(0 if arguments.skip else 2)
    before = machine()
    with tempfile.TemporaryDirectory(prefix="flexmoe-bench-", dir=arguments.folder) as folder:
        result = measure(Path(folder), arguments.size, arguments.runs, arguments.mergekit_python) | before
    keep(result, arguments.out)
    assert result["passed"], "grafting takes more than a third of mergekit's time or memory"


if __name__ == "__main__":
    main()
