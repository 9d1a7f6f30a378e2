"""What `import flexmoe` adds to `import transformers` and `from transformers import AutoModelForCausalLM`.

Fresh processes in turns, with and without the import, after one of each that fills the page cache. Asserts that the
statement itself takes at most 0.3 s, in the median; the difference between the medians of whole imports is beside it,
which on a busy machine says little. `tests/test_imports.py` holds the reason: which modules the import may bring in.

Run: python tests/bench/bench_import.py [--out JSON].
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from machine import keep, machine

RESULT = Path(__file__).parents[2] / "docs" / "benchmarks" / "import.json"
RUNS = 7
BAR = 0.3  # seconds

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
    """Seconds of the imports in a fresh process: all, and `more` alone."""
    command = [sys.executable, "-c", IMPORTS.format(more=more)]
    everything, added = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(everything), float(added)


def measure() -> dict[str, object]:
    ways = {"without": "", "with": "import flexmoe"}
    took: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for run in range(RUNS + 1):
        for way, more in ways.items():
            measured = seconds(more)
            if run:
                took[way].append(measured)
    everything = {way: statistics.median(all_ for all_, _ in values) for way, values in took.items()}
    added = statistics.median(more for _, more in took["with"])
    return {
        "added_seconds": round(added, 4),
        "difference_of_medians": round(everything["with"] - everything["without"], 3),
        "seconds": {way: round(value, 3) for way, value in everything.items()},
        "runs": RUNS,
        "bars": {"added_seconds": BAR},
        "passed": added <= BAR,
        "path": "fresh processes in turns, page cache warm",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT, help="where the result goes")
    arguments = parser.parse_args()
    before = machine()
    result = measure() | before
    keep(result, arguments.out)
    assert result["passed"], f"import flexmoe adds {result['added_seconds']} s, more than {BAR} s"


if __name__ == "__main__":
    main()
