"""PEFT on single experts: `expert_lora_config`, training, saving, merging, several adapters at once."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedModel, Trainer, TrainingArguments

from flexmoe import FlexMoeConfig, FlexMoeForCausalLM, FlexMoeModel, expert_lora_config
from flexmoe.testing import (
    ANCHOR_CONFIGS,
    TOLERANCES,
    flexmoe_from_anchor,
    random_tokens,
    tiny_anchor,
    tiny_flexmoe,
)
from tests.support.soak import soak, thinned

OWNERS = ("math", "math-2", "x-math", "code")
FLOAT32 = TOLERANCES[torch.float32]


def opt_flexmoe() -> FlexMoeForCausalLM:
    """OPT's FFN is a sequence of modules of the layer, without a module of its own."""
    torch.manual_seed(0)
    anchor = OPTConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32
    )
    return FlexMoeForCausalLM(FlexMoeConfig(anchor_config=anchor, experts=["public", *OWNERS])).eval()


FAMILIES: dict[str, Callable[[], FlexMoeForCausalLM]] = {
    **{family: lambda family=family: tiny_flexmoe(family, OWNERS) for family in ANCHOR_CONFIGS},
    "opt": opt_flexmoe,
}


def adapted_with(model: FlexMoeForCausalLM, expert: str | list[str], name: str = "default", **options: Any) -> Any:
    """The model with an adapter whose A and B are random; by default B is zero, so the adapter has no effect."""
    torch.manual_seed(sum(map(ord, name)))
    config = expert_lora_config(model, expert, r=4, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config, adapter_name=name).eval()


def logits(model: Any, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=random_tokens(2, 9), **kwargs).logits


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


class TestConfig:
    @pytest.mark.parametrize("family", thinned(FAMILIES, ["llama", "gpt2", "phi3", "opt"]))
    @pytest.mark.parametrize("expert", ["math", soak("math-2")])
    def test_targets_all_matrices_of_one_expert_only(self, family, expert):
        model = FAMILIES[family]()
        plain = logits(model)
        network = model.flexmoe_blocks()[0].experts[expert]
        matrices = [name for name, parameter in network.named_parameters() if parameter.dim() == 2]
        adapted = adapted_with(model, expert)
        ours = trained(adapted)
        assert len(ours) == 2 * len(matrices) * 2  # layers, matrices, A and B
        assert all(f".experts.{expert}." in name and ".lora_" in name for name in ours)
        assert not torch.allclose(logits(adapted), plain, **FLOAT32)
        logits(adapted)
        adapted(input_ids=random_tokens(2, 9)).logits.square().mean().backward()
        assert {name for name, parameter in adapted.named_parameters() if parameter.grad is not None} == ours
        with model.only_experts(*(name for name in model.expert_names if name != expert)):
            masked = logits(adapted)
        fresh = FAMILIES[family]()
        fresh.remove_expert(expert)
        assert torch.equal(masked, logits(fresh))

    @pytest.mark.parametrize("expert", ["math", "math-2"])
    def test_rows_and_biases_on_request(self, expert):
        model = tiny_flexmoe("gpt2", OWNERS)
        adapted = adapted_with(model, expert, router_row=True, bias="lora_only")
        rest = {name.partition(".mlp.")[2] for name in trained(adapted) if "lora_" not in name}
        assert rest == {
            f"experts.{expert}.c_fc.base_layer.bias",
            f"experts.{expert}.c_proj.base_layer.bias",
            f"router.{expert}.modules_to_save.default.weight",
            f"router.{expert}.modules_to_save.default.bias",
        }

    def test_options_of_lora(self):
        model = tiny_flexmoe("llama", OWNERS)
        config = expert_lora_config(model, ["code", "math-2"], r=3, lora_alpha=7, lora_dropout=0.5, use_dora=True)
        assert (config.r, config.lora_alpha, config.lora_dropout, config.use_dora) == (3, 7, 0.5, True)
        assert config.task_type == "CAUSAL_LM"
        assert config.modules_to_save is None
        ours = trained(peft.get_peft_model(model, config))
        assert {name.split(".experts.")[1].split(".")[0] for name in ours} == {"code", "math-2"}
        assert any("lora_magnitude_vector" in name for name in ours)

    def test_models_without_head_and_adapted_models(self):
        decoder = FlexMoeModel(tiny_flexmoe("llama", OWNERS).config)
        config = expert_lora_config(decoder, "math")
        assert config.task_type is None
        assert config.target_modules == expert_lora_config(peft.get_peft_model(decoder, config), "math").target_modules

    @pytest.mark.parametrize(
        ("expert", "options", "words"),
        [
            ("zoology", {}, r"\['zoology'\], which this model does not have"),
            ([], {}, "names no expert"),
            ("math", {"bias": "all"}, "biases of all experts"),
            ("public", {"router_row": True}, "router rows of 'public'"),
            ("math", {"target_modules": ["up_proj"]}, "target_modules"),
        ],
    )
    def test_errors(self, expert, options, words):
        with pytest.raises(ValueError, match=words):
            expert_lora_config(tiny_flexmoe("llama", OWNERS), expert, **options)

    def test_without_peft(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ImportError, match=r"pip install 'flexmoe\[peft\]'"):
            expert_lora_config(tiny_flexmoe("llama", OWNERS), "math")


ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "with rows and biases": {"router_row": True, "bias": "lora_only"},
    "DoRA": {"use_dora": True, "bias": "lora_only"},
}

