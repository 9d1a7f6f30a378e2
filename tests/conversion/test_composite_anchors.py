"""Anchors whose config is composite (text and images): adapters and fine-tunes saved by any class of the family."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
)

from flexmoe.conversion.graft import graft
from flexmoe.conversion.lora_adapters import TEXT_MODELS
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM
from flexmoe.testing import random_tokens
from tests.support.soak import soak

TEXT = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 64, "layer_types": ["full_attention", "full_attention"],
}  # fmt: skip
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
SIGLIP = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
CLOSE = {"rtol": 0.0, "atol": 1e-5}


def qwen() -> PreTrainedModel:
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=TEXT, vision_config=QWEN_VISION))


def gemma() -> PreTrainedModel:
    config = Gemma3Config(text_config=TEXT, vision_config=SIGLIP, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"qwen3_5": qwen, "gemma3": gemma}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    """The model for text and images, which is the anchor in tmp_path/anchor."""
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    model.save_pretrained(tmp_path / "anchor")
    return model


@torch.no_grad()
def of_expert(folder: Path, name: str) -> torch.Tensor:
    grafted = FlexMoeForCausalLM.from_pretrained(folder)
    with grafted.only_experts(name):
        return grafted(random_tokens(2, 9)).logits


@torch.no_grad()
def adapter(model: PreTrainedModel, folder: Path, **settings: Any) -> torch.Tensor:
    """Saves an adapter on the text model's FFNs, as trained with the class of `model`; returns PEFT's logits."""
    peft = pytest.importorskip("peft")
    pattern = r".*(?<!visual)(?<!vision_tower)\.layers\.\d+\.mlp\.(gate|up|down)_proj"
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=pattern, r=4, **settings)).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return adapted(random_tokens(2, 9)).logits


@pytest.mark.promise(
    "`graft` with Qwen3.5 or Gemma 3",
    "a LoRA of PEFT on the text model, by the class for text and images or for text",
    "PEFT's logits",
)
@pytest.mark.parametrize("named", ["by the model", "by the class for text", "by the checkpoint"])
def test_an_adapter_of_the_class_for_text_and_images(model: PreTrainedModel, named: str, tmp_path: Path) -> None:
    ours = {"qwen3_5": "model.language_model.", "gemma3": "model.language_model."}[model.config.model_type]
    scales = {rf"{ours}layers.0.mlp.up_proj".replace(".", r"\."): 9}  # in the names of the trained class
    wanted = adapter(model, tmp_path / "math", lora_alpha=6, alpha_pattern=scales)
    theirs = {"by the class for text": "model.", "by the checkpoint": "language_model.model."}.get(named, ours)
    file, config = tmp_path / "math" / "adapter_model.safetensors", tmp_path / "math" / "adapter_config.json"
    save_file({name.replace(ours, theirs, 1): tensor for name, tensor in load_file(file).items()}, file)
    values = json.loads(config.read_text())
    values["alpha_pattern"] = {key.replace(*(p.replace(".", r"\.") for p in (ours, theirs))): 9 for key in scales}
    config.write_text(json.dumps(values))
    graft(tmp_path / "anchor", tmp_path / "model", {"math": tmp_path / "math"})
    torch.testing.assert_close(of_expert(tmp_path / "model", "math"), wanted, **CLOSE)
    assert (of_expert(tmp_path / "model", "public") - wanted).abs().max() > 1e-2


def test_an_adapter_on_the_image_encoder(model: PreTrainedModel, tmp_path: Path) -> None:
    adapter(model, tmp_path / "math")
    file = tmp_path / "math" / "adapter_model.safetensors"
    image = {"base_model.model.model.visual.blocks.0.mlp.linear_fc1.lora_A.weight": torch.ones(4, 32)}
    save_file(load_file(file) | image, file)
    with pytest.raises(
        ValueError, match=r"changes more than .* in 1 tensors: .*visual.blocks.0.mlp.linear_fc1.lora_A"
    ):
        graft(tmp_path / "anchor", tmp_path / "model", {"math": tmp_path / "math"})


def test_two_names_for_one_matrix(model: PreTrainedModel, tmp_path: Path) -> None:
    adapter(model, tmp_path / "math")
    file = tmp_path / "math" / "adapter_model.safetensors"
    tensors = load_file(file)
    again = {
        name.replace("model.language_model.", "language_model.model.", 1): t.clone() for name, t in tensors.items()
    }
    save_file(tensors | again, file)
    with pytest.raises(ValueError, match=r"two names for .*layers.0.mlp.down_proj"):
        graft(tmp_path / "anchor", tmp_path / "model", {"math": tmp_path / "math"})


def test_no_prefix_hides_another() -> None:
    assert sorted(TEXT_MODELS, key=len, reverse=True) == list(TEXT_MODELS)


@torch.no_grad()
def tuned(model: PreTrainedModel, folder: Path, kind: type[PreTrainedModel], **config: Any) -> torch.Tensor:
    """Saves a fine-tune by a class of the family, with other fields in the parts of its config; returns its logits."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "layers" in name and ".mlp." in name and "vis" not in name:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "composite")
    other = kind.from_pretrained(folder / "composite")
    other.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    parts = [values[key] for key in ("text_config", "vision_config") if key in values] or [values]
    for part in parts:
        part.update(config)
    (folder / "config.json").write_text(json.dumps(values))
    return model(random_tokens(2, 9)).logits


