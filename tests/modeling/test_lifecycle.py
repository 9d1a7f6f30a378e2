"""Adding, removing, replacing and renaming experts of a loaded model; calls that fail change nothing."""

import copy
import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM
from flexmoe.packages.package import ExpertPackage
from flexmoe.testing import ANCHOR_CONFIGS, flexmoe_from_anchor, perturb_expert, random_tokens, tiny_flexmoe
from tests.support.mutators.packages import read_file, read_tensors, write_file, write_tensors

OWNERS = ("math", "code", "legal")
FINGERPRINT = {"repo": "org/anchor", "revision": "abc", "fingerprint": "f" * 64, "model_type": "llama"}


@torch.no_grad()
def logits(model):
    return model(random_tokens(2, 9)).logits


def snapshot(model: FlexMoeForCausalLM) -> tuple:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return copy.deepcopy(model.config.to_dict()), list(state), state, logits(model)


def assert_unchanged(model: FlexMoeForCausalLM, before: tuple) -> None:
    config, names, state, expected = before
    assert model.config.to_dict() == config
    assert list(model.state_dict()) == names
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in names)
    assert torch.equal(logits(model), expected)


@pytest.fixture
def model() -> FlexMoeForCausalLM:
    return tiny_flexmoe("llama", OWNERS, num_experts_per_tok=2, anchor=FINGERPRINT)


@pytest.mark.parametrize("family", ANCHOR_CONFIGS)
def test_saved_expert_gives_the_same_model_when_added(family, tmp_path):
    model, empty = tiny_flexmoe(family, OWNERS), tiny_flexmoe(family)
    for name in OWNERS:
        assert empty.add_expert(model.save_expert(name, tmp_path / name)) == name
    assert list(empty.state_dict()) == list(model.state_dict())
    assert torch.equal(logits(empty), logits(model))


def test_model_of_one_layer(tmp_path):
    config = ANCHOR_CONFIGS["llama"]()
    config.num_hidden_layers = 1
    anchor = AutoModelForCausalLM.from_config(config)
    model, empty = flexmoe_from_anchor(anchor, ["math"]), flexmoe_from_anchor(anchor)
    empty.add_expert(model.save_expert("math", tmp_path / "math"))
    assert torch.equal(logits(empty), logits(model))


def test_manifest_is_kept_by_add_and_save(model, tmp_path):
    model.save_expert("math", tmp_path / "a", license="cc-by-4.0", data_statement="Proofs.", version="2.1.0")
    other = tiny_flexmoe("llama", anchor=FINGERPRINT)
    other.add_expert(tmp_path / "a", name="algebra")
    other.save_expert("algebra", tmp_path / "b")
    first, second = (ExpertPackage.open(tmp_path / folder).manifest for folder in "ab")
    assert second.name == "algebra"
    assert {**first.to_dict(), "name": "algebra"} == second.to_dict()
    assert first.ffn == {"class": "LlamaMLP", "hidden": 32, "intermediate": [64, 64]}
    assert first.anchor == FINGERPRINT


def test_experts_are_in_the_order_of_adding(model, tmp_path):
    packages = {name: model.save_expert(name, tmp_path / name) for name in OWNERS}
    other = tiny_flexmoe("llama", anchor=FINGERPRINT)
    for name in ("legal", "math", "code"):
        other.add_expert(ExpertPackage.open(packages[name]))
    assert other.expert_names == ["public", "legal", "math", "code"]


def test_options_reach_the_admission_of_a_replacement(model, tmp_path):
    other = tiny_flexmoe("llama", ["code"], anchor=FINGERPRINT)
    for block in other.flexmoe_blocks():
        torch.nn.init.constant_(block.router["code"].bias, 50.0)
    package = other.save_expert("code", tmp_path / "biased")
    with pytest.raises(ValueError, match=r"the bias in layer \d is 50 above"):
        model.replace_expert("math", package)
    model.replace_expert("math", package, verify=False)
    assert model.flexmoe_blocks()[0].router["math"].bias.item() == 50.0


def test_replace_keeps_position_and_name(model, tmp_path):
    other = tiny_flexmoe("llama", ["code"], anchor=FINGERPRINT)
    perturb_expert(other, "code", seed=5)
    package = other.save_expert("code", tmp_path / "new", version="2.0.0")
    model.replace_expert("math", package)
    assert model.expert_names == ["public", *OWNERS]
    assert model.config.experts[1]["version"] == "2.0.0"
    block, theirs = model.flexmoe_blocks()[0], other.flexmoe_blocks()[0]
    assert torch.equal(block.experts["math"].up_proj.weight, theirs.experts["code"].up_proj.weight)
    assert torch.equal(block.router["math"].weight, theirs.router["code"].weight)


