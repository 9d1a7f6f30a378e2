"""The structure of FFNs, and computing them from their weights: bit-equal to their modules, and with their hooks."""

import pytest
import torch
from torch import nn

from flexmoe.cpu.forward import bind_structure
from flexmoe.modeling.low_rank_flexmoe import FfnStructure
from flexmoe.structures import structure_of
from flexmoe.testing import ANCHOR_CONFIGS, tiny_flexmoe
from tests.support.ffn import CHANGES, HIDDEN, Ffn

GATED = FfnStructure("up_proj", "down_proj", "act_fn", "gate_proj")
STRUCTURES = {
    "llama": GATED,
    "olmo2": GATED,
    "gpt2": None,  # a dropout at the end
    "gemma2": GATED,
    "qwen3": GATED,
    "phi3": None,  # gate and up in one matrix
    "gpt_neox": FfnStructure("dense_h_to_4h", "dense_4h_to_h", "act"),
}


def network(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return next(iter(tiny_flexmoe(family, ("math",)).to(dtype).flexmoe_blocks())).experts["math"]


@pytest.fixture
def ffn() -> Ffn:
    torch.manual_seed(0)
    return Ffn().eval()


def run(ffn: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return bind_structure(ffn, structure_of(ffn), x)(x)


def test_table_has_all_families():
    assert STRUCTURES.keys() == ANCHOR_CONFIGS.keys()


@pytest.mark.parametrize("family", STRUCTURES)
def test_structure_is_read_from_forward(family):
    assert structure_of(network(family)) == STRUCTURES[family]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [family for family, structure in STRUCTURES.items() if structure])
@torch.no_grad()
def test_computing_from_weights_is_bit_equal(family, dtype):
    ffn = network(family, dtype)
    for shape in [(32,), (1, 32), (5, 32), (2, 3, 32)]:
        x = torch.randn(shape).to(dtype)
        assert torch.equal(run(ffn, x), ffn(x)), shape


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_factors_in_either_order_and_biases(bias, dtype):
    ffn = Ffn(bias).to(dtype).eval()
    assert structure_of(ffn) == FfnStructure("second", "last", "act", "first")
    for x in (torch.randn(HIDDEN).to(dtype), torch.randn(7, HIDDEN).to(dtype)):
        assert torch.equal(run(ffn, x), ffn(x))


class Summed(Ffn):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.act(self.first(x)) + self.second(x))


class Scaled(Ffn):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.act(self.first(x)) * self.second(x)) * 2


class Crossed(Ffn):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.act(self.first(x)) * self.second(self.first(x)))


class Squared(Ffn):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.act(self.first(x)) * x)


class Branching(Ffn):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.act(self.first(x)) * self.second(x)) if x.sum() > 0 else x


@pytest.mark.parametrize("kind", [Summed, Scaled, Crossed, Squared, Branching])
def test_other_structures_are_not_recognized(kind):
    assert structure_of(kind().eval()) is None


def test_reading_does_not_change_the_network(ffn):
    before = {name: id(child) for name, child in ffn.named_children()}
    structure_of(ffn)
    assert {name: id(child) for name, child in ffn.named_children()} == before


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(HIDDEN,), (3, HIDDEN)])
@torch.no_grad()
def test_changes_of_the_network_take_effect_at_once(ffn, change, dtype, shape):
    ffn.to(dtype)
    x = torch.randn(shape).to(dtype)
    before = run(ffn, x)  # caches the structure
    change(ffn)
    after = run(ffn, x)
    assert torch.equal(after, ffn(x))
    assert not torch.equal(after, before)


def test_hooks_and_training_mode_give_no_structure(ffn):
    assert structure_of(ffn)
    handle = ffn.register_forward_hook(lambda module, args, output: output + 1)
    assert structure_of(ffn) is None
    handle.remove()
    assert structure_of(ffn)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    assert structure_of(ffn) is None
    handle.remove()
    assert structure_of(ffn.train()) is None
    ffn.eval().forward = lambda x: x
    assert structure_of(ffn) is None


def test_patched_forward_is_read_again(ffn, monkeypatch):
    assert structure_of(ffn)
    monkeypatch.setattr(Ffn, "forward", lambda self, x: x)
    assert structure_of(ffn) is None


@torch.no_grad()
def test_patched_linear_is_called(ffn, monkeypatch):
    x = torch.randn(HIDDEN)
    own = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: own(self, x) + 1)
    assert torch.equal(run(ffn, x), ffn(x))
