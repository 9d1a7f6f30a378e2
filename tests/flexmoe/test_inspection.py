"""Inspection, compared with the loaded model."""

import json
from pathlib import Path

import pytest
import torch

from flexmoe.inspection import inspect
from flexmoe.testing import ANCHOR_CONFIGS, tiny_anchor, tiny_flexmoe


@pytest.fixture
def model():
    return tiny_flexmoe("llama", ["math", "code-2"], num_experts_per_tok=2)


@pytest.fixture
def folder(model, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def test_a_model(model, folder: Path) -> None:
    found = inspect(folder)
    assert found["kind"] == "model"
    assert found["path"] == str(folder)
    assert found["model_type"] == "flexmoe"
    assert found["layers"] == 2
    assert found["num_experts_per_tok"] == 2
    assert found["norm_topk_prob"] is True
    assert found["public_prior"] == 0.0
    assert found["parameters"] == model.num_parameters()
    assert [expert["name"] for expert in found["experts"]] == ["public", "math", "code-2"]
    assert [expert["active"] for expert in found["experts"]] == [True, True, True]
    assert json.loads(json.dumps(found)) == found


def test_figures_of_each_expert(model, folder: Path) -> None:
    for expert in inspect(folder)["experts"]:
        name, blocks = expert["name"], model.flexmoe_blocks()
        networks = [*(block.experts[name] for block in blocks), *(block.router[name] for block in blocks)]
        assert expert["parameters"] == sum(part.numel() for network in networks for part in network.parameters())
        assert expert["bytes"] == 4 * expert["parameters"]
        assert expert["row_norms"] == pytest.approx([block.router[name].weight.norm().item() for block in blocks])
        assert expert["biases"] == pytest.approx([block.router[name].bias.item() for block in blocks])


@pytest.mark.parametrize("family", ANCHOR_CONFIGS)
def test_rows_of_every_family(family: str, tmp_path: Path) -> None:
    tiny_flexmoe(family, ["math"]).save_pretrained(tmp_path)
    found = inspect(tmp_path)
    assert found["layers"] == 2
    assert all(expert["parameters"] > 4096 for expert in found["experts"])


def test_layers_are_sorted_by_number(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_flexmoe("llama").save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for layer in range(12):
        state[f"anchor.model.layers.{layer}.mlp.router.public.bias"] = torch.tensor([float(layer)])
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = inspect(tmp_path)
    assert found["experts"][0]["biases"] == [float(layer) for layer in range(12)]
    assert found["public_prior"] is None


def test_active_experts(model, tmp_path: Path) -> None:
    model.set_active_experts(["public", "math"])
    model.save_pretrained(tmp_path)
    assert [expert["active"] for expert in inspect(tmp_path)["experts"]] == [True, True, False]


@pytest.mark.parametrize(
    ("family", "device", "experts_implementation", "implementation", "reason"),
    [
        ("llama", "cpu", None, "torch", "on a CPU the operators run their reference"),
        ("llama", "cuda", None, "torch", "the kernels have not been measured on this GPU"),
        ("llama", "cuda", "flexmoe_triton", "triton", "router and experts are fused"),
        ("llama", "cuda", "eager", "torch", "experts_implementation is 'eager'"),
        ("gpt2", "cuda", "flexmoe_triton", "torch", "has a structure that no kernel computes"),
    ],
)
def test_implementations_of_layers(
    tmp_path: Path, family, device, experts_implementation, implementation, reason
) -> None:
    tiny_flexmoe(family, ["math"]).save_pretrained(tmp_path)
    found = inspect(tmp_path, device=device, experts_implementation=experts_implementation)
    assert [path["layer"] for path in found["paths"]] == [0, 1]
    assert {path["implementation"] for path in found["paths"]} == {implementation}
    assert all(reason in path["reason"] for path in found["paths"])
    assert "paths" not in inspect(tmp_path)


def test_a_package(model, tmp_path: Path) -> None:
    model.save_expert("math", tmp_path / "package", license="MIT", data_statement="Sums.")
    found = inspect(tmp_path / "package")
    model.save_pretrained(tmp_path / "model")
    in_model = inspect(tmp_path / "model")["experts"][1]
    (expert,) = found["experts"]
    assert found["kind"] == "package"
    assert found["layers"] == 2
    assert found["anchor"]["model_type"] == "llama"
    assert (expert["name"], expert["license"], expert["data_statement"]) == ("math", "MIT", "Sums.")
    measured = ("parameters", "bytes", "row_norms", "biases")
    assert {key: expert[key] for key in measured} == {key: in_model[key] for key in measured}
    assert found["parameters"] == expert["parameters"]


def test_a_dense_model(tmp_path: Path) -> None:
    tiny_anchor("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a llama model, not a FlexMoE model.*flexmoe graft"):
        inspect(tmp_path)


def test_other_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="contains neither"):
        inspect(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        inspect(tmp_path / "nowhere")