# Parts that transformers' `load_adapter` does not find in PEFT's files; FlexMoE refuses that, PEFT loads them.
UNREAD = {"DoRA": "lora_magnitude_vector"}
if Version(transformers.__version__) < Version("5.18"):
    UNREAD["with rows and biases"] = "modules_to_save"


def with_random_rows(adapted: Any) -> Any:
    """Perturbs rows and biases that the adapter trains, as training would."""
    for name, parameter in adapted.named_parameters():
        if "modules_to_save" in name or (parameter.requires_grad and name.endswith("base_layer.bias")):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return adapted


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("family", [soak("llama"), "gpt2", "phi3"])
def test_a_merged_expert_can_be_saved_and_added(family, kind, tmp_path):
    model = tiny_flexmoe(family, OWNERS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = with_random_rows(adapted_with(model, "math", **ADAPTERS[kind]))
    expected = logits(adapted)
    with pytest.raises(ValueError, match="adapter"):
        model.save_expert("math", tmp_path / "wrapped")
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, **FLOAT32)
    assert list(merged.state_dict()) == list(before)
    for name, value in merged.state_dict().items():
        assert torch.equal(value, before[name]) or ".math." in name, name
    clean = tiny_flexmoe(family, [name for name in OWNERS if name != "math"])
    clean.add_expert(merged.save_expert("math", tmp_path / "package"))
    for name, value in clean.state_dict().items():
        assert torch.equal(value, merged.state_dict()[name]), name


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_saved_adapter_fits_other_compositions(kind, tmp_path):
    adapted = with_random_rows(adapted_with(tiny_flexmoe("gpt2", OWNERS), "math", **ADAPTERS[kind]))
    adapted.save_pretrained(tmp_path)
    for others in ([], ["x-math", "code", "news"]):
        adapted.base_model.model.set_active_experts(["public", "math"])
        with_others = tiny_flexmoe("gpt2", [*others, "math"], active_experts=["public", "math"])
        loaded = peft.PeftModel.from_pretrained(with_others, tmp_path)
        torch.testing.assert_close(logits(loaded), logits(adapted), **FLOAT32)
        added = tiny_flexmoe("gpt2", [*others, "math"], active_experts=["public", "math"])
        if kind in UNREAD:
            plain = logits(added)
            with pytest.raises(ValueError, match=rf"{UNREAD[kind]}.*is not loaded"):
                added.load_adapter(str(tmp_path))
            assert torch.equal(logits(added), plain)
        else:
            added.load_adapter(str(tmp_path))
            torch.testing.assert_close(logits(added), logits(adapted), **FLOAT32)


def test_other_experts_can_be_added_and_removed(tmp_path):
    model = tiny_flexmoe("llama", OWNERS)
    adapted = with_random_rows(adapted_with(model, "math", router_row=True))
    adapted.save_pretrained(tmp_path / "before")
    package = tiny_flexmoe("llama", ["news"]).save_expert("news", tmp_path / "news")
    adapted.remove_expert("math-2")
    adapted.rename_expert("x-math", "y-math")
    adapted.add_expert(package)
    adapted.save_pretrained(tmp_path / "after")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    other = tiny_flexmoe("llama", ["math", "x-math", "code", "news"])
    other.rename_expert("x-math", "y-math")
    assert torch.equal(logits(peft.PeftModel.from_pretrained(other, tmp_path / "after")), logits(adapted))


@pytest.mark.parametrize("there", [["code"], ["math-2"]])
@pytest.mark.parametrize("load", ["PeftModel", "load_adapter"])
def test_loading_an_adapter_without_its_expert(tmp_path, there, load):
    adapted_with(tiny_flexmoe("llama", OWNERS), ["math", "code"], router_row=True).save_pretrained(tmp_path)
    model = tiny_flexmoe("llama", there)
    words = (
        r"made for the expert\(s\) \['math'\], which this model does not have"
        if "code" in there
        else "math.* not found"
    )
    with pytest.raises(ValueError, match=words):
        peft.PeftModel.from_pretrained(model, tmp_path) if load == "PeftModel" else model.load_adapter(str(tmp_path))


