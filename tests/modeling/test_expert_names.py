"""Experts with names that libraries look for in tensor names: they are treated as an expert of any other name.

Libraries match patterns anywhere in a name ("router"), at its end or as a prefix. Each test compares the experts of
`NAMES` with one of an ordinary name. Does not cover which names are valid (`test_refusals`), or those that PEFT
confuses with modules (`test_adapters`).
"""

import copy
import json
import re
from collections.abc import Iterable
from pathlib import Path

import peft
import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, TorchAoConfig, Trainer, TrainingArguments
from transformers.core_model_loading import build_glob_alternation
from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
from transformers.quantizers.quantizers_utils import should_convert_module

from flexmoe import expert_lora_config
from flexmoe.modeling import FlexMoeForCausalLM, check_expert_name
from flexmoe.modeling.experts_flexmoe import is_quantized
from flexmoe.testing import flexmoe_from_anchor, random_tokens, tiny_flexmoe
from tests.support.families import tiny_config

ORDINARY = "math"
NAMES = (
    *("router", "my_router", "router-manuals", "experts", "anchor", "mlp", "model", "layers", "gate", "gate_proj"),
    *("norm", "my_norm", "layernorm-notes", "bias", "bias-reports", "weight", "embed", "embed_tokens", "lm-head"),
    *("lm_head", "q_proj", "self_attn", "lora", "adapter", "original", "modules_to_save", "quantized", "scale"),
    *("rotary_emb", "inv_freq", "position_ids", "sinks", "attention-bias", "wte-notes", "decoder", "mtp"),
    *("code", "code-2", "code-21", "code_2", "public-law", "default-style", "merged", "base"),
)
TOKENS = random_tokens(2, 7)
OWNED = re.compile(r"(?P<block>.*?)\.(?P<part>experts|router)\.(?P<name>[a-z0-9_-]+)\.(?P<rest>.*)")


@pytest.fixture(scope="module")
def model() -> FlexMoeForCausalLM:
    return tiny_flexmoe("llama", [ORDINARY, *NAMES], num_experts_per_tok=3)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("names")
    model.save_pretrained(path)
    return path


def properties_by_expert(found: Iterable[tuple[str, object]]) -> dict[tuple[str, str], set[tuple[str, object]]]:
    """Pairs of a tensor's name and a property, by (experts or router, expert) and without block."""
    by_expert: dict[tuple[str, str], set[tuple[str, object]]] = {}
    for name, value in found:
        if match := OWNED.fullmatch(name):
            by_expert.setdefault((match["part"], match["name"]), set()).add((match["rest"], value))
    return by_expert


def treated_differently(found: Iterable[tuple[str, object]]) -> set[str]:
    """The experts whose tensors have other properties than those of the ordinary one."""
    by_expert = properties_by_expert(found)
    assert {name for _, name in by_expert} == {"public", ORDINARY, *NAMES}
    return {name for (part, name), values in by_expert.items() if values != by_expert[part, ORDINARY]}


def test_names_are_valid():
    assert [check_expert_name(name) for name in NAMES] == list(NAMES)


@pytest.mark.promise(
    "`from_pretrained`",
    "experts called `router`, `my_router`, `norm`, `bias` and the like, in half precision",
    "loaded as saved; router rows alone are float32",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_loaded_as_saved(model, dtype, tmp_path):
    half = copy.deepcopy(model).to(dtype)
    for block in half.flexmoe_blocks():
        block.router.float()
    half.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert treated_differently((name, value.dtype) for name, value in loaded.state_dict().items()) == set()
    saved = half.state_dict()
    for name, value in loaded.state_dict().items():
        assert (value.dtype == torch.float32) == (".mlp.router." in name), name
        assert torch.equal(value, saved[name]), name
    with torch.no_grad():
        assert loaded(TOKENS).logits.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "flint", "gpt_neox"])
def test_patterns_of_an_anchor_match_no_owners_tensors(family):
    """Families list patterns of their own: of what stays in float32, and of what may be missing in a checkpoint."""
    model = flexmoe_from_anchor(AutoModelForCausalLM.from_config(tiny_config(family)), [ORDINARY, *NAMES])
    names = list(model.state_dict())
    assert treated_differently((name, kept_in_float32(model, name)) for name in names) == set()
    for kind in ("_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"):
        ignored = {name for name in names for pattern in getattr(model, kind) if re.search(pattern, name)}
        assert not any(OWNED.fullmatch(name) for name in ignored)


def kept_in_float32(model: FlexMoeForCausalLM, name: str) -> bool:
    pattern, _, _ = build_glob_alternation(list(model._get_dtype_plan(torch.bfloat16)))
    return pattern.search(name) is not None


