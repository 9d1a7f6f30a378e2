"""Small versions of published models: grafted from files as published, given an expert, exported, and restored."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from flexmoe.conversion.export import DENSE, TARGETS
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.testing import perturb_expert, realigned
from flexmoe_cli import main
from tests.support.family_checks import CHECKS, greedy, logits
from tests.support.named_models import NAMED_MODELS, markdown
from tests.support.soak import thinned

ROOT = Path(__file__).resolve().parents[2]

DISTINCT = (
    "meta-llama/Llama-2-7b-hf",  # exports to Mixtral
    "cerebras/Cerebras-GPT-111M",  # transposed weights
    "databricks/dolly-v2-3b",  # attention and network in parallel
    "allenai/OLMo-2-1124-7B",  # norms after; exports to FlexOlmo
    "Qwen/Qwen3-0.6B",  # exports to Qwen3-MoE
    "google/gemma-2-2b",  # norms before and after
    "microsoft/Phi-3-mini-4k-instruct",  # a fused matrix
    "facebook/opt-125m",  # no module around the network
    "bigscience/bloom-560m",  # files without a prefix, a residual inside of the network
    "tiiuae/falcon-7b",  # one norm for both branches, an obsolete head
)
"""One model of each way to store and call a network; `make soak` runs the others too."""

TO_FILES = tuple(name for name in DISTINCT if not name.startswith(("databricks", "Qwen", "google")))
"""Those of which `make test` writes files, which depend on tensor names and obsolete tensors."""

models = pytest.mark.parametrize("name", thinned(NAMED_MODELS, DISTINCT))


def published(name: str, folder: Path) -> Path:
    """A small random model in a folder as on the Hub: the published config.json, obsolete tensors included."""
    named = NAMED_MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(named.configuration())
    with torch.no_grad():
        for parameter in model.parameters():  # no norm is 1, no bias 0
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    if named.bare:
        tensors = {key.removeprefix(f"{model.base_model_prefix}."): tensor for key, tensor in tensors.items()}
    state = model.state_dict()
    relics = {key: state.get(key, torch.ones(shape)).clone() for key, shape in named.relics.items()}
    assert not relics.keys() & tensors.keys()
    assert all(tuple(relics[key].shape) == shape for key, shape in named.relics.items())
    save_file({**tensors, **relics}, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**named.config, "architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def loaded(folder: Path) -> PreTrainedModel:
    return realigned(AutoModelForCausalLM.from_pretrained(folder).eval())


def run(*line: object) -> None:
    assert main([str(word) for word in line]) == 0


def package_of(grafted: Path, folder: Path) -> Path:
    """A package of an expert that differs from public, with bias-free rows."""
    model = FlexMoeForCausalLM.from_pretrained(grafted)
    model.add_expert_copy("math")
    perturb_expert(model, "math")
    for block in model.flexmoe_blocks():
        torch.nn.init.zeros_(block.router["math"].bias)
    return model.save_expert("math", folder)


@pytest.mark.parametrize("name", thinned(NAMED_MODELS, TO_FILES))
def test_from_files_to_files(name: str, tmp_path: Path) -> None:
    dense = published(name, tmp_path / "dense")
    anchor = loaded(dense)
    run("graft", dense, "--out", tmp_path / "grafted")
    grafted = loaded(tmp_path / "grafted")
    assert grafted.expert_names == ["public"]
    assert torch.equal(logits(grafted), logits(anchor))
    assert torch.equal(greedy(grafted), greedy(anchor))

    package = package_of(tmp_path / "grafted", tmp_path / "math")
    run("compose", tmp_path / "grafted", package, "--out", tmp_path / "composed")
    composed = loaded(tmp_path / "composed")
    assert not torch.allclose(logits(composed), logits(anchor), atol=1e-3)
    assert greedy(composed).shape == greedy(anchor).shape
    run("remove", tmp_path / "composed", "math", "--out", tmp_path / "without")
    assert torch.equal(logits(loaded(tmp_path / "without")), logits(anchor))

    run("export", tmp_path / "composed", "--to", DENSE, "--expert", "public", "--out", tmp_path / "back")
    assert torch.equal(logits(loaded(tmp_path / "back")), logits(anchor))
    for target in TARGETS:
        if target != DENSE:
            code = main(["export", str(tmp_path / "composed"), "--to", target, "--out", str(tmp_path / target)])
            assert (code == 0) == (tmp_path / target).exists() == (target == NAMED_MODELS[name].native), target
    if native := NAMED_MODELS[name].native:
        ours, theirs = logits(composed), logits(loaded(tmp_path / native))
        assert (ours - theirs).abs().max() <= 1e-5 * ours.abs().max()


@pytest.mark.parametrize("check", ["remove_is_exact", "norm_follows_is_true", "decode_is_prefill"])
@models
def test_in_memory(name: str, check: str, tmp_path: Path) -> None:
    CHECKS[check](name, tmp_path)


@pytest.mark.parametrize("name", NAMED_MODELS)
def test_published_flags_are_read(name: str) -> None:
    """The class follows the published flags: it has the tensors that they require and none that they exclude."""
    named = NAMED_MODELS[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(named.configuration())
    tensors = [key for key in model.state_dict() if key not in model.all_tied_weights_keys]
    assert [pattern for pattern in named.has if not any(re.search(pattern, key) for key in tensors)] == []
    assert [key for key in tensors if any(re.search(pattern, key) for pattern in named.lacks)] == []


def test_the_documentation_shows_this_table() -> None:
    assert markdown() in (ROOT / "docs" / "families.md").read_text()
