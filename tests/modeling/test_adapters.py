"""PEFT adapters on a FlexMoE: warnings about adapters on several owners, and changes that adapters block."""

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import peft
import pytest
import torch

from flexmoe import expert_lora_config
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.testing import random_tokens, tiny_flexmoe

OWNERS = ("math", "math-2", "code")
ALL_EXPERTS = ["public", *OWNERS]
TOKENS = random_tokens(2, 7)


@pytest.fixture
def model() -> FlexMoeForCausalLM:
    return tiny_flexmoe("llama", OWNERS)


@contextmanager
def no_warnings() -> Iterator[None]:
    """Turns the warning about several owners into an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*owners at once")
        yield


def by_get_peft_model(config: peft.LoraConfig) -> Callable[[FlexMoeForCausalLM], Any]:
    return lambda model: peft.get_peft_model(model, config)


def by_add_adapter(model: FlexMoeForCausalLM) -> None:
    model.add_adapter(peft.LoraConfig(target_modules="all-linear"))


SEVERAL_OWNERS = {
    # how the adapter is added, and the owners whose modules it changes
    "all-linear": (by_get_peft_model(peft.LoraConfig(target_modules="all-linear")), ALL_EXPERTS),
    "add_adapter": (by_add_adapter, ALL_EXPERTS),
    "a matrix of all": (by_get_peft_model(peft.LoraConfig(target_modules=["up_proj"])), ALL_EXPERTS),
    "rows of all": (by_get_peft_model(peft.LoraConfig(target_modules=r".*\.router\..*")), ALL_EXPERTS),
    "two of a list": (
        by_get_peft_model(peft.LoraConfig(target_modules=["math.up_proj", "code.up_proj"])),
        ["math", "code"],
    ),
    "a pattern that names one of them": (
        by_get_peft_model(peft.LoraConfig(target_modules=r".*math.*up_proj")),
        ["math", "math-2"],
    ),
    "biases of all": (by_get_peft_model(peft.LoraConfig(target_modules=["code.up_proj"], bias="all")), ALL_EXPERTS),
    "a row of another owner": (
        by_get_peft_model(peft.LoraConfig(target_modules=["code.up_proj"], modules_to_save=["router.math"])),
        ["math", "code"],
    ),
}

NAMED_OWNERS = {
    "one matrix": by_get_peft_model(peft.LoraConfig(target_modules=["math.up_proj"])),
    "one row": by_get_peft_model(peft.LoraConfig(target_modules=["router.math"])),
    "attention": by_get_peft_model(peft.LoraConfig(target_modules=["q_proj"])),
    "a pattern that names them": by_get_peft_model(
        peft.LoraConfig(target_modules=r".*\.experts\.(math-2|code)\.up_proj")
    ),
}


@pytest.mark.parametrize("case", SEVERAL_OWNERS)
def test_adapter_on_several_owners_warns_with_their_names(model, case):
    wrap, owners = SEVERAL_OWNERS[case]
    with pytest.warns(UserWarning, match="owners at once") as caught:
        wrap(model)
    (message,) = {str(warning.message) for warning in caught if "owners at once" in str(warning.message)}
    assert f"'default' changes modules of {len(owners)} owners at once: {owners}" in message
    assert "expert_lora_config(model, " in message
    with no_warnings(), torch.no_grad():  # each adapter is reported once
        model(TOKENS)


@pytest.mark.parametrize("case", NAMED_OWNERS)
def test_adapter_on_one_owner_or_on_named_owners_does_not_warn(model, case):
    with no_warnings():
        NAMED_OWNERS[case](model)
        model(TOKENS)


def test_second_adapter_warns_at_the_next_forward_pass(model):
    adapted = peft.get_peft_model(model, expert_lora_config(model, "code", r=4))
    adapted.add_adapter("second", peft.LoraConfig(r=4, target_modules=["down_proj"]))
    with pytest.warns(UserWarning, match=r"'second' changes modules of 4 owners"):
        adapted(TOKENS)
    with no_warnings():
        adapted(TOKENS)


def test_adapter_with_the_name_of_an_expert_is_refused(model):
    config = expert_lora_config(model, "math", r=4)
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=r"'math' has the name of an expert.*'math-lora'"):
        model.add_adapter(config, adapter_name="math")
    assert list(model.state_dict()) == before
    with pytest.raises(ValueError, match="has the name of an expert"):
        peft.get_peft_model(model, config, adapter_name="math")


def test_expert_with_the_name_of_an_adapter_is_refused(model):
    adapted = peft.get_peft_model(model, expert_lora_config(model, "math", r=4), adapter_name="style")
    with pytest.raises(ValueError, match="An adapter of this model is called 'style'"):
        adapted.add_expert_copy("style")
    with pytest.raises(ValueError, match="An adapter of this model is called 'style'"):
        adapted.rename_expert("code", "style")
    assert model.expert_names == ALL_EXPERTS


WRAP_MATH: dict[str, Callable[[FlexMoeForCausalLM], Any]] = {
    "get_peft_model": lambda model: peft.get_peft_model(model, expert_lora_config(model, "math", r=4), "style"),
    "add_adapter": lambda model: model.add_adapter(expert_lora_config(model, "math", r=4), "style"),
    "a row alone": lambda model: peft.get_peft_model(model, peft.LoraConfig(target_modules=["router.math"]), "style"),
}

CHANGES: dict[str, Callable[[FlexMoeForCausalLM, str, Any], object]] = {
    "remove_expert": lambda model, name, package: model.remove_expert(name),
    "rename_expert": lambda model, name, package: model.rename_expert(name, f"{name}-renamed"),
    "replace_expert": lambda model, name, package: model.replace_expert(name, package),
    "freeze_except": lambda model, name, package: model.freeze_except(name),
}


@pytest.mark.parametrize("wrap", WRAP_MATH)
@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_an_adapted_expert_are_refused_until_the_adapter_is_removed(model, tmp_path, wrap, change):
    package = model.save_expert("code", tmp_path / "code")
    adapted = WRAP_MATH[wrap](model)
    before = (copy.deepcopy(model.config.to_dict()), list(model.state_dict()), trained(model))
    message = rf"^{change}: .* \['style'\] are around 'math'\. Merge them .*\(merge_and_unload\)"
    with pytest.raises(ValueError, match=message):
        CHANGES[change](model, "math", package)
    assert (model.config.to_dict(), list(model.state_dict()), trained(model)) == before

    CHANGES[change](model, "math-2", package)  # experts without an adapter can change
    if wrap == "add_adapter":
        model.delete_adapter("style")
    else:
        adapted.unload()
    assert not hasattr(model, "peft_config")
    CHANGES[change](model, "math", package)
    with torch.no_grad():
        assert model(TOKENS).logits.isfinite().all()


def trained(model: FlexMoeForCausalLM) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def test_added_experts_are_frozen_and_have_no_adapter(model, tmp_path):
    package = tiny_flexmoe("llama", ["news"]).save_expert("news", tmp_path / "news")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    before = trained(model)
    assert adapted.add_expert(package) == "news"
    adapted.add_expert_copy("blank")
    reference = tiny_flexmoe("llama", ["news"])
    reference.add_expert_copy("blank")
    expected = {key: value for key, value in reference.state_dict().items() if ".news." in key or ".blank." in key}
    assert {key for key in model.state_dict() if ".news." in key or ".blank." in key} == set(expected)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.items())
    assert trained(model) == before


def test_freeze_except_does_not_interfere_with_adapters_on_other_experts(model):
    adapted = peft.get_peft_model(model, expert_lora_config(model, "math", r=4))
    model.freeze_except("code")
    assert {re.search(r"\.(?:experts|router)\.(\w+)\.", name)[1] for name in trained(model)} == {"code"}
    adapted.set_adapter("default")
    assert {name.split(".lora_")[0].split(".")[6] for name in trained(model) if "lora_" in name} == {"math"}

    other = tiny_flexmoe("llama", OWNERS)
    other.freeze_except("math")
    peft.get_peft_model(other, expert_lora_config(other, "math", r=4))
    assert trained(other)
    assert all(".experts.math." in name and ".lora_" in name for name in trained(other))


def test_wrapped_model_is_not_saved_as_a_checkpoint(model, tmp_path):
    model.config.anchor = {"repo": "org/a", "revision": "1", "fingerprint": "f" * 64, "dtype": "F32"}
    anchor = dict(model.config.anchor)
    adapted = peft.get_peft_model(model, expert_lora_config(model, "public", r=4))
    with pytest.raises(ValueError, match=r"PEFT has wrapped .* \(adapters: \['default'\]\).*merge_and_unload"):
        model.save_pretrained(tmp_path / "model")
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.unload()
    model.add_adapter(expert_lora_config(model, "public", r=4))
    model.save_pretrained(tmp_path / "added")
    for folder in ("adapter", "added"):
        assert {path.name for path in (tmp_path / folder).glob("*.safetensors")} == {"adapter_model.safetensors"}
    assert model.config.anchor == anchor


def test_deleting_the_last_adapter_restores_the_model(model, tmp_path):
    reference = tiny_flexmoe("llama", OWNERS)
    for name in ("math", "code"):
        model.add_adapter(expert_lora_config(model, name, r=4, router_row=True), f"{name}-lora")
    model.delete_adapter("math-lora")
    assert list(model.peft_config) == ["code-lora"]
    model.delete_adapter("code-lora")
    assert list(model.state_dict()) == list(reference.state_dict())
    model.save_expert("math", tmp_path / "math")
    model.save_pretrained(tmp_path / "model")
    loaded = FlexMoeForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in reference.state_dict().items())


def test_model_with_adapter_layers_but_no_adapter_is_not_saved(model, tmp_path):
    adapted = peft.get_peft_model(model, expert_lora_config(model, "math", r=4))
    adapted.delete_adapter("default")
    with pytest.raises(ValueError, match=r"\(adapters: \[\]\).*unload"):
        model.save_pretrained(tmp_path / "model")