def test_tensors_of_an_unknown_expert_are_found_whatever_its_name(tmp_path):
    """GPT-NeoX ignores what matches `attention.bias` in a checkpoint, which could also be an expert."""
    tiny_flexmoe("gpt_neox", ["attention-bias"]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["experts"] = config["experts"][:1]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"holds tensors of \['attention-bias'\], which its config does not name"):
        FlexMoeForCausalLM.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning:torchao")
def test_quantisers_treat_experts_alike(folder):
    quantized = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2))
    )
    found = [(name, is_quantized(parameter)) for name, parameter in quantized.named_parameters()]
    assert treated_differently(found) == set()
    assert {(part, value) for (part, _), values in properties_by_expert(found).items() for _, value in values} == {
        ("experts", True),
        ("router", False),
    }


def test_quantisers_by_module_names(model):
    """bitsandbytes and others decide by module; rows are kept as they are."""
    patterns = list(model._keep_in_fp32_modules)
    modules = {name.rpartition(".")[0] for name in model.state_dict()}
    converted = {name for name in modules if should_convert_module(name, patterns)}
    assert {name for name in modules - converted if OWNED.fullmatch(f"{name}.weight")} == {
        name for name in modules if ".mlp.router." in name
    }


def test_quantisers_do_not_replace_the_container_of_experts():
    """Fine-grained FP8 takes a module called `experts` for a stacked mixture of experts."""
    model = tiny_flexmoe("llama", ["code", "experts"])
    replace_with_fp8_linear(model, list(model._keep_in_fp32_modules), FineGrainedFP8Config())
    for block in model.flexmoe_blocks():
        kinds = {name: type(network.up_proj).__name__ for name, network in block.experts.items()}
        assert kinds == dict.fromkeys(model.expert_names, "FP8Linear")
        assert {type(row) for row in block.router.values()} == {torch.nn.Linear}


@pytest.mark.parametrize("kind", ["_tp_plan", "_fsdp_plan", "_ep_plan"])
def test_plans_treat_experts_alike(model, kind):
    def rule(name: str) -> str | None:  # as transformers looks it up
        generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        return plan.get(generic) or plan.get(generic.rpartition(".")[0])

    plan = getattr(model, kind)
    assert treated_differently((name, rule(name)) for name in model.state_dict()) == set()
    assert kind != "_tp_plan" or rule("anchor.model.layers.0.mlp.experts.code-2.up_proj.weight") == "colwise"


def test_float32_groups_of_fsdp_are_the_rows(model):
    """FSDP2 gives each module that stays in float32 a group of its own."""
    kept = {name for name in model.state_dict() if kept_in_float32(model, name)}
    assert kept == {name for name in model.state_dict() if ".mlp.router." in name}
    assert not any(hasattr(FSDPModule, name) for name in NAMES)


@pytest.mark.parametrize("name", ["router", "code", "code-2", "lm_head", "gate_proj", "modules_to_save", "weight"])
def test_an_adapter_for_one_expert(model, name, tmp_path):
    def changed(state: dict[str, torch.Tensor]) -> set[str]:
        before = model.state_dict()
        return {key for key, value in state.items() if not torch.equal(value, before[key])}

    fresh = copy.deepcopy(model)
    adapted = peft.get_peft_model(
        fresh, expert_lora_config(fresh, name, r=2, router_row=True, init_lora_weights=False)
    )
    ours = {key for key, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert {match["name"] for key in ours if (match := OWNED.fullmatch(key))} == {name}
    with torch.no_grad():
        expected = adapted(input_ids=TOKENS, experts=[name]).logits
        adapted.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
        assert torch.equal(loaded(input_ids=TOKENS, experts=[name]).logits, expected)
    merged = adapted.merge_and_unload()
    assert {match["name"] for key in changed(merged.state_dict()) if (match := OWNED.fullmatch(key))} == {name}


# Trainer leaves tensors without weight decay whose names contain "bias", "layernorm" or "rmsnorm", or a module called
# norm or ..._norm; it cannot be told otherwise (docs/training.md).
UNDECAYED = {"norm", "my_norm", "layernorm-notes", "bias", "bias-reports", "attention-bias"}


def test_names_without_weight_decay_are_those_of_the_documentation(model, tmp_path):
    trainer = Trainer(model, TrainingArguments(tmp_path, use_cpu=True, report_to=[]))
    decayed = set(trainer.get_decay_parameter_names(model))
    assert treated_differently((name, name in decayed) for name in model.state_dict()) == UNDECAYED
