"""What `import flexmoe` adds to `import transformers` and `from transformers import AutoModelForCausalLM`.

Fresh processes in turns, with and without the import, after one of each that fills the page cache; each says how long
its imports took. Asserts at most 0.3 s between the medians. `tests/test_imports.py` holds the reason why it is less:
which modules the import may bring in. Run: python tests/bench/bench_import.py [--out JSON].
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

from machine import machine

RESULT = Path(__file__).parents[2] / "docs" / "benchmarks" / "import.json"
RUNS = 7
BAR = 0.3  # seconds

IMPORTS = """
import time
start = time.perf_counter()
import transformers
from transformers import AutoModelForCausalLM
{more}
print(time.perf_counter() - start)
"""


def seconds(more: str) -> float:
    """Seconds of the imports in a fresh process."""
    command = [sys.executable, "-c", IMPORTS.format(more=more)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure() -> dict[str, object]:
    ways = {"without": "", "with": "import flexmoe"}
    took: dict[str, list[float]] = {way: [] for way in ways}
    for run in range(RUNS + 1):
        for way, more in ways.items():
            took[way].append(seconds(more))
        if run == 0:
            took = {way: [] for way in ways}
    added = statistics.median(took["with"]) - statistics.median(took["without"])
    return {
        "added_seconds": round(added, 3),
        "seconds": {way: [round(value, 3) for value in values] for way, values in took.items()},
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
    text = json.dumps(result, indent=2)
    sys.stdout.write(text + "\n")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text + "\n")
    assert result["passed"], f"import flexmoe adds {result['added_seconds']} s, more than {BAR} s"


if __name__ == "__main__":
    main()
