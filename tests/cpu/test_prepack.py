"""Prepacked models: outputs, changes after which prepacked data must not be used, and what undoes prepacking."""

import copy
import io
import logging

import pytest
import torch
from peft import LoraConfig
from torch import nn

from flexmoe import FlexMoeForCausalLM
from flexmoe.cpu import compiled, linear, prepack
from flexmoe.cpu.prepack import prepacked_of
from flexmoe.testing import TOLERANCES, VOCABULARY, random_tokens, tiny_flexmoe
from tests.support.soak import thinned

OWNERS = ("math", "code")
HAS_INSTRUCTIONS = linear.has_instructions(torch.bfloat16)


def without_inductor(output, tensors, dtype=torch.float32):
    """Replaces `compiled._compile`: the same function of the same tensors, as torch runs it."""
    return torch.no_grad()(output)


@pytest.fixture(autouse=True)
def include_small_weights(request, monkeypatch):
    """All matrices are prepacked. Nothing is compiled, which takes seconds for each shape, except in `real_loops`."""
    monkeypatch.setattr(linear, "SMALLEST_WEIGHT", 1)
    monkeypatch.setattr(prepack, "SMALLEST_WEIGHT", 1)
    if "real_loops" not in request.fixturenames:
        monkeypatch.setattr(compiled, "_loops", {})
        monkeypatch.setattr(compiled, "_compile", without_inductor)


