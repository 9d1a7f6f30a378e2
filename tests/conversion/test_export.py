"""Exports load in stock transformers with equal logits; models that a format cannot represent are refused."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from flexmoe.conversion.export import TARGETS, export
from flexmoe.conversion.graft import graft
from flexmoe.io.tensors import CheckpointFolder
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.testing import ANCHOR_CONFIGS, flexmoe_from_anchor, random_tokens, tiny_anchor, tiny_flexmoe
from flexmoe_cli import main
from tests.support.letters import letter_tokenizer
from tests.support.soak import soak, thinned

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

# Anchors whose configs differ from a target's defaults, so a field that is not carried over shows in the logits.
NATIVE: dict[str, tuple[PreTrainedConfig, str, str]] = {
    "olmo2": (
        Olmo2Config(
            **SIZES, head_dim=16, rms_norm_eps=1e-3, rope_parameters={"rope_type": "default", "rope_theta": 20.0}
        ),
        "flex_olmo",
        "FlexOlmoForCausalLM",
    ),
    "olmo2 with biases": (Olmo2Config(**SIZES, attention_bias=True), "flex_olmo", "FlexOlmoForCausalLM"),
    "llama": (LlamaConfig(**SIZES, head_dim=16, rope_parameters=LLAMA3_ROPE), "mixtral", "MixtralForCausalLM"),
    "llama, tied": (LlamaConfig(**SIZES, tie_word_embeddings=True), "mixtral", "MixtralForCausalLM"),
    "mistral": (MistralConfig(**SIZES, sliding_window=5), "mixtral", "MixtralForCausalLM"),
    "mistral, open": (MistralConfig(**SIZES, sliding_window=None), "mixtral", "MixtralForCausalLM"),
    "qwen3": (Qwen3Config(**SIZES, head_dim=16, sliding_window=4), "qwen3_moe", "Qwen3MoeForCausalLM"),
    "qwen3, window unused": (
        Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=2),
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
    ),
    "qwen3, biased": (Qwen3Config(**SIZES, head_dim=8, attention_bias=True), "qwen3_moe", "Qwen3MoeForCausalLM"),
}


def bias_free(model: FlexMoeForCausalLM) -> FlexMoeForCausalLM:
    for block in model.flexmoe_blocks():
        for row in block.router.values():
            torch.nn.init.zeros_(row.bias)
    return model


def grown(config: PreTrainedConfig, **settings: Any) -> FlexMoeForCausalLM:
    """A FlexMoE model with two owners on a random anchor of this config, no parameter of which is 0 or 1."""
    torch.manual_seed(0)
    anchor = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in anchor.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return bias_free(flexmoe_from_anchor(anchor, ["math", "code"], **settings))


def saved(model: FlexMoeForCausalLM, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(random_tokens(2, 24)).logits


def assert_equal_logits(one: PreTrainedModel, other: PreTrainedModel) -> None:
    ours, theirs = logits(one), logits(other)
    assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


def loaded(folder: Path) -> PreTrainedModel:
    """The model that stock transformers loads, without missing or unexpected tensors."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    return model


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with CheckpointFolder(folder) as files:
        return {name: files.read(name) for name in files.infos}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return saved(bias_free(tiny_flexmoe("llama", ["math", "code"], num_experts_per_tok=2)), tmp_path / "model")