@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
def test_adapters_on_several_experts_at_once(way):
    model, names = tiny_flexmoe("llama", OWNERS), ("math", "code")
    plain = logits(model)
    for name in names:
        torch.manual_seed(len(name))
        config = expert_lora_config(model, name, r=4, router_row=True, init_lora_weights=False)
        if way == "add_adapter":
            model.add_adapter(config, f"{name}-lora")
        elif name == "math":
            adapted = peft.get_peft_model(model, config, "math-lora")
        else:
            adapted.add_adapter(f"{name}-lora", config)
    with_random_rows(model)
    switch = model.set_adapter if way == "add_adapter" else adapted.base_model.set_adapter
    alone = {}
    for name in names:
        switch(f"{name}-lora")
        alone[name] = logits(model)
        others = [other for other in model.expert_names if other != name]
        with model.only_experts(*others):
            expected = logits(model)
        fresh = tiny_flexmoe("llama", OWNERS, active_experts=others)
        assert torch.equal(expected, logits(fresh))
    switch([f"{name}-lora" for name in names])
    together = logits(model)
    assert len({tuple(x.flatten()[:5].tolist()) for x in (plain, together, *alone.values())}) == 4
    by_hand = tiny_flexmoe("llama", OWNERS)
    state = model.state_dict()
    for key, value in by_hand.state_dict().items():
        stem, _, leaf = key.rpartition(".")
        name = next((name for name in names if f".{name}." in key), None)
        if ".router." in key and name:
            value.copy_(state[f"{stem}.modules_to_save.{name}-lora.{leaf}"])
        elif name:
            a, b = (state[f"{stem}.lora_{part}.{name}-lora.weight"] for part in "AB")
            value.add_(b @ a * (8 / 4))  # LoraConfig's default lora_alpha / r
    torch.testing.assert_close(together, logits(by_hand), **FLOAT32)


def test_masks_and_generation_through_the_peft_model():
    model, tokens = tiny_flexmoe("llama", OWNERS), random_tokens(2, 7)
    adapted = adapted_with(model, "math", router_row=True)
    assert type(adapted) is peft.PeftModelForCausalLM
    others = [name for name in model.expert_names if name != "math"]
    mask = model.expert_mask([others, others])
    assert torch.equal(logits(adapted, expert_mask=mask), logits(tiny_flexmoe("llama", OWNERS), expert_mask=mask))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    written = adapted.generate(input_ids=tokens, experts=["public", "math"], **options)
    assert written.shape == (2, 11)
    merged = adapted.merge_and_unload()
    assert torch.equal(merged.generate(input_ids=tokens, experts=["public", "math"], **options), written)