@pytest.mark.parametrize("name", OWNERS)
def test_removed_and_added_at_its_position_is_the_same_model(name, tmp_path):
    model = tiny_flexmoe("llama", OWNERS)
    before = snapshot(model)
    package = model.save_expert(name, tmp_path / "package")
    position = model.expert_names.index(name)
    model.remove_expert(name)
    for wrong in (0, 4, -1, True, 1.0):
        with pytest.raises(ValueError, match="1 to 3; None adds it last"):
            model.add_expert(package, position=wrong)
    model.add_expert(package, position=position)
    assert model.expert_names == ["public", *OWNERS]
    assert list(model.state_dict()) == before[1]
    assert torch.equal(logits(model), before[3])


def test_rename_keeps_logits_and_position(model):
    model.set_active_experts(["public", "code"])
    before = logits(model)
    model.rename_expert("code", "programs")
    assert model.expert_names == ["public", "math", "programs", "legal"]
    assert model.active_experts == ["public", "programs"]
    assert list(model.flexmoe_blocks()[0].experts) == model.expert_names
    assert list(model.flexmoe_blocks()[0].router) == model.expert_names
    assert torch.equal(logits(model), before)


def test_serials_identify_experts_across_renames_but_not_replacements(model, tmp_path):
    package = model.save_expert("math", tmp_path / "math")
    before = {name: model.serial_of(name) for name in model.expert_names}
    model.add_expert_copy("news")
    model.add_expert(package, name="algebra")
    model.replace_expert("math", package)
    model.rename_expert("code", "programs")
    after = {name: model.serial_of(name) for name in model.expert_names}
    assert after["programs"] == before["code"]
    assert after["math"] != before["math"]
    assert len(set(after.values()) | {before["math"], None}) == len(after) + 2


def test_remove_updates_the_active_set(model):
    model.set_active_experts(["public", "code", "math"])
    model.remove_expert("code")
    assert model.active_experts == ["public", "math"]


def test_added_experts_have_the_dtype_and_mode_of_the_model(model, tmp_path):
    package = model.save_expert("math", tmp_path / "math")
    other = tiny_flexmoe("llama", anchor=FINGERPRINT).to(torch.bfloat16).train()
    other.add_expert(package)
    other.add_expert_copy("news")
    block = other.flexmoe_blocks()[0]
    for name in ("math", "news"):
        assert block.experts[name].up_proj.weight.dtype == torch.bfloat16
        assert block.router[name].weight.dtype == block.router["public"].weight.dtype
        assert block.experts[name].training


def test_copy_of_public_has_its_weights(model):
    model.add_expert_copy("news")
    for block in model.flexmoe_blocks():
        for (name, value), public in zip(
            block.experts["news"].named_parameters(), block.experts["public"].parameters(), strict=True
        ):
            assert torch.equal(value, public), name
            assert value.data_ptr() != public.data_ptr()
        assert not block.router["news"].weight.any()


INVALID_NAMES = ["", "Math", "1math", "a--b", "math", "public", "keys", "default", "base_layer", "x" * 65, "a.b"]


@pytest.mark.parametrize("name", INVALID_NAMES)
def test_invalid_names_change_nothing(model, tmp_path, name):
    package = model.save_expert("math", tmp_path / "math")
    before = snapshot(model)
    if name:  # an empty name stands for the package's own
        with pytest.raises(ValueError, match=r"name|already"):
            model.add_expert(package, name=name)
    for call in (model.add_expert_copy, lambda new: model.rename_expert("code", new)):
        with pytest.raises(ValueError, match=r"name|already"):
            call(name)
    assert_unchanged(model, before)


REFUSED_FOR_PUBLIC = {
    "remove_expert": "removed: mask it",
    "rename_expert": "renamed: it names the anchor's own network",
    "replace_expert": "replaced: graft the other anchor",
    "save_expert": "saved as a package: it is the anchor itself",
}


@pytest.mark.parametrize("call", REFUSED_FOR_PUBLIC)
@pytest.mark.parametrize("name", ["public", "unknown"])
def test_public_and_unknown_experts_are_refused(model, tmp_path, call, name):
    arguments = {"remove_expert": ()}.get(call, (str(tmp_path / "somewhere"),))
    before = snapshot(model)
    message = f"'public' cannot be {REFUSED_FOR_PUBLIC[call]}" if name == "public" else "no expert 'unknown'"
    with pytest.raises(ValueError, match=message):
        getattr(model, call)(name, *arguments)
    assert_unchanged(model, before)


