"""Marks parameters that only `make soak` runs, so that `make test` stays short.

`make test` runs every test with the parameters that it needs to see each code path; the others, of the same test, have
the marker `soak`, which is deselected by default. Does not cover tests that are long as a whole (`tests/soak`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def soak(*values: Any, id: str | None = None) -> Any:
    """One set of parameters that only `make soak` runs."""
    return pytest.param(*values, marks=pytest.mark.soak, id=id)


def thinned(values: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """All `values` of one parameter, of which `make test` runs those in `kept`.

    Raises:
        ValueError: one of `kept` is not among the values, so a typing error would drop a test.
    """
    everything = list(values)
    if unknown := [value for value in kept if value not in everything]:
        raise ValueError(f"{unknown} are not among the values {everything}.")
    return [value if value in kept else soak(value) for value in everything]