class TestNative:
    @pytest.mark.parametrize("case", NATIVE)
    def test_stock_classes_give_equal_logits(self, case: str, tmp_path: Path) -> None:
        anchor, to, architecture = NATIVE[case]
        model = grown(anchor, num_experts_per_tok=2)
        out = export(saved(model, tmp_path / "model"), tmp_path / "out", to=to)
        stock = loaded(out)
        assert type(stock).__name__ == architecture
        assert config_of(out)["architectures"] == [architecture]
        assert_equal_logits(model, stock)

    @pytest.mark.parametrize(
        ("case", "k", "divided"),
        [
            soak("olmo2", 1, True),
            ("olmo2", 2, True),
            ("olmo2", 9, False),
            ("qwen3", 1, False),
            soak("qwen3", 2, False),
            soak("llama", 1, True),
            ("llama", 3, False),  # mixtral always divides, by 1 if all experts are chosen
            ("llama", 9, True),
        ],
    )
    def test_k_and_normalization_are_kept(self, case: str, k: int, divided: bool, tmp_path: Path) -> None:
        anchor, to, _ = NATIVE[case]
        model = grown(anchor, num_experts_per_tok=k, norm_topk_prob=divided)
        out = export(saved(model, tmp_path / "model"), tmp_path / "out", to=to)
        assert config_of(out)["num_experts_per_tok"] == min(k, 3)
        assert_equal_logits(model, loaded(out))

    def test_experts_keep_their_order_and_bytes(self, llama: Path, tmp_path: Path) -> None:
        ours, theirs = stored(llama), stored(export(llama, tmp_path / "out", to="mixtral"))
        for layer in range(2):
            block, names = f"model.layers.{layer}.block_sparse_moe", ("public", "math", "code")
            old = f"anchor.model.layers.{layer}.mlp"
            gate = torch.cat([ours.pop(f"{old}.router.{name}.weight") for name in names])
            assert torch.equal(theirs.pop(f"{block}.gate.weight"), gate)
            for number, name in enumerate(names):
                del ours[f"{old}.router.{name}.bias"]
                for matrix, called in {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}.items():
                    tensor = theirs.pop(f"{block}.experts.{number}.{called}.weight")
                    assert torch.equal(tensor, ours.pop(f"{old}.experts.{name}.{matrix}.weight"))
        assert {f"anchor.{name}": tensor.tolist() for name, tensor in theirs.items()} == {
            name: tensor.tolist() for name, tensor in ours.items()
        }

    def test_a_graft_without_experts(self, tmp_path: Path) -> None:
        anchor = tiny_anchor("qwen3")
        anchor.save_pretrained(tmp_path / "anchor")
        stock = loaded(export(graft(tmp_path / "anchor", tmp_path / "g"), tmp_path / "out", to="qwen3_moe"))
        assert (stock.config.num_experts, stock.config.num_experts_per_tok) == (1, 1)
        assert_equal_logits(anchor, stock)

    def test_config_fields_for_engines(self, tmp_path: Path) -> None:
        model = bias_free(tiny_flexmoe("qwen3", ["math"], num_experts_per_tok=2, router_aux_loss_coef=0.25))
        config = config_of(export(saved(model, tmp_path / "model"), tmp_path / "out", to="qwen3_moe"))
        said = {
            "num_experts": 2,
            "num_local_experts": 2,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": 64,
            "head_dim": 8,
            "router_aux_loss_coef": 0.25,
            "dtype": "float32",
        }
        assert {key: config[key] for key in said} == said

    def test_shards_are_read_and_written(self, tmp_path: Path) -> None:
        model = bias_free(tiny_flexmoe("olmo2", ["math", "code"]))
        model.save_pretrained(tmp_path / "model", max_shard_size="60KB")
        assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
        told: list[int] = []
        out = export(tmp_path / "model", tmp_path / "out", to="flex_olmo", max_shard_size=50_000, progress=told.append)
        assert len(list(out.glob("*.safetensors"))) > 1
        assert sum(told) == sum(tensor.nbytes for tensor in stored(out).values())
        assert_equal_logits(model, loaded(out))


