"""Recipes of mergekit-moe: gates and logits equal those of the Mixtral or Qwen3-MoE model that mergekit writes.

mergekit is not a dependency. MERGEKIT_PYTHON names the interpreter of an environment with mergekit and the same torch
and transformers (gates in half precision may otherwise differ in the last bits). Does not cover other architectures of
mergekit, whose gates are computed in the same way.
"""

import copy
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

import flexmoe
from flexmoe.io.tensors import CheckpointFolder
from flexmoe.recipes import read_recipe
from tests.support.letters import letter_tokenizer

MERGEKIT = os.environ.get("MERGEKIT_PYTHON")
pytestmark = pytest.mark.skipif(
    not MERGEKIT, reason="set MERGEKIT_PYTHON to the Python of an environment with mergekit"
)

SIZES: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "mistral": MistralConfig(**SIZES, sliding_window=None),  # mergekit drops the sliding window, a graft keeps it
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
}
WRITTEN = {"llama": "MixtralForCausalLM", "mistral": "MixtralForCausalLM", "qwen3": "Qwen3MoeForCausalLM"}
PROMPTS: dict[str, dict[str, list[str]]] = {
    "base": {"positive_prompts": ["once upon a time", "the"]},
    "math": {"positive_prompts": ["one plus two is three", "a sum"], "negative_prompts": ["a poem about the sea"]},
    "code": {
        "positive_prompts": ["import this", "def of a function that returns"],
        "negative_prompts": ["no", "never"],
    },
}
MODES = ("hidden", "hidden_last", "hidden_avg", "cheap_embed", "random", "uniform_random")
SEED = 7


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model and two with other weights throughout, each with a tokenizer; math has a larger vocabulary."""
    folder = tmp_path_factory.mktemp(request.param)
    for seed, name in enumerate(PROMPTS):
        torch.manual_seed(seed)
        config = copy.deepcopy(FAMILIES[request.param])
        config.vocab_size += 8 * (name == "math")
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():  # no weight is exactly 0 or 1, and the logits are not all near zero
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
        letter_tokenizer().save_pretrained(folder / name)
    return folder


def write_recipe(folder: Path, models: Path, mode: str, experts: list[str], **keys: Any) -> Path:
    entries = [{"source_model": str(models / name), **PROMPTS[name]} for name in experts]
    recipe = {"base_model": str(models / "base"), "gate_mode": mode, "dtype": "float32", "experts": entries, **keys}
    (folder / "moe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "moe.yaml"


def merged(recipe: Path, out: Path) -> Path:
    """Runs mergekit-moe."""
    command = [str(MERGEKIT), "-m", "mergekit.scripts.moe", str(recipe), str(out), "--random-seed", str(SEED)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "experts", [["math", "code"], ["math", "base", "code"], ["base", "code", "base"]], ids="-".join
)
@torch.no_grad()
def test_gates_and_logits_equal_those_of_mergekit(mode: str, experts: list[str], models: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, models, mode, experts)
    if experts.count("base") == 2:  # equal prompts would give equal gates
        values = yaml.safe_load(recipe.read_text())
        values["experts"][2]["positive_prompts"] = ["another thing"]
        recipe.write_text(yaml.safe_dump(values))
    theirs = merged(recipe, tmp_path / "mergekit")
    ours = flexmoe.graft(None, tmp_path / "flexmoe", recipe=recipe, seed=SEED)
    names = [expert.name for expert in read_recipe(recipe).experts]

    with CheckpointFolder(theirs) as merge, CheckpointFolder(ours) as grafted:
        for layer in range(SIZES["num_hidden_layers"]):
            gate_EH = merge.read(f"model.layers.{layer}.mlp.gate.weight")
            row = f"anchor.model.layers.{layer}.mlp.router"
            rows_EH = torch.cat([grafted.read(f"{row}.{name}.weight") for name in names])
            shift = gate_EH[names.index("public")] if "public" in names else torch.zeros(())
            torch.testing.assert_close(rows_EH, gate_EH - shift, rtol=0, atol=1e-5)

    model, reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in (ours, theirs))
    assert type(reference).__name__ == WRITTEN[model.config.anchor_config.model_type]
    tokens = torch.randint(3, SIZES["vocab_size"], (4, 64), generator=torch.Generator().manual_seed(0))
    logits, expected = model(tokens).logits, reference(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
