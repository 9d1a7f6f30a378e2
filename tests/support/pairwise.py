"""Few combinations of parameters that hold every pair of values of any two of them, for long grids.

Most faults depend on one or two parameters, so `make soak` runs such a selection of a grid. With `FLEXMOE_FULL_GRID=1`
it runs random draws of all combinations too. The selection depends on the seed only.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

FULL_GRID = os.environ.get("FLEXMOE_FULL_GRID") == "1"
TRIES = 20  # candidates of which the one with most new pairs is taken

Pair = tuple[tuple[str, int], tuple[str, int]]


def pairwise(axes: Mapping[str, Sequence[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Combinations of one value of each axis that hold each pair of values of two axes at least once.

    Greedy: each combination starts from a pair that is still missing, and is the best of some random completions.
    """
    chance = random.Random(seed)
    missing = {
        ((one, i), (other, j)): None
        for one, other in itertools.combinations(axes, 2)
        for i, j in itertools.product(range(len(axes[one])), range(len(axes[other])))
    }
    rows = []
    while missing:
        start = dict(next(iter(missing)))
        candidates = [
            {name: start.get(name, chance.randrange(len(values))) for name, values in axes.items()}
            for _ in range(TRIES)
        ]
        best = max(candidates, key=lambda row: sum(pair in missing for pair in _pairs(row)))
        for pair in _pairs(best):
            missing.pop(pair, None)
        rows.append({name: axes[name][index] for name, index in best.items()})
    return rows


def _pairs(row: Mapping[str, int]) -> list[Pair]:
    return list(itertools.combinations(row.items(), 2))
