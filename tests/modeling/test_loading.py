"""Checkpoints: loading with both classes and the Auto classes, round trips, and checkpoints that are refused."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import flexmoe
from flexmoe.meta import build_on_meta
from flexmoe.modeling import FlexMoeForCausalLM, FlexMoeModel, UnsupportedAnchorError, find_ffn_sites
from flexmoe.modeling.fingerprint_flexmoe import live_fingerprint
from flexmoe.testing import ANCHOR_CONFIGS, random_tokens, realigned, tiny_anchor, tiny_flexmoe
from tests.support.soak import soak

OWNERS = ("math", "code-2")
families = pytest.mark.parametrize("family", ANCHOR_CONFIGS)


@torch.no_grad()
def logits(model):
    return model(random_tokens(2, 9)).logits


@families
def test_both_classes_load_the_same_checkpoint(family, tmp_path):
    model = tiny_flexmoe(family, OWNERS)
    model.save_pretrained(tmp_path)
    tied = set(model.all_tied_weights_keys)
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict()) - tied
    hidden = model(random_tokens(2, 9), output_hidden_states=True).hidden_states[-1]
    for auto, cls in ((AutoModelForCausalLM, FlexMoeForCausalLM), (AutoModel, FlexMoeModel)):
        loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is cls
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        if cls is FlexMoeForCausalLM:
            assert torch.equal(logits(realigned(loaded)), logits(model))
        else:
            assert torch.equal(realigned(loaded)(random_tokens(2, 9)).last_hidden_state, hidden)


@families
def test_checkpoint_of_flexmoe_model_loads_as_a_causal_lm_without_an_untied_head(family, tmp_path):
    model = tiny_flexmoe(family, OWNERS)
    model.save_pretrained(tmp_path / "causal")
    AutoModel.from_pretrained(tmp_path / "causal").save_pretrained(tmp_path / "decoder")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "decoder", output_loading_info=True)
    head = {name for name in model.state_dict() if "lm_head" in name or "embed_out" in name}
    assert set(info["missing_keys"]) <= head
    assert not info["unexpected_keys"]
    for name, value in loaded.state_dict().items():
        assert name in head or torch.equal(value, model.state_dict()[name])


def test_config_round_trip(tmp_path):
    records = ["public", {"name": "math", "version": "2.0.0", "license": "mit", "training": {"tokens": 5}}, "code-2"]
    model = tiny_flexmoe("olmo2")
    config = flexmoe.FlexMoeConfig(
        anchor_config=model.config.anchor_config,
        experts=records,
        active_experts=["public", "math"],
        num_experts_per_tok=7,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        router_z_loss_coef=0.001,
        anchor={"repo": "org/x", "fingerprint": None},
        public_sample={"file": "public_sample.jsonl", "sha256": "0" * 64},
    )
    FlexMoeForCausalLM(config).save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    for key in ("experts", "active_experts", "num_experts_per_tok", "norm_topk_prob", "anchor", "public_sample"):
        assert getattr(again, key) == getattr(config, key), key
    assert again.router_aux_loss_coef == 0.01
    ignored = {"dtype": None, "architectures": None}  # set by saving
    assert {**again.anchor_config.to_dict(), **ignored} == {**model.config.anchor_config.to_dict(), **ignored}


def test_config_of_the_dense_model_is_not_changed():
    anchor = tiny_anchor("llama")
    before = logits(anchor), anchor.config.to_dict(), anchor.config._attn_implementation
    FlexMoeForCausalLM(flexmoe.FlexMoeConfig(anchor_config=anchor.config))
    assert (anchor.config.to_dict(), anchor.config._attn_implementation) == before[1:]
    assert torch.equal(logits(anchor), before[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_router_rows_stay_float32_in_half_precision(tmp_path, dtype):
    model = tiny_flexmoe("llama", OWNERS)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    dtypes = {".router." in name: value.dtype for name, value in loaded.state_dict().items()}
    assert dtypes == {True: torch.float32, False: dtype}
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    assert torch.equal(logits(realigned(again)), logits(realigned(loaded)))


def edit(folder, change_tensors=None, change_config=None):
    """Changes a checkpoint, and updates its index if it is sharded."""
    if change_tensors:
        weight_map = {}
        for file in folder.glob("*.safetensors"):
            tensors = change_tensors(load_file(file))
            save_file(tensors, file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file.name)
        if (index := folder / "model.safetensors.index.json").exists():
            index.write_text(json.dumps({**json.loads(index.read_text()), "weight_map": weight_map}))
    if change_config:
        path = folder / "config.json"
        path.write_text(json.dumps(change_config(json.loads(path.read_text()))))


def without(part):
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


def narrowed(part):
    return lambda tensors: {
        name: value[..., :-1].clone() if part in name else value for name, value in tensors.items()
    }


def with_experts(*names):
    return lambda config: {**config, "experts": [{"name": name} for name in names]}


NARROW = "layers.1.mlp.experts.math.up_proj"
DAMAGE = {
    "an expert's network": ({"change_tensors": without(".experts.math.")}, r"lacks tensors of .*\['math'\]"),
    "one layer of it": ({"change_tensors": without("layers.1.mlp.experts.math.")}, r"lacks tensors of .*\['math'\]"),
    "one matrix": ({"change_tensors": without(NARROW)}, rf"lacks tensors of .*\['math'\].*{NARROW}"),
    "a router row": ({"change_tensors": without("layers.0.mlp.router.code-2.")}, r"lacks tensors of .*\['code-2'\]"),
    "public's network": ({"change_tensors": without(".experts.public.")}, r"lacks tensors of .*\['public'\]"),
    "no name in the config": ({"change_config": with_experts("public", "math")}, r"\['code-2'\], which .* not name"),
    "an unknown name in the config": (
        {"change_config": with_experts("public", *OWNERS, "zoology")},
        r"lacks tensors of .*\['zoology'\]",
    ),
    "another name instead of one in the config": (
        {"change_config": with_experts("public", "math", "zoology")},
        r"lacks tensors of .*\['zoology'\]",
    ),
    "an unknown active name in the config": (
        {"change_config": lambda config: {**config, "active_experts": ["public", "zoology"]}},
        r"active_experts names \['zoology'\]",
    ),
    "a narrower matrix": (
        {"change_tensors": narrowed(NARROW)},
        r"has shape \[64, 31\], the config requires \[64, 32\]",
    ),
    "a narrower row": (
        {"change_tensors": narrowed("layers.0.mlp.router.math.weight")},
        r"has shape \[1, 31\], the config requires \[1, 32\]",
    ),
}


@pytest.mark.parametrize(
    ("cls", "sharded"),
    [
        (FlexMoeForCausalLM, False),
        (FlexMoeModel, True),
        soak(FlexMoeForCausalLM, True),
        soak(FlexMoeModel, False),
    ],
)
@pytest.mark.parametrize("damage", DAMAGE)
def test_mismatch_of_config_and_tensors_is_refused(tmp_path, damage, cls, sharded):
    changes, message = DAMAGE[damage]
    tiny_flexmoe("llama", OWNERS).save_pretrained(tmp_path, **({"max_shard_size": "60KB"} if sharded else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == sharded
    edit(tmp_path, **changes)
    for ignore in (False, True):
        with pytest.raises((ValueError, StrictDataclassError), match=message):
            cls.from_pretrained(tmp_path, ignore_mismatched_sizes=ignore)


def test_mismatched_sizes_outside_experts_need_ignore_mismatched_sizes(tmp_path):
    tiny_flexmoe("llama", OWNERS).save_pretrained(tmp_path)
    edit(tmp_path, change_tensors=narrowed("self_attn.o_proj"))
    with pytest.raises(RuntimeError, match=r"has shape \[32, 31\], .* \[32, 32\] \(and 1 more\).*at random"):
        FlexMoeForCausalLM.from_pretrained(tmp_path)
    model = FlexMoeForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert model.expert_names == ["public", *OWNERS]


@pytest.mark.parametrize("cls", [FlexMoeForCausalLM, FlexMoeModel, flexmoe.FlexMoeConfig])
def test_dense_checkpoint_is_refused(tmp_path, cls):
    tiny_anchor("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'llama' model, not of a FlexMoE\. .*flexmoe\.graft"):
        cls.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"experts": ["math"]}, "first expert"),
        ({"experts": ["public", "math", "math"]}, "must differ"),
        ({"experts": ["public", "Math"]}, "not an expert name"),
        ({"experts": [{"name": "public"}, {"name": "math", "path": "/tmp"}]}, "Unknown key"),
        ({"experts": ["public"], "active_experts": []}, "empty"),
        ({"experts": ["public", "math"], "active_experts": ["math", "math"]}, "twice"),
        ({"anchor_config": {"model_type": "nothing"}}, "does not know"),
    ],
)
def test_invalid_configs_are_refused(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        flexmoe.FlexMoeConfig(**fields)


def test_experts_must_be_a_list():
    with pytest.raises((TypeError, StrictDataclassError)):
        flexmoe.FlexMoeConfig(experts="public")


UNSUPPORTED_ANCHORS = {
    "mixtral": "mixture of experts already",
    "olmoe": "mixture of experts already",
    "flex_olmo": "mixture of experts already",
    "t5": "no causal LM",
    "mamba": "past_key_values",
    "vit": "no causal LM",
}


@pytest.mark.parametrize("model_type", UNSUPPORTED_ANCHORS)
def test_unsupported_anchors_are_refused(model_type):
    config = AutoConfig.for_model(model_type)
    with pytest.raises(UnsupportedAnchorError, match=UNSUPPORTED_ANCHORS[model_type]):
        build_on_meta(config)


@families
def test_tensor_names_map_both_ways(family):
    anchor = tiny_anchor(family)
    model = tiny_flexmoe(family, OWNERS)
    dense, ours = set(anchor.state_dict()), set(model.state_dict())
    names = flexmoe.modeling.NameMap(find_ffn_sites(anchor))
    assert {names.to_flexmoe(name) for name in dense} <= ours
    assert {names.to_dense(names.to_flexmoe(name)) for name in dense} == dense
    added = ours - {names.to_flexmoe(name) for name in dense}
    assert added
    assert all(".router." in name or ".experts.math." in name or ".experts.code-2." in name for name in added)
    assert {names.to_dense(name) for name in added} == {None}


class TestModifiedAnchor:
    def graft(self, **anchor):
        model = tiny_flexmoe("llama", OWNERS)
        fingerprint, dtype = live_fingerprint(model.state_dict(), model.anchor_names, set())
        model.config.anchor = {"repo": "org/a", "revision": "1", "fingerprint": fingerprint, "dtype": dtype, **anchor}
        return model, fingerprint

    def test_unmodified_anchor_keeps_its_fingerprint(self, tmp_path, caplog):
        model, fingerprint = self.graft()
        model.remove_expert("math")
        model.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).anchor["fingerprint"] == fingerprint
        assert "modified" not in caplog.text

    @pytest.mark.parametrize("part", ["embed_tokens", "experts.public.up_proj", "lm_head"])
    def test_modified_anchor_warns_and_refuses_experts_of_the_original(self, tmp_path, caplog, part):
        model, fingerprint = self.graft()
        package = model.save_expert("math", tmp_path / "math")
        parameter = next(p for name, p in model.named_parameters() if part in name)
        parameter.data.view(-1)[0] += 1
        model.save_pretrained(tmp_path / "saved")
        assert "modified" in caplog.text
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert again.config.anchor["fingerprint"] != fingerprint
        assert again.config.anchor["repo"] is None
        with pytest.raises(ValueError, match="another anchor"):
            again.add_expert(package, name="news")

    def test_cast_is_not_a_modification(self, tmp_path):
        model, fingerprint = self.graft()
        model.to(torch.bfloat16).save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).anchor["fingerprint"] == fingerprint
