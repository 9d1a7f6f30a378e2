"""Killed while it writes, a command leaves the old folder or the new one: 20 kills, most at points all over its work.

Not here: 200 of them, and the other commands that write folders (`make soak`).
"""

import sys
from pathlib import Path

import pytest

from tests import kills

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two folders in one step")

COUNTS = {"save_expert": 7, "compose": 7, "graft": 6}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return kills.make_world(tmp_path_factory.mktemp("world"), list(COUNTS))


@pytest.mark.parametrize("command", COUNTS)
def test_a_kill_leaves_the_old_folder_or_the_new_one(command: str, world: Path, tmp_path: Path) -> None:
    found = list(kills.kill(command, COUNTS[command], world, tmp_path))
    assert sum(one.writing for one in found) >= len(found) / 3, found
