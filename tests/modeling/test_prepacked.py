"""Models made ready for a CPU: what they say, what they never use when it is out of date, and what undoes it."""

import copy
import io
import logging

import pytest
import torch
from peft import LoraConfig
from torch import nn

from flexmoe import FlexMoeForCausalLM
from flexmoe.modeling import linear_flexmoe, one_token_flexmoe, prepacked_flexmoe
from flexmoe.testing import TOLERANCES, random_tokens, tiny_flexmoe

OWNERS = ("math", "code")
HAS_INSTRUCTIONS = linear_flexmoe.has_instructions(torch.bfloat16)


@pytest.fixture(autouse=True)
def small_weights_count(monkeypatch):
    monkeypatch.setattr(linear_flexmoe, "SMALLEST_WEIGHT", 1)
    monkeypatch.setattr(prepacked_flexmoe, "SMALLEST_WEIGHT", 1)


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Lists what took the place of an ordinary product, or of a network."""
    names: list[str] = []
    for name in ("product", "one_token"):
        own = getattr(prepacked_flexmoe.Prepacked, name)

        def noting(self, *args, own=own, name=name):
            result = own(self, *args)
            if result is not None:
                names.append(name)
            return result

        monkeypatch.setattr(prepacked_flexmoe.Prepacked, name, noting)
    return names


def model_of(family: str = "olmo2", dtype: torch.dtype = torch.bfloat16) -> FlexMoeForCausalLM:
    model = tiny_flexmoe(family, OWNERS, num_experts_per_tok=2).to(dtype)
    for block in model.flexmoe_blocks():
        block.router.float()  # as a loaded model has it
    return model


@torch.no_grad()
def logits(model: FlexMoeForCausalLM, *shape: int) -> torch.Tensor:
    return model(random_tokens(*shape)).logits


def test_several_tokens_have_the_same_bits(ran):
    model = model_of()
    before = logits(model, 2, 9)
    assert model.prepack_for_cpu() == (HAS_INSTRUCTIONS and half_bytes(model))
    assert torch.equal(logits(model, 2, 9), before)
    assert ("product" in ran) == HAS_INSTRUCTIONS


def half_bytes(model: FlexMoeForCausalLM) -> int:
    linears = [part for part in model.modules() if isinstance(part, nn.Linear)]
    return sum(linear.weight.nbytes for linear in linears if linear.weight.dtype == torch.bfloat16)


@pytest.mark.parametrize("family", ["olmo2", "gpt_neox"])  # gated, and plain with biases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_says_the_same(ran, family, dtype):
    model = model_of(family, dtype)
    before = logits(model, 1, 1)
    model.prepack_for_cpu()
    torch.testing.assert_close(logits(model, 1, 1), before, **TOLERANCES[dtype])
    assert {"product", "one_token"} == set(ran)


def test_twice_is_as_once(ran):
    model = model_of()
    taken = model.prepack_for_cpu()
    logits(model, 1, 1)
    once = list(ran)
    assert model.prepack_for_cpu() == taken
    ran.clear()
    logits(model, 1, 1)
    assert ran == once


@pytest.mark.parametrize("family", ["olmo2", "gpt_neox"])
@torch.no_grad()
def test_one_token_is_not_rounded_on_its_way(family):
    model = model_of(family)
    model.prepack_for_cpu()
    expert = model.flexmoe_blocks()[0].experts["math"]
    exact = copy.deepcopy(expert).double()
    for x_H in torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).bfloat16():
        said = model._prepacked.one_token(expert)(x_H)
        assert said.dtype == torch.float32
        torch.testing.assert_close(said.double(), exact(x_H[None, None].double())[0, 0], **TOLERANCES[torch.float32])


def test_experts_that_a_token_does_not_go_to_are_not_read(ran):
    model = model_of()
    for block in model.flexmoe_blocks():
        block.router["code"].bias.data.fill_(-1e9)
        for parameter in block.experts["code"].parameters():
            parameter.data.fill_(float("nan"))
    model.prepack_for_cpu()
    assert logits(model, 1, 1).isfinite().all()
    assert "one_token" in ran


def written_to(model):
    for block in model.flexmoe_blocks():
        with torch.no_grad():
            block.experts["math"].up_proj.weight.mul_(-2)


def given_other_data(model):
    for block in model.flexmoe_blocks():
        weight = block.experts["math"].down_proj.weight
        weight.data = -2 * weight.data


def given_another_part(model):
    for block in model.flexmoe_blocks():
        block.experts["math"].act_fn = nn.Mish()


def watched(model):
    for block in model.flexmoe_blocks():
        block.experts["math"].gate_proj.register_forward_hook(lambda module, args, out: -2 * out)


def watched_whole(model):
    for block in model.flexmoe_blocks():
        block.experts["math"].register_forward_hook(lambda module, args, out: -2 * out)


def tuned(model):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=r".*\.experts\.math\.up_proj", r=2, init_lora_weights=False)
    model.add_adapter(config, "tuned")


def loaded_anew(model):
    state = {name: -2 * value if "math.up_proj" in name else value for name, value in model.state_dict().items()}
    model.load_state_dict(state)


@pytest.mark.parametrize("shape", [(1, 1), (2, 9)])
@pytest.mark.parametrize(
    "change", [written_to, given_other_data, given_another_part, watched, watched_whole, tuned, loaded_anew]
)
def test_what_is_out_of_date_is_not_used(change, shape):
    model, plain = model_of(), model_of()
    model.prepack_for_cpu()
    before = logits(model, *shape)
    change(model)
    change(plain)
    after, expected = logits(model, *shape), logits(plain, *shape)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, expected, **TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize(
    ("undo", "still"),
    [
        (lambda model: model.undo_prepacking(), False),
        (lambda model: model.train().eval(), False),
        (lambda model: model.add_expert_copy("new"), False),
        (lambda model: model.remove_expert("code"), False),
        (lambda model: model.eval(), True),
        (lambda model: model.rename_expert("code", "law"), True),
        (lambda model: model.set_active_experts(["math"]), True),
    ],
)
def test_what_undoes_it(ran, undo, still):
    model = model_of()
    model.prepack_for_cpu()
    undo(model)
    logits(model, 1, 1)
    assert bool(ran) == still
    assert any("forward" in part.__dict__ for part in model.modules()) == still


def test_copies_pickles_and_files_are_ordinary(ran, tmp_path):
    model = model_of()
    before = logits(model, 1, 1)
    model.prepack_for_cpu()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    model.save_pretrained(tmp_path)
    copies = [copy.deepcopy(model), torch.load(buffer, weights_only=False)]
    copies.append(FlexMoeForCausalLM.from_pretrained(tmp_path))
    for other in copies:
        ran.clear()
        assert torch.equal(logits(other.eval(), 1, 1), before)
        assert not ran


def test_gradients_and_autocast_take_the_ordinary_way(ran):
    model = model_of(dtype=torch.float32)
    model.prepack_for_cpu()
    tokens = random_tokens(1, 1)
    model(tokens, labels=random_tokens(1, 1)).logits.sum().backward()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens)
    assert not ran
    assert model.flexmoe_blocks()[0].experts["math"].up_proj.weight.grad is not None


def test_where_it_cannot_be():
    model = model_of()
    with pytest.raises(ValueError, match=r"for inference, and this model trains: call eval\(\) first"):
        model.train().prepack_for_cpu()
    with pytest.raises(ValueError, match="for models on a CPU; this one is on meta"):
        model.eval().to("meta").prepack_for_cpu()


def test_without_a_compiler_matrices_are_laid_out_all_the_same(monkeypatch, caplog, ran):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("no g++")

    monkeypatch.setattr(one_token_flexmoe, "_loops", {})
    monkeypatch.setattr(one_token_flexmoe, "_compile", no_compiler)
    model = model_of()
    before = logits(model, 1, 1)
    with caplog.at_level(logging.WARNING):
        model.prepack_for_cpu()
    assert "no C++ compiler that works was found (no g++)" in caplog.text
    assert torch.equal(logits(model, 1, 1), before)
    assert "one_token" not in ran
