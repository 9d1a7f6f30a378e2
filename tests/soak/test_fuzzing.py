"""Hostile expert packages, 2,000 of them: refused in words or without effect. Writes docs/benchmarks/fuzzing.json.

Not here: the 200 of the suite, with other seeds (`tests/modeling/test_fuzzing.py`).
"""

import time
from pathlib import Path

from tests import fuzzing
from tests.bench.machine import keep, machine
from tests.mutators import MUTATORS

OUT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "fuzzing.json"
CASES = 2000


def test_hostile_packages_are_refused_in_words(tmp_path: Path) -> None:
    about, begin = machine(), time.monotonic()
    (tmp_path / "cases").mkdir()
    outcomes = fuzzing.run(
        fuzzing.make_cases(CASES, seed=1), fuzzing.make_world(tmp_path / "world"), tmp_path / "cases"
    )
    seconds = {"seconds": round(time.monotonic() - begin)}
    keep(about | seconds | fuzzing.report(outcomes), OUT)
    assert len(outcomes) == CASES
    assert {outcome.case.mutator for outcome in outcomes} == MUTATORS.keys()
    assert not [outcome for outcome in outcomes if outcome.fault], f"\n{fuzzing.table(outcomes)}"
