"""PEFT adapters on a FlexMoE: warnings about adapters on several owners, and changes that adapters block."""

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from flexmoe import expert_lora_config
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.testing import TOLERANCES, flexmoe_from_anchor, random_tokens, tiny_flexmoe
from tests.support.families import tiny_config

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


BLOCKS_AND_MORE = {
    # entries of modules_to_save that copy whole blocks, or what is around them
    "blocks": "mlp",
    "one block": "layers.0.mlp",
    "a layer": "layers.1",
    "the decoder": "anchor.model",
}


def copying(entry: str) -> peft.LoraConfig:
    return peft.LoraConfig(target_modules=["lm_head"], modules_to_save=[entry])


@pytest.mark.filterwarnings("ignore:.*owners at once")
class TestCopiesOfBlocks:
    """`modules_to_save` around the experts of all owners, at any depth."""

    @pytest.mark.filterwarnings("default:.*owners at once")
    @pytest.mark.parametrize("entry", BLOCKS_AND_MORE)
    def test_all_owners_are_named(self, model, entry):
        with pytest.warns(UserWarning, match="changes modules of 4 owners at once") as caught:
            peft.get_peft_model(model, copying(BLOCKS_AND_MORE[entry]))
        assert sum("owners at once" in str(warning.message) for warning in caught) == 1

    @pytest.mark.promise(
        "PEFT",
        "changes of experts while `modules_to_save` copies whole blocks or layers",
        "refused until the adapter is merged or removed",
    )
    @pytest.mark.parametrize("entry", BLOCKS_AND_MORE)
    def test_changes_are_refused(self, model, entry, tmp_path):
        package = tiny_flexmoe("llama", ["news"]).save_expert("news", tmp_path / "news")
        peft.get_peft_model(model, copying(BLOCKS_AND_MORE[entry]))
        changes = {
            **{name: lambda change=change: change(model, "math", package) for name, change in CHANGES.items()},
            "save_expert": lambda: model.save_expert("math", tmp_path / "math"),
            "add_expert": lambda: model.add_expert(package),
            "add_expert_copy": lambda: model.add_expert_copy("blank"),
        }
        before = list(model.state_dict())
        for name, change in changes.items():
            with pytest.raises(ValueError, match=r"adapter\(s\) \['default'\]"):
                change()
            assert (model.expert_names, list(model.state_dict())) == (ALL_EXPERTS, before), name
        with torch.no_grad():
            assert model(TOKENS).logits.isfinite().all()

    @pytest.mark.parametrize("entry", BLOCKS_AND_MORE)
    @pytest.mark.parametrize("way", ["merge_and_unload", "unload"])
    def test_the_copies_are_part_of_the_model_once_merged(self, model, entry, way):
        """PEFT's `unload` leaves out LoRA matrices only, so it keeps the copies, too."""
        adapted = peft.get_peft_model(model, copying(BLOCKS_AND_MORE[entry]))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "modules_to_save" in name and ".experts.math." in name:
                    parameter.add_(1.0)
            expected = adapted(TOKENS).logits
        plain = tiny_flexmoe("llama", OWNERS)
        merged = getattr(adapted, way)()
        assert list(merged.state_dict()) == list(plain.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(merged(TOKENS).logits, expected)
            assert not torch.allclose(expected, plain(TOKENS).logits)
        assert all(block is merged.get_submodule(name) for name, block in merged.named_blocks().items())
        for changed in (merged, plain):
            changed.remove_expert("math")
        with torch.no_grad():
            assert torch.equal(merged(TOKENS).logits, plain(TOKENS).logits)

    def test_an_added_adapter_is_deleted(self, model):
        model.add_adapter(copying("anchor.model"))
        model.delete_adapter("default")
        assert all(block is model.get_submodule(name) for name, block in model.named_blocks().items())
        assert list(model.state_dict()) == list(tiny_flexmoe("llama", OWNERS).state_dict())

    @pytest.mark.parametrize("entry", ["experts", "router", "mlp.experts", "anchor"])
    def test_copies_of_what_experts_are_taken_from_are_refused(self, model, entry):
        before = list(model.state_dict())
        with pytest.raises(
            ValueError, match=r"would train a copy of anchor.*name experts .*or whole blocks \('mlp'\)"
        ):
            model.add_adapter(copying(entry))
        assert list(model.state_dict()) == before


class TestNamesThatPeftConfuses:
    @pytest.mark.parametrize("name", ["lm_head", "q_proj", "embed_tokens"])
    def test_an_expert_with_the_name_of_a_targeted_module(self, name):
        model = tiny_flexmoe("llama", [name, "math"])
        options = {"modules_to_save": [name]} if name == "lm_head" else {"target_modules": [name]}
        with pytest.raises(ValueError, match=rf"cannot tell the expert '{name}' from other modules.*rename_expert"):
            model.add_adapter(peft.LoraConfig(**{"target_modules": ["v_proj"], **options}))
        model.add_adapter(peft.LoraConfig(target_modules=["k_proj"]))  # that names no expert

    def test_an_expert_with_the_name_of_another_experts_part(self):
        model = tiny_flexmoe("llama", ["up_proj", "router", "my_router"])
        config = expert_lora_config(model, "up_proj", r=2, router_row=True)
        adapted = peft.get_peft_model(model, config)
        assert all(".experts.up_proj." in name or ".router.up_proj." in name for name in trained(adapted))

    def test_an_expert_with_the_name_of_peft_parameters(self):
        """PEFT would not delete adapters from modules whose names contain that of its parameters."""
        model = tiny_flexmoe("llama", ["lora_notes", "math"])
        peft.get_peft_model(model, expert_lora_config(model, "math", r=2))
        other = tiny_flexmoe("llama", ["lora_notes"])
        config = expert_lora_config(other, "lora_notes", r=2)
        with pytest.raises(ValueError, match="cannot tell the expert 'lora_notes' from"):
            peft.get_peft_model(other, config)


ANCHORS: dict[str, str] = {
    # families of dense anchors, and a target in the attention of each
    "llama": "q_proj",
    "gpt2": "c_attn",
    "gpt_neox": "query_key_value",
    "gemma3": "q_proj",  # a composite, whose decoder is nested
    "opt": "q_proj",  # no module around its feed-forward network
}


def dense_adapter(family: str, folder: Path, **options: Any) -> tuple[FlexMoeForCausalLM, torch.Tensor]:
    """A saved adapter for a dense anchor; a graft of that, and the logits of the anchor with the adapter."""
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(tiny_config(family)).eval()
    graft = flexmoe_from_anchor(dense, ["math"])
    adapted = peft.get_peft_model(dense, peft.LoraConfig(r=2, init_lora_weights=False, **options)).eval()
    adapted.save_pretrained(folder)
    with torch.no_grad():
        return graft, adapted(input_ids=TOKENS).logits


def of_public(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, experts=["public"]).logits


class TestAdaptersOfTheDenseAnchor:
    @pytest.mark.promise(
        "`PeftModel.from_pretrained`, `model.load_adapter`",
        "a LoRA adapter on the attention of the dense anchor",
        "works as on the anchor",
    )
    @pytest.mark.parametrize("family", ANCHORS)
    @pytest.mark.parametrize("way", ["PeftModel", "load_adapter"])
    def test_attention(self, family, way, tmp_path):
        graft, expected = dense_adapter(family, tmp_path, target_modules=[ANCHORS[family]])
        plain = of_public(graft)
        if way == "PeftModel":
            adapted = peft.PeftModel.from_pretrained(graft, tmp_path)
        else:
            graft.load_adapter(str(tmp_path))
            adapted = graft
        torch.testing.assert_close(of_public(adapted), expected, **TOLERANCES[torch.float32])
        assert not torch.allclose(plain, expected)

    def test_second_adapter_of_a_peft_model(self, tmp_path):
        graft, expected = dense_adapter("llama", tmp_path, target_modules=["q_proj"])
        adapted = peft.get_peft_model(graft, peft.LoraConfig(target_modules=["o_proj"]))
        with pytest.raises(ValueError, match=r"have no place in this model.*key_mapping"):
            adapted.load_adapter(tmp_path, "dense")
        adapted.load_adapter(tmp_path, "dense", key_mapping=graft.anchor_names.replacements())
        adapted.set_adapter("dense")
        torch.testing.assert_close(of_public(adapted), expected, **TOLERANCES[torch.float32])

    @pytest.mark.filterwarnings("ignore:.*owners at once", "ignore:Found missing adapter keys")
    def test_networks_become_those_of_public(self, tmp_path):
        graft, expected = dense_adapter("llama", tmp_path, target_modules=["q_proj", "up_proj", "down_proj"])
        others = graft(TOKENS, experts=["math"]).logits
        adapted = peft.PeftModel.from_pretrained(graft, tmp_path)
        torch.testing.assert_close(of_public(adapted), expected, **TOLERANCES[torch.float32])
        assert not torch.allclose(adapted(input_ids=TOKENS, experts=["math"]).logits, others)  # attention is shared

    @pytest.mark.filterwarnings("ignore:.*owners at once")
    @pytest.mark.parametrize("way", ["PeftModel", "load_adapter"])
    def test_tensors_without_a_module_here_are_refused(self, way, tmp_path):
        """ "all-linear" is saved as parts of paths, which the FFNs of a FlexMoE do not have."""
        graft, _ = dense_adapter("llama", tmp_path, target_modules=["mlp.up_proj", "self_attn.q_proj"])
        load = graft.load_adapter if way == "load_adapter" else partial(peft.PeftModel.from_pretrained, graft)
        with pytest.raises(ValueError, match="have no place"):
            load(str(tmp_path))

    def test_the_head(self, tmp_path):
        graft, expected = dense_adapter("llama", tmp_path, target_modules=["q_proj"], modules_to_save=["lm_head"])
        adapted = peft.PeftModel.from_pretrained(graft, tmp_path)
        torch.testing.assert_close(of_public(adapted), expected, **TOLERANCES[torch.float32])
