"""Loading with a device map, and adding and removing experts while weights are offloaded to disk.

The devices are the CPU and the disk, whose weights accelerate's hooks fetch. Does not cover several processes
(`test_distributed`).
"""

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from flexmoe.modeling import FlexMoeForCausalLM, FlexMoeModel
from flexmoe.testing import TOLERANCES, random_tokens, realigned, tiny_flexmoe

OWNERS = ("math", "code")
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")


@torch.no_grad()
def logits(model):
    return model(random_tokens(2, 9)).logits


def device_map(model: FlexMoeForCausalLM, on_disk: str = "") -> dict[str, str]:
    """A device map to the CPU, except for modules whose name contains `on_disk`."""
    name, base = next((name, part) for name, part in model.anchor.named_children() if part is model.anchor.base_model)
    devices = {f"anchor.{other}": "cpu" for other, _ in model.anchor.named_children() if other != name}
    for child, module in base.named_children():
        if isinstance(module, torch.nn.ModuleList):
            for i, layer in enumerate(module):
                for part, _ in layer.named_children():
                    devices[f"anchor.{name}.{child}.{i}.{part}"] = "cpu"
        else:
            devices[f"anchor.{name}.{child}"] = "cpu"
    return {module: "disk" if on_disk and on_disk in module else device for module, device in devices.items()}


OFFLOADED = {
    "a layer": lambda model: device_map(model, ".1."),
    "every block": lambda model: device_map(model, ".mlp"),
    "everything": lambda model: {"": "disk"},
}


def model_of(family: str) -> FlexMoeForCausalLM:
    return tiny_flexmoe(family, OWNERS, num_experts_per_tok=2)


@pytest.mark.parametrize("family", ["llama", "olmo2"])
@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}])
def test_loading_to_one_device(family, options, tmp_path):
    model = model_of(family)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert torch.equal(logits(realigned(loaded)), logits(model))
    decoder = FlexMoeModel.from_pretrained(tmp_path, **options)
    assert not any(parameter.is_meta for parameter in decoder.parameters())


@pytest.mark.parametrize(
    ("family", "offloaded"), [("llama", "a layer"), ("olmo2", "every block"), ("gpt2", "everything")]
)
def test_adding_and_removing_experts_with_weights_on_disk(family, offloaded, tmp_path):
    model = model_of(family)
    model.save_pretrained(tmp_path / "model")
    package = model.save_expert("math", tmp_path / "package")
    in_memory = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    offloaded_model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=OFFLOADED[offloaded](model), offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in offloaded_model.parameters())
    # not bit-equal: tensors that are read from a mapped file at each pass are not aligned
    assert_close(logits(offloaded_model), logits(in_memory), **TOLERANCES[torch.float32])

    saved_again = offloaded_model.save_expert("math", tmp_path / "package from disk")
    assert (saved_again / "expert.safetensors").read_bytes() == (package / "expert.safetensors").read_bytes()
    for model in (offloaded_model, in_memory):
        model.remove_expert("math")
    assert_close(logits(offloaded_model), logits(in_memory), **TOLERANCES[torch.float32])
    for model in (offloaded_model, in_memory):
        model.add_expert(package, name="algebra")
        model.add_expert_copy("fresh")
        model.rename_expert("code", "programs")
    assert_close(logits(offloaded_model), logits(in_memory), **TOLERANCES[torch.float32])
    with offloaded_model.only_experts("fresh"), in_memory.only_experts("fresh"):
        assert_close(logits(offloaded_model), logits(in_memory), **TOLERANCES[torch.float32])

    offloaded_model.save_pretrained(tmp_path / "again")
    saved, expected = load_file(tmp_path / "again" / "model.safetensors"), in_memory.state_dict()
    assert set(saved) >= set(expected) - set(in_memory.all_tied_weights_keys)
    assert all(torch.equal(value, expected[name]) for name, value in saved.items())
