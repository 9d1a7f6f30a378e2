"""Loading to devices and to disk, and experts that come and go while weights are offloaded.

Two "devices" of one machine stand for several: the CPU, and the disk, whose weights are fetched by hooks. Does not
cover several processes (`test_distributed`).
"""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from flexmoe.modeling import FlexMoeForCausalLM, FlexMoeModel
from flexmoe.testing import random_tokens, realigned, tiny_flexmoe

OWNERS = ("math", "code")
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")


@torch.no_grad()
def logits(model):
    return model(random_tokens(2, 9)).logits


def parts(model: FlexMoeForCausalLM, inside: str = "") -> dict[str, str]:
    """Where everything goes: to the CPU, except `inside` (a module's name), which goes to disk."""
    name, base = next((name, part) for name, part in model.anchor.named_children() if part is model.base_model)
    places = {f"anchor.{other}": "cpu" for other, _ in model.anchor.named_children() if other != name}
    for child, module in base.named_children():
        if isinstance(module, torch.nn.ModuleList):
            for i, layer in enumerate(module):
                for part, _ in layer.named_children():
                    places[f"anchor.{name}.{child}.{i}.{part}"] = "cpu"
        else:
            places[f"anchor.{name}.{child}"] = "cpu"
    return {where: "disk" if inside and inside in where else place for where, place in places.items()}


OFFLOADED = {
    "a layer": lambda model: parts(model, ".1."),
    "every block": lambda model: parts(model, ".mlp"),
    "everything": lambda model: {"": "disk"},
}


def model_of(family: str) -> FlexMoeForCausalLM:
    return tiny_flexmoe(family, OWNERS, num_experts_per_tok=2)


@pytest.mark.parametrize("family", ["llama", "olmo2"])
@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}])
def test_loaded_to_one_device(family, options, tmp_path):
    model = model_of(family)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert torch.equal(logits(realigned(loaded)), logits(model))
    decoder = FlexMoeModel.from_pretrained(tmp_path, **options)
    assert not any(parameter.is_meta for parameter in decoder.parameters())


@pytest.mark.parametrize(
    ("family", "offloaded"), [("llama", "a layer"), ("olmo2", "every block"), ("gpt2", "everything")]
)
def test_experts_come_and_go_while_weights_are_on_disk(family, offloaded, tmp_path):
    model = model_of(family)
    model.save_pretrained(tmp_path / "model")
    package = model.save_expert("math", tmp_path / "package")
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    away = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=OFFLOADED[offloaded](model), offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in away.parameters())
    assert torch.equal(logits(away), logits(kept))

    again = away.save_expert("math", tmp_path / "package from disk")
    assert (again / "expert.safetensors").read_bytes() == (package / "expert.safetensors").read_bytes()
    for each in (away, kept):
        each.remove_expert("math")
    assert torch.equal(logits(away), logits(kept))
    for each in (away, kept):
        each.add_expert(package, name="algebra")
        each.add_expert_copy("fresh")
        each.rename_expert("code", "programs")
    assert torch.equal(logits(away), logits(kept))
    with away.only_experts("fresh"), kept.only_experts("fresh"):
        assert torch.equal(logits(away), logits(kept))

    away.save_pretrained(tmp_path / "again")
    saved, expected = load_file(tmp_path / "again" / "model.safetensors"), kept.state_dict()
    assert set(saved) >= set(expected) - set(kept.all_tied_weights_keys)
    assert all(torch.equal(value, expected[name]) for name, value in saved.items())
