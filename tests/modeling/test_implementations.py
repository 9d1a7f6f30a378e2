"""The operators in place of modules: the same logits, the choice by name, and a reason wherever they are not taken.

On the CPU they run their reference, so what is tested here is everything around the kernels, which tests/kernels has.
"""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from flexmoe import FlexMoeConfig, FlexMoeForCausalLM, track_usage
from flexmoe.modeling import implementations_flexmoe, ops_flexmoe
from flexmoe.modeling.experts_flexmoe import router_row
from flexmoe.modeling.implementations_flexmoe import ENVIRONMENT, Inputs, activation_name, row_reason
from flexmoe.testing import TOLERANCES, random_tokens, tiny_flexmoe

OWNERS = ("math", "code", "legal")
LOW_RANK = {"name": "thin", "kind": "low_rank", "rank": [2, 2]}
FUSED = "router and experts are fused"


@pytest.fixture
def calls(monkeypatch):
    """Lists which operators ran, through their CPU implementations."""
    made = []
    for name in ("ROUTE", "MIX", "MIX_LOW_RANK"):
        own = getattr(ops_flexmoe, name)
        monkeypatch.setattr(ops_flexmoe, name, lambda *a, own=own, name=name: made.append(name) or own(*a))
    return made


def fused(family: str = "olmo2", experts=OWNERS, **config) -> FlexMoeForCausalLM:
    model = tiny_flexmoe(family, experts, num_experts_per_tok=2, **config)
    model.config._flexmoe_implementation = "triton"
    return model


