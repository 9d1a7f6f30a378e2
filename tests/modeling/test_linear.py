"""The faster linear layers against torch's own: values, what they leave alone, and what stays exact behind them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flexmoe.modeling import FlexMoeForCausalLM, linear_flexmoe
from flexmoe.modeling.linear_flexmoe import faster_linears, split_linear, turned_linear, widened_linear
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
def taken(monkeypatch):
    """Small weights take the faster way, too, as on a CPU without half-precision instructions; lists what did."""
    calls = []
    monkeypatch.setattr(linear_flexmoe, "SMALLEST_WEIGHT", 1)
    monkeypatch.setattr(linear_flexmoe, "has_instructions", lambda dtype: dtype not in HALVES)
    for name in ("split_linear", "widened_linear"):
        own = getattr(linear_flexmoe, name)
        monkeypatch.setattr(linear_flexmoe, name, lambda *a, own=own, name=name: calls.append(name) or own(*a))
    return calls


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 3, 8, 65])
@pytest.mark.parametrize("outputs", [12, 13])  # 13 rows of a weight cannot be split evenly
@torch.no_grad()
def test_split_linear_is_linear(rows, outputs, bias):
    layer = nn.Linear(24, outputs, bias=bias)
    x = torch.randn(rows, 24)
    torch.testing.assert_close(split_linear(x, layer.weight, layer.bias), layer(x), **TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widened", [24, 5 * 24, 1 << 20])  # one row of the weight at a time, five, all
@torch.no_grad()
def test_widened_linear_is_the_float32_product_rounded_once(monkeypatch, dtype, bias, widened):
    monkeypatch.setattr(linear_flexmoe, "WIDENED", widened)
    layer = nn.Linear(24, 12, bias=bias, dtype=dtype)
    x = torch.randn(9, 24, dtype=dtype)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double() if bias else None)
    # half a unit in the last place: a product rounded in between would be off by more
    torch.testing.assert_close(
        widened_linear(x, layer.weight, layer.bias).double(), expected, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(24, 12), (12, 24)])
@pytest.mark.parametrize("rows", [0, 1, 9])
@torch.no_grad()
def test_turned_linear_is_linear(shape, rows):
    weight, x = torch.randn(shape, dtype=torch.bfloat16), torch.randn(rows, shape[1], dtype=torch.bfloat16)
    out = turned_linear(x, weight)
    torch.testing.assert_close(out, F.linear(x, weight), **TOLERANCES[torch.bfloat16])
    assert rows < 2 or out.is_contiguous() == (shape == (12, 24))


@torch.no_grad()
def test_with_instructions_the_weight_is_the_left_factor_from_some_rows_on(monkeypatch):
    turned = []
    monkeypatch.setattr(linear_flexmoe, "SMALLEST_WEIGHT", 1)
    monkeypatch.setattr(linear_flexmoe, "has_instructions", lambda dtype: True)
    monkeypatch.setattr(
        linear_flexmoe, "turned_linear", lambda x, w: turned.append((len(x), *w.shape)) or F.linear(x, w)
    )
    narrow, wide = nn.Linear(12, 24, bias=False).bfloat16(), nn.Linear(24, 12, bias=False).bfloat16()
    biased = nn.Linear(12, 24).bfloat16()
    for rows in (1, 11, 12, 31, 32):
        x = torch.randn(rows, 12).bfloat16()
        with faster_linears(x):
            wide(narrow(x))
            biased(x)  # the bias is added before the only rounding
    assert turned == [(12, 12, 24), (31, 12, 24), (32, 24, 12), (32, 12, 24)]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", [(8, 24), (1, 8, 24), (2, 4, 24)])
@torch.no_grad()
def test_modules_are_called_and_keep_their_shapes(taken, dtype, shape):
    layer = nn.Linear(24, 12, dtype=dtype)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    x = torch.randn(shape, dtype=dtype)
    expected = layer(x)
    assert not taken
    with faster_linears(x):
        out = layer(x)
    assert taken
    torch.testing.assert_close(out, expected, **TOLERANCES[dtype])
    assert out.dtype == dtype


class _Marked(torch.Tensor):
    """Stands for quantised and distributed tensors: a type of its own."""


@torch.no_grad()
def test_what_is_not_plain_is_left_alone(taken):
    x = torch.randn(8, 24)
    layer = nn.Linear(24, 12)
    marked = nn.Linear(24, 12)
    marked.weight = nn.Parameter(marked.weight.as_subclass(_Marked))
    with faster_linears(x):
        marked(x)
        F.linear(x, layer.weight.t().contiguous().t())  # not contiguous
        F.linear(x.double(), layer.weight.double())
        torch.mm(x, layer.weight.t())
    with torch.enable_grad(), faster_linears(x):
        layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), faster_linears(x):
        layer(x)
    long = torch.randn(linear_flexmoe.MOST_ROWS + 1, 24)
    with faster_linears(long):
        layer(long)
    few = x[: linear_flexmoe.FEWEST_HALF_ROWS - 1].bfloat16()
    with faster_linears(few):
        layer.bfloat16()(few)
    assert not taken


@pytest.fixture
def model(taken) -> FlexMoeForCausalLM:
    return tiny_flexmoe("olmo2", OWNERS, num_experts_per_tok=2)


@torch.no_grad()
def logits(model: FlexMoeForCausalLM, length: int = 17, **kwargs: object) -> torch.Tensor:
    return model(random_tokens(2, length), **kwargs).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_masked_is_removed_bit_for_bit(model, taken, dtype, k):
    model.to(dtype)
    for block in model.flexmoe_blocks():
        for parameter in block.experts["code"].parameters():
            parameter.data.fill_(float("nan"))
    rest = ("public", "math", "legal")
    by_mask = logits(model, expert_mask=model.expert_mask([rest, rest]), num_experts_per_tok=k)
    assert taken
    model.remove_expert("code")
    assert torch.equal(by_mask, logits(model, num_experts_per_tok=k))
    assert by_mask.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_public_alone_has_the_anchors_bits(model, taken, dtype):
    model.to(dtype)
    model.set_active_experts(["public"])
    tokens = random_tokens(2, 17)
    alone = logits(model)
    assert not taken
    for block in model.flexmoe_blocks():
        block.forward = block.experts["public"].forward
    with torch.no_grad():
        assert torch.equal(model.anchor(tokens).logits, alone)


def test_logits_are_those_of_torchs_own_products(model, taken, monkeypatch):
    faster = logits(model)
    assert taken
    monkeypatch.setattr(linear_flexmoe, "SMALLEST_WEIGHT", 1 << 62)
    torch.testing.assert_close(faster, logits(model), **TOLERANCES[torch.float32])