class Rows(Dataset):
    """Eight token sequences."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        ids = random_tokens(1, 12, seed=item)[0]
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
def test_trainer_changes_the_adapter_only(way, tmp_path: Path):
    model = tiny_flexmoe("llama", OWNERS)
    config = expert_lora_config(model, "math", r=4, router_row=True, lora_dropout=0.1)
    adapted = model if way == "add_adapter" else peft.get_peft_model(model, config)
    if way == "add_adapter":
        model.add_adapter(config)
    before = {name: value.clone() for name, value in adapted.state_dict().items()}
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none", use_cpu=True
    )
    trainer = Trainer(adapted, arguments, train_dataset=Rows())
    trainer.train()
    moved = {name for name, value in adapted.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".math.lora" in name or ".lora_" in name or "modules_to_save" in name}
    assert all(".math." in name for name in moved)
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").exists()


class TestLayersToTransform:
    def test_only_these_layers_have_the_adapter(self):
        model = tiny_flexmoe("llama", OWNERS)
        ours = trained(adapted_with(model, "math", layers_to_transform=1, router_row=True))
        assert {name.split(".layers.")[1].split(".")[0] for name in ours} == {"1"}
        assert {name.split(".mlp.")[1].split(".")[1] for name in ours} == {"math"}
        both = trained(adapted_with(tiny_flexmoe("llama", OWNERS), "math", layers_to_transform=[0, 1]))
        assert both == trained(adapted_with(tiny_flexmoe("llama", OWNERS), "math"))

    @pytest.mark.parametrize("family", ["gpt2", "opt"])
    def test_a_saved_adapter_is_loaded(self, family, tmp_path):
        adapted = adapted_with(FAMILIES[family](), "math", layers_to_transform=[1], router_row=True)
        with_random_rows(adapted).save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(FAMILIES[family](), tmp_path)
        torch.testing.assert_close(logits(loaded), logits(adapted), **FLOAT32)
        without = tiny_flexmoe("gpt2", ["code"])
        with pytest.raises(ValueError, match=r"made for the expert\(s\) \['math'\]|math.*not found"):
            peft.PeftModel.from_pretrained(without, tmp_path)

    @pytest.mark.parametrize("layers", [[], [2], [0, -1]])
    def test_unknown_layers(self, layers):
        with pytest.raises(ValueError, match=r"layers_to_transform is .*name layers among \[0, 1\]"):
            expert_lora_config(tiny_flexmoe("llama", OWNERS), "math", layers_to_transform=layers)

    def test_the_row_of_a_layer_is_not_that_of_another_one(self):
        """PEFT compares the ends of names, so the row of layer 1 must not match that of layer 11."""
        config = expert_lora_config(tiny_flexmoe("llama", OWNERS), "math", layers_to_transform=1, router_row=True)
        assert list(config.modules_to_save) == [".1.mlp.router.math"]


def tied_model(tied: bool) -> tuple[PreTrainedModel, FlexMoeForCausalLM]:
    """A dense anchor with tied embeddings, or not, and a FlexMoE made from it."""
    config = ANCHOR_CONFIGS["qwen3"]()
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    anchor = AutoModelForCausalLM.from_config(config).eval()
    return anchor, flexmoe_from_anchor(anchor, ["math"])


class TestTiedEmbeddings:
    @pytest.mark.promise(
        "PEFT", "`trainable_token_indices` on tied embeddings, merged", "as on a dense model: head and embeddings"
    )
    @pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
    @pytest.mark.parametrize("tied", [True, False])
    def test_merged_tokens_compute_what_the_adapter_computes(self, tied):
        changed = {}
        for name, model in zip(("dense", "FlexMoE"), tied_model(tied), strict=True):
            plain = model.state_dict()[next(key for key in model.state_dict() if "lm_head" in key)].clone()
            config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[5, 6])
            adapted = peft.get_peft_model(model, config).eval()
            for key, parameter in adapted.named_parameters():
                if "trainable_tokens_delta" in key:
                    torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
            expected = logits(adapted)
            merged = adapted.merge_and_unload()
            torch.testing.assert_close(logits(merged), expected, **FLOAT32)
            head = merged.get_output_embeddings().weight
            changed[name] = (head != plain).any(-1).nonzero().flatten().tolist()
            assert (head.data_ptr() == merged.get_input_embeddings().weight.data_ptr()) == tied
        assert changed["FlexMoE"] == changed["dense"] == ([5, 6] if tied else [])

    @pytest.mark.parametrize("save", [True, False])
    def test_ensure_weight_tying_finds_the_head(self, save):
        entry = {"modules_to_save": ["embed_tokens"]} if save else {}
        targets = ["q_proj"] if save else ["q_proj", "embed_tokens"]
        config = peft.LoraConfig(target_modules=targets, ensure_weight_tying=True, task_type="CAUSAL_LM", **entry)
        adapted = peft.get_peft_model(tied_model(True)[1], config)
        assert any(
            "lm_head" in name for name, _ in adapted.named_parameters(remove_duplicate=False) if "default" in name
        )


PROMPTS: dict[str, Callable[..., Any]] = {
    "prompt tuning": peft.PromptTuningConfig,
    "P-tuning": peft.PromptEncoderConfig,
    "prefix tuning": peft.PrefixTuningConfig,
}


@pytest.mark.promise(
    "PEFT", "prompt tuning, P-tuning and prefix tuning", "works, with the sizes of the anchor and a choice of experts"
)
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("family", [soak("llama"), "gpt2", "gemma2"])
def test_learned_prompts(family, kind, tmp_path):
    def adapted(model: PreTrainedModel) -> Any:
        torch.manual_seed(0)
        return peft.get_peft_model(model, PROMPTS[kind](task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()

    dense, model = adapted(tiny_anchor(family)), adapted(tiny_flexmoe(family, ["math"]))
    torch.testing.assert_close(logits(model, experts=["public"]), logits(dense), **FLOAT32)
    assert not torch.allclose(logits(model), logits(dense))
    tokens, options = random_tokens(1, 7), {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    expected = dense.generate(input_ids=tokens, **options)
    assert torch.equal(model.generate(input_ids=tokens, experts=["public"], **options), expected)
    assert all("prompt_encoder" in name for name in trained(model))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_flexmoe(family, ["math"]), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), **FLOAT32)
