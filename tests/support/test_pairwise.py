"""`pairwise`: every pair of values, few rows, the same rows each time."""

import itertools

import pytest

from tests.support.pairwise import pairwise
from tests.support.soak import thinned

AXES = {"size": (1, 2, 3, 4, 5), "dtype": ("float32", "bfloat16"), "gated": (True, False), "k": (1, 2, 3)}


def test_every_pair_is_there_in_few_rows():
    rows = pairwise(AXES)
    for one, other in itertools.combinations(AXES, 2):
        assert {(row[one], row[other]) for row in rows} == set(itertools.product(AXES[one], AXES[other]))
    assert 15 <= len(rows) < 30  # of 60 combinations
    assert rows == pairwise(AXES)
    assert rows != pairwise(AXES, seed=1)


def test_a_thinned_parameter_keeps_its_values_in_order():
    values = thinned(["a", "b", "c"], ["b"])
    assert values[1] == "b"
    assert [value.values for value in (values[0], values[2])] == [("a",), ("c",)]
    assert all(value.marks[0].name == "soak" for value in (values[0], values[2]))
    with pytest.raises(ValueError, match=r"\['d'\] are not among the values"):
        thinned(["a"], ["d"])
