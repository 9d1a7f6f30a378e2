"""The implementation "flexmoe_triton" of a model: the logits, gradients and records of modules, and compilation.

On a CPU the operators run their reference, so this tests everything around the kernels. Why a layer runs as modules is
in `test_dispatch.py`.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from flexmoe import track_usage
from flexmoe.kernels.dispatch import Inputs, choose_path
from flexmoe.modeling.experts_flexmoe import EXPERTS_FORWARDS
from flexmoe.modeling.masking_flexmoe import ForwardContext
from flexmoe.testing import ANCHOR_CONFIGS, TOLERANCES, flexmoe_from_anchor, random_tokens, tiny_flexmoe
from tests.kernels.models import FUSED, LOW_RANK, OWNERS, both, fused
from tests.support.soak import soak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma2", "qwen3", "gpt_neox"])
def test_logits_equal_those_of_modules(calls, family, dtype):
    model = fused(family).to(dtype)
    by_modules, by_operators = both(model)
    assert calls == ["ROUTE", "MIX"] * 2
    scale = 1 if dtype == torch.float32 else 4  # rounding in two layers
    torch.testing.assert_close(by_operators, by_modules, **{k: scale * v for k, v in TOLERANCES[dtype].items()})
    assert {path.reason for path in model.implementation_paths()} == {FUSED}


@pytest.mark.parametrize("k", [1, 2, 9])
@pytest.mark.parametrize("rows", [(["public", "math"], ["code", "legal"]), (["math"], ["public", "code", "legal"])])
def test_masks_are_data(calls, rows, k):
    model = fused()
    by_modules, by_operators = both(model, expert_mask=model.expert_mask(rows), num_experts_per_tok=k)
    assert "MIX" in calls
    torch.testing.assert_close(by_operators, by_modules, **TOLERANCES[torch.float32])


def test_a_masked_expert_may_hold_nan(calls):
    model = fused()
    for block in model.flexmoe_blocks():
        for parameter in (*block.experts["code"].parameters(), *block.router["code"].parameters()):
            parameter.data.fill_(float("nan"))
    _, by_operators = both(model, expert_mask=model.expert_mask([["public", "math"], ["legal"]]))
    assert by_operators.isfinite().all()


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize(
    "experts", [("math", LOW_RANK, "code"), (LOW_RANK,), ("math", LOW_RANK, {**LOW_RANK, "alpha": 3, "name": "two"})]
)
def test_low_rank_experts_share_the_public_products(calls, experts, k):
    model = fused(experts=experts)
    assert {path.reason for path in model.implementation_paths()} == {f"{FUSED}, low-rank experts up to 64 tokens"}
    of_layer = [name for name in ("ROUTE", "MIX", "MIX_LOW_RANK") if name != "MIX" or "math" in experts]
    for length, expected in ((9, of_layer), (33, [name for name in of_layer if name != "MIX_LOW_RANK"])):
        calls.clear()
        by_modules, by_operators = both(model, length, num_experts_per_tok=k)
        assert calls == expected * 2
        torch.testing.assert_close(by_operators, by_modules, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("tokens", [64, 65])
def test_many_tokens_run_low_rank_experts_as_modules(tokens):
    block = fused(experts=("math", LOW_RANK)).flexmoe_blocks()[0]
    with torch.no_grad():
        path = choose_path(block, tuple(block.experts), Inputs("cpu", tokens=tokens))
    assert (path.low_rank is None) == (tokens == 65)
    as_modules = "; low-rank experts run as PyTorch modules: the operator takes at most 64 tokens"
    assert path.reason == FUSED + (as_modules if tokens == 65 else "")


def test_low_rank_networks_with_biases_and_without_a_gate(calls):
    model = fused("gpt_neox", experts=("math", LOW_RANK))
    for name, parameter in model.named_parameters():
        if "mlp" in name and name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    by_modules, by_operators = both(model)
    assert calls == ["ROUTE", "MIX", "MIX_LOW_RANK"] * 2
    torch.testing.assert_close(by_operators, by_modules, **TOLERANCES[torch.float32])


def test_a_low_rank_expert_that_is_masked_may_hold_nan(calls):
    model = fused(experts=("math", LOW_RANK))
    for block in model.flexmoe_blocks():
        for parameter in (*block.experts["thin"].parameters(), *block.router["thin"].parameters()):
            parameter.data.fill_(float("nan"))
    _, by_operators = both(model, expert_mask=model.expert_mask([["public", "math"], ["public", "thin"]]))
    assert "MIX_LOW_RANK" in calls
    assert by_operators[0].isfinite().all()
    assert by_operators[1].isnan().all()


@pytest.mark.parametrize("trained", ["experts.thin", "experts.public", "router.thin"])
def test_gradients_beside_low_rank_experts(calls, trained):
    model = fused(experts=("math", LOW_RANK)).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f"layers.1.mlp.{trained}" in name)
    tokens = random_tokens(2, 9)
    gradients = []
    for implementation in ("flexmoe_triton", "eager"):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert calls[:3] == ["ROUTE", "MIX", "MIX_LOW_RANK"]
    assert "MIX_LOW_RANK" not in calls[3:]
    assert gradients[0]
    torch.testing.assert_close(*gradients, **TOLERANCES[torch.float32])


def test_router_logits_and_usage_are_recorded(calls):
    model = fused()
    tokens = random_tokens(2, 9)
    with torch.no_grad(), track_usage(model) as by_operators:
        ours = model(tokens, output_router_logits=True, expert_mask=model.expert_mask([["public", "math"], OWNERS]))
    assert calls
    model.set_experts_implementation("eager")
    with torch.no_grad(), track_usage(model) as by_modules:
        theirs = model(tokens, output_router_logits=True, expert_mask=model.expert_mask([["public", "math"], OWNERS]))
    torch.testing.assert_close(ours.router_logits, theirs.router_logits, **TOLERANCES[torch.float32])
    torch.testing.assert_close(by_operators.share(), by_modules.share(), **TOLERANCES[torch.float32])


def test_experts_train_as_modules_and_their_rows_through_the_operator(calls):
    model = fused()
    tokens = random_tokens(2, 9)
    model(tokens, labels=tokens).loss.backward()
    assert set(calls) == {"ROUTE"}
    fused_gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_experts_implementation("eager")
    model(tokens, labels=tokens).loss.backward()
    assert any("router" in name for name in fused_gradients)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(fused_gradients[name], parameter.grad, **TOLERANCES[torch.float32], msg=name)


@pytest.mark.parametrize(
    ("length", "others"),
    [
        pytest.param(9, (), id="full"),
        pytest.param(1, (LOW_RANK,), id="low rank"),
        soak(1, (), id="full, one token"),
        soak(9, (LOW_RANK,), id="low rank, several tokens"),
    ],
)
def test_compiles_without_graph_breaks(length, others):
    config = ANCHOR_CONFIGS["olmo2"]()
    config.num_hidden_layers = 1  # tracing a layer takes a second
    anchor = AutoModelForCausalLM.from_config(config).eval()
    model = flexmoe_from_anchor(anchor, (*OWNERS, *others), num_experts_per_tok=2)
    model.set_experts_implementation("flexmoe_triton")
    tokens = random_tokens(2, length)
    seen = []

    def backend(graph, examples):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    masks = [model.expert_mask([names, names]) for names in (("public", "math"), OWNERS, model.expert_names)]
    with torch.no_grad():
        compiled(tokens, expert_mask=masks[0])
        operators = ("route", "mix", "mix_low_rank")
        assert [sum(f".{name}." in target for target in seen) for name in operators] == [1, 1, len(others)]
        with torch.compiler.set_stance("fail_on_recompile"):  # a mask is data
            for mask in masks:
                torch.testing.assert_close(
                    compiled(tokens, expert_mask=mask).logits,
                    model(tokens, expert_mask=mask).logits,
                    **TOLERANCES[torch.float32],
                )


def test_generation_with_a_static_cache(calls):
    model = fused()
    tokens = random_tokens(2, 5)
    static = model.generate(tokens, max_new_tokens=6, do_sample=False, cache_implementation="static")
    model.set_experts_implementation("eager")
    assert torch.equal(static, model.generate(tokens, max_new_tokens=6, do_sample=False))
    assert calls


def test_it_is_chosen_by_the_names_of_transformers(calls, tmp_path):
    model = fused()
    model.save_pretrained(tmp_path)
    assert "triton" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="flexmoe_triton")
    assert loaded.get_experts_implementation() == {"": "flexmoe_triton"}
    for parameter in loaded.parameters():  # tensors of a mapped file may not be aligned to 16 bytes
        parameter.data = parameter.detach().clone()
    with torch.no_grad():
        loaded(random_tokens(2, 9))
        assert calls == ["ROUTE", "MIX"] * 2
        loaded.set_experts_implementation("eager")
        loaded(random_tokens(2, 9))
    assert calls == ["ROUTE", "MIX"] * 2


def test_a_block_on_its_own():
    """As a registered function: the same arguments and the same result as the reference."""
    block = tiny_flexmoe("llama", OWNERS).flexmoe_blocks()[0]
    x_TH = torch.randn(5, block.hidden_size)
    with torch.no_grad():
        ours, theirs = (
            EXPERTS_FORWARDS[name](block, x_TH, tuple(block.experts), ForwardContext(top_k=2), [])
            for name in ("flexmoe_triton", "eager")
        )
    torch.testing.assert_close(ours, theirs, **TOLERANCES[torch.float32])


def test_networks_that_take_a_residual_run_as_modules(calls):
    config = BloomConfig(vocab_size=128, hidden_size=32, n_layer=2, n_head=4)
    model = flexmoe_from_anchor(BloomForCausalLM(config).eval(), ["math"])
    by_modules, by_operators = both(model)
    assert torch.equal(by_modules, by_operators)
    assert not calls
