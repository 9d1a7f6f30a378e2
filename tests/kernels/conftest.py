"""What the kernels' tests need on a GPU, and a layer that those of the expert step share."""

import os

import pytest

# Tests fill what nobody has written by asking for determinism, and cuBLAS must then be told how to be deterministic.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture
def layer(monkeypatch):
    """x [17, 40], weights [17, 4] and experts: token 0 goes to 0 and 1, token 1 to 1 alone, nobody to 3."""
    import torch

    from tests.kernels.expert_witness import BIASES, Experts, draw_tokens, draw_weights, poison, seeded

    kind = Experts([24, 136, 40, 16], 40, biases=BIASES)
    generator = seeded("layer")
    weights_TE = draw_weights(17, 4, 2, generator)
    weights_TE[:, 3] = 0.0
    weights_TE[0] = torch.tensor([0.3, 0.7, 0.0, 0.0])
    weights_TE[1] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    poison(monkeypatch)
    return draw_tokens(17, 40, torch.float32, generator), weights_TE, kind.draw(generator)
