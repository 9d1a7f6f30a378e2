"""Who is refused where experts come in: on a live model, on disk, by reference. The checks have tests of their own."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmoe.conversion.by_reference import compose_by_reference
from flexmoe.conversion.compose import add, compose
from flexmoe.conversion.graft import graft
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.modeling.admission_flexmoe import AdmissionError
from flexmoe.testing import perturb_expert, tiny_anchor

Tensors = dict[str, torch.Tensor]

# A planted expert, the check that sees it, and whether that is one of a row, which is also judged on disk.
PLANTED: dict[str, tuple[Callable[[Tensors], object], str, bool]] = {
    "row x 50": (
        lambda t: [t[f"layers.{i}.router.weight"].mul_(50) for i in (0, 1)],
        r"row against the others: .* times as long as the longest other one",
        True,
    ),
    "row x 50 in one layer": (lambda t: t["layers.1.router.weight"].mul_(50), r"the row in layer 1 is \d+", True),
    "bias + 10": (lambda t: t["layers.0.router.bias"].add_(10), r"the bias in layer 0 is 1\d.* above", True),
    "down_proj x 30": (
        lambda t: t["layers.1.ffn.down_proj.weight"].mul_(30),
        r"weights: down_proj\.weight in layer 1 has .* times the size",
        False,
    ),
    "weights lost": (lambda t: t["layers.0.ffn.up_proj.weight"].zero_(), "empty weights", False),
}


def plant(package: Path, out: Path, change: Callable[[Tensors], object]) -> Path:
    """A copy of a package with other weights and a manifest that agrees: the owner is the attacker."""
    shutil.copytree(package, out)
    tensors = load_file(out / "expert.safetensors")
    change(tensors)
    save_file(tensors, out / "expert.safetensors")
    manifest = json.loads((out / "expert_config.json").read_text())
    digest = hashlib.sha256((out / "expert.safetensors").read_bytes()).hexdigest()
    manifest["sha256"] = {"expert.safetensors": digest}
    (out / "expert_config.json").write_text(json.dumps(manifest))
    return out


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graft, honest packages without biases, and each planted one, made of `code`."""
    folder = tmp_path_factory.mktemp("stored")
    tiny_anchor("llama").save_pretrained(folder / "anchor")
    graft(folder / "anchor", folder / "grafted")
    for name in ("math", "code", "law"):
        model = FlexMoeForCausalLM.from_pretrained(folder / "grafted")
        model.add_expert_copy(name)
        perturb_expert(model, name)
        for block in model.flexmoe_blocks():
            torch.nn.init.zeros_(block.router[name].bias)
        model.save_expert(name, folder / name)
    for name, (change, _, _) in PLANTED.items():
        plant(folder / "code", folder / name, change)
    compose(folder / "grafted", [folder / "math"], folder / "model")
    return folder


@pytest.mark.parametrize("planted", PLANTED)
def test_a_live_model_refuses_them_and_stays_as_it_was(stored: Path, planted: str) -> None:
    _, words, _ = PLANTED[planted]
    model = FlexMoeForCausalLM.from_pretrained(stored / "model")
    model.add_expert(stored / "law")
    before, config = model.state_dict(), model.config.to_dict()
    with pytest.raises(AdmissionError, match=f"Expert 'code' is refused.*{words}.*verify=False"):
        model.add_expert(stored / planted)
    with pytest.raises(AdmissionError, match=words):
        model.replace_expert("law", stored / planted)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert model.config.to_dict() == config
    assert model.add_expert(stored / "code", name="honest") == "honest"
    assert model.add_expert(stored / planted, verify=False) == "code"


def test_an_expert_is_not_measured_by_the_one_whose_place_it_takes(stored: Path) -> None:
    model = FlexMoeForCausalLM.from_pretrained(stored / "model")
    model.add_expert(stored / "row x 50", name="long", verify=False)
    model.add_expert(stored / "row x 50", name="other")  # beside one as long it is nothing special
    model.remove_expert("other")
    with pytest.raises(AdmissionError, match="longest other one, of 'math'"):
        model.replace_expert("long", stored / "row x 50")
    model.replace_expert("long", stored / "code")


@pytest.mark.parametrize("planted", PLANTED)
def test_on_disk_rows_are_judged(stored: Path, planted: str, tmp_path: Path) -> None:
    _, words, is_of_a_row = PLANTED[planted]
    ways: list[Callable[..., object]] = [
        lambda **o: compose(
            stored / "grafted", [stored / "math", stored / planted], tmp_path / "a", public_prior=0.0, **o
        ),
        lambda **o: add(stored / "model", stored / planted, tmp_path / "b", **o),
        lambda **o: compose_by_reference(
            stored / "grafted",
            [stored / planted, stored / "math"],
            tmp_path / "c",
            anchor=stored / "anchor",
            public_prior=0.0,
            **o,
        ),
    ]
    for way in ways:
        if is_of_a_row:
            with pytest.raises(AdmissionError, match=words):
                way()
            assert not list(tmp_path.iterdir())
    for way in ways:
        way(verify=False)
