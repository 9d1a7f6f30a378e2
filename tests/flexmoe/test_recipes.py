"""Recipes of mergekit-moe: what each key becomes, in any family, and what cannot be done is said by its key.

Against mergekit itself: tests/soak/test_mergekit_recipes.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, OPTConfig

import flexmoe
from flexmoe.io.dense import DenseCheckpoint
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.recipes import Source, expert_name, parse_recipe
from flexmoe.routers.prompt_gates import GATE_MODES, Prompts, make_gates
from flexmoe.testing import random_tokens, realigned, tiny_anchor
from flexmoe_cli import main
from tests.support.letters import letter_tokenizer

STORY, MATH, CODE = (
    {"positive_prompts": ["once upon"]},
    {"positive_prompts": ["one plus two", "sum"], "negative_prompts": ["a poem"]},
    {"positive_prompts": ["import this"]},
)


def entry(source: str, **keys: Any) -> dict[str, Any]:
    return {"source_model": source, **keys}


def recipe(*experts: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"base_model": "base", "experts": list(experts), **keys}


TWO = (entry("math", **MATH), entry("code", **CODE))


def names(values: dict[str, Any]) -> list[str]:
    return [expert.name for expert in parse_recipe(values).experts]


@pytest.fixture(params=["olmo2"])
def models(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base, math and code in the working directory, all different; OLMo-2 would not normalise weights by default."""
    for seed, name in enumerate(("base", "math", "code")):
        tiny_anchor(request.param, seed).save_pretrained(tmp_path / name)
        letter_tokenizer().save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(folder: Path, values: dict[str, Any], **options: Any) -> FlexMoeForCausalLM:
    (folder / "moe.yaml").write_text(yaml.safe_dump(values))
    out = flexmoe.graft(None, folder / "out", recipe=folder / "moe.yaml", **options)
    return realigned(FlexMoeForCausalLM.from_pretrained(out))


def rows(model: FlexMoeForCausalLM, name: str) -> torch.Tensor:
    """[layers, H]; the biases must be zero."""
    assert not any(block.router[name].bias.any() for block in model.flexmoe_blocks())
    return torch.cat([block.router[name].weight.detach() for block in model.flexmoe_blocks()])


def gates(folder: Path, mode: str, *prompts: dict[str, list[str]], seed: int = 0) -> torch.Tensor:
    """[experts, layers, H]"""
    asked = [Prompts(entry["positive_prompts"], entry.get("negative_prompts", [])) for entry in prompts]
    return make_gates(GATE_MODES[mode], asked, DenseCheckpoint(folder), seed=seed).float().unbind(1)