@torch.no_grad()
def both(model: FlexMoeForCausalLM, length: int = 9, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits by modules, and by operators."""
    tokens = random_tokens(2, length)
    model.config._flexmoe_implementation = "torch"
    by_modules = model(tokens, **kwargs).logits
    model.config._flexmoe_implementation = "triton"
    return by_modules, model(tokens, **kwargs).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma2", "qwen3", "gpt_neox"])
def test_operators_say_what_modules_say(calls, family, dtype):
    model = fused(family).to(dtype)
    by_modules, by_operators = both(model)
    assert calls == ["ROUTE", "MIX"] * 2
    scale = 1 if dtype == torch.float32 else 4  # roundings in two layers
    torch.testing.assert_close(by_operators, by_modules, **{k: scale * v for k, v in TOLERANCES[dtype].items()})
    assert {path.reason for path in model.implementation_paths()} == {FUSED}


@pytest.mark.parametrize("k", [1, 2, 9])
@pytest.mark.parametrize("rows", [(["public", "math"], ["code", "legal"]), (["math"], ["public", "code", "legal"])])
def test_masks_are_data(calls, rows, k):
    model = fused()
    by_modules, by_operators = both(model, expert_mask=model.expert_mask(rows), num_experts_per_tok=k)
    assert "MIX" in calls
    torch.testing.assert_close(by_operators, by_modules, **TOLERANCES[torch.float32])


def test_what_is_masked_may_hold_nan(calls):
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
    assert {path.reason for path in model.implementation_paths()} == {f"{FUSED}, low-rank ones of up to 64 tokens"}
    of_layer = [name for name in ("ROUTE", "MIX", "MIX_LOW_RANK") if name != "MIX" or "math" in experts]
    for length, expected in ((9, of_layer), (33, [name for name in of_layer if name != "MIX_LOW_RANK"])):
        calls.clear()
        by_modules, by_operators = both(model, length, num_experts_per_tok=k)
        assert calls == expected * 2
        torch.testing.assert_close(by_operators, by_modules, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("tokens", [64, 65])
def test_many_tokens_go_through_low_rank_modules(tokens):
    block = fused(experts=("math", LOW_RANK)).flexmoe_blocks()[0]
    with torch.no_grad():
        path = block.path(tuple(block.experts), Inputs("cpu", tokens=tokens), "triton")
    assert (path.low_rank is None) == (tokens == 65)
    in_torch = (
        "; low-rank experts share the public network's products in PyTorch: the operator takes 64 tokens at most"
    )
    assert path.reason == FUSED + (in_torch if tokens == 65 else "")


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
def test_what_trains_has_its_gradients_beside_low_rank_experts(calls, trained):
    model = fused(experts=("math", LOW_RANK)).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f"layers.1.mlp.{trained}" in name)
    tokens = random_tokens(2, 9)
    gradients = []
    for implementation in ("triton", "torch"):
        model.config._flexmoe_implementation = implementation
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert calls[:3] == ["ROUTE", "MIX", "MIX_LOW_RANK"]
    assert "MIX_LOW_RANK" not in calls[3:]
    assert gradients[0]
    torch.testing.assert_close(*gradients, **TOLERANCES[torch.float32])


def test_logits_of_the_router_and_usage_are_reported(calls):
    model = fused()
    tokens = random_tokens(2, 9)
    with torch.no_grad(), track_usage(model) as by_operators:
        ours = model(tokens, output_router_logits=True, expert_mask=model.expert_mask([["public", "math"], OWNERS]))
    assert calls
    model.config._flexmoe_implementation = "torch"
    with torch.no_grad(), track_usage(model) as by_modules:
        theirs = model(tokens, output_router_logits=True, expert_mask=model.expert_mask([["public", "math"], OWNERS]))
    torch.testing.assert_close(ours.router_logits, theirs.router_logits, **TOLERANCES[torch.float32])
    torch.testing.assert_close(by_operators.share(), by_modules.share(), **TOLERANCES[torch.float32])


def test_experts_train_through_modules_and_their_rows_through_the_operator(calls):
    model = fused()
    tokens = random_tokens(2, 9)
    model(tokens, labels=tokens).loss.backward()
    assert set(calls) == {"ROUTE"}
    fused_gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.config._flexmoe_implementation = "torch"
    model(tokens, labels=tokens).loss.backward()
    assert any("router" in name for name in fused_gradients)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(fused_gradients[name], parameter.grad, **TOLERANCES[torch.float32], msg=name)


@pytest.mark.parametrize("length", [1, 9])
@pytest.mark.parametrize("others", [(), (LOW_RANK,)], ids=["full", "low rank"])
def test_compiled_whole(length, others):
    model = fused(experts=(*OWNERS, *others))
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
        low_rank = 2 if others else 0
        assert [sum(f".{name}." in target for target in seen) for name in operators] == [2, 2, low_rank]
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
    model.config._flexmoe_implementation = "torch"
    assert torch.equal(static, model.generate(tokens, max_new_tokens=6, do_sample=False))
    assert calls


# Why a layer runs as modules


def lora(model):
    model.add_adapter(LoraConfig(target_modules=r".*\.experts\.math\.(up_proj|down_proj)", r=2), "tuned")


def hooked(model):
    for block in model.flexmoe_blocks():
        block.experts["code"].up_proj.register_forward_hook(lambda module, args, out: out)


def hooked_row(model):
    for block in model.flexmoe_blocks():
        block.router["legal"].register_forward_hook(lambda module, args, out: out)


def other_activation(model):
    for block in model.flexmoe_blocks():
        block.experts["math"].act_fn = nn.Mish()


def one_in_another_dtype(model):
    for block in model.flexmoe_blocks():
        block.experts["math"].to(torch.bfloat16)


def misaligned(model):
    for block in model.flexmoe_blocks():
        weight = block.experts["code"].gate_proj.weight
        storage = torch.zeros(weight.numel() + 1)
        storage[1:] = weight.detach().flatten()
        weight.data = storage[1:].view(weight.shape)


def misaligned_row(model):
    for block in model.flexmoe_blocks():
        weight = block.router["code"].weight
        weight.data = torch.cat([torch.zeros(1, 1), weight.detach()], 1)[:, 1:]


def hooked_difference(model):
    for block in model.flexmoe_blocks():
        block.experts["thin"].up_proj.register_forward_hook(lambda module, args, out: out)


def hooked_factor(model):
    for block in model.flexmoe_blocks():
        block.experts["thin"].down_proj.B.register_forward_hook(lambda module, args, out: out)


def hooked_public_part(model):
    for block in model.flexmoe_blocks():
        block.experts["public"].gate_proj.register_forward_hook(lambda module, args, out: out)


def hooked_public(model):
    for block in model.flexmoe_blocks():
        block.experts["public"].register_forward_hook(lambda module, args, out: out * 1)


def other_scale(model):
    for block in model.flexmoe_blocks():
        block.experts["thin"].gate_proj.scale = 0.5


def misaligned_factor(model):
    for block in model.flexmoe_blocks():
        weight = block.experts["thin"].gate_proj.A.weight
        storage = torch.zeros(weight.numel() + 1)
        storage[1:] = weight.detach().flatten()
        weight.data = storage[1:].view(weight.shape)


LOW_RANK_REASONS = {
    hooked_difference: "thin.up_proj is wrapped or watched (flexmoe.modeling.low_rank_flexmoe.LowRankDelta)",
    hooked_factor: "thin.down_proj is wrapped or watched (flexmoe.modeling.low_rank_flexmoe.Factor)",
    hooked_public_part: "public.gate_proj is wrapped or watched (torch.nn.modules.linear.Linear)",
    hooked_public: "the network of 'public' (Olmo2MLP) is of no form that a kernel computes, or wrapped",
    other_scale: "ranks or scales of 'thin' differ from matrix to matrix",
    misaligned_factor: "a tensor of thin.gate_proj is not contiguous or not aligned to 16 bytes",
}


@pytest.mark.parametrize("change", LOW_RANK_REASONS, ids=lambda change: change.__name__)
def test_low_rank_experts_that_no_operator_takes_run_as_modules(calls, change):
    model = fused(experts=("math", LOW_RANK))
    change(model)
    by_modules, by_operators = both(model)
    assert "MIX_LOW_RANK" not in calls
    assert all(path.low_rank is None for path in model.implementation_paths())
    torch.testing.assert_close(by_operators, by_modules, **TOLERANCES[torch.float32])
    if change is not hooked_public:  # which is then one of the others, that nothing is fused for
        assert "MIX" in calls
    assert all(LOW_RANK_REASONS[change] in path.reason for path in model.implementation_paths())


REASONS = {
    lora: "math.up_proj is wrapped or watched (peft.tuners.lora.layer.Linear)",
    hooked: "code.up_proj is wrapped or watched (torch.nn.modules.linear.Linear)",
    hooked_row: "the router row of 'legal' is wrapped or watched",
    other_activation: "the activation of 'math' is none of silu, gelu, gelu_tanh, relu",
    one_in_another_dtype: "several dtypes",
    misaligned: "a tensor of code.gate_proj is not contiguous or not aligned to 16 bytes",
    misaligned_row: "the router row of 'code' is not aligned to 16 bytes",
}


@pytest.mark.parametrize("change", REASONS, ids=lambda change: change.__name__)
def test_what_no_operator_takes_runs_as_modules(calls, change):
    model = fused()
    change(model)
    assert all(REASONS[change] in path.reason for path in model.implementation_paths())
    if change is one_in_another_dtype:
        return  # modules do not take it either
    by_modules, by_operators = both(model)
    assert "MIX" not in calls
    torch.testing.assert_close(by_operators, by_modules, **TOLERANCES[torch.float32])


@pytest.mark.parametrize(
    ("family", "reason"),
    [("gpt2", "of no form that a kernel computes"), ("phi3", "of no form that a kernel computes")],
)
def test_families_whose_networks_are_of_another_form(calls, family, reason):
    model = fused(family)
    assert all(reason in path.reason for path in model.implementation_paths())
    by_modules, by_operators = both(model)
    torch.testing.assert_close(by_operators, by_modules, rtol=0, atol=0)


@pytest.mark.parametrize("experts", [OWNERS, (LOW_RANK,)], ids=["full", "low rank"])
def test_what_no_router_kernel_takes_is_routed_by_modules(calls, experts):
    """Also where the experts run as modules anyway."""
    model = fused(experts=experts).double()
    assert all(path.reason == "no kernel routes torch.float64" for path in model.implementation_paths())
    by_modules, by_operators = both(model)
    assert torch.equal(by_modules, by_operators)
    assert not calls


@pytest.mark.parametrize(
    ("hidden", "reason"), [(36, "the hidden size is 36, and a kernel takes multiples of 8"), (40, None)]
)
def test_hidden_sizes_of_rows(hidden, reason):
    rows = nn.ModuleDict({name: router_row(hidden) for name in OWNERS})
    assert row_reason(OWNERS, rows, None) == reason


def test_autocast_and_single_experts_run_as_modules(calls):
    model = fused()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(random_tokens(2, 9))
    model.set_active_experts(["math"])
    with torch.no_grad():
        model(random_tokens(2, 9))
    assert not calls


def test_auto_takes_modules_where_nobody_has_measured(calls):
    model = tiny_flexmoe("olmo2", OWNERS)
    assert model.config._flexmoe_implementation == "auto"
    with torch.no_grad():
        model(random_tokens(2, 9))
    assert not calls
    assert all("on a CPU the operators are a reference" in path.reason for path in model.implementation_paths())
    assert all(path.reason == "no operator runs on mps" for path in model.implementation_paths(device="mps"))
    on_a_gpu = model.implementation_paths(device="cuda", capability=(9, 0))
    assert all("nobody has measured the kernels on compute capability 9.0" in path.reason for path in on_a_gpu)
    model.config._flexmoe_implementation = "triton"
    assert {path.reason for path in model.implementation_paths(device="cuda", capability=(9, 0))} == {FUSED}


def test_what_auto_takes_on_a_gpu(monkeypatch):
    model = tiny_flexmoe("olmo2", OWNERS)
    on_a_gpu = {"device": "cuda", "dtype": torch.float32, "capability": (9, 0)}

    def reasons():
        return {path.reason for path in model.implementation_paths(**on_a_gpu, tokens=8)}

    monkeypatch.setitem(implementations_flexmoe.MEASURED, (9, 0), {torch.float32: (8, 64)})
    assert reasons() == {FUSED}
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert reasons() == {"nobody has measured the kernels on AMD's GPUs"}
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(implementations_flexmoe, "TRITON_IS_THERE", False)
    assert reasons() == {"Triton is not installed"}
    monkeypatch.setitem(implementations_flexmoe.MEASURED, (9, 0), {torch.float32: (9, 64)})
    assert reasons() == {"modules are faster with 8 tokens (the kernels from 9 to 64)"}


def test_the_environment_goes_before_the_config(calls, monkeypatch):
    model = fused()
    monkeypatch.setenv(ENVIRONMENT, "torch")
    with torch.no_grad():
        model(random_tokens(1, 9))
        assert not calls
        monkeypatch.setenv(ENVIRONMENT, "cuda")
        with pytest.raises(ValueError, match=r"FLEXMOE_IMPLEMENTATION.*'cuda'.*\['auto', 'torch', 'triton'\]"):
            model(random_tokens(1, 9))


def test_the_choice_is_checked_and_stays_in_this_process(tmp_path):
    model = fused()
    with pytest.raises(ValueError, match=r"'cuda' is unknown: it must be one of \['auto', 'torch', 'triton'\]"):
        model.config._flexmoe_implementation = "cuda"
    assert copy.deepcopy(model.config)._flexmoe_implementation == "triton"
    model.save_pretrained(tmp_path)
    assert "triton" not in (tmp_path / "config.json").read_text()
    assert FlexMoeConfig.from_pretrained(tmp_path)._flexmoe_implementation == "auto"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, _flexmoe_implementation="triton")
    assert loaded.config._flexmoe_implementation == "triton"


SAID = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
SAID |= {"relu": "relu", "quick_gelu": None, "relu2": None, "mish": None, "gelu_10": None}


@pytest.mark.parametrize(("name", "expected"), SAID.items())
def test_activations_are_told_by_what_they_compute(name, expected):
    assert activation_name(ACT2FN[name]) == expected
