"""Which parts of a layer run as operators, and the reasons why others run as modules.

On a CPU the operators run their reference. The results of a model on operators are in `test_forward.py`.
"""

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers.activations import ACT2FN

from flexmoe.kernels import dispatch
from flexmoe.kernels.dispatch import router_reason
from flexmoe.kernels.plans import activation_name
from flexmoe.modeling.experts_flexmoe import router_row
from flexmoe.testing import TOLERANCES, random_tokens, tiny_flexmoe
from tests.kernels.models import FUSED, LOW_RANK, OWNERS, both, fused


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
    hooked_difference: "thin.up_proj is wrapped or has hooks (flexmoe.modeling.low_rank_flexmoe.LowRankDelta)",
    hooked_factor: "thin.down_proj is wrapped or has hooks (flexmoe.modeling.low_rank_flexmoe.Factor)",
    hooked_public_part: "public.gate_proj is wrapped or has hooks (torch.nn.modules.linear.Linear)",
    hooked_public: "the network of 'public' (Olmo2MLP) has a structure that no kernel computes, or is wrapped",
    other_scale: "ranks or scales of 'thin' differ between its matrices",
    misaligned_factor: "a tensor of thin.gate_proj is not contiguous or not aligned to 16 bytes",
}


@pytest.mark.parametrize("change", LOW_RANK_REASONS, ids=lambda change: change.__name__)
def test_unsupported_low_rank_experts_run_as_modules(calls, change):
    model = fused(experts=("math", LOW_RANK))
    change(model)
    by_modules, by_operators = both(model)
    assert "MIX_LOW_RANK" not in calls
    assert all(path.low_rank is None for path in model.implementation_paths())
    torch.testing.assert_close(by_operators, by_modules, **TOLERANCES[torch.float32])
    if change is not hooked_public:  # it is then one of the full experts, which all run as modules
        assert "MIX" in calls
    assert all(LOW_RANK_REASONS[change] in path.reason for path in model.implementation_paths())


REASONS = {
    lora: "math.up_proj is wrapped or has hooks (peft.tuners.lora.layer.Linear)",
    hooked: "code.up_proj is wrapped or has hooks (torch.nn.modules.linear.Linear)",
    hooked_row: "the router row of 'legal' is wrapped or has hooks",
    other_activation: "the activation of 'math' is none of silu, gelu, gelu_tanh, relu",
    one_in_another_dtype: "several dtypes",
    misaligned: "a tensor of code.gate_proj is not contiguous or not aligned to 16 bytes",
    misaligned_row: "the router row of 'code' is not aligned to 16 bytes",
}


@pytest.mark.parametrize("change", REASONS, ids=lambda change: change.__name__)
def test_unsupported_experts_run_as_modules(calls, change):
    model = fused()
    change(model)
    assert all(REASONS[change] in path.reason for path in model.implementation_paths())
    if change is one_in_another_dtype:
        return  # modules do not run it either
    by_modules, by_operators = both(model)
    assert "MIX" not in calls
    torch.testing.assert_close(by_operators, by_modules, **TOLERANCES[torch.float32])


@pytest.mark.parametrize(
    ("family", "reason"),
    [("gpt2", "has a structure that no kernel computes"), ("phi3", "has a structure that no kernel computes")],
)
def test_families_with_other_structures(calls, family, reason):
    model = fused(family)
    assert all(reason in path.reason for path in model.implementation_paths())
    by_modules, by_operators = both(model)
    torch.testing.assert_close(by_operators, by_modules, rtol=0, atol=0)


@pytest.mark.parametrize("experts", [OWNERS, (LOW_RANK,)], ids=["full", "low rank"])
def test_unsupported_routers_run_as_modules(calls, experts):
    model = fused(experts=experts).double()
    assert all(path.reason == "no kernel routes torch.float64" for path in model.implementation_paths())
    by_modules, by_operators = both(model)
    assert torch.equal(by_modules, by_operators)
    assert not calls


@pytest.mark.parametrize(
    ("hidden", "reason"), [(36, "the hidden size is 36, and the kernels take multiples of 8"), (40, None)]
)
def test_hidden_sizes_of_rows(hidden, reason):
    rows = nn.ModuleDict({name: router_row(hidden) for name in OWNERS})
    assert router_reason(OWNERS, rows, None) == reason


def test_autocast_and_single_experts_run_as_modules(calls):
    model = fused()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(random_tokens(2, 9))
    model.set_active_experts(["math"])
    with torch.no_grad():
        model(random_tokens(2, 9))
    assert not calls


def test_auto_runs_modules_where_kernels_were_not_measured(calls):
    model = tiny_flexmoe("olmo2", OWNERS)
    assert model.get_experts_implementation() == {"": "auto"}
    with torch.no_grad():
        model(random_tokens(2, 9))
    assert not calls
    paths = model.implementation_paths()
    assert {path.implementation for path in paths} == {"flexmoe_cpu"}
    assert all("on a CPU the operators run their reference" in path.reason for path in paths)
    assert all(path.reason == "no operator runs on mps" for path in model.implementation_paths(device="mps"))
    on_a_gpu = model.implementation_paths(device="cuda", capability=(9, 0))
    assert all("the kernels have not been measured on compute capability 9.0" in path.reason for path in on_a_gpu)
    assert {path.implementation for path in on_a_gpu} == {"eager"}
    model.set_experts_implementation("flexmoe_triton")
    on_a_gpu = model.implementation_paths(device="cuda", capability=(9, 0))
    assert {(path.implementation, path.reason) for path in on_a_gpu} == {("flexmoe_triton", FUSED)}


def test_what_auto_runs_on_a_gpu(monkeypatch):
    model = tiny_flexmoe("olmo2", OWNERS)
    on_a_gpu = {"device": "cuda", "dtype": torch.float32, "capability": (9, 0)}

    def reasons():
        return {path.reason for path in model.implementation_paths(**on_a_gpu, tokens=8)}

    monkeypatch.setitem(dispatch.MEASURED, (9, 0), {torch.float32: (8, 64)})
    assert reasons() == {FUSED}
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert reasons() == {"the kernels have not been measured on AMD GPUs"}
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert reasons() == {"Triton is not installed"}
    monkeypatch.setitem(dispatch.MEASURED, (9, 0), {torch.float32: (9, 64)})
    assert reasons() == {"modules are faster with 8 tokens (the kernels from 9 to 64)"}


@pytest.mark.parametrize("name", ["eager", "flexmoe_cpu"])
def test_other_implementations_are_the_reason(name):
    model = tiny_flexmoe("olmo2", OWNERS)
    model.set_experts_implementation(name)
    for device in ("cpu", "cuda"):
        assert {path.reason for path in model.implementation_paths(device=device)} == {
            f"experts_implementation is {name!r}"
        }


def test_auto_takes_triton_on_no_cpu(monkeypatch):
    x_TH = torch.ones(2, 8)
    assert not dispatch.auto_takes_triton(x_TH)
    monkeypatch.setitem(dispatch.MEASURED, (9, 0), {torch.float32: (1, 64)})
    assert not dispatch.auto_takes_triton(x_TH)


ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
ACTIVATIONS |= {"relu": "relu", "quick_gelu": None, "relu2": None, "mish": None, "gelu_10": None}


@pytest.mark.parametrize(("name", "expected"), ACTIVATIONS.items())
def test_activations_are_recognised_by_their_values(name, expected):
    assert activation_name(ACT2FN[name]) == expected
