"""A command that is killed while it writes leaves either the old folder or the new one: 9 kills.

Does not cover 200 kills, or the other commands that write folders (`make soak`).
"""

import sys
from pathlib import Path

import pytest

from tests.support import kills

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux can swap two folders atomically")

COUNTS = {"save_expert": 3, "compose": 3, "graft": 3}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kills.make_world(tmp_path_factory.mktemp("world"), list(COUNTS))


@pytest.mark.parametrize("command", COUNTS)
def test_a_kill_leaves_the_old_folder_or_the_new_one(command: str, world: Path, tmp_path: Path) -> None:
    results = list(kills.kill(command, COUNTS[command], world, tmp_path))
    at_points = [kill for kill in results if not kill.timed]  # how many of the others write is up to the machine
    assert sum(kill.writing for kill in at_points) >= len(at_points) / 2, results