class TestModel:
    @pytest.mark.parametrize("models", ["olmo2", "gpt2"], indirect=True)
    @torch.no_grad()
    def test_without_the_base_model_public_is_inactive(self, models: Path) -> None:
        model = made(models, recipe(*TWO))
        assert model.expert_names == ["public", "math", "code"]
        assert model.active_experts == ["math", "code"]
        assert (model.config.norm_topk_prob, model.config.num_experts_per_tok) == (True, 2)
        for name, gate in zip(("math", "code"), gates(models / "base", "hidden", MATH, CODE), strict=True):
            assert torch.equal(rows(model, name), gate)
            torch.testing.assert_close(gate.norm(dim=-1), torch.ones(2), rtol=0.01, atol=0)  # in bfloat16
        assert not rows(model, "public").any()

    def test_public_can_be_activated_as_the_command_explains(self, models: Path, capsys) -> None:
        (models / "moe.yaml").write_text(yaml.safe_dump(recipe(*TWO, gate_mode="cheap_embed")))
        assert main(["graft", "--recipe", "moe.yaml", "--out", "out"]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert "public will be inactive" in printed
        assert "call set_active_experts(None)" in printed
        assert "flexmoe train" not in printed
        model = FlexMoeForCausalLM.from_pretrained("out")
        model.set_active_experts(None)
        assert model.active_experts == ["public", "math", "code"]

    def test_the_base_models_gate_is_subtracted_from_all(self, models: Path) -> None:
        values = recipe(TWO[0], entry("./base", **STORY), TWO[1], gate_mode="cheap_embed", experts_per_token=3)
        model = made(models, values)
        assert model.active_experts == model.expert_names == ["public", "math", "code"]
        assert model.config.active_experts is None
        assert model.config.num_experts_per_tok == 3
        story, math, code = gates(models / "base", "cheap_embed", STORY, MATH, CODE)
        assert torch.equal(rows(model, "math"), math - story)
        assert torch.equal(rows(model, "code"), code - story)
        assert not rows(model, "public").any()

    @torch.no_grad()
    def test_routing_equals_that_of_the_gates(self, models: Path) -> None:
        """By the definition: softmax over <gate, FFN input>, top-2, normalised."""
        prompts = [{"positive_prompts": [letter]} for letter in "xyz"]
        entries = [entry(name, **given) for name, given in zip(("base", "math", "code"), prompts, strict=True)]
        model = made(models, recipe(*entries, gate_mode="cheap_embed"))
        block, tokens = model.flexmoe_blocks()[0], random_tokens(2, 7)
        caught: list[torch.Tensor] = []
        block.register_forward_hook(lambda _, args, output: caught.extend([args[0], output]))
        model(tokens)
        x, said = caught[0], caught[1] if isinstance(caught[1], torch.Tensor) else caught[1][0]
        gates_EH = torch.stack(gates(models / "base", "cheap_embed", *prompts))[:, 0]
        weights, chosen = (x @ gates_EH.T).softmax(-1).topk(2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        spoken = torch.stack([block.experts[name](x) for name in ("public", "math", "code")], dim=-2)
        expected = (spoken.gather(-2, chosen[..., None].expand(*chosen.shape, 32)) * weights[..., None]).sum(-2)
        torch.testing.assert_close(said, expected, rtol=1e-4, atol=1e-5)
        assert len(chosen.unique()) == 3

    @torch.no_grad()
    def test_a_second_entry_of_the_base_model_is_a_copy(self, models: Path) -> None:
        model = made(models, recipe(entry("base", **STORY), entry("base", **CODE), experts_per_token=1))
        assert model.expert_names == ["public", "base"]
        tokens = random_tokens(2, 9)
        dense = realigned(AutoModelForCausalLM.from_pretrained(models / "base"))
        with model.only_experts("base"):
            assert torch.equal(model(tokens).logits, dense(tokens).logits)

    @torch.no_grad()
    def test_shared_tensors_are_the_base_models(self, models: Path) -> None:
        model = made(models, recipe(*TWO))
        state, base, code = (
            model.state_dict(),
            AutoModelForCausalLM.from_pretrained("base").state_dict(),
            AutoModelForCausalLM.from_pretrained("code").state_dict(),
        )
        for name, tensor in base.items():
            if ".mlp." in name:
                ours = state["anchor." + name.replace(".mlp.", ".mlp.experts.code.")]
                assert torch.equal(ours, code[name])
                assert not torch.equal(ours, tensor)
            else:
                assert torch.equal(state["anchor." + name], tensor)

    def test_random_gates_depend_on_the_seed(self, models: Path) -> None:
        model = made(models, recipe(entry("math"), entry("code"), gate_mode="random"), seed=3)
        torch.manual_seed(3)
        assert torch.equal(rows(model, "code"), torch.randn(2, 2, 32)[:, 1])

    def test_the_dtype_must_be_the_stored_one(self, models: Path) -> None:
        made(models, recipe(*TWO, dtype="torch.float32", gate_mode="random"))
        with pytest.raises(ValueError, match=r"dtype: bfloat16, but .*base is stored in float32.*save_pretrained"):
            made(models, recipe(*TWO, dtype="bfloat16"), overwrite=True)

    def test_a_failure_writes_nothing(self, models: Path) -> None:
        with pytest.raises(ValueError, match="is stored in float32"):
            made(models, recipe(*TWO, dtype="float16"))
        assert sorted(path.name for path in models.iterdir()) == ["base", "code", "math", "moe.yaml"]

    def test_entries_without_effect_are_warned_of(self, models: Path) -> None:
        with pytest.warns(UserWarning, match="architecture: mixtral has no effect"):
            made(models, recipe(*TWO, architecture="mixtral", gate_mode="random"))

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("experts", {"math": "math"}),
            ("shared", "average"),
            ("norm_topk_prob", False),
            ("num_experts_per_tok", 1),
            ("router_data", {"math": ["x.txt"]}),
            ("revision", "main"),
        ],
    )
    def test_conflicting_arguments(self, models: Path, option: str, value: object) -> None:
        with pytest.raises(ValueError, match=f"A recipe defines .* conflicts with {option}"):
            made(models, recipe(*TWO), **{option: value})

    def test_a_conflicting_anchor(self, models: Path, capsys) -> None:
        (models / "moe.yaml").write_text(yaml.safe_dump(recipe(*TWO)))
        assert main(["graft", "base", "--recipe", "moe.yaml", "--out", "out"]) == 1
        assert "so it conflicts with anchor" in capsys.readouterr().err
        assert main(["graft", "--out", "out"]) == 1
        assert "Neither an anchor nor a recipe" in capsys.readouterr().err

    def test_with_public_text(self, models: Path) -> None:
        (models / "public.txt").write_text("of all and nothing")
        made(models, recipe(*TWO, gate_mode="random"), public_data=["public.txt"])
        assert json.loads((models / "out" / "public_sample.jsonl").read_text()) == {"text": "of all and nothing"}

    def test_the_recipe_is_never_overwritten(self, models: Path) -> None:
        with pytest.raises(ValueError, match=r"moe\.yaml, which is read"):
            flexmoe.graft(None, models / "out", recipe=models / "out" / "moe.yaml", overwrite=True)