def test_the_only_active_expert_cannot_be_removed(model):
    model.set_active_experts(["math"])
    before = snapshot(model)
    with pytest.raises(ValueError, match="no active expert is left"):
        model.remove_expert("math")
    assert_unchanged(model, before)


def _other_fingerprint(folder, tmp_path):
    other = tiny_flexmoe("llama", ["math"], anchor={**FINGERPRINT, "fingerprint": "a" * 64})
    return other.save_expert("math", tmp_path / "other")


def _edit_manifest(**changes):
    def edit(folder, tmp_path):
        path = folder / "expert_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return folder

    return edit


def _other_hidden_size(folder, tmp_path):
    config = ANCHOR_CONFIGS["llama"]()
    config.hidden_size = 48
    narrow = FlexMoeForCausalLM(FlexMoeConfig(anchor_config=config, experts=["public", "math"], anchor=FINGERPRINT))
    return narrow.save_expert("math", tmp_path / "narrow")


def _flipped_bit(folder, tmp_path):
    path = folder / "expert.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return folder


def _sparse_file(folder, tmp_path):
    """A tensor of 1 TB in a sparse file, which takes no disk space but would not fit into memory."""
    path, name = folder / "expert.safetensors", "layers.1.ffn.up_proj.weight"
    write_tensors(path, sorted(read_tensors(path), key=lambda tensor: tensor.name == name))  # the last one
    header, data = read_file(path)
    begin, _ = header[name]["data_offsets"]
    header[name] |= {"shape": [1 << 38], "data_offsets": [begin, begin + (1 << 40)]}
    write_file(path, header, data[:begin])
    os.truncate(path, path.stat().st_size + (1 << 40))
    return folder


def _too_large(name):
    def make(folder, tmp_path):
        values = load_file(folder / "expert.safetensors")
        values[name] = values[name].double()
        values[name].view(-1)[0] = 1e300
        save_file(values, folder / "expert.safetensors")
        digest = hashlib.sha256((folder / "expert.safetensors").read_bytes()).hexdigest()
        dtype = "mixed" if ".ffn." in name else "float32"
        return _edit_manifest(sha256={"expert.safetensors": digest}, dtype=dtype)(folder, tmp_path)

    return make


UNSUITABLE = {
    "another anchor": (_other_fingerprint, "f{64}|a{64}"),
    "another hidden size": (_other_hidden_size, r"shape"),
    "fewer layers": (_edit_manifest(layers=[0]), r"layer"),
    "unknown kind": (_edit_manifest(kind="sparse"), r"kind"),
    "a flipped bit": (_flipped_bit, r"SHA-256"),
    "a sparse file": (_sparse_file, r"up_proj.weight has shape \[274877906944\]"),
    "a value too large": (_too_large("layers.1.ffn.up_proj.weight"), "up_proj.weight' holds numbers too large"),
    "a value too large in a row": (_too_large("layers.1.router.weight"), "router.weight' holds numbers too large"),
}


@pytest.mark.parametrize("case", UNSUITABLE)
@pytest.mark.parametrize("call", ["add_expert", "replace_expert"])
def test_unsuitable_packages_change_nothing(model, tmp_path, case, call):
    make, message = UNSUITABLE[case]
    folder = make(model.save_expert("math", tmp_path / "math"), tmp_path)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message) as caught:
        model.add_expert(folder, name="news") if call == "add_expert" else model.replace_expert("code", folder)
    assert str(folder) in str(caught.value)
    assert_unchanged(model, before)


def test_error_for_an_existing_name_names_the_package(model, tmp_path):
    folder = model.save_expert("math", tmp_path / "math")
    with pytest.raises(ValueError, match="has an expert 'math' already") as caught:
        model.add_expert(folder)
    assert str(folder) in str(caught.value)


def test_missing_package_is_refused(model, tmp_path):
    with pytest.raises(FileNotFoundError):
        model.add_expert(tmp_path / "nowhere")


def test_overwriting_a_package_needs_overwrite(model, tmp_path):
    folder = model.save_expert("math", tmp_path / "math")
    with pytest.raises(FileExistsError):
        model.save_expert("code", folder)
    assert ExpertPackage.open(folder).manifest.name == "math"
    model.save_expert("code", folder, overwrite=True)
    assert ExpertPackage.open(folder).manifest.name == "code"


def test_expert_with_a_replaced_layer_is_not_saved(model, tmp_path):
    block = model.flexmoe_blocks()[0]
    block.experts["math"].up_proj = torch.nn.Sequential(block.experts["math"].up_proj)
    with pytest.raises(ValueError, match="adapter"):
        model.save_expert("math", tmp_path / "math")
    assert not (tmp_path / "math").exists()
