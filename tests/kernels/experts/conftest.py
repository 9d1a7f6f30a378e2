"""A layer that the tests of both kernels share."""

import copy
import functools

import pytest
import torch

from tests.kernels.experts.inputs import BIASES, Experts, draw_tokens, draw_weights, order_products, poison, seeded


@functools.cache
def drawn_layer():
    """The layer that `layer` copies."""
    kind = Experts([24, 72, 16, 8], 40, biases=BIASES)
    generator = seeded("layer")
    weights_TE = draw_weights(17, 4, 2, generator)
    weights_TE[:, 3] = 0.0
    weights_TE[0] = torch.tensor([0.3, 0.7, 0.0, 0.0])
    weights_TE[1] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    return draw_tokens(17, 40, torch.float32, generator), weights_TE, kind.draw(generator)


@pytest.fixture
def layer(monkeypatch):
    """x [17, 40], weights [17, 4] and experts: token 0 is routed to 0 and 1, token 1 to 1 alone, no token to 3."""
    order_products(monkeypatch)  # tests compare bits
    poison(monkeypatch)
    return copy.deepcopy(drawn_layer())


@pytest.fixture(scope="module")
def clean_TH(request):
    """The output of the module's function `run` for `layer`."""
    with pytest.MonkeyPatch.context() as patch:
        order_products(patch)
        poison(patch)
        return request.module.run(*drawn_layer())
