"""Nothing around a row or a matrix is silently passed over: adapters, parametrisations, hooks, quantisation, offload.

Each wrapper goes around one module of "math" in the first layer. Where it changes the value, logits move; what belongs
to the others keeps its bits; and a masked expert is not run, wrapped or not.
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


class Doubled(nn.Module):
    """A parametrisation by a factor, 1 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.factor


class Int8Linear(nn.Module):
    """A stand-in for quantised layers: 8-bit weights, no floating-point parameter, none called `weight`."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.scale = plain.weight.detach().abs().max() / 127
        self.packed = nn.Parameter((plain.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.shift = None if plain.bias is None else plain.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.packed.to(x.dtype) * self.scale, self.shift)


def lora(model: FlexMoeForCausalLM, path: str, folder: Path, **options: object) -> Change:
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=path.replace(".", r"\."), **options))
    return lambda: nn.init.normal_(model.get_submodule(path).lora_B["default"].weight)


def dora(model: FlexMoeForCausalLM, path: str, folder: Path) -> Change:
    return lora(model, path, folder, use_dora=True)


def modules_to_save(model: FlexMoeForCausalLM, path: str, folder: Path) -> Change:
    # a target is needed: one of the same owner in the other layer, whose adapter adds zero
    target = rf".*\.1\.mlp\.experts\.{path.split('.')[6]}\.down_proj"
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=target, modules_to_save=[path]))
    return lambda: doubled(model.get_submodule(path).modules_to_save["default"])


def parametrisation(model: FlexMoeForCausalLM, path: str, folder: Path) -> Change:
    factor = Doubled()
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
        warnings.simplefilter("ignore")  # torch means to move it to torchao
        from torch.ao.quantization import quantize_dynamic

        plain = nn.Sequential(model.get_submodule(path))
        model.set_submodule(path, quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)[0])
    return lambda: None


def stand_in(model: FlexMoeForCausalLM, path: str, folder: Path) -> Change:
    model.set_submodule(path, Int8Linear(model.get_submodule(path)))
    return lambda: None


def doubled(module: nn.Linear) -> None:
    module.weight.data.mul_(2)


WRAPPERS: dict[str, tuple[Callable[..., Change], bool]] = {
    # how it is wrapped, and whether wrapping alone leaves every bit as it was
    "LoRA": (lora, True),
    "DoRA": (dora, False),  # divides by a norm and multiplies with it
    "modules_to_save": (modules_to_save, True),
    "parametrisation": (parametrisation, True),
    "weight_norm": (weight_norm, False),  # likewise
    "forward hook": (forward_hook, True),
    "forward pre-hook": (forward_pre_hook, True),
    "offload to CPU": (offloaded_to_cpu, True),
    "offload to disk": (offloaded_to_disk, True),
    "dynamic quantisation": (torch_dynamic, False),
    "quantised stand-in": (stand_in, False),
}


@torch.no_grad()
def run(model: FlexMoeForCausalLM, k: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the router logits of the first layer: its input is the same whatever stands in it."""
    out = model(random_tokens(2, 9), num_experts_per_tok=k, output_router_logits=True)
    return out.logits, out.router_logits[0]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_is_around_a_module_counts_and_nothing_else_changes(wrapper, place, tmp_path):
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
        for one, other in zip(run(model), without, strict=True):
            assert torch.equal(one, other)
    assert len(calls) == 1


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_public_network_is_copied_without_its_wrapper(wrapper, place, tmp_path):
    model = tiny_flexmoe("llama", ["math"])
    model.get_submodule(f"{BLOCK}.router.public").weight.data.fill_(0.1)  # DoRA and weight_norm divide by its norm
    WRAPPERS[wrapper][0](model, f"{BLOCK}.{PLACES[place]}".replace("math", "public"), tmp_path)
    plain = tiny_flexmoe("llama").flexmoe_blocks()[0].experts["public"]
    if place == "matrix" and wrapper == "quantised stand-in":
        model.add_expert_copy("news")
        experts = model.flexmoe_blocks()[0].experts
        public, news = experts["public"].state_dict(), experts["news"].state_dict()
        assert list(public) == list(news) != list(plain.state_dict())
        assert all(torch.equal(public[key], news[key]) for key in public)
        return
    if place == "matrix" and wrapper == "dynamic quantisation":
        with pytest.raises(ValueError, match=r"no tensor 'up_proj\.weight'"):
            model.add_expert_copy("news")
        assert model.expert_names == ["public", "math"]
        return
    model.add_expert_copy("news")
    block = model.flexmoe_blocks()[0]
    assert list(block.experts["news"].state_dict()) == list(plain.state_dict())
    for key, value in block.experts["news"].state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[key], msg=key)
    assert type(block.router["news"]) is nn.Linear
    assert run(model)[0].isfinite().all()


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_experts_come_and_go_and_are_saved_under_offload(offload, tmp_path):
    model, owners = tiny_flexmoe("llama", ["math", "code"]), tiny_flexmoe("llama", ["math", "code"])
    if offload == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, tmp_path / "offloaded", execution_device="cpu")
    assert torch.equal(run(model)[0], run(owners)[0])
    package = model.save_expert("math", tmp_path / "math")
    for one in (model, owners):
        one.remove_expert("math")
        assert one.add_expert(package) == "math"
        one.add_expert_copy("news")
    assert torch.equal(run(model)[0], run(owners)[0])
    again = tiny_flexmoe("llama", ["code", "math"])
    again.add_expert_copy("news")
    assert torch.equal(run(again)[0], run(owners)[0])
