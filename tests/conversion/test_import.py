"""A FlexOlmo checkpoint is split into an anchor and packages, which compose and export to the same bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, FlexOlmoConfig, FlexOlmoForCausalLM
from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoTopKRouter

from flexmoe.conversion.compose import compose, remove
from flexmoe.conversion.export import export
from flexmoe.conversion.import_flex_olmo import import_flex_olmo
from flexmoe.io.tensors import CheckpointFolder
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.modeling.fingerprint_flexmoe import live_fingerprint
from flexmoe.packages.package import ExpertPackage
from flexmoe.testing import random_tokens
from flexmoe_cli import main
from tests.support.letters import letter_tokenizer

NAMES = ["public", "math", "code"]
LAYERS, EXPERTS, WIDTH = 2, 3, 48


def flex_olmo(dtype: torch.dtype = torch.float32, **settings: Any) -> FlexOlmoForCausalLM:
    """A random FlexOlmo model whose every parameter differs from its default."""
    torch.manual_seed(0)
    config = FlexOlmoConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=WIDTH,
        num_experts=EXPERTS,
        max_position_embeddings=128,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": 20.0},
        pad_token_id=0,
        eos_token_id=2,
        **{"num_experts_per_tok": 2, "router_aux_loss_coef": 0.25, **settings},
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """As published: a matrix per expert, in one file."""
    flex_olmo().save_pretrained(tmp_path / "flex_olmo")
    return tmp_path / "flex_olmo"


def composed(imported: Path, out: Path, **options: Any) -> Path:
    return compose(imported / "model", [imported / name for name in NAMES[1:]], out, **options)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(random_tokens(2, 24)).logits


def assert_equal_logits(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = logits(one), logits(other)
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with CheckpointFolder(folder) as files:
        return {name: files.read(name) for name in files.infos}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("per_expert", [True, False], ids=["per-expert", "stacked"])
@pytest.mark.parametrize("shard", ["1GB", "30KB"], ids=["one-file", "sharded"])
class TestRoundTrip:
    def test_composed_parts_compute_what_the_checkpoint_computes(
        self, per_expert: bool, shard: str, tmp_path: Path
    ) -> None:
        model = flex_olmo(norm_topk_prob=per_expert)
        model.save_pretrained(tmp_path / "in", save_original_format=per_expert, max_shard_size=shard)
        out = import_flex_olmo(tmp_path / "in", tmp_path / "out", names=NAMES)
        assert {path.name for path in out.iterdir()} == {"model", "math", "code"}
        both, info = AutoModelForCausalLM.from_pretrained(composed(out, tmp_path / "both"), output_loading_info=True)
        assert {key: value for key, value in info.items() if value} == {}
        assert both.expert_names == NAMES
        assert_equal_logits(model, both)

    def test_an_export_has_the_bytes_and_the_config(self, per_expert: bool, shard: str, tmp_path: Path) -> None:
        model = flex_olmo(torch.bfloat16)
        model.save_pretrained(tmp_path / "in", save_original_format=per_expert, max_shard_size=shard)
        out = import_flex_olmo(tmp_path / "in", tmp_path / "out", names=NAMES)
        back = export(composed(out, tmp_path / "both"), tmp_path / "back", to="flex_olmo")
        assert config_of(back) == config_of(tmp_path / "in")
        tensors = stored(back)
        for layer in range(LAYERS):
            of_one = [f"model.layers.{layer}.mlp.experts.{expert}" for expert in range(EXPERTS)]
            experts = f"model.layers.{layer}.mlp.experts"
            gate_up = [torch.cat([tensors.pop(f"{at}.{m}_proj.weight") for m in ("gate", "up")]) for at in of_one]
            tensors[f"{experts}.gate_up_proj"] = torch.stack(gate_up)
            tensors[f"{experts}.down_proj"] = torch.stack([tensors.pop(f"{at}.down_proj.weight") for at in of_one])
        state = model.state_dict()
        assert sorted(tensors) == sorted(state)
        assert all(torch.equal(tensors[name], state[name]) for name in state)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_the_model_is_the_anchor_of_expert_0_with_its_row(checkpoint: Path, tmp_path: Path) -> None:
    tensors = stored(checkpoint)
    model = stored(import_flex_olmo(checkpoint, tmp_path / "out", names=NAMES) / "model")
    for layer in range(LAYERS):
        ours, theirs = f"anchor.model.layers.{layer}.mlp", f"model.layers.{layer}.mlp"
        assert torch.equal(model[f"{ours}.router.public.weight"], tensors[f"{theirs}.gate.weight"][:1])
        assert not model[f"{ours}.router.public.bias"].any()
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            public = model[f"{ours}.experts.public.{matrix}.weight"]
            assert torch.equal(public, tensors[f"{theirs}.experts.0.{matrix}.weight"])
    assert torch.equal(model["anchor.lm_head.weight"], tensors["lm_head.weight"])


def test_settings_are_kept(checkpoint: Path, tmp_path: Path) -> None:
    config = config_of(import_flex_olmo(checkpoint, tmp_path / "out", names=NAMES) / "model")
    assert (config["num_experts_per_tok"], config["norm_topk_prob"], config["router_aux_loss_coef"]) == (
        2,
        False,
        0.25,
    )
    assert (config["anchor_config"]["model_type"], config["dtype"]) == ("olmo2", "float32")
    assert config["experts"] == [{"name": "public", "kind": "full"}]


def test_the_fingerprint_includes_publics_row(checkpoint: Path, tmp_path: Path) -> None:
    out = import_flex_olmo(checkpoint, tmp_path / "out", names=NAMES)
    anchor = config_of(out / "model")["anchor"]
    model = FlexMoeForCausalLM.from_pretrained(out / "model")
    assert live_fingerprint(model.state_dict(), model.anchor_names, set()) == (anchor["fingerprint"], "float32")
    assert {name: anchor[name] for name in ("repo", "revision", "model_type", "dtype")} == {
        "repo": None,
        "revision": None,
        "model_type": "olmo2",
        "dtype": "float32",
    }
    with torch.no_grad():
        model.flexmoe_blocks()[1].router["public"].weight[0, 3] += 1
    assert live_fingerprint(model.state_dict(), model.anchor_names, set()) != (anchor["fingerprint"], "float32")


def test_packages_equal_those_of_save_expert(checkpoint: Path, tmp_path: Path) -> None:
    out = import_flex_olmo(checkpoint, tmp_path / "out", names=NAMES)
    model = FlexMoeForCausalLM.from_pretrained(composed(out, tmp_path / "both"))
    model.save_expert("code", tmp_path / "saved")
    for name in ("expert_config.json", "expert.safetensors", "config.json", "README.md"):
        assert (out / "code" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    assert dict(ExpertPackage.open(out / "code").tensors())["layers.1.ffn.up_proj.weight"].shape == (WIDTH, 32)


def test_imported_experts_can_be_removed(checkpoint: Path, tmp_path: Path) -> None:
    out = import_flex_olmo(checkpoint, tmp_path / "out", names=NAMES)
    without = remove(composed(out, tmp_path / "both"), "math", tmp_path / "without")
    never = compose(out / "model", [out / "code"], tmp_path / "never")
    assert (without / "model.safetensors").read_bytes() == (never / "model.safetensors").read_bytes()


def test_tokenizer_and_generation_settings_are_copied(checkpoint: Path, tmp_path: Path) -> None:
    letter_tokenizer().save_pretrained(checkpoint)
    (checkpoint / "generation_config.json").write_text('{"temperature": 0.25}')
    model = import_flex_olmo(checkpoint, tmp_path / "out", names=NAMES) / "model"
    assert AutoTokenizer.from_pretrained(model).get_vocab() == letter_tokenizer().get_vocab()
    assert AutoModelForCausalLM.from_pretrained(model).generation_config.temperature == 0.25


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("public", [-0.5, 0.75])
def test_biases_of_the_gate_are_clamped_to_zero(
    public: float, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias = torch.tensor([public, -1.5, 2.0])
    gates = {f"model.layers.{layer}.mlp.gate.bias": bias for layer in range(LAYERS)}
    edit_tensors(checkpoint, lambda tensors: tensors.update({name: bias.clone() for name in gates}))
    out = import_flex_olmo(checkpoint, tmp_path / "out", names=NAMES)
    both = AutoModelForCausalLM.from_pretrained(composed(out, tmp_path / "both"))
    kept = {name: both.flexmoe_blocks()[1].router[name].bias.item() for name in NAMES}
    assert kept == {"public": min(public, 0.0), "math": -1.5, "code": 0.0}

    def forward(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight, bias.clamp(max=0.0))
        weights, chosen = torch.topk(logits.softmax(-1), self.top_k)
        return logits, weights, chosen

    plain = logits(flex_olmo())
    monkeypatch.setattr(FlexOlmoTopKRouter, "forward", forward)
    assert_equal_logits(flex_olmo(), both)
    assert not torch.allclose(plain, logits(both), rtol=0.01)


class TestErrors:
    @pytest.mark.parametrize(
        ("names", "fault"),
        [
            (["public", "math"], "has 3 experts, and given are 2: public, math"),
            ([*NAMES, "law"], "has 3 experts, and given are 4"),
            (["public", "math", "math"], "names must differ"),
            (["math", "public", "code"], "must be named 'public'"),
            (["public", "Math", "code"], "'Math' is not an expert name"),
            (["public", "model", "code"], "the grafted anchor is written to that folder"),
        ],
    )
    def test_names(self, names: list[str], fault: str, checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=fault):
            import_flex_olmo(checkpoint, tmp_path / "out", names=names)
        assert not (tmp_path / "out").exists()

    def test_a_string_instead_of_a_list(self, checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="expected a list of names"):
            import_flex_olmo(checkpoint, tmp_path / "out", names="public,math,code")  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("change", "fault"),
        [
            (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight': its shape is none"),
            (lambda t: t.pop("model.layers.1.mlp.experts.2.up_proj.weight"), r"experts\.2\.up_proj.*is none"),
            (lambda t: t.update({"model.extra": torch.ones(1)}), r"model\.extra'.*expected none"),
            (
                lambda t: t.update({"model.layers.0.mlp.gate.weight": torch.ones(2, 32)}),
                r"\[2, 32\], expected \[3, 32\]",
            ),
        ],
    )
    def test_tensors_that_do_not_match_the_config(
        self, change: Callable[[dict[str, torch.Tensor]], Any], fault: str, checkpoint: Path, tmp_path: Path
    ) -> None:
        edit_tensors(checkpoint, change)
        with pytest.raises(ValueError, match=fault):
            import_flex_olmo(checkpoint, tmp_path / "out", names=NAMES)
        assert [path.name for path in tmp_path.iterdir()] == ["flex_olmo"]

    def test_a_failure_leaves_no_output(self, checkpoint: Path, tmp_path: Path) -> None:
        name = "model.layers.1.mlp.experts.2.down_proj.weight"
        edit_tensors(checkpoint, lambda tensors: tensors[name][0, 0].fill_(float("nan")))
        with pytest.raises(ValueError, match=r"flex_olmo: expert 2 holds NaN .*down_proj\.weight of layer 1"):
            import_flex_olmo(checkpoint, tmp_path / "out", names=NAMES)
        assert [path.name for path in tmp_path.iterdir()] == ["flex_olmo"]

    def test_other_models(self, checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            import_flex_olmo(tmp_path / "nowhere", tmp_path / "out", names=NAMES)
        imported = import_flex_olmo(checkpoint, tmp_path / "out", names=NAMES)
        with pytest.raises(ValueError, match=r"'flexmoe' model; only 'flex_olmo' models can be imported"):
            import_flex_olmo(imported / "model", tmp_path / "again", names=NAMES)

    def test_existing_outputs(self, checkpoint: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(FileExistsError):
            import_flex_olmo(checkpoint, tmp_path / "out", names=NAMES)
        import_flex_olmo(checkpoint, tmp_path / "out", names=NAMES, overwrite=True)
        with pytest.raises(ValueError, match="which is read"):
            import_flex_olmo(checkpoint, checkpoint, names=NAMES, overwrite=True)


def test_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["import", str(checkpoint), "--names", "public, math,code"]
    assert main([*line, "--out", str(tmp_path / "a"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [expert["name"] for expert in printed["model"]["experts"]] == ["public"]
    assert [package["experts"][0]["name"] for package in printed["packages"]] == ["math", "code"]
    assert main([*line, "--out", str(tmp_path / "b")]) == 0
    parts = " ".join(str(tmp_path / "b" / name) for name in ("model", "math", "code"))
    assert f"flexmoe compose {parts} --out" in capsys.readouterr().out
