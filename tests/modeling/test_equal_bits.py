"""Models with equal weights have equal logits, bit for bit, whichever way their tensors got where they are."""

from __future__ import annotations

import copy
import io
import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import flexmoe
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.modeling.fingerprint_flexmoe import ALIGNMENT
from flexmoe.testing import ANCHOR_CONFIGS, flexmoe_from_anchor, perturb_expert, random_tokens, tiny_anchor
from tests.support.soak import thinned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (1, 9)
CASES = [(family, dtype) for family in ANCHOR_CONFIGS for dtype in DTYPES]
KEPT = list(zip(ANCHOR_CONFIGS, itertools.cycle(DTYPES), strict=False))
"""Each family in one dtype, and each dtype in two families at least."""


def load(folder: Path) -> FlexMoeForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


@torch.no_grad()
def logits(model: FlexMoeForCausalLM, **arguments: object) -> list[torch.Tensor]:
    return [model(random_tokens(1, length), **arguments).logits for length in LENGTHS]


def pickled(model: FlexMoeForCausalLM) -> FlexMoeForCausalLM:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.fixture(scope="module", params=thinned(CASES, KEPT), ids=str)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graft, two packages, the model of both, and the one that never had "math"; rows have biases of 4 bytes."""
    family, dtype = request.param
    folder = tmp_path_factory.mktemp("bits")
    tiny_anchor(family).to(dtype).save_pretrained(folder / "anchor")
    graft = flexmoe.graft(folder / "anchor", folder / "graft")
    model = load(graft)
    for name in ("math", "code"):
        model.add_expert_copy(name)
        perturb_expert(model, name)
        model.save_expert(name, folder / name)
    packages = [folder / "math", folder / "code"]
    flexmoe.compose(graft, packages, folder / "both", public_prior=0.0, verify=False)
    flexmoe.compose(graft, packages[1:], folder / "never", public_prior=0.0, verify=False)
    return folder


@pytest.mark.promise(
    "`remove_expert`, `add_expert`, masks, reloading, `deepcopy`, `torch.save`, `flexmoe remove`",
    "the logits of a model that never had the expert, in float32, bfloat16 and float16, in every family",
    "equal, bit for bit",
)
def test_removed_masked_added_reloaded_and_copied_models_agree(world: Path, tmp_path: Path) -> None:
    expected = logits(load(world / "never"))
    both = load(world / "both")
    masked = logits(both, experts=["public", "code"])
    copied = copy.deepcopy(both)
    both.remove_expert("math")
    copied.remove_expert("math")
    added = load(world / "graft")
    added.add_expert(world / "code", verify=False)  # random ones overflow in float16
    both.save_pretrained(tmp_path / "saved")
    models = {
        "removed": both,
        "removed from a copy": copied,
        "a copy": copy.deepcopy(both),
        "pickled": pickled(both),
        "saved and loaded": load(tmp_path / "saved"),
        "removed on disk": load(flexmoe.remove(world / "both", "math", tmp_path / "removed")),
        "added": added,
    }
    results = {"masked": masked, **{name: logits(model) for name, model in models.items()}}
    differ = [name for name, result in results.items() if not all(map(torch.equal, result, expected))]
    assert not differ


def test_tensors_of_loaded_models_are_aligned(tmp_path: Path) -> None:
    model = flexmoe_from_anchor(tiny_anchor("llama"), ["math"])
    model.save_pretrained(tmp_path)  # safetensors' own writer puts biases of 4 bytes between others
    assert any(tensor.data_ptr() % ALIGNMENT for tensor in load_file(tmp_path / "model.safetensors").values())
    assert not any(tensor.data_ptr() % ALIGNMENT for tensor in load(tmp_path).state_dict().values())
