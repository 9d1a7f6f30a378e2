"""The layer that the tests of low-rank experts share, as a fixture."""

import copy

import pytest

from tests.kernels.experts.inputs import poison
from tests.kernels.low_rank.layers import clean_layer


@pytest.fixture
def layer(monkeypatch):
    poison(monkeypatch)
    layer = copy.deepcopy(clean_layer())
    assert layer.clean_TH.isfinite().all()
    return layer
