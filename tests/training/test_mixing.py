"""The block as it is trained on a CPU, compared with the reference."""

import pytest
import torch

from flexmoe.modeling.experts_flexmoe import FlexMoeBlock
from flexmoe.modeling.masking_flexmoe import ForwardContext
from flexmoe.testing import TOLERANCES, tiny_flexmoe
from flexmoe.training import mixing
from flexmoe.training.mixing import DECIDED, decide, training_experts_forward

LOW_RANK = {"name": "own", "kind": "low_rank", "rank": [4, 4]}


def training_block(family: str, expert, rows: bool = False) -> FlexMoeBlock:
    model = tiny_flexmoe(family, [expert])
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and ".mlp." in name:
            torch.nn.init.normal_(parameter)
    model.freeze_except("own", rows=rows)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    block = next(iter(model.flexmoe_blocks()))
    torch.nn.init.normal_(block.router["own"].weight, std=1.0)  # decides some tokens and leaves others
    return block.train()


def results(block, forward, x_TH):
    """The output, and the gradients of the input and of all that is trained."""
    x_TH = x_TH.clone().requires_grad_()
    y_TH = forward(block, x_TH, tuple(block.experts), ForwardContext(top_k=2))
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    assert trained
    weight = torch.randn(y_TH.shape, generator=torch.Generator().manual_seed(3))
    return y_TH.detach(), torch.autograd.grad((y_TH * weight).sum(), [x_TH, *trained])


def reference(decided: bool):
    """Every expert as a module on every token, weighted as `decide` does if `decided`."""

    def forward(block, x_TH, names, context):
        weights_TA = block.route(x_TH, names, context)
        weights_TA = decide(weights_TA) if decided else weights_TA
        outputs = [block.call_expert(name, x_TH) for name in names]
        return sum(y_TH * weight_T1 for y_TH, weight_T1 in zip(outputs, weights_TA.split(1, -1), strict=True))

    return forward


def assert_equals_reference(block, x_TH, *, decided):
    torch.testing.assert_close(
        results(block, training_experts_forward, x_TH),
        results(block, reference(decided=decided), x_TH),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("expert", ["own", LOW_RANK], ids=["full", "low_rank"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_outputs_and_gradients_are_those_of_the_reference(family, expert):
    block = training_block(family, expert)
    x_TH = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    weights_TA = decide(block.route(x_TH, tuple(block.experts), ForwardContext(top_k=2)))
    assert 0 < (weights_TA == 0).any(-1).sum() < 40, "some tokens are decided, others are not"
    assert_equals_reference(block, x_TH, decided=True)


def test_leaving_experts_out_changes_little():
    block = training_block("llama", "own")
    x_TH = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    ours, exact = (
        results(block, forward, x_TH)[0] for forward in (training_experts_forward, reference(decided=False))
    )
    names = tuple(block.experts)
    with torch.no_grad():
        difference = block.call_expert(names[0], x_TH) - block.call_expert(names[1], x_TH)
    assert ((ours - exact).abs() <= DECIDED * difference.abs() + 1e-5).all()


def test_decided_tokens_are_computed_by_one_expert(monkeypatch):
    block = training_block("llama", "own")
    x_TH = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    weights_TA = decide(block.route(x_TH, tuple(block.experts), ForwardContext(top_k=2)))
    seen = []
    for expert in block.experts.values():
        expert.gate_proj.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    results(block, training_experts_forward, x_TH)
    assert seen == (weights_TA != 0).sum(0).tolist()
    assert sum(seen) < 80


def test_weights_keep_their_sum():
    weights_TA = torch.tensor([[0.99, 0.01], [0.5, 0.5], [0.001, 0.499], [0.015, 0.985]])
    expected = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 0.5], [0.0, 1.0]])
    torch.testing.assert_close(decide(weights_TA), expected)


def test_trained_rows_get_the_gradients_of_all_tokens():
    block = training_block("llama", "own", rows=True)
    x_TH = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    assert_equals_reference(block, x_TH, decided=False)


def test_an_expert_without_tokens_has_gradients_of_zero():
    """DDP waits for a gradient of every trained parameter."""
    block = training_block("llama", "own")
    block.router["own"].weight.data.zero_()
    block.router["own"].bias.data.fill_(-20.0)
    _, (_, *gradients) = results(block, training_experts_forward, torch.randn(6, 32))
    assert gradients
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("expert", ["own", LOW_RANK], ids=["full", "low_rank"])
def test_hooks_stay_in_force(expert):
    block = training_block("llama", expert)
    block.experts["public"].register_forward_hook(lambda module, args, output: output * 0)
    x_TH = torch.randn(12, 32)
    torch.testing.assert_close(
        results(block, training_experts_forward, x_TH)[0],
        results(block, reference(decided=True), x_TH)[0],
        **TOLERANCES[torch.float32],
    )


def test_validation_is_exact(monkeypatch):
    block = training_block("llama", "own")
    x_TH = torch.randn(12, 32)
    with torch.no_grad():
        found = training_experts_forward(block, x_TH, tuple(block.experts), ForwardContext(top_k=2))
        expected = reference(decided=False)(block, x_TH, tuple(block.experts), ForwardContext(top_k=2))
    torch.testing.assert_close(found, expected, **TOLERANCES[torch.float32])


def test_activations_that_draw_random_numbers_are_not_computed_again():
    block = training_block("llama", "own")
    block.experts["own"].act_fn = torch.nn.RReLU()
    assert mixing._structure_of(block.experts["own"]) is None
