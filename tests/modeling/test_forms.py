"""Networks that are run on their weights: they say the bits of their modules, and whoever watches a part is called."""

import pytest
import torch
from torch import nn

from flexmoe import track_usage
from flexmoe.modeling.forms_flexmoe import FfnForm, form_of
from flexmoe.testing import ANCHOR_CONFIGS, TOLERANCES, random_tokens, tiny_flexmoe
from tests.ffn import CHANGES, HIDDEN, Ffn

GATED = FfnForm("up_proj", "down_proj", "act_fn", "gate_proj")
FORMS = {
    "llama": GATED,
    "olmo2": GATED,
    "gpt2": None,  # a dropout at the end
    "gemma2": GATED,
    "qwen3": GATED,
    "phi3": None,  # gate and up in one matrix
    "gpt_neox": FfnForm("dense_h_to_4h", "dense_4h_to_h", "act"),
}


def network(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return next(iter(tiny_flexmoe(family, ("math",)).to(dtype).flexmoe_blocks())).experts["math"]


@pytest.fixture
def ffn() -> Ffn:
    torch.manual_seed(0)
    return Ffn().eval()


def bound(ffn: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return form_of(ffn).bind(ffn, x)(x)


def test_every_family_of_these_tests_has_its_form_here():
    assert FORMS.keys() == ANCHOR_CONFIGS.keys()


@pytest.mark.parametrize("family", FORMS)
def test_the_form_is_read_from_the_networks_own_forward(family):
    assert form_of(network(family)) == FORMS[family]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", [family for family, form in FORMS.items() if form])
@torch.no_grad()
def test_a_bound_network_says_the_bits_of_its_modules(family, dtype):
    ffn = network(family, dtype)
    for shape in [(32,), (1, 32), (5, 32), (2, 3, 32)]:
        x = torch.randn(shape).to(dtype)
        assert torch.equal(bound(ffn, x), ffn(x)), shape


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_factors_in_either_order_and_biases(bias, dtype):
    ffn = Ffn(bias).to(dtype).eval()
    assert form_of(ffn) == FfnForm("second", "last", "act", "first")
    for x in (torch.randn(HIDDEN).to(dtype), torch.randn(7, HIDDEN).to(dtype)):
        assert torch.equal(bound(ffn, x), ffn(x))


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
def test_other_forms_are_not_taken_for_known_ones(kind):
    assert form_of(kind().eval()) is None


def test_reading_leaves_the_network_as_it_was(ffn):
    before = {name: id(child) for name, child in ffn.named_children()}
    form_of(ffn)
    assert {name: id(child) for name, child in ffn.named_children()} == before


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(HIDDEN,), (3, HIDDEN)])
@torch.no_grad()
def test_what_is_done_to_a_part_counts_at_once(ffn, change, dtype, shape):
    ffn.to(dtype)
    x = torch.randn(shape).to(dtype)
    before = bound(ffn, x)  # the form is known by now
    change(ffn)
    after = bound(ffn, x)
    assert torch.equal(after, ffn(x))
    assert not torch.equal(after, before)


def test_who_watches_the_network_itself_or_trains_it_has_it_called(ffn):
    assert form_of(ffn)
    handle = ffn.register_forward_hook(lambda module, args, output: output + 1)
    assert form_of(ffn) is None
    handle.remove()
    assert form_of(ffn)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    assert form_of(ffn) is None
    handle.remove()
    assert form_of(ffn.train()) is None
    ffn.eval().forward = lambda x: x
    assert form_of(ffn) is None


def test_a_forward_that_is_patched_on_the_class_is_read_again(ffn, monkeypatch):
    assert form_of(ffn)
    monkeypatch.setattr(Ffn, "forward", lambda self, x: x)
    assert form_of(ffn) is None


@torch.no_grad()
def test_a_linear_that_is_patched_on_the_class_is_called(ffn, monkeypatch):
    x = torch.randn(HIDDEN)
    own = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: own(self, x) + 1)
    assert torch.equal(bound(ffn, x), ffn(x))


# One token, as when decoding


@pytest.fixture
def model():
    return tiny_flexmoe("olmo2", ("math", "code", "legal"), num_experts_per_tok=2)


@pytest.fixture
def seen(monkeypatch):
    """How many networks were run on their weights."""
    calls = []
    bind = FfnForm.bind
    monkeypatch.setattr(FfnForm, "bind", lambda self, *args: calls.append(self) or bind(self, *args))
    return calls


ONE = random_tokens(1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2, 4])
@torch.no_grad()
def test_one_token_masked_is_removed_bit_for_bit(model, seen, dtype, k):
    model.to(dtype)
    for block in model.flexmoe_blocks():
        for parameter in block.experts["code"].parameters():
            parameter.data.fill_(float("nan"))
    by_mask = model(ONE, expert_mask=model.expert_mask([["public", "math", "legal"]]), num_experts_per_tok=k).logits
    model.remove_expert("code")
    assert torch.equal(by_mask, model(ONE, num_experts_per_tok=k).logits)
    assert by_mask.isfinite().all()
    assert len(seen) == 2 * 2 * min(k, 3)


@pytest.mark.parametrize("family", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_alone_says_what_it_says_among_others(family, dtype):
    model = tiny_flexmoe(family, ("math", "code", "legal"), num_experts_per_tok=2).to(dtype)
    with torch.no_grad():
        alone = model(ONE, output_router_logits=True)
        among = model(ONE.expand(3, 1), output_router_logits=True)
    with_gradients = model(ONE)
    torch.testing.assert_close(alone.logits, among.logits[:1], **TOLERANCES[dtype])
    torch.testing.assert_close(alone.logits, with_gradients.logits, **TOLERANCES[dtype])
    for one, three in zip(alone.router_logits, among.router_logits, strict=True):
        torch.testing.assert_close(one, three[:1], **TOLERANCES[dtype])


@torch.no_grad()
def test_usage_of_one_token_is_recorded(model):
    with track_usage(model) as usage:
        model(ONE)
    with torch.enable_grad(), track_usage(model) as expected:
        model(ONE)
    assert usage.share() == pytest.approx(expected.share(), rel=1e-5)
    assert usage.chosen_share() == expected.chosen_share()


@pytest.mark.parametrize("part", ["expert", "row"])
@torch.no_grad()
def test_a_hook_that_changes_nothing_changes_no_bit(model, part):
    before = model(ONE).logits
    seen = []
    for block in model.flexmoe_blocks():
        module = block.experts["math"] if part == "expert" else block.router["math"]
        module.register_forward_hook(lambda module, args, output: seen.append(module))
    assert torch.equal(model(ONE, num_experts_per_tok=4).logits, model(ONE, num_experts_per_tok=4).logits)
    assert torch.equal(model(ONE).logits, before)
    assert seen


@torch.no_grad()
def test_a_row_that_is_changed_counts_at_once(model):
    before = model(ONE).logits
    for block in model.flexmoe_blocks():
        block.router["math"].register_forward_hook(lambda module, args, output: output + 10)
    assert not torch.equal(model(ONE).logits, before)
