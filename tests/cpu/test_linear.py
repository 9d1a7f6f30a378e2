"""The faster linear layers against `F.linear`: values, unsupported cases, and exactness of a model that uses them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flexmoe.cpu import linear
from flexmoe.cpu.linear import faster_linears, split_linear, widened_linear
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.testing import TOLERANCES, random_tokens, tiny_flexmoe

OWNERS = ("math", "code", "legal")
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def calls(monkeypatch):
    """The calls of the faster products, also for small weights, as on a CPU without half-precision instructions."""
    names = []
    monkeypatch.setattr(linear, "SMALLEST_WEIGHT", 1)
    monkeypatch.setattr(linear, "has_instructions", lambda dtype: dtype not in HALVES)
    for name in ("split_linear", "widened_linear"):
        own = getattr(linear, name)
        monkeypatch.setattr(linear, name, lambda *a, own=own, name=name: names.append(name) or own(*a))
    return names


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 3, 8, 65])
@pytest.mark.parametrize("outputs", [12, 13])  # 13 rows of a weight cannot be split evenly
@torch.no_grad()
def test_split_linear_equals_linear(rows, outputs, bias):
    layer = nn.Linear(24, outputs, bias=bias)
    x = torch.randn(rows, 24)
    torch.testing.assert_close(split_linear(x, layer.weight, layer.bias), layer(x), **TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widened", [24, 5 * 24, 1 << 20])  # one row of the weight at a time, five, or all
@torch.no_grad()
def test_widened_linear_rounds_the_float32_product_once(monkeypatch, dtype, bias, widened):
    monkeypatch.setattr(linear, "WIDENED", widened)
    layer = nn.Linear(24, 12, bias=bias, dtype=dtype)
    x = torch.randn(9, 24, dtype=dtype)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    # half a unit in the last place: a product rounded in between would be off by more
    torch.testing.assert_close(
        widened_linear(x, layer.weight, layer.bias).double(), expected, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-6
    )


@torch.no_grad()
def test_widened_linear_reuses_its_memory_in_and_outside_of_inference_mode():
    layer = nn.Linear(24, 12, dtype=torch.bfloat16)
    x = torch.randn(9, 24, dtype=torch.bfloat16)
    with torch.inference_mode():
        inside = linear.widened_linear(x, layer.weight)
    used = linear._of_thread.scratch.data_ptr()
    assert torch.equal(linear.widened_linear(x, layer.weight), inside)
    assert linear._of_thread.scratch.data_ptr() == used
    larger = nn.Linear(24, 1 << 15, dtype=torch.bfloat16)  # grows
    expected = F.linear(x.float(), larger.weight.float())
    torch.testing.assert_close(linear.widened_linear(x, larger.weight).float(), expected, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", [(8, 24), (1, 8, 24), (2, 4, 24)])
@torch.no_grad()
def test_modules_are_called_and_keep_their_shapes(calls, dtype, shape):
    layer = nn.Linear(24, 12, dtype=dtype)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    x = torch.randn(shape, dtype=dtype)
    expected = layer(x)
    assert not calls
    with faster_linears(x):
        out = layer(x)
    assert calls
    torch.testing.assert_close(out, expected, **TOLERANCES[dtype])
    assert out.dtype == dtype


class _Subclass(torch.Tensor):
    """A tensor subclass, as quantised and distributed tensors are."""


@torch.no_grad()
def test_other_tensors_use_torch(calls):
    x = torch.randn(8, 24)
    layer = nn.Linear(24, 12)
    subclassed = nn.Linear(24, 12)
    subclassed.weight = nn.Parameter(subclassed.weight.as_subclass(_Subclass))
    with faster_linears(x):
        subclassed(x)
        F.linear(x, layer.weight.t().contiguous().t())  # not contiguous
        F.linear(x.double(), layer.weight.double())
        torch.mm(x, layer.weight.t())
    with torch.enable_grad(), faster_linears(x):
        layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), faster_linears(x):
        layer(x)
    long = torch.randn(linear.MOST_ROWS + 1, 24)
    with faster_linears(long):
        layer(long)
    few = x[: linear.FEWEST_HALF_ROWS - 1].bfloat16()
    with faster_linears(few):
        layer.bfloat16()(few)
    assert not calls


@pytest.fixture
def model(calls) -> FlexMoeForCausalLM:
    return tiny_flexmoe("olmo2", OWNERS, num_experts_per_tok=2)


@torch.no_grad()
def logits(model: FlexMoeForCausalLM, length: int = 17, **kwargs: object) -> torch.Tensor:
    return model(random_tokens(2, length), **kwargs).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_masked_equals_removed(model, calls, dtype, k):
    model.to(dtype)
    for block in model.flexmoe_blocks():
        for parameter in block.experts["code"].parameters():
            parameter.data.fill_(float("nan"))
    rest = ("public", "math", "legal")
    by_mask = logits(model, expert_mask=model.expert_mask([rest, rest]), num_experts_per_tok=k)
    assert calls
    model.remove_expert("code")
    assert torch.equal(by_mask, logits(model, num_experts_per_tok=k))
    assert by_mask.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_public_alone_equals_the_anchor(model, calls, dtype):
    model.to(dtype)
    model.set_active_experts(["public"])
    tokens = random_tokens(2, 17)
    alone = logits(model)
    assert not calls
    for block in model.flexmoe_blocks():
        block.forward = block.experts["public"].forward
    with torch.no_grad():
        assert torch.equal(model.anchor(tokens).logits, alone)


def test_logits_are_close_to_those_of_torch(model, calls, monkeypatch):
    faster = logits(model)
    assert calls
    monkeypatch.setattr(linear, "SMALLEST_WEIGHT", 1 << 62)
    torch.testing.assert_close(faster, logits(model), **TOLERANCES[torch.float32])
