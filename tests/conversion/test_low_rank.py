"""Compress and densify: the kept singular values, the reported error, and the round trip."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from flexmoe.conversion.compose import compose
from flexmoe.conversion.export import export
from flexmoe.conversion.graft import graft
from flexmoe.conversion.low_rank import CompressedLayer, compress, densify
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM
from flexmoe.packages.package import ExpertPackage
from flexmoe.testing import perturb_expert, random_tokens, tiny_anchor
from flexmoe_cli import main
from tests.support.soak import thinned

FAMILIES = ("llama", "gpt2", "phi3", "gpt_neox")  # Linear; Conv1D with biases; fused gate_up; Linear with biases
CLOSE = {"rtol": 0.0, "atol": 1e-4}  # rounding at full rank


def make_world(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """In `folder`: the anchor, its graft, and the full package `math`, whose row has no bias."""
    tiny_anchor(family).to(dtype).save_pretrained(folder / "anchor")
    graft(folder / "anchor", folder / "grafted")
    model = FlexMoeForCausalLM.from_pretrained(folder / "grafted")
    model.add_expert_copy("math")
    perturb_expert(model, "math")
    for block in model.flexmoe_blocks():
        torch.nn.init.zeros_(block.router["math"].bias)
    model.save_expert("math", folder / "math", license="mit", training={"tokens": 5})
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the world of a family, once."""
    return functools.cache(lambda family: make_world(tmp_path_factory.mktemp(family), family))


@pytest.fixture(scope="module", params=thinned(FAMILIES, ["gpt2", "phi3"]))
def world(request: pytest.FixtureRequest, built: Callable[[str], Path]) -> Path:
    return built(request.param)


@pytest.fixture(scope="module")
def llama(built: Callable[[str], Path]) -> Path:
    return built("llama")


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder)(random_tokens(2, 9)).logits


def weights(package: Path) -> dict[str, torch.Tensor]:
    return load_file(package / "expert.safetensors")


class TestRoundTrip:
    def test_full_rank_changes_nothing(self, world: Path, tmp_path: Path) -> None:
        layers = compress(world / "math", tmp_path / "low", anchor=world / "grafted", rank=32)
        assert [layer.rank for layer in layers] == [32, 32]
        assert max(layer.error for layer in layers) < 1e-5
        for name, package in (("full", world / "math"), ("low", tmp_path / "low")):
            compose(world / "grafted", [package], tmp_path / f"with-{name}")
        torch.testing.assert_close(logits(tmp_path / "with-low"), logits(tmp_path / "with-full"), **CLOSE)
        densify(tmp_path / "low", tmp_path / "back", anchor=world / "grafted")
        before, after = weights(world / "math"), weights(tmp_path / "back")
        assert list(after) == list(before)
        for name, tensor in before.items():
            torch.testing.assert_close(after[name], tensor, **CLOSE)
        assert ExpertPackage.open(tmp_path / "back").manifest.ffn == ExpertPackage.open(world / "math").manifest.ffn

    def test_a_composed_low_rank_expert_is_the_added_one(self, world: Path, tmp_path: Path) -> None:
        compress(world / "math", tmp_path / "low", anchor=world / "grafted", rank=[3, 5])
        compose(world / "grafted", [tmp_path / "low"], tmp_path / "composed")
        model = FlexMoeForCausalLM.from_pretrained(world / "grafted")
        model.add_expert(tmp_path / "low")
        on_disk = FlexMoeForCausalLM.from_pretrained(tmp_path / "composed")
        assert on_disk.config.expert_records == model.config.expert_records
        assert list(on_disk.state_dict()) == list(model.state_dict())
        assert all(torch.equal(value, on_disk.state_dict()[name]) for name, value in model.state_dict().items())
        model.save_composition(tmp_path / "reference", sources={"public": world / "anchor", "math": tmp_path / "low"})
        torch.testing.assert_close(logits(tmp_path / "reference"), logits(tmp_path / "composed"), rtol=0, atol=1e-6)

    def test_a_densified_expert_computes_what_the_low_rank_one_does(self, world: Path, tmp_path: Path) -> None:
        compress(world / "math", tmp_path / "low", anchor=world / "anchor", rank=4)
        densify(tmp_path / "low", tmp_path / "full", anchor=world / "anchor")
        for name in ("low", "full"):
            compose(world / "grafted", [tmp_path / name], tmp_path / f"with-{name}")
        torch.testing.assert_close(logits(tmp_path / "with-low"), logits(tmp_path / "with-full"), rtol=0, atol=1e-5)
        assert (logits(tmp_path / "with-low") - logits(world / "grafted")).abs().max() > 1e-2


