"""Killed at any moment: a folder that is written again and again always is a whole one, the old or the new.

200 kills of `save_expert`, `compose` and `graft`, and some of every other command that writes a folder. Writes
docs/benchmarks/kills.json.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import kills
from tests.bench.machine import keep, machine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two folders in one step")

OUT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "kills.json"
COUNTS = {"save_expert": 67, "compose": 67, "graft": 66, "import": 12, **dict.fromkeys(kills.EXPORTS, 12)}
WHILE_WRITING = 0.5  # so many of the kills that were asked for must find a folder half-written, or nothing was tested


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kills.make_world(tmp_path_factory.mktemp("world"), list(COUNTS))


@pytest.fixture(scope="module")
def found() -> Iterator[list[kills.Kill]]:
    """All kills; they are reported once every command had its own."""
    about, everything = machine(), list[kills.Kill]()
    yield everything
    if len(everything) >= sum(COUNTS.values()):
        keep(about | kills.report(everything), OUT)


@pytest.mark.parametrize("command", COUNTS)
def test_a_kill_leaves_the_old_folder_or_the_new_one(
    command: str, world: Path, found: list[kills.Kill], tmp_path: Path
) -> None:
    here = list(kills.kill(command, COUNTS[command], world, tmp_path, seed=1))
    found += here
    assert sum(one.writing for one in here) >= WHILE_WRITING * COUNTS[command], here
    assert any(one.writing for one in here if one.timed), here
    assert {one.found for one in here} == set(kills.VERSIONS), "every kill came before, or every kill came after"
