"""Low-rank experts for few tokens: against a witness in float64, what must not be heard, the same bits in any batch.

The witness adds up whole matrices, `W + scale B A`, which no kernel makes. A random grid is in
`tests/soak/test_kernel_experts_grid.py`.
"""

import copy
import dataclasses
import functools
import math
from dataclasses import dataclass

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flexmoe.modeling import kernels_low_rank_flexmoe as kernels
from flexmoe.modeling import ops_flexmoe as ops
from flexmoe.modeling.kernels_flexmoe import TABLES, expert_table, low_rank_table
from flexmoe.modeling.kernels_low_rank_flexmoe import decode_low_rank
from flexmoe.modeling.routing_flexmoe import ExpertTensors, LowRankTensors, mix_low_rank
from flexmoe.testing import TOLERANCES
from tests.kernels.expert_witness import BIASES, DEVICE, draw_tokens, draw_weights, poison, seeded
from tests.kernels.low_rank_witness import LowRank, said

BF16, F16 = torch.bfloat16, torch.float16
UP_DOWN = ("up_bias", "down_bias")

# tokens, k, what to draw. A product of sizes would be slow: each value stands in one row at least.
CASES = [
    (0, 1, LowRank([3], 24, 40)),
    (1, 1, LowRank([16], 40, 136, public=0)),
    (3, 2, LowRank([1, 3], 24, 72, public=1, biases=BIASES)),
    (17, 3, LowRank([40, 16, 3, 1], 40, 40, public=4, biases=("gate_bias", "down_bias"), activation="gelu_tanh")),
    (17, 2, LowRank([40, 8], 24, 40, gated=False, biases=UP_DOWN, activation="relu")),
    (64, 2, LowRank([16, 16], 40, 24, public=0, biases=("up_bias",), activation="gelu")),
    (2, 5, LowRank([1, 2, 4, 5, 9], 8, 8, activation="gelu")),
    (3, 3, LowRank([1 + i % 3 for i in range(63)], 16, 8, public=30, gated=False)),
    (5, 2, LowRank([24, 8], 72, 40, public=2, dtype=BF16, biases=BIASES)),
    (17, 2, LowRank([3, 40], 24, 72, dtype=F16, gated=False, activation="relu")),
]


def drawn(tokens, k, kind):
    generator = seeded(tokens, k, kind)
    x_TH = draw_tokens(tokens, kind.hidden, kind.dtype, generator)
    return x_TH, draw_weights(tokens, kind.members, k, generator), kind.draw(generator)


def name_of(value):
    return str(value.ranks if len(value.ranks) < 6 else len(value.ranks)) if isinstance(value, LowRank) else str(value)


@pytest.mark.parametrize(("tokens", "k", "kind"), CASES, ids=name_of)
def test_against_the_witness(tokens, k, kind, monkeypatch):
    x_TH, weights_TM, experts = drawn(tokens, k, kind)
    expected_TH = said(x_TH, weights_TM, experts)
    poison(monkeypatch)
    for run in (decode_low_rank, mix_low_rank) if kind.dtype == torch.float32 else (decode_low_rank,):
        y_TH = run(x_TH, weights_TM, experts)
        assert y_TH.dtype == kind.dtype
        torch.testing.assert_close(y_TH.double().cpu(), expected_TH, **TOLERANCES[kind.dtype], equal_nan=False)
        nowhere_T = (weights_TM == 0).all(-1)
        assert torch.equal(y_TH[nowhere_T], torch.zeros_like(y_TH[nowhere_T]))


@dataclass
class Layer:
    """Token 0 goes to 0 and 1, token 1 to 1 alone, 2 to the public network, 3 to 0, 4 nowhere; nobody to 3."""

    x_TH: torch.Tensor
    weights_TM: torch.Tensor
    experts: LowRankTensors
    clean_TH: torch.Tensor

    def run(self) -> torch.Tensor:
        return decode_low_rank(self.x_TH, self.weights_TM, self.experts)

    def is_nan_for(self, tokens: list[int]) -> None:
        """Checks that these tokens' outputs are all NaN, and that all others have the bits that they had."""
        y_TH = self.run()
        others = [t for t in range(len(y_TH)) if t not in tokens]
        assert y_TH[tokens].isnan().all()
        assert torch.equal(y_TH[others], self.clean_TH[others])