@pytest.fixture
def real_loops(monkeypatch):
    """Loops are compiled, of the experts and of the largest matrix only."""
    monkeypatch.setattr(prepack, "SMALLEST_WEIGHT", VOCABULARY * 32)


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Lists the prepacked products and networks that run."""
    names: list[str] = []
    for name in ("product", "one_token"):
        own = getattr(prepack.Prepacked, name)

        def recording(self, *args, own=own, name=name):
            result = own(self, *args)
            if result is not None:
                names.append(name)
            return result

        monkeypatch.setattr(prepack.Prepacked, name, recording)
    return names


def model_of(family: str = "olmo2", dtype: torch.dtype = torch.bfloat16) -> FlexMoeForCausalLM:
    model = tiny_flexmoe(family, OWNERS, num_experts_per_tok=2).to(dtype)
    for block in model.flexmoe_blocks():
        block.router.float()  # as in a loaded model
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


# gated, and not gated with biases
compiled_families = pytest.mark.parametrize("family", ["olmo2", "gpt_neox"])


@compiled_families
@pytest.mark.parametrize("dtype", thinned([torch.float32, torch.bfloat16], [torch.bfloat16]))
def test_one_token_has_close_logits(real_loops, ran, family, dtype):
    model = model_of(family, dtype)
    before = logits(model, 1, 1)
    model.prepack_for_cpu()
    torch.testing.assert_close(logits(model, 1, 1), before, **TOLERANCES[dtype])
    assert {"product", "one_token"} == set(ran)


@pytest.mark.soak
def test_every_matrix_is_compiled(real_loops, ran, monkeypatch):
    monkeypatch.setattr(prepack, "SMALLEST_WEIGHT", 1)
    model = model_of()
    before = logits(model, 1, 1)
    model.prepack_for_cpu()
    torch.testing.assert_close(logits(model, 1, 1), before, **TOLERANCES[torch.bfloat16])
    assert ran.count("product") > 2 * len(model.flexmoe_blocks())


def test_prepacking_twice_equals_once(ran):
    model = model_of()
    n_bytes = model.prepack_for_cpu()
    logits(model, 1, 1)
    expected = list(ran)
    assert model.prepack_for_cpu() == n_bytes
    ran.clear()
    logits(model, 1, 1)
    assert ran == expected


@compiled_families
@torch.no_grad()
def test_one_token_is_not_rounded_in_between(real_loops, family):
    model = model_of(family)
    model.prepack_for_cpu()
    expert = model.flexmoe_blocks()[0].experts["math"]
    exact = copy.deepcopy(expert).double()
    for x_H in torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).bfloat16():
        output = prepacked_of(model.flexmoe_blocks()[0]).one_token(expert)(x_H)
        assert output.dtype == torch.float32
        torch.testing.assert_close(output.double(), exact(x_H[None, None].double())[0, 0], **TOLERANCES[torch.float32])


def test_experts_that_are_not_chosen_are_not_read(ran):
    model = model_of()
    for block in model.flexmoe_blocks():
        block.router["code"].bias.data.fill_(-1e9)
        for parameter in block.experts["code"].parameters():
            parameter.data.fill_(float("nan"))
    model.prepack_for_cpu()
    assert logits(model, 1, 1).isfinite().all()
    assert "one_token" in ran


def write_in_place(model):
    for block in model.flexmoe_blocks():
        with torch.no_grad():
            block.experts["math"].up_proj.weight.mul_(-2)


def assign_data(model):
    for block in model.flexmoe_blocks():
        weight = block.experts["math"].down_proj.weight
        weight.data = -2 * weight.data


def replace_activation(model):
    for block in model.flexmoe_blocks():
        block.experts["math"].act_fn = nn.Mish()


def hook_matrix(model):
    for block in model.flexmoe_blocks():
        block.experts["math"].gate_proj.register_forward_hook(lambda module, args, out: -2 * out)


def hook_network(model):
    for block in model.flexmoe_blocks():
        block.experts["math"].register_forward_hook(lambda module, args, out: -2 * out)


def add_adapter(model):
    torch.manual_seed(0)
    config = LoraConfig(target_modules=r".*\.experts\.math\.up_proj", r=2, init_lora_weights=False)
    model.add_adapter(config, "adapter")


def load_state_dict(model):
    state = {name: -2 * value if "math.up_proj" in name else value for name, value in model.state_dict().items()}
    model.load_state_dict(state)


@pytest.mark.parametrize("shape", [(1, 1), (2, 9)])
@pytest.mark.parametrize(
    "change",
    [write_in_place, assign_data, replace_activation, hook_matrix, hook_network, add_adapter, load_state_dict],
)
def test_stale_data_is_not_used(change, shape):
    model, reference = model_of(), model_of()
    model.prepack_for_cpu()
    before = logits(model, *shape)
    change(model)
    change(reference)
    after, expected = logits(model, *shape), logits(reference, *shape)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, expected, **TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize(
    ("change", "still_prepacked"),
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
def test_changes_that_undo_prepacking(ran, change, still_prepacked):
    model = model_of()
    model.prepack_for_cpu()
    change(model)
    logits(model, 1, 1)
    assert bool(ran) == still_prepacked
    assert any("forward" in part.__dict__ for part in model.modules()) == still_prepacked


def test_copies_pickles_and_files_are_not_prepacked(ran, tmp_path):
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


def test_gradients_and_autocast_use_the_reference(ran):
    model = model_of(dtype=torch.float32)
    model.prepack_for_cpu()
    tokens = random_tokens(1, 1)
    model(tokens, labels=random_tokens(1, 1)).logits.sum().backward()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens)
    assert not ran
    assert model.flexmoe_blocks()[0].experts["math"].up_proj.weight.grad is not None


def test_training_mode_and_other_devices_are_refused():
    model = model_of()
    with pytest.raises(ValueError, match=r"for inference, and this model is in training mode: call eval\(\) first"):
        model.train().prepack_for_cpu()
    with pytest.raises(ValueError, match="for models on a CPU; this one is on meta"):
        model.eval().to("meta").prepack_for_cpu()


def test_matrices_are_prepacked_without_a_compiler(monkeypatch, caplog, ran):
    def no_compiler(*args, **kwargs):
        raise RuntimeError("no g++")

    monkeypatch.setattr(compiled, "_loops", {})
    monkeypatch.setattr(compiled, "_compile", no_compiler)
    model = model_of()
    before = logits(model, 1, 1)
    with caplog.at_level(logging.WARNING):
        model.prepack_for_cpu()
    assert "no working C++ compiler was found (no g++)" in caplog.text
    assert torch.equal(logits(model, 1, 1), before)
    assert "one_token" not in ran
