"""Settings that the tests of the kernels need on a GPU, and the fixtures that several of them share."""

import os

import pytest

# Tests fill uninitialised memory by requesting determinism, which cuBLAS then needs to be configured for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def ordered_products(monkeypatch):
    """See `order_products`."""
    from tests.kernels.experts.inputs import order_products

    order_products(monkeypatch)


@pytest.fixture
def calls(monkeypatch):
    """Lists which operators run, through their CPU implementations."""
    from flexmoe.kernels.experts import op as experts
    from flexmoe.kernels.low_rank import op as low_rank
    from flexmoe.kernels.route import op as route

    made = []
    for module, name in ((route, "ROUTE"), (experts, "MIX"), (low_rank, "MIX_LOW_RANK")):
        operator = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, operator=operator, name=name: made.append(name) or operator(*args)
        )
    return made
