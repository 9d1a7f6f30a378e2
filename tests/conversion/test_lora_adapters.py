"""LoRA adapters as experts: equal to PEFT's model; adapters that an expert cannot represent are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flexmoe.conversion.graft import graft
from flexmoe.hub.client import DOWNLOADED, NEVER_DOWNLOADED
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM
from flexmoe.testing import ANCHOR_CONFIGS, random_tokens, tiny_anchor
from flexmoe_cli import main
from tests.support.soak import soak

peft = pytest.importorskip("peft")

CLOSE = {"rtol": 0.0, "atol": 1e-5}
MATRICES = {  # per family: all of a feed-forward network, and some of it
    "llama": (["gate_proj", "up_proj", "down_proj"], ["up_proj"]),
    "gpt2": (["c_fc", r".*mlp\.c_proj"], ["c_fc"]),
    "phi3": (["gate_up_proj", "down_proj"], ["down_proj"]),
    "gpt_neox": (["dense_h_to_4h", "dense_4h_to_h"], ["dense_4h_to_h"]),
}


@torch.no_grad()
def make_adapter(folder: Path, family: str, targets: list[str], **settings: Any) -> torch.Tensor:
    """Writes the anchor and an adapter with random factors; returns the logits of PEFT's model of both."""
    anchor = tiny_anchor(family)
    anchor.save_pretrained(folder / "anchor")
    pattern = "|".join(target if target.startswith(".*") else rf".*\.{target}" for target in targets)
    config = peft.LoraConfig(target_modules=pattern, task_type="CAUSAL_LM", **settings)
    adapted = peft.get_peft_model(anchor, config).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder / "adapter")
    return adapted(random_tokens(2, 9)).logits


@torch.no_grad()
def of_expert(folder: Path, name: str = "math") -> torch.Tensor:
    model = FlexMoeForCausalLM.from_pretrained(folder)
    with model.only_experts(name):
        return model(random_tokens(2, 9)).logits


