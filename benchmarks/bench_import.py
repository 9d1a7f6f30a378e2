"""The time that `import flexmoe` adds to `import transformers` and `from transformers import AutoModelForCausalLM`.

New processes alternate with and without the import, after one of each that fills the page cache. Asserts that the
median time of the statement is at most 0.3 s. The difference between the medians of all imports is reported, too, but
varies on a busy machine. `tests/test_imports.py` checks which modules are imported.

Run: python benchmarks/bench_import.py [--out JSON].
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from machine import keep, machine

RESULT = Path(__file__).parents[1] / "docs" / "benchmarks" / "import.json"
RUNS = 7
LIMIT = 0.3  # seconds

IMPORTS = """
import time
start = time.perf_counter()
import transformers
from transformers import AutoModelForCausalLM
middle = time.perf_counter()
{more}
end = time.perf_counter()
print(end - start, end - middle)
"""


def seconds(more: str) -> tuple[float, float]:
    """Seconds of the imports in a new process: of all, and of `more` alone."""
    command = [sys.executable, "-c", IMPORTS.format(more=more)]
    total, added = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8").stdout.split()
    return float(total), float(added)


def measure() -> dict[str, object]:
    imports = {"without": "", "with": "import flexmoe"}
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in imports}
    for run in range(RUNS + 1):
        for name, more in imports.items():
            measured = seconds(more)
            if run:
                took[name].append(measured)
    totals = {name: statistics.median(total for total, _ in values) for name, values in took.items()}
    added = statistics.median(more for _, more in took["with"])
    return {
        "added_seconds": round(added, 4),
        "difference_of_medians": round(totals["with"] - totals["without"], 3),
        "seconds": {name: round(value, 3) for name, value in totals.items()},
        "runs": RUNS,
        "bars": {"added_seconds": LIMIT},
        "passed": added <= LIMIT,
        "path": "fresh processes in turns, page cache warm",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT, help="output file")
    arguments = parser.parse_args()
    before = machine()
    result = measure() | before
    keep(result, arguments.out)
    assert result["passed"], f"import flexmoe adds {result['added_seconds']} s, more than {LIMIT} s"


if __name__ == "__main__":
    main()