@functools.cache
def clean_layer():
    x_TH, _, experts = drawn(5, 2, LowRank([16, 3, 20], 24, 40, public=2, biases=BIASES))
    weights_TM = [[0.3, 0.7, 0, 0], [0, 1, 0, 0], [0, 0, 0.5, 0], [0.2, 0, 0, 0], [0, 0, 0, 0]]
    weights_TM = torch.tensor(weights_TM, dtype=torch.float32, device=DEVICE)
    return Layer(x_TH, weights_TM, experts, decode_low_rank(x_TH, weights_TM, experts))


@pytest.fixture
def layer(monkeypatch):
    poison(monkeypatch)
    layer = copy.deepcopy(clean_layer())
    assert layer.clean_TH.isfinite().all()
    return layer


def test_no_tokens_need_no_launch(layer, monkeypatch):
    for name in ("thin_kernel", "gate_up_kernel", "down_kernel"):
        monkeypatch.setattr(kernels, name, None)
    assert decode_low_rank(layer.x_TH[:0], layer.weights_TM[:0], layer.experts).shape == (0, 24)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_token_has_the_same_bits_in_any_batch(dtype):
    x_TH, weights_TM, experts = drawn(64, 1, LowRank([20], 40, 40, public=0, dtype=dtype, biases=BIASES))
    y_TH = decode_low_rank(x_TH, weights_TM, experts)
    for batch in ([63], list(range(30, 47))):
        assert torch.equal(decode_low_rank(x_TH[batch], weights_TM[batch], experts), y_TH[batch]), batch


def test_nan_in_a_token_stays_there(layer):
    layer.x_TH[1, 3] = math.nan
    layer.is_nan_for([1])


def test_weights_that_are_nan_make_the_token_nan(layer):
    layer.weights_TM[1] = math.nan
    layer.is_nan_for([1])


MATRICES = [("a", name) for name in ("gate", "up", "down")] + [("b", name) for name in ("gate", "up", "down", *BIASES)]
TOKENS_OF = {0: [0, 3], 1: [0, 1], 2: []}  # by place among the low-rank experts


@pytest.mark.parametrize("e", TOKENS_OF)
def test_nan_in_an_expert_is_heard_where_it_is_chosen_alone(e, layer):
    for factor, name in MATRICES:
        getattr(getattr(layer.experts, factor), name)[e].fill_(math.nan)
    layer.is_nan_for(TOKENS_OF[e])


@pytest.mark.parametrize(("factor", "name"), MATRICES)
def test_what_is_no_longer_there_is_nan_and_not_read(factor, name, layer, monkeypatch):
    table = low_rank_table(layer.experts)
    TABLES.redirect({getattr(getattr(layer.experts, factor), name)[1].data_ptr(): 0})
    monkeypatch.setattr(kernels, "low_rank_table", lambda _: table)
    layer.is_nan_for(TOKENS_OF[1])


@pytest.mark.parametrize("name", ["gate", "up", "down", *BIASES])
def test_without_the_public_network_there_is_nothing_but_nan(name, layer, monkeypatch):
    public = expert_table(layer.experts.public)
    TABLES.redirect({getattr(layer.experts.public, name)[0].data_ptr(): 0})
    monkeypatch.setattr(kernels, "expert_table", lambda _: public)
    layer.is_nan_for([0, 1, 2, 3])


def test_where_nobody_goes_nothing_is_read(layer, monkeypatch):
    gone = torch.zeros(7, 1, dtype=torch.int64, device=DEVICE)
    monkeypatch.setattr(kernels, "expert_table", lambda _: gone)
    layer.weights_TM.zero_()
    assert torch.equal(layer.run(), torch.zeros(5, 24, device=DEVICE))


# The operator


