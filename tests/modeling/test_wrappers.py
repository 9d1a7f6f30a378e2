"""Adapters, parametrizations, hooks, quantised layers and offload on a row or matrix of one expert take effect.

Each wraps one module of "math" in the first layer. When it changes the output of that module, the logits change; the
other experts keep their bits; and the module is not called while "math" is masked.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.testing import random_tokens, tiny_flexmoe

OTHERS = ("public", "code")
PLACES = {"row": "router.math", "matrix": "experts.math.up_proj"}
BLOCK = "anchor.model.layers.0.mlp"

Change = Callable[[], object]


class Factor(nn.Module):
    """A parametrization that multiplies by a factor, initially 1."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.factor


class Int8Linear(nn.Module):
    """A quantised linear layer: 8-bit weights, no floating-point parameter, and no parameter called `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        self.packed = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.shift = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.packed.to(x.dtype) * self.scale, self.shift)


def lora(model: FlexMoeForCausalLM, path: str, folder: Path, **options: object) -> Change:
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=path.replace(".", r"\."), **options))
    return lambda: nn.init.normal_(model.get_submodule(path).lora_B["default"].weight)


def dora(model: FlexMoeForCausalLM, path: str, folder: Path) -> Change:
    return lora(model, path, folder, use_dora=True)


def modules_to_save(model: FlexMoeForCausalLM, path: str, folder: Path) -> Change:
    # PEFT needs a target module: one of the same expert in the other layer, whose adapter adds zero
    target = rf".*\.1\.mlp\.experts\.{path.split('.')[6]}\.down_proj"
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=target, modules_to_save=[path]))
    return lambda: double(model.get_submodule(path).modules_to_save["default"])


def parametrization(model: FlexMoeForCausalLM, path: str, folder: Path) -> Change:
    factor = Factor()
    parametrize.register_parametrization(model.get_submodule(path), "weight", factor)
    return lambda: nn.init.constant_(factor.factor, 2.0)


def weight_norm(model: FlexMoeForCausalLM, path: str, folder: Path) -> Change:
    module = parametrizations.weight_norm(model.get_submodule(path))
    return lambda: module.parametrizations.weight.original0.data.mul_(2)


def forward_hook(model: FlexMoeForCausalLM, path: str, folder: Path) -> Change:
    factor = [1.0]
    model.get_submodule(path).register_forward_hook(lambda module, args, output: output * factor[0])
    return lambda: factor.__setitem__(0, 2.0)


def forward_pre_hook(model: FlexMoeForCausalLM, path: str, folder: Path) -> Change:
    factor = [1.0]
    model.get_submodule(path).register_forward_pre_hook(lambda module, args: (args[0] * factor[0],))
    return lambda: factor.__setitem__(0, 2.0)


def offloaded_to_cpu(model: FlexMoeForCausalLM, path: str, folder: Path) -> Change:
    module = model.get_submodule(path)
    cpu_offload(module, execution_device="cpu")
    return lambda: module._hf_hook.hooks[-1].weights_map["weight"].mul_(2)


def offloaded_to_disk(model: FlexMoeForCausalLM, path: str, folder: Path) -> Change:
    module = model.get_submodule(path)
    size = module.weight.numel()
    disk_offload(module, folder, execution_device="cpu")

    def change() -> None:
        stored = np.memmap(folder / "weight.dat", dtype="float32", mode="r+", shape=(size,))
        stored *= 2
        stored.flush()

    return change


def torch_dynamic(model: FlexMoeForCausalLM, path: str, folder: Path) -> Change:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in torch in favor of torchao
        from torch.ao.quantization import quantize_dynamic

        linear = nn.Sequential(model.get_submodule(path))
        model.set_submodule(path, quantize_dynamic(linear, {nn.Linear}, dtype=torch.qint8)[0])
    return lambda: None


def int8_linear(model: FlexMoeForCausalLM, path: str, folder: Path) -> Change:
    model.set_submodule(path, Int8Linear(model.get_submodule(path)))
    return lambda: None


def double(module: nn.Linear) -> None:
    module.weight.data.mul_(2)


WRAPPERS: dict[str, tuple[Callable[..., Change], bool]] = {
    # a function that wraps the module, and whether wrapping alone changes no bit
    "LoRA": (lora, True),
    "DoRA": (dora, False),  # divides by a norm and multiplies by it
    "modules_to_save": (modules_to_save, True),
    "parametrization": (parametrization, True),
    "weight_norm": (weight_norm, False),  # likewise
    "forward hook": (forward_hook, True),
    "forward pre-hook": (forward_pre_hook, True),
    "offload to CPU": (offloaded_to_cpu, True),
    "offload to disk": (offloaded_to_disk, True),
    "dynamic quantisation": (torch_dynamic, False),
    "quantised linear": (int8_linear, False),
}


@torch.no_grad()
def run(model: FlexMoeForCausalLM, k: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the router logits of the first layer, whose input does not depend on the experts."""
    out = model(random_tokens(2, 9), num_experts_per_tok=k, output_router_logits=True)
    return out.logits, out.router_logits[0]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_module_takes_effect_and_other_experts_do_not_change(wrapper, place, tmp_path):
    model, path = tiny_flexmoe("llama", ["math", "code"]), f"{BLOCK}.{PLACES[place]}"
    logits, rows = run(model)
    with model.only_experts(*OTHERS):
        without = run(model)
    wrap, keeps_bits = WRAPPERS[wrapper]

    change = wrap(model, path, tmp_path)
    if keeps_bits:
        assert torch.equal(run(model)[0], logits)
    with torch.no_grad():
        change()

    changed, changed_rows = run(model)
    assert changed.isfinite().all()
    assert not torch.equal(changed, logits)
    assert not torch.equal(run(model, k=1)[0], changed)
    assert torch.equal(changed_rows[:, [0, 2]], rows[:, [0, 2]])
    assert torch.equal(changed_rows[:, 1], rows[:, 1]) == (place == "matrix")

    calls = []
    model.get_submodule(path).register_forward_hook(lambda *_: calls.append(1))
    run(model)
    assert len(calls) == 1
    with model.only_experts(*OTHERS):
        for masked, expected in zip(run(model), without, strict=True):
            assert torch.equal(masked, expected)
    assert len(calls) == 1


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_public_network_is_copied_without_its_wrapper(wrapper, place, tmp_path):
    model = tiny_flexmoe("llama", ["math"])
    model.get_submodule(f"{BLOCK}.router.public").weight.data.fill_(0.1)  # DoRA and weight_norm divide by its norm
    WRAPPERS[wrapper][0](model, f"{BLOCK}.{PLACES[place]}".replace("math", "public"), tmp_path)
    unwrapped = tiny_flexmoe("llama").flexmoe_blocks()[0].experts["public"]
    if place == "matrix" and wrapper == "quantised linear":
        model.add_expert_copy("news")
        experts = model.flexmoe_blocks()[0].experts
        public, news = experts["public"].state_dict(), experts["news"].state_dict()
        assert list(public) == list(news) != list(unwrapped.state_dict())
        assert all(torch.equal(public[key], news[key]) for key in public)
        return
    if place == "matrix" and wrapper == "dynamic quantisation":
        with pytest.raises(ValueError, match=r"no longer has a tensor 'up_proj\.weight'"):
            model.add_expert_copy("news")
        assert model.expert_names == ["public", "math"]
        return
    model.add_expert_copy("news")
    block = model.flexmoe_blocks()[0]
    assert list(block.experts["news"].state_dict()) == list(unwrapped.state_dict())
    for key, value in block.experts["news"].state_dict().items():
        torch.testing.assert_close(value, unwrapped.state_dict()[key], msg=key)
    assert type(block.router["news"]) is nn.Linear
    assert run(model)[0].isfinite().all()


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_adding_removing_and_saving_experts_under_offload(offload, tmp_path):
    model, reference = tiny_flexmoe("llama", ["math", "code"]), tiny_flexmoe("llama", ["math", "code"])
    if offload == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, tmp_path / "offloaded", execution_device="cpu")
    assert torch.equal(run(model)[0], run(reference)[0])
    package = model.save_expert("math", tmp_path / "math")
    for each in (model, reference):
        each.remove_expert("math")
        assert each.add_expert(package) == "math"
        each.add_expert_copy("news")
    assert torch.equal(run(model)[0], run(reference)[0])
    built = tiny_flexmoe("llama", ["code", "math"])
    built.add_expert_copy("news")
    assert torch.equal(run(built)[0], run(reference)[0])