SAYS_NOTHING = {
    "dtype": "float32",
    "architectures": None,
    "_name_or_path": "elsewhere",
    "output_hidden_states": True,
    "id2label": {"0": "yes", "1": "no"},
    "use_cache": False,
    "transformers_version": "4.57.0",
}


@pytest.mark.promise(
    "`graft` with Qwen3.5 or Gemma 3",
    "a fine-tune saved by the class for text and images, or with fields without effect",
    "the fine-tune's logits",
)
@pytest.mark.parametrize("shared", [None, soak("anchor")])
def test_a_fine_tune_of_the_class_for_text_and_images(model: PreTrainedModel, shared: Any, tmp_path: Path) -> None:
    wanted = tuned(model, tmp_path / "math", type(model), **SAYS_NOTHING)
    graft(tmp_path / "anchor", tmp_path / "model", {"math": tmp_path / "math"}, shared=shared)
    torch.testing.assert_close(of_expert(tmp_path / "model", "math"), wanted, **CLOSE)


def tuned_text_model(model: PreTrainedModel, folder: Path, **config: Any) -> torch.Tensor:
    """Saves a fine-tune by the family's class for text alone; returns its logits."""
    kind = {"qwen3_5": Qwen3_5ForCausalLM, "gemma3": Gemma3ForCausalLM}[model.config.model_type]
    text = kind(model.config.text_config).eval()
    text.model.load_state_dict(model.model.language_model.state_dict())
    text.lm_head.load_state_dict(model.lm_head.state_dict())
    wanted = tuned(text, folder, kind, **config)
    assert json.loads((folder / "config.json").read_text())["model_type"] == f"{model.config.model_type}_text"
    return wanted


@pytest.mark.promise(
    "`graft` with Qwen3.5 or Gemma 3",
    "a fine-tune of the text model, saved by the class for text",
    "the fine-tune's logits",
)
@pytest.mark.parametrize("shared", [None, soak("anchor"), "average"])
def test_a_fine_tune_of_the_class_for_text(model: PreTrainedModel, shared: Any, tmp_path: Path) -> None:
    wanted = tuned_text_model(model, tmp_path / "math", **SAYS_NOTHING)
    graft(tmp_path / "anchor", tmp_path / "model", {"math": tmp_path / "math"}, shared=shared)
    torch.testing.assert_close(of_expert(tmp_path / "model", "math"), wanted, **CLOSE)
    assert (of_expert(tmp_path / "model", "public") - wanted).abs().max() > 1e-2


def test_a_fine_tune_of_the_class_for_text_that_differs(model: PreTrainedModel, tmp_path: Path) -> None:
    tuned_text_model(model, tmp_path / "math")
    file = tmp_path / "math" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.1.self_attn.q_proj.weight"))
    save_file(tensors | {name: tensors[name] + 1}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"in 1 of [0-9]+ tensors: model\..*layers\.1\.self_attn\.q_proj\.weight"):
        graft(tmp_path / "anchor", tmp_path / "model", {"math": tmp_path / "math"})
    mean = graft(tmp_path / "anchor", tmp_path / "mean", {"math": tmp_path / "math"}, shared="average")
    stored = load_file(mean / "model.safetensors")
    (averaged,) = (
        t for key, t in stored.items() if key.endswith("layers.1.self_attn.q_proj.weight") and "vis" not in key
    )
    torch.testing.assert_close(averaged, tensors[name] + 0.5)


@pytest.mark.parametrize("shared", [None, soak("anchor")])
def test_a_field_of_the_text_model_that_counts(model: PreTrainedModel, shared: Any, tmp_path: Path) -> None:
    tuned_text_model(model, tmp_path / "math", rms_norm_eps=0.5)
    with pytest.raises(ValueError, match=r"differ in rms_norm_eps \(0\.5, the anchor's is 1e-06\)"):
        graft(tmp_path / "anchor", tmp_path / "model", {"math": tmp_path / "math"}, shared=shared)


@pytest.mark.parametrize("shared", [None, soak("anchor")])
def test_a_field_that_counts_is_named_alone(model: PreTrainedModel, shared: Any, tmp_path: Path) -> None:
    tuned(model, tmp_path / "math", type(model), rms_norm_eps=0.5)
    with pytest.raises(ValueError, match=r"differ in (text_config\.)?rms_norm_eps \(0\.5, the anchor's is 1e-06\)"):
        graft(tmp_path / "anchor", tmp_path / "model", {"math": tmp_path / "math"}, shared=shared)
