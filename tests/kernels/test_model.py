"""A whole model on the kernels: what modules say, text by greedy decoding, and an expert that is masked or removed."""

import pytest
import torch

from flexmoe.modeling import kernels_route_flexmoe, ops_flexmoe
from flexmoe.testing import TOLERANCES, random_tokens, tiny_flexmoe

OWNERS = ("math", "code")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def model(monkeypatch):
    if DEVICE == "cpu":  # the interpreter, in the place of the CPU's reference
        monkeypatch.setattr(ops_flexmoe, "ROUTE", lambda *args: tuple(kernels_route_flexmoe.route(*args)))
        monkeypatch.setattr(ops_flexmoe, "MIX", ops_flexmoe._mix_cuda)
    model = tiny_flexmoe("olmo2", OWNERS, num_experts_per_tok=2).to(DEVICE)
    model.config._flexmoe_implementation = "triton"
    return model


@torch.no_grad()
def logits(model, length: int, **kwargs: object) -> torch.Tensor:
    return model(random_tokens(2, length).to(DEVICE), **kwargs).logits


@pytest.mark.parametrize("length", [3, 40])  # few tokens, and more than 64
def test_kernels_say_what_modules_say(model, length):
    mask = model.expert_mask([["public", "math"], ["code"]])
    by_kernels = [logits(model, length), logits(model, length, expert_mask=mask)]
    model.config._flexmoe_implementation = "torch"
    by_modules = [logits(model, length), logits(model, length, expert_mask=mask)]
    torch.testing.assert_close(by_kernels, by_modules, **TOLERANCES[torch.float32])


def test_masked_is_removed_although_it_holds_nan(model):
    for block in model.flexmoe_blocks():
        for parameter in (*block.experts["code"].parameters(), *block.router["code"].parameters()):
            parameter.data.fill_(float("nan"))
    rest = ["public", "math"]
    by_mask = logits(model, 40, expert_mask=model.expert_mask([rest, rest]))
    beside = logits(model, 40, expert_mask=model.expert_mask([rest, ["code"]]))
    model.remove_expert("code")
    removed = logits(model, 40)
    torch.testing.assert_close(by_mask, removed, **TOLERANCES[torch.float32])
    torch.testing.assert_close(beside[0], removed[0], **TOLERANCES[torch.float32])
    assert beside[1].isnan().all()


def test_greedy_text(model):
    tokens = random_tokens(2, 5).to(DEVICE)
    by_kernels = model.generate(tokens, max_new_tokens=4, do_sample=False)
    model.config._flexmoe_implementation = "torch"
    assert torch.equal(by_kernels, model.generate(tokens, max_new_tokens=4, do_sample=False))