def test_the_operator_hands_everything_on(layer, monkeypatch):
    given = []
    monkeypatch.setattr(ops, "MIX_LOW_RANK", lambda *args: given.append(args))
    ops.mix_low_rank(layer.x_TH, layer.weights_TM, layer.experts)
    assert torch.equal(ops._mix_low_rank_cuda(*given[0]), layer.clean_TH)


def test_on_a_cpu_it_is_the_reference(layer):
    on_cpu = [tensor.cpu() for tensor in (layer.x_TH, layer.weights_TM)]
    experts = cpu_experts()
    y_TH = ops.mix_low_rank(*on_cpu, experts)
    assert torch.equal(y_TH, mix_low_rank(*on_cpu, experts))
    torch.testing.assert_close(y_TH, layer.clean_TH.cpu(), **TOLERANCES[torch.float32])
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = ops.mix_low_rank(torch.empty(5, 24), torch.empty(5, 4), experts)
    assert (fake.shape, fake.dtype, fake.stride()) == (y_TH.shape, y_TH.dtype, y_TH.stride())


def cpu_experts():
    def there(of):
        return ExpertTensors(
            **{key: v if key == "activation" else [t.cpu() for t in v] for key, v in vars(of).items()}
        )

    experts = clean_layer().experts
    parts = {name: there(getattr(experts, name)) for name in ("public", "a", "b")}
    return dataclasses.replace(copy.deepcopy(experts), **parts)


@pytest.mark.parametrize("which", ["x", "weights", "a", "b", "public"])
def test_it_refuses_where_a_gradient_would_be_lost(which):
    experts = copy.deepcopy(cpu_experts())
    x_TH, weights_TM = torch.ones(2, 24), torch.ones(2, 4)
    tensors = {"x": x_TH, "weights": weights_TM, "a": experts.a.up[1], "b": experts.b.down_bias[0]}
    {**tensors, "public": experts.public.gate[0]}[which].requires_grad_()
    with pytest.raises(RuntimeError, match=r"mix_low_rank\(\) has no gradient.*implementation 'torch'"):
        ops.mix_low_rank(x_TH, weights_TM, experts)
    with torch.no_grad():
        assert ops.mix_low_rank(x_TH, weights_TM, experts).isfinite().all()


BAD = {
    "65 tokens": lambda x, w, experts: (x.new_zeros(65, 24), w.new_zeros(65, 4), experts),
    r"weights_TM is \[2, 3\], must be \[2, 4\]": lambda x, w, experts: (x, w[:, :3], experts),
    "weights_TM is torch.float64": lambda x, w, experts: (x, w.double(), experts),
    "public_column is 4": lambda x, w, experts: (x, w, changed(experts, public_column=4)),
    "1 public networks and 0 low-rank": lambda x, w, experts: (x, w, changed(experts, scales=[], public_column=None)),
    "3 of `a.gate`, must be 2": lambda x, w, experts: (x, w, changed(experts, scales=[1.0, 2.0])),
    "0 of `b.up_bias`, must be 3": lambda x, w, experts: (x, w, changed(experts, "b", up_bias=[])),
    r"b.down\[0\] is \[40, 16\], must be \[24, 16\]": lambda x, w, e: (x, w, changed(e, "b", down=e.b.up)),
    r"a.up\[0\] is torch.bfloat16": lambda x, w, e: (x, w, changed(e, "a", up=[t.bfloat16() for t in e.a.up])),
    r"Ranks are \[0, 0, 0\]": lambda x, w, e: (x, w, changed(e, "a", up=[t[:0] for t in e.a.up])),
}


def changed(experts, part=None, **fields):
    if part is not None:
        fields = {part: dataclasses.replace(getattr(experts, part), **fields)}
    return dataclasses.replace(experts, **fields)


@pytest.mark.parametrize("words", BAD)
def test_it_says_what_does_not_fit(words):
    with pytest.raises((ValueError, TypeError), match=words):
        ops.mix_low_rank(*BAD[words](torch.ones(2, 24), torch.ones(2, 4), cpu_experts()))