class TestApproximation:
    def test_the_largest_singular_values(self, llama: Path, tmp_path: Path) -> None:
        """A difference with the singular values 8, 4, 2, 1."""
        package = edited(llama, tmp_path, lambda key: known_difference() if "up_proj" in key else None)
        one, two = (compress(package, tmp_path / f"{r}", anchor=llama / "grafted", rank=r) for r in (1, 2))
        total = 64 + 16 + 4 + 1
        for layer in one:
            assert layer.error == pytest.approx(((16 + 4 + 1) / total) ** 0.5, rel=1e-4)
        for layer in two:
            assert layer.error == pytest.approx(((4 + 1) / total) ** 0.5, rel=1e-4)
        low = weights(tmp_path / "2")
        product = low["layers.0.ffn.up_proj.lora_B.weight"] @ low["layers.0.ffn.up_proj.lora_A.weight"]
        wanted = torch.zeros(64, 32)
        wanted[0, 0], wanted[1, 1] = 8.0, 4.0
        torch.testing.assert_close(product, wanted, rtol=0, atol=1e-5)
        assert not low["layers.0.ffn.gate_proj.lora_B.weight"].any()

    @pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.75, 1), (0.76, 2), (0.94, 2), (0.95, 3), (1.0, 4)])
    def test_the_smallest_rank_with_the_energy(self, energy: float, rank: int, llama: Path, tmp_path: Path) -> None:
        package = edited(llama, tmp_path, lambda key: known_difference() if "up_proj" in key else None)
        layers = compress(package, tmp_path / "low", anchor=llama / "grafted", energy=energy)  # 64 / 85, 80 / 85 ...
        assert [layer.rank for layer in layers] == [rank, rank]

    def test_no_difference_at_all(self, llama: Path, tmp_path: Path) -> None:
        package = edited(llama, tmp_path, lambda key: None)
        assert compress(package, tmp_path / "low", anchor=llama / "grafted", energy=0.5) == [
            CompressedLayer(0, 1, 0.0),
            CompressedLayer(1, 1, 0.0),
        ]

    def test_metadata_is_kept(self, llama: Path, tmp_path: Path) -> None:
        layers = compress(llama / "math", tmp_path / "low", anchor=llama / "grafted", rank=4)
        manifest = ExpertPackage.open(tmp_path / "low").manifest
        assert (manifest.license, manifest.kind, manifest.rank, manifest.alpha) == ("mit", "low_rank", [4, 4], None)
        assert manifest.training == {
            "tokens": 5,
            "compressed": {"rank": [4, 4], "relative_error": [layer.error for layer in layers]},
        }
        rows = {name: tensor for name, tensor in weights(llama / "math").items() if ".router." in name}
        assert rows
        assert all(torch.equal(weights(tmp_path / "low")[name], row) for name, row in rows.items())

    def test_the_error_includes_half_precision(self, tmp_path: Path) -> None:
        world = make_world(tmp_path, "llama", torch.bfloat16)
        layers = compress(world / "math", tmp_path / "low", anchor=world / "grafted", rank=32)
        assert weights(tmp_path / "low")["layers.0.ffn.up_proj.lora_A.weight"].dtype == torch.bfloat16
        assert all(1e-4 < layer.error < 1e-2 for layer in layers)


def known_difference() -> torch.Tensor:
    difference = torch.zeros(64, 32)
    for i, value in enumerate((8.0, 4.0, 2.0, 1.0)):
        difference[i, i] = value
    return difference


def edited(world: Path, folder: Path, difference: Any) -> Path:
    """A package whose matrices are public's plus `difference(key)`."""
    model = FlexMoeForCausalLM.from_pretrained(world / "grafted")
    model.add_expert_copy("math")
    for block in model.flexmoe_blocks():
        for key, value in block.experts["math"].state_dict().items():
            more = difference(key)
            if more is not None:
                value += more
    return Path(model.save_expert("math", folder / "edited"))