class TestHalfPrecision:
    def model(self, row: float) -> FlexMoeForCausalLM:
        model = bias_free(tiny_flexmoe("qwen3", ["math"])).to(torch.bfloat16)
        for block in model.flexmoe_blocks():
            block.router.float()
            torch.nn.init.constant_(block.router["math"].weight, row)
        return model

    def test_rows_are_rounded_with_a_warning(self, tmp_path: Path) -> None:
        model = saved(self.model(row=0.1), tmp_path / "model")
        with pytest.warns(UserWarning, match=r"of the 128 values of the router rows, 64 are rounded .*bfloat16"):
            out = export(model, tmp_path / "out", to="qwen3_moe")
        assert {tensor.dtype for tensor in stored(out).values()} == {torch.bfloat16}
        assert config_of(out)["dtype"] == "bfloat16"

    def test_only_the_rows_are_rounded(self, tmp_path: Path) -> None:
        """What README says of exports of bfloat16 anchors."""
        model = bias_free(tiny_flexmoe("llama", ["math", "code"])).to(torch.bfloat16)
        for block in model.flexmoe_blocks():
            for row in block.router.float().values():
                torch.nn.init.normal_(row.weight, std=0.3)
        with pytest.warns(UserWarning, match="values of the router rows"):
            out = export(saved(model, tmp_path / "model"), tmp_path / "out", to="mixtral")
        weights = {name: value for name, value in stored(out).items() if not name.endswith("gate.weight")}
        bits = {
            value.contiguous().view(torch.int16).numpy().tobytes()
            for value in model.state_dict().values()
            if value.dtype == torch.bfloat16
        }
        assert len(weights) > 30
        assert all(value.contiguous().view(torch.int16).numpy().tobytes() in bits for value in weights.values())
        ids = random_tokens(2, 40)
        with torch.no_grad():
            ours = model.float()(ids).logits
            theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(ids).logits
        assert (ours - theirs).norm() / ours.norm() < 1e-2
        agree = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
        assert agree >= 0.95, "random weights have tokens that are nearly equal"

    def test_exact_rows_give_no_warning(self, tmp_path: Path) -> None:
        model = saved(self.model(row=0.125), tmp_path / "model")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            out = export(model, tmp_path / "out", to="qwen3_moe")
        assert set(stored(out)["model.layers.0.mlp.gate.weight"][1].tolist()) == {0.125}

    def test_rows_too_large_for_the_dtype_are_refused(self, tmp_path: Path) -> None:
        model = self.model(row=1e6).to(torch.float16)
        for block in model.flexmoe_blocks():
            block.router.float()
            torch.nn.init.constant_(block.router["math"].weight, 1e6)
        with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
            export(saved(model, tmp_path / "model"), tmp_path / "out", to="qwen3_moe")


class TestDense:
    @pytest.mark.parametrize("family", thinned(ANCHOR_CONFIGS, ["gpt2", "phi3", "gemma2"]))
    def test_public_is_the_anchor_byte_for_byte(self, family: str, tmp_path: Path) -> None:
        anchor = tiny_anchor(family)
        anchor.save_pretrained(tmp_path / "anchor", save_original_format=False)
        out = export(graft(tmp_path / "anchor", tmp_path / "g"), tmp_path / "out", to="dense", expert="public")
        before, after = stored(tmp_path / "anchor"), stored(out)
        assert sorted(before) == sorted(after)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert config_of(out) == config_of(tmp_path / "anchor")
        assert torch.equal(logits(loaded(out)), logits(anchor))

    @pytest.mark.parametrize("family", ["gpt2", "olmo2"])
    def test_an_experts_ffns_replace_the_anchors(self, family: str, tmp_path: Path) -> None:
        model = tiny_flexmoe(family, ["math", "code"], active_experts=["public"])
        out = export(saved(model, tmp_path / "model"), tmp_path / "out", to="dense", expert="math")
        dense = loaded(out)
        assert type(dense) is type(tiny_anchor(family))
        model.set_active_experts(None)
        with model.only_experts("math"):
            assert_equal_logits(model, dense)
        with model.only_experts("code"):
            assert not torch.allclose(logits(model), logits(dense), rtol=0.01)