class TestNames:
    @pytest.mark.parametrize(
        ("source", "name"),
        [
            ("teknium/OpenHermes-2.5-Mistral", "openhermes-2-5-mistral"),
            ("./runs/math_v2/", "math-v2"),
            ("7B-math", "expert-7b-math"),
            ("owner/public", "expert-public"),
            ("owner/values", "expert-values"),
            ("___", "expert"),
            ("x" * 80, "x" * 56),
            ("a" * 55 + ".b", "a" * 55),
        ],
    )
    def test_of_sources(self, source: str, name: str) -> None:
        assert expert_name(source) == name

    def test_duplicates_are_numbered(self) -> None:
        values = recipe(entry("a/math", **MATH), entry("b/math", **CODE), entry("c/Math", **STORY))
        assert names(values) == ["math", "math-2", "math-3"]

    def test_given_names(self) -> None:
        assert names(recipe(entry("a/math", name="algebra", **MATH), entry("b/math", **CODE))) == ["algebra", "math"]

    def test_the_base_model_is_always_public(self) -> None:
        read = parse_recipe(recipe(entry("base", name="story", **STORY), TWO[0]))
        assert [expert.name for expert in read.experts] == ["public", "math"]
        assert read.notes == ["experts[0].name: story is the base model, which is named public in FlexMoE models."]
        assert parse_recipe(recipe(entry("base", name="public", **STORY), TWO[0])).notes == []

    def test_revisions_and_mappings_are_sources(self) -> None:
        values = recipe(
            entry("owner/math@v2", **MATH),
            entry({"model": {"path": "owner/code", "revision": "abc"}}, **CODE),
            entry({"model": "owner/story@v1", "lora": None}, **STORY),
        )
        assert [expert.source for expert in parse_recipe(values).experts] == [
            Source("owner/math", "v2"),
            Source("owner/code", "abc"),
            Source("owner/story", "v1"),
        ]
        again = recipe(entry("base@v2", **STORY), entry("base", **CODE))
        assert [expert.name for expert in parse_recipe(again).experts] == ["base", "public"]


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ([], "a recipe is a mapping with the keys base_model"),
        (recipe(*TWO, tokenizer_source="union"), "unknown keys: tokenizer_source. Known keys: base_model"),
        (recipe(entry("math", prompts=["x"])), r"experts\[0\] has unknown keys: prompts"),
        ({"experts": [*TWO]}, "the recipe lacks base_model"),
        (recipe(), "experts: must be a list of at least one entry"),
        (recipe({"positive_prompts": ["x"]}), r"experts\[0\] lacks source_model"),
        (recipe(*TWO, shared_experts=[TWO[0]]), "shared_experts: a FlexMoE model has no shared experts"),
        (recipe(TWO[0], entry("code", residual_scale=0.1, **CODE)), r"experts\[1\]\.residual_scale: 0\.1"),
        (recipe(entry("code", noise_scale=0.5, **CODE)), r"experts\[0\]\.noise_scale: 0\.5"),
        (
            recipe(*TWO, gate_mode="hiden"),
            "gate_mode: 'hiden' is unknown; available are hidden, hidden_last",
        ),
        (recipe(*TWO, dtype="float17"), "dtype: 'float17' is not a torch dtype"),
        (recipe(*TWO, dtype="nn"), "dtype: 'nn' is not a torch dtype"),
        (recipe(*TWO, architecture="t5"), "architecture: 't5' is not one of mixtral, deepseek moe"),
        (recipe(*TWO, experts_per_token=0), "experts_per_token: .* at least 1; got 0"),
        (recipe(*TWO, experts_per_token="two"), "experts_per_token: .* must be an integer"),
        (recipe(*TWO, experts_per_token=3), "experts_per_token: 3, but there are 2 experts"),
        (recipe(TWO[0]), "experts_per_token: 2, its default, but there are 1 experts"),
        (recipe(entry("math"), TWO[1]), r"experts\[0\] has no positive_prompts, which gate_mode: hidden needs"),
        (recipe(entry("math", **CODE), TWO[1]), "the prompts are the same for all"),
        (recipe(entry("math", positive_prompts="one"), TWO[1]), r"experts\[0\]\.positive_prompts: must be a list"),
        (recipe(entry("math", negative_prompts=[1], **CODE)), r"experts\[0\]\.negative_prompts: must be a list"),
        (recipe(entry("math+owner/lora", **MATH), TWO[1]), r"experts\[0\]\.source_model: an adapter \(owner/lora\)"),
        (recipe(entry("a@b@c", **MATH), TWO[1]), r"experts\[0\]\.source_model: 'a@b@c' is not a model"),
        (recipe(entry(3, **MATH), TWO[1]), r"experts\[0\]\.source_model: 3 is not a model"),
        (recipe(entry("math", name="Math!", **MATH), TWO[1]), r"experts\[0\]\.name: 'Math!' is not an expert name"),
        (recipe(entry("math", name="public", **MATH), TWO[1]), r"experts\[0\]\.name: 'public' is the base model's"),
        (recipe(TWO[0], entry("code", name="math", **CODE)), r"experts\[1\]\.name: 'math' is taken"),
        (recipe(entry("base", **STORY), experts_per_token=1), "the only one is base_model itself"),
    ],
)
def test_errors_name_the_key(values: Any, error: str) -> None:
    with pytest.raises((ValueError, TypeError), match=error):
        parse_recipe(values)