class TestAsAnExpert:
    @pytest.mark.parametrize("part", [0, soak(1)], ids=["all", "some"])
    @pytest.mark.parametrize("family", MATRICES)
    def test_equals_pefts_model(self, family: str, part: int, tmp_path: Path) -> None:
        wanted = make_adapter(tmp_path, family, MATRICES[family][part], r=4, lora_alpha=6)
        graft(tmp_path / "anchor", tmp_path / "model", {"math": tmp_path / "adapter"})
        torch.testing.assert_close(of_expert(tmp_path / "model"), wanted, **CLOSE)
        with torch.no_grad():
            plain = AutoModelForCausalLM.from_pretrained(tmp_path / "anchor")(random_tokens(2, 9)).logits
        assert (wanted - plain).abs().max() > 1e-2
        torch.testing.assert_close(of_expert(tmp_path / "model", "public"), plain, **CLOSE)
        (_, record) = FlexMoeForCausalLM.from_pretrained(tmp_path / "model").config.expert_records
        assert (record["kind"], record["rank"], record["alpha"]) == ("low_rank", [4, 4], 6.0)

    @pytest.mark.parametrize(
        "settings",
        [
            {"r": 4, "lora_alpha": 6, "use_rslora": True},
            {"r": 4, "rank_pattern": {"up_proj": 2}},
            {"r": 4, "alpha_pattern": {"gate_proj": 3}},
            {"r": 4, "alpha_pattern": {r"model\.layers\.0\.mlp\.up_proj": 3}, "rank_pattern": {"gate_proj": 7}},
            {"r": 4, "layers_to_transform": [1], "layers_pattern": "layers"},
        ],
        ids=["rank-stabilised", "ranks", "alphas", "both", "one-layer"],
    )
    def test_scales_and_ranks_of_modules(self, settings: dict[str, Any], tmp_path: Path) -> None:
        if "layers_to_transform" in settings:  # PEFT wants a list of names with it
            torch.manual_seed(0)
            anchor = tiny_anchor("llama")
            anchor.save_pretrained(tmp_path / "anchor")
            config = peft.LoraConfig(target_modules=["up_proj"], init_lora_weights=False, **settings)
            adapted = peft.get_peft_model(anchor, config).eval()
            adapted.save_pretrained(tmp_path / "adapter")
            with torch.no_grad():
                wanted = adapted(random_tokens(2, 9)).logits
        else:
            wanted = make_adapter(tmp_path, "llama", MATRICES["llama"][0], **settings)
        graft(tmp_path / "anchor", tmp_path / "model", {"math": tmp_path / "adapter"})
        torch.testing.assert_close(of_expert(tmp_path / "model"), wanted, **CLOSE)

    def test_one_scale_and_one_rank_keep_the_bytes(self, tmp_path: Path) -> None:
        make_adapter(tmp_path, "llama", MATRICES["llama"][0], r=3, lora_alpha=5)
        graft(tmp_path / "anchor", tmp_path / "model", {"math": tmp_path / "adapter"})
        theirs = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        ours = load_file(tmp_path / "model" / "model.safetensors")
        for name, tensor in theirs.items():
            layer, matrix, side = name.split(".")[4], name.split(".")[6], name.split(".")[7][-1]
            assert torch.equal(ours[f"anchor.model.layers.{layer}.mlp.experts.math.{matrix}.{side}.weight"], tensor)

    def test_beside_a_fine_tune_in_half_precision(self, tmp_path: Path) -> None:
        make_adapter(tmp_path, "llama", MATRICES["llama"][0], r=3)
        for name, seed in (("anchor", 0), ("tuned", 0)):
            tiny_anchor("llama", seed).to(torch.bfloat16).save_pretrained(tmp_path / name)
        graft(tmp_path / "anchor", tmp_path / "model", {"small": tmp_path / "adapter", "big": tmp_path / "tuned"})
        tensors = load_file(tmp_path / "model" / "model.safetensors")
        assert {t.dtype for n, t in tensors.items() if ".experts." in n} == {torch.bfloat16}
        model = FlexMoeForCausalLM.from_pretrained(tmp_path / "model")
        assert [record["kind"] for record in model.config.expert_records] == ["full", "low_rank", "full"]

    def test_a_config_of_the_model_beside_it(self, tmp_path: Path) -> None:
        wanted = make_adapter(tmp_path, "llama", MATRICES["llama"][0], r=3)
        (tmp_path / "adapter" / "config.json").write_bytes((tmp_path / "anchor" / "config.json").read_bytes())
        graft(tmp_path / "anchor", tmp_path / "model", {"math": tmp_path / "adapter"})
        torch.testing.assert_close(of_expert(tmp_path / "model"), wanted, **CLOSE)

    def test_from_the_hub(self, tmp_path: Path) -> None:
        make_adapter(tmp_path, "llama", ["up_proj"], r=3)
        names = [path.name for path in (tmp_path / "adapter").iterdir()]
        fetched = set(filter_repo_objects(names, allow_patterns=DOWNLOADED, ignore_patterns=NEVER_DOWNLOADED))
        assert {"adapter_config.json", "adapter_model.safetensors"} <= fetched

    def test_on_the_command_line(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        make_adapter(tmp_path, "llama", MATRICES["llama"][0], r=3)
        line = ["graft", str(tmp_path / "anchor"), "--expert", f"math={tmp_path / 'adapter'}"]
        assert main([*line, "--out", str(tmp_path / "model")]) == 0
        assert "math" in capsys.readouterr().out


class TestErrors:
    def test_numbers_too_large_for_the_anchor(self, tmp_path: Path) -> None:
        make_adapter(tmp_path, "llama", ["up_proj", "down_proj"], r=2, rank_pattern={"up_proj": 1}, lora_alpha=64)
        tiny_anchor("llama").to(torch.float16).save_pretrained(tmp_path / "anchor")
        path = tmp_path / "adapter" / "adapter_model.safetensors"
        save_file({name: torch.full_like(tensor, 60_000.0) for name, tensor in load_file(path).items()}, path)
        self.refused(tmp_path, "too large for torch.float16")

    def refused(self, tmp_path: Path, fault: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=fault):
            graft(tmp_path / "anchor", tmp_path / "model", {"math": tmp_path / "adapter"})
        assert not (tmp_path / "model").exists()

    def test_attention(self, tmp_path: Path) -> None:
        make_adapter(tmp_path, "llama", ["q_proj", "up_proj"], r=2)
        self.refused(tmp_path, r"more than feed-forward matrices.*4 tensors: .*q_proj.*merge_and_unload.*--shared")

    @pytest.mark.parametrize(
        ("settings", "fault"),
        [
            ({"use_dora": True}, "use_dora=True"),
            ({"lora_bias": True}, "lora_bias=True"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
            ({"bias": "lora_only"}, "bias='lora_only'"),
        ],
    )
    def test_unsupported_settings(self, settings: dict[str, Any], fault: str, tmp_path: Path) -> None:
        make_adapter(tmp_path, "llama", ["up_proj"], r=2)
        config = tmp_path / "adapter" / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
        self.refused(tmp_path, fault)

    def test_an_initialisation_that_changes_the_anchor(self, tmp_path: Path) -> None:
        make_adapter(tmp_path, "llama", ["up_proj"], r=2)
        config = tmp_path / "adapter" / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": "pissa_niter_4"}))
        self.refused(tmp_path, "init_lora_weights='pissa_niter_4'")

    def test_another_kind_of_adapter(self, tmp_path: Path) -> None:
        make_adapter(tmp_path, "llama", ["up_proj"], r=2)
        config = tmp_path / "adapter" / "adapter_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "peft_type": "IA3"}))
        self.refused(tmp_path, "type 'IA3'; only LORA")

    def test_another_anchor(self, tmp_path: Path) -> None:
        make_adapter(tmp_path, "llama", ["up_proj"], r=2)
        config = ANCHOR_CONFIGS["llama"]()
        config.intermediate_size = 96
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "anchor")
        self.refused(tmp_path, r"lora_B.*\[64, 2\].*\[96, 32\].*another model")

    def test_pickles(self, tmp_path: Path) -> None:
        make_adapter(tmp_path, "llama", ["up_proj"], r=2)
        (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
        self.refused(tmp_path, "pickles run code", FileNotFoundError)

    def test_nan(self, tmp_path: Path) -> None:
        make_adapter(tmp_path, "llama", ["up_proj"], r=2)
        path = tmp_path / "adapter" / "adapter_model.safetensors"
        tensors = load_file(path)
        next(iter(tensors.values())).view(-1)[0] = float("nan")
        save_file(tensors, path)
        self.refused(tmp_path, "holds NaN")

    def test_a_missing_factor(self, tmp_path: Path) -> None:
        make_adapter(tmp_path, "llama", ["up_proj"], r=2)
        path = tmp_path / "adapter" / "adapter_model.safetensors"
        tensors = load_file(path)
        tensors.pop(next(name for name in tensors if "lora_B" in name))
        save_file(tensors, path)
        self.refused(tmp_path, "do not match each other")