def test_tokenizer_and_generation_settings_are_copied(llama: Path, tmp_path: Path) -> None:
    tokenizer = letter_tokenizer()
    tokenizer.save_pretrained(llama)
    (llama / "generation_config.json").write_text('{"temperature": 0.25}')
    (llama / "public_sample.jsonl").write_text("not this")
    for to, expert in (("mixtral", None), ("dense", "math")):
        out = export(llama, tmp_path / to, to=to, expert=expert)
        assert not [path.name for path in out.iterdir() if path.suffix in (".py", ".jsonl")]
        assert AutoTokenizer.from_pretrained(out).get_vocab() == tokenizer.get_vocab()
        assert loaded(out).generation_config.temperature == 0.25


def edit_config(folder: Path, **values: Any) -> None:
    config = config_of(folder)
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


class TestErrors:
    def test_biases_are_refused_or_dropped(self, tmp_path: Path) -> None:
        model = tiny_flexmoe("llama", ["math", "code"], num_experts_per_tok=2)
        folder = saved(model, tmp_path / "model")
        with pytest.raises(ValueError, match=r"those of math, code are not zero .*--drop-bias") as caught:
            export(folder, tmp_path / "out", to="mixtral")
        assert "mixtral" in str(caught.value)
        dropped = loaded(export(folder, tmp_path / "out", to="mixtral", drop_bias=True))
        assert not torch.allclose(logits(model), logits(dropped), rtol=0.01)
        assert_equal_logits(bias_free(model), dropped)

    def test_the_public_prior_is_a_bias(self, llama: Path, tmp_path: Path) -> None:
        edit_tensors(llama, lambda t: t["anchor.model.layers.1.mlp.router.public.bias"].fill_(0.5))
        with pytest.raises(ValueError, match=r"those of public are not zero .*is the public prior"):
            export(llama, tmp_path / "out", to="mixtral")

    def test_a_bias_of_the_only_expert_changes_nothing(self, tmp_path: Path) -> None:
        model = tiny_flexmoe("llama")
        torch.nn.init.constant_(model.flexmoe_blocks()[0].router["public"].bias, 0.5)
        assert_equal_logits(model, loaded(export(saved(model, tmp_path / "model"), tmp_path / "out", to="mixtral")))

    @pytest.mark.parametrize(
        ("config", "to", "fault"),
        [
            (LlamaConfig(**SIZES), "qwen3_moe", "qwen3_moe is for anchors of type qwen3; .*'llama'.*to='mixtral'"),
            (Qwen3Config(**SIZES), "mixtral", "for anchors of type llama or mistral; .*'qwen3'.*to='qwen3_moe'"),
            (ANCHOR_CONFIGS["gemma2"](), "flex_olmo", "'gemma2'.*no such architecture.*--to dense"),
            (LlamaConfig(**SIZES, attention_bias=True), "mixtral", "no 'attention_bias'.*attention_bias=True"),
            (LlamaConfig(**SIZES, mlp_bias=True), "mixtral", "no 'mlp_bias'.*mlp_bias=True"),
            (
                Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1),
                "qwen3_moe",
                "no 'layer_types'.*sliding_attention",
            ),
        ],
        ids=["other-family", "other-family-2", "no-target", "attention-bias", "mlp-bias", "sliding-window"],
    )
    def test_fields_that_the_target_lacks(self, config: PreTrainedConfig, to: str, fault: str, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = bias_free(flexmoe_from_anchor(AutoModelForCausalLM.from_config(config), ["math"]))
        with pytest.raises(ValueError, match=fault):
            export(saved(model, tmp_path / "model"), tmp_path / "out", to=to)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]

    def test_unnormalized_weights_as_mixtral(self, tmp_path: Path) -> None:
        model = bias_free(tiny_flexmoe("llama", ["math", "code"], num_experts_per_tok=2, norm_topk_prob=False))
        with pytest.raises(ValueError, match=r"always divides.*k = 2 of 3 experts.*--num-experts-per-tok 3"):
            export(saved(model, tmp_path / "model"), tmp_path / "out", to="mixtral")

    def test_masked_experts(self, llama: Path, tmp_path: Path) -> None:
        edit_config(llama, active_experts=["public", "math"])
        with pytest.raises(ValueError, match=r"masks code .*flexmoe remove"):
            export(llama, tmp_path / "out", to="mixtral")
        edit_config(llama, active_experts=["public", "math", "code"])
        export(llama, tmp_path / "out", to="mixtral")

    @pytest.mark.parametrize(("to", "expert"), [("mixtral", None), ("dense", "code")])
    def test_low_rank_experts(self, to: str, expert: str | None, llama: Path, tmp_path: Path) -> None:
        records = config_of(llama)["experts"]
        edit_config(llama, experts=[*records[:2], {"name": "code", "kind": "low_rank", "rank": [4, 4]}])
        with pytest.raises(ValueError, match=r"code.*full"):
            export(llama, tmp_path / "out", to=to, expert=expert)
        loaded(export(llama, tmp_path / "math", to="dense", expert="math"))

    def test_experts_of_other_widths(self, llama: Path, tmp_path: Path) -> None:
        name = "anchor.model.layers.1.mlp.experts.code.up_proj.weight"
        edit_tensors(llama, lambda t: t.update({name: t[name][:48].clone()}))
        with pytest.raises(ValueError, match=r"experts\.code\.up_proj.*\[48, 32\].*\[64, 32\].*one width"):
            export(llama, tmp_path / "out", to="mixtral")

    @pytest.mark.parametrize("name", ["norm.weight", "layers.1.mlp.experts.code.up_proj.weight"])
    def test_missing_tensors(self, name: str, llama: Path, tmp_path: Path) -> None:
        edit_tensors(llama, lambda t: t.pop(f"anchor.model.{name}"))
        with pytest.raises(ValueError, match="lacks the tensor"):
            export(llama, tmp_path / "out", to="mixtral")

    @pytest.mark.parametrize(
        ("options", "fault"),
        [
            ({"to": "gguf"}, "no format 'gguf'.*dense, flex_olmo, mixtral, qwen3_moe"),
            ({"to": "dense"}, r"none is given: give --expert public \| math \| code"),
            ({"to": "dense", "expert": "law"}, "'law' is not one of them"),
            ({"to": "mixtral", "expert": "math"}, "for to='dense' only"),
        ],
    )
    def test_invalid_options(self, options: dict[str, str], fault: str, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=fault):
            export(llama, tmp_path / "out", **options)

    def test_sources_that_are_not_merged_models(self, llama: Path, tmp_path: Path) -> None:
        dense = export(llama, tmp_path / "dense", to="dense", expert="public")
        with pytest.raises(ValueError, match="not a FlexMoE"):
            export(dense, tmp_path / "out", to="mixtral")
        FlexMoeForCausalLM.from_pretrained(llama).save_expert("math", tmp_path / "package")
        with pytest.raises(ValueError, match="expert package"):
            export(tmp_path / "package", tmp_path / "out", to="mixtral")
        with pytest.raises(FileNotFoundError):
            export(tmp_path / "nowhere", tmp_path / "out", to="mixtral")

    def test_existing_outputs(self, llama: Path, tmp_path: Path) -> None:
        out = export(llama, tmp_path / "out", to="mixtral")
        with pytest.raises(FileExistsError):
            export(llama, out, to="mixtral")
        assert config_of(export(llama, out, to="dense", expert="math", overwrite=True))["model_type"] == "llama"
        with pytest.raises(ValueError, match="which is read"):
            export(llama, llama, to="mixtral", overwrite=True)


def test_command(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(llama), "--to", "mixtral", "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["path"] == str(tmp_path / "out")
    assert (printed["model_type"], printed["architecture"]) == ("mixtral", "MixtralForCausalLM")
    assert printed["bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert main(["export", str(llama), "--to", "gguf", "--out", str(tmp_path / "no")]) == 1
    assert ", ".join(TARGETS) in capsys.readouterr().err
