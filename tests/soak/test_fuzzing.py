"""2,000 malicious expert packages, each refused or without effect. Writes docs/benchmarks/fuzzing.json.

`make test` runs 120 cases with other seeds (`tests/modeling/test_fuzzing.py`).
"""

import time
from pathlib import Path

from benchmarks.machine import keep, machine
from tests.support import fuzzing
from tests.support.mutators import MUTATORS

OUT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "fuzzing.json"
CASES = 2000


def test_malicious_packages_are_refused(tmp_path: Path) -> None:
    environment, start = machine(), time.monotonic()
    (tmp_path / "cases").mkdir()
    outcomes = fuzzing.run(
        fuzzing.make_cases(CASES, seed=1), fuzzing.make_world(tmp_path / "world"), tmp_path / "cases"
    )
    seconds = {"seconds": round(time.monotonic() - start)}
    keep(environment | seconds | fuzzing.report(outcomes), OUT)
    assert len(outcomes) == CASES
    assert {outcome.case.mutator for outcome in outcomes} == MUTATORS.keys()
    assert not [outcome for outcome in outcomes if outcome.fault], f"\n{fuzzing.table(outcomes)}"
