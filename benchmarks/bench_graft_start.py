"""The time of `flexmoe graft` on a Llama of 100 M parameters beyond its imports.

The command runs in new processes that alternate with `python -c "import flexmoe"`, which imports no model, and with an
import of the dense model's class, which every program that uses the model needs. Medians of wall seconds and
processor seconds. The threshold is 1.5 s beyond each import. Only the second is asserted, because the first is mostly
that import.

Run: python benchmarks/bench_graft_start.py [--size 100m] [--runs 5] [--folder WHERE] [--out JSON]. Linux only.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from llama_files import SHAPES, write_llama
from machine import keep, machine
from process_usage import ProcessUsage, run_command

RUNS = 5
LIMIT = 1.5  # seconds
CLASS = "the import of the dense model's class"
RESULT = Path(__file__).parents[1] / "docs" / "benchmarks" / "graft_start.json"

IMPORTS = {
    "`import flexmoe`": "import flexmoe",
    CLASS: "from transformers import LlamaForCausalLM",
}
COMMAND = "flexmoe graft"


def measure(folder: Path, size: str, runs: int) -> dict[str, object]:
    anchor, out = folder / "anchor", folder / "out"
    infos = write_llama(anchor, size)
    commands = {name: [sys.executable, "-c", code] for name, code in IMPORTS.items()}
    commands[COMMAND] = [sys.executable, "-m", "flexmoe", "graft", anchor, "--out", out]
    took: dict[str, list[ProcessUsage]] = {name: [] for name in commands}
    for run in range(runs + 1):
        for name, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            usage = run_command(command)
            if run:  # the first round warms the page cache
                took[name].append(usage)
    seconds = {name: statistics.median(run.seconds for run in ran) for name, ran in took.items()}
    processor = {name: statistics.median(run.cpu_seconds for run in ran) for name, ran in took.items()}
    beyond = {name: round(seconds[COMMAND] - seconds[name], 3) for name in IMPORTS}
    return {
        "parameters": sum(info.nbytes for info in infos) // 2,
        "dtype": "bfloat16",
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "processor_seconds": {name: round(value, 3) for name, value in processor.items()},
        "seconds_beyond": beyond,
        "runs": runs,
        "bars": {"seconds_beyond": dict.fromkeys(IMPORTS, LIMIT)},
        "passed": beyond[CLASS] <= LIMIT,
        "path": "fresh processes in turns, page cache warm, with the fingerprint",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="100m", help="of the anchor")
    parser.add_argument("--runs", type=int, default=RUNS, help="runs of each command, after one for warmup")
    parser.add_argument("--folder", type=Path, default=None, help="folder for two temporary models")
    parser.add_argument("--out", type=Path, default=RESULT, help="output file")
    arguments = parser.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory(prefix="flexmoe-bench-", dir=arguments.folder) as folder:
        result = measure(Path(folder), arguments.size, arguments.runs) | before
    keep(result, arguments.out)
    assert result["passed"], f"flexmoe graft takes more than {LIMIT} s beyond {CLASS}"


if __name__ == "__main__":
    main()
