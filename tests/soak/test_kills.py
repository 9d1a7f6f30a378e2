"""Commands that are killed while they overwrite a folder leave either the complete old folder or the complete new one.

200 kills of `save_expert`, `compose` and `graft`, and some of every other command that writes a folder. Writes
docs/benchmarks/kills.json.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.machine import keep, machine
from tests.support import kills

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can swap two folders atomically")

OUT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "kills.json"
COUNTS = {"save_expert": 67, "compose": 67, "graft": 66, "import": 12, **dict.fromkeys(kills.EXPORTS, 12)}
WHILE_WRITING = 0.5  # the share of the kills that must interrupt writing, or the test would prove nothing


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kills.make_world(tmp_path_factory.mktemp("world"), list(COUNTS))


@pytest.fixture(scope="module")
def all_kills() -> Iterator[list[kills.Kill]]:
    """The kills of all commands; the report is written after the last command."""
    environment, collected = machine(), list[kills.Kill]()
    yield collected
    if len(collected) >= sum(COUNTS.values()):
        keep(environment | kills.report(collected), OUT)


@pytest.mark.parametrize("command", COUNTS)
def test_a_kill_leaves_the_old_folder_or_the_new_one(
    command: str, world: Path, all_kills: list[kills.Kill], tmp_path: Path
) -> None:
    results = list(kills.kill(command, COUNTS[command], world, tmp_path, seed=1))
    all_kills += results
    assert sum(kill.writing for kill in results) >= WHILE_WRITING * COUNTS[command], results
    assert any(kill.writing for kill in results if kill.timed), results
    assert {kill.found for kill in results} == set(kills.VERSIONS), "all kills left the same version"