@pytest.mark.promise(
    "`graft(recipe=...)`",
    "`gate_mode: cheap_embed` with embeddings narrower than the layers (OPT-350m)",
    "refused before anything is fetched",
)
def test_a_gate_mode_that_the_base_model_rules_out_is_refused_before_any_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    narrow = OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16)
    narrow.save_pretrained("base")
    (tmp_path / "moe.yaml").write_text(yaml.safe_dump(recipe(*TWO, gate_mode="cheap_embed")))
    with pytest.raises(ValueError, match=r"cheap_embed .* 16 values per token .*hidden"):
        flexmoe.graft(None, "out", recipe="moe.yaml")  # neither the weights nor the experts exist


def test_neutral_scales_are_accepted() -> None:
    assert parse_recipe(recipe(entry("math", noise_scale=0.0, residual_scale=1, **MATH), TWO[1])).notes == []


def test_invalid_files(tmp_path: Path) -> None:
    for content in ("a: [b", "[" * 1_100):
        (tmp_path / "moe.yaml").write_text(content)
        with pytest.raises(ValueError, match=r"moe\.yaml: not YAML"):
            flexmoe.graft(None, tmp_path / "out", recipe=tmp_path / "moe.yaml")
    (tmp_path / "moe.yaml").write_text("merge_method: slerp")
    with pytest.raises(ValueError, match=r"moe\.yaml: a recipe has unknown keys: merge_method"):
        flexmoe.graft(None, tmp_path / "out", recipe=tmp_path / "moe.yaml")
    with pytest.raises(FileNotFoundError, match=r"other\.yaml: no such recipe"):
        flexmoe.graft(None, tmp_path / "out", recipe=tmp_path / "other.yaml")