class TestExports:
    @pytest.mark.parametrize("to", ["mixtral", "dense"])
    def test_low_rank_experts_are_merged(self, to: str, llama: Path, tmp_path: Path) -> None:
        compress(llama / "math", tmp_path / "low", anchor=llama / "grafted", rank=4)
        compose(llama / "grafted", [tmp_path / "low"], tmp_path / "model", num_experts_per_tok=2)
        expert = "math" if to == "dense" else None
        with pytest.raises(ValueError, match=r"low-rank in this model: math.*--densify"):
            export(tmp_path / "model", tmp_path / "out", to=to, expert=expert)
        export(tmp_path / "model", tmp_path / "out", to=to, expert=expert, densify=True)
        model = FlexMoeForCausalLM.from_pretrained(tmp_path / "model")
        with torch.no_grad(), model.only_experts(*(["math"] if expert else model.expert_names)):
            ours = model(random_tokens(2, 9)).logits
        torch.testing.assert_close(logits(tmp_path / "out"), ours, rtol=0, atol=1e-5)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "fault"),
        [
            ({}, "rank=None and energy=None: give exactly one"),
            ({"rank": 4, "energy": 0.9}, "give exactly one of them"),
            ({"rank": 0}, "positive integer"),
            ({"rank": [4]}, "a list of 2"),
            ({"rank": True}, "positive integer"),
            ({"energy": 0.0}, "above 0 and at most 1"),
            ({"energy": 95}, "above 0 and at most 1"),
        ],
    )
    def test_invalid_ranks_and_energies(
        self, options: dict[str, Any], fault: str, llama: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(ValueError, match=fault):
            compress(llama / "math", tmp_path / "out", anchor=llama / "grafted", **options)
        assert not list(tmp_path.iterdir())

    def test_unknown_anchor(self, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="--anchor"):
            compress(llama / "math", tmp_path / "out", rank=4)

    @pytest.mark.parametrize("kind", ["anchor", "grafted"])
    def test_another_anchor(self, kind: str, llama: Path, tmp_path: Path) -> None:
        tiny_anchor("llama", seed=1).save_pretrained(tmp_path / "anchor")
        graft(tmp_path / "anchor", tmp_path / "grafted")
        with pytest.raises(ValueError, match="made for another anchor"):
            compress(llama / "math", tmp_path / "out", anchor=tmp_path / kind, rank=4)
        assert not (tmp_path / "out").exists()

    def test_the_wrong_kind(self, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"full expert.*`flexmoe compress`"):
            densify(llama / "math", tmp_path / "out", anchor=llama / "grafted")
        compress(llama / "math", tmp_path / "low", anchor=llama / "grafted", rank=4)
        with pytest.raises(ValueError, match=r"low_rank expert.*`flexmoe densify`"):
            compress(tmp_path / "low", tmp_path / "out", anchor=llama / "grafted", rank=2)

    def test_an_existing_output(self, llama: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(FileExistsError):
            compress(llama / "math", tmp_path / "out", anchor=llama / "grafted", rank=4)
        compress(llama / "math", tmp_path / "out", anchor=llama / "grafted", rank=4, overwrite=True)
        assert ExpertPackage.open(tmp_path / "out").manifest.kind == "low_rank"

    def test_a_flipped_bit(self, llama: Path, tmp_path: Path) -> None:
        shutil.copytree(llama / "math", tmp_path / "math")
        path = tmp_path / "math" / "expert.safetensors"
        data = bytearray(path.read_bytes())
        data[-200] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match="SHA-256"):
            compress(tmp_path / "math", tmp_path / "out", anchor=llama / "grafted", rank=4)
        assert not (tmp_path / "out").exists()


class TestCommands:
    def test_compress_and_densify(self, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        anchor = ["--anchor", str(llama / "grafted")]
        assert main(["compress", str(llama / "math"), *anchor, "--rank", "4,2", "--out", str(tmp_path / "low")]) == 0
        shown = capsys.readouterr().out
        assert "relative error" in shown
        assert "holds the expert math" in shown
        assert main(["densify", str(tmp_path / "low"), *anchor, "--out", str(tmp_path / "full"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["experts"][0]["kind"] == "full"
        line = ["compress", str(tmp_path / "full"), *anchor, "--energy", "0.9", "--out", str(tmp_path / "again")]
        assert main([*line, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        # the differences have the ranks 4 and 2
        assert [layer["rank"] <= most for layer, most in zip(found["layers_kept"], (4, 2), strict=True)] == [True] * 2

    def test_bad_input_is_one_paragraph(self, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["compress", str(llama / "math"), "--rank", "four", "--out", str(tmp_path / "low")]) == 1
        assert "--rank four" in capsys.readouterr().err
