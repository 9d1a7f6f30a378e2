"""Changes of a loaded model take a bounded number of Python calls."""

import cProfile
import pstats

import pytest

from flexmoe.testing import tiny_flexmoe


def count_calls(function) -> int:
    profile = cProfile.Profile()
    profile.runcall(function)
    return pstats.Stats(profile).total_calls


@pytest.mark.parametrize(("experts", "limit"), [(2, 500), (12, 900)])
def test_remove_expert(experts, limit):
    names = [f"owner-{i}" for i in range(experts)]
    model = tiny_flexmoe("llama", names)
    assert len(model.flexmoe_blocks()) == 2
    assert count_calls(lambda: model.remove_expert(names[0])) < limit
