"""A small layer of low-rank experts that the tests of the kernel and of the operator share."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from flexmoe.kernels.low_rank.kernel import decode_low_rank
from flexmoe.kernels.low_rank.reference import LowRankTensors
from tests.kernels.experts.inputs import BIASES, DEVICE, draw_tokens, seeded
from tests.kernels.low_rank.inputs import LowRank


@dataclass
class Layer:
    """Token 0 is routed to members 0 and 1, 1 to 1, 2 to public, 3 to 0, 4 to none; no token to member 3."""

    x_TH: torch.Tensor
    weights_TM: torch.Tensor
    experts: LowRankTensors
    clean_TH: torch.Tensor

    def run(self) -> torch.Tensor:
        return decode_low_rank(self.x_TH, self.weights_TM, self.experts)

    def check_nan_for(self, tokens: list[int]) -> None:
        """Checks that these tokens' outputs are all NaN, and that the bits of all others are unchanged."""
        y_TH = self.run()
        others = [t for t in range(len(y_TH)) if t not in tokens]
        assert y_TH[tokens].isnan().all()
        assert torch.equal(y_TH[others], self.clean_TH[others])


@functools.cache
def clean_layer() -> Layer:
    """A layer with its output; shared, so copy it before changing it."""
    kind = LowRank([16, 3, 20], 24, 40, public=2, biases=BIASES)
    generator = seeded("low-rank layer")
    x_TH, experts = draw_tokens(5, kind.hidden, kind.dtype, generator), kind.draw(generator)
    weights_TM = [[0.3, 0.7, 0, 0], [0, 1, 0, 0], [0, 0, 0.5, 0], [0.2, 0, 0, 0], [0, 0, 0, 0]]
    weights_TM = torch.tensor(weights_TM, dtype=torch.float32, device=DEVICE)
    return Layer(x_TH, weights_TM, experts, decode_low_rank(x_TH, weights_TM, experts))
