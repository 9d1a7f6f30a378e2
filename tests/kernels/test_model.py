"""A whole model on the kernels: the logits of modules, greedy decoding, and an expert that is masked or removed."""

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("triton")

from flexmoe.kernels.experts import op as experts_op
from flexmoe.kernels.route import kernel as route_kernel
from flexmoe.kernels.route import op as route_op
from flexmoe.testing import ANCHOR_CONFIGS, TOLERANCES, flexmoe_from_anchor, random_tokens

OWNERS = ("math", "code")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def model(monkeypatch):
    if DEVICE == "cpu":  # the interpreter, instead of the reference
        monkeypatch.setattr(route_op, "ROUTE", lambda *args: tuple(route_kernel.route(*args)))
        monkeypatch.setattr(experts_op, "MIX", experts_op._mix_cuda)
    config = ANCHOR_CONFIGS["olmo2"]()
    config.num_hidden_layers = 1  # the interpreter is slow
    torch.manual_seed(0)
    anchor = AutoModelForCausalLM.from_config(config).eval()
    model = flexmoe_from_anchor(anchor, OWNERS, num_experts_per_tok=2).to(DEVICE)
    model.set_experts_implementation("flexmoe_triton")
    return model


@torch.no_grad()
def logits(model, length: int, **kwargs: object) -> torch.Tensor:
    return model(random_tokens(2, length).to(DEVICE), **kwargs).logits


@pytest.mark.parametrize("length", [3, 33])  # few tokens, and more than 64
def test_logits_equal_those_of_modules(model, length):
    mask = model.expert_mask([["public", "math"], ["code"]])
    by_kernels = [logits(model, length), logits(model, length, expert_mask=mask)]
    model.set_experts_implementation("eager")
    by_modules = [logits(model, length), logits(model, length, expert_mask=mask)]
    torch.testing.assert_close(by_kernels, by_modules, **TOLERANCES[torch.float32])


def test_a_masked_expert_acts_as_removed_even_if_it_holds_nan(model):
    for block in model.flexmoe_blocks():
        for parameter in (*block.experts["code"].parameters(), *block.router["code"].parameters()):
            parameter.data.fill_(float("nan"))
    rest = ["public", "math"]
    by_mask = logits(model, 33, expert_mask=model.expert_mask([rest, rest]))
    beside = logits(model, 33, expert_mask=model.expert_mask([rest, ["code"]]))
    model.remove_expert("code")
    removed = logits(model, 33)
    torch.testing.assert_close(by_mask, removed, **TOLERANCES[torch.float32])
    torch.testing.assert_close(beside[0], removed[0], **TOLERANCES[torch.float32])
    assert beside[1].isnan().all()


def test_greedy_decoding(model):
    tokens = random_tokens(2, 5).to(DEVICE)
    by_kernels = model.generate(tokens, max_new_tokens=3, do_sample=False)
    model.set_experts_implementation("eager")
    assert torch.equal(by_kernels, model.generate(tokens, max_new_tokens=3, do_sample=False))
