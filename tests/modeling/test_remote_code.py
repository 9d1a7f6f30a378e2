"""Remote code: the files that are saved with a checkpoint, and what a model does without the package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_relative_import_files

import flexmoe
from flexmoe.conversion.compose import compose, remove
from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM, FlexMoeModel, modeling_flexmoe
from flexmoe.modeling.configuration_flexmoe import AUTO_MAP
from flexmoe.testing import random_tokens, realigned, tiny_anchor, tiny_flexmoe
from tests.support.hub import HubServer, point_client_at
from tests.support.two_owners import write_two_owners

SCRIPT = Path(__file__).with_name("without_flexmoe.py")
MODELING = Path(modeling_flexmoe.__file__)
CODE = {MODELING.name, *(Path(path).name for path in get_relative_import_files(MODELING))}


def code_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.py")}


def auto_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / "config.json").read_text())["auto_map"]


class TestSavedFiles:
    @pytest.mark.parametrize("cls", [FlexMoeForCausalLM, FlexMoeModel])
    def test_auto_map_names_all_three_classes(self, cls, tmp_path):
        cls(tiny_flexmoe("llama", ("math",)).config).save_pretrained(tmp_path)
        assert auto_map(tmp_path) == AUTO_MAP
        assert code_in(tmp_path) == CODE
        for name in CODE:
            assert (tmp_path / name).read_bytes() == (MODELING.parent / name).read_bytes()

    def test_auto_map_names_existing_classes(self):
        for reference in AUTO_MAP.values():
            module, name = reference.split(".")
            assert f"class {name}(" in (MODELING.parent / f"{module}.py").read_text()

    def test_conversions_write_the_code_and_drop_files_of_an_older_version(self, world, tmp_path):
        for folder in (world.grafted, world.merged, remove(world.merged, "code", tmp_path / "without")):
            assert code_in(folder) == CODE
            assert auto_map(folder) == AUTO_MAP
        older = shutil.copytree(world.merged, tmp_path / "older")
        (older / "kernels_flexmoe.py").write_text("a file that this version does not have")
        (older / "modeling_flexmoe.py").write_text("an older copy")
        config = json.loads((older / "config.json").read_text())
        del config["auto_map"]
        (older / "config.json").write_text(json.dumps(config))
        updated = remove(older, "code", tmp_path / "updated")
        assert code_in(updated) == CODE
        assert {p.name: p.read_bytes() for p in updated.iterdir()} == {
            p.name: p.read_bytes() for p in (tmp_path / "without").iterdir()
        }

    def test_auto_map_of_the_anchor_is_ignored(self, tmp_path):
        anchor = tiny_anchor("llama").config
        anchor.auto_map = {"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"}
        with pytest.warns(UserWarning, match="modeling_other.OtherForCausalLM"):
            config = FlexMoeConfig(anchor_config=anchor)
        assert config.auto_map == AUTO_MAP
        FlexMoeForCausalLM(config).save_pretrained(tmp_path)
        assert auto_map(tmp_path) == AUTO_MAP
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)) is FlexMoeForCausalLM


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """A dense anchor, its graft, the packages math and code, and their model: merged and as a composition."""
    folder = tmp_path_factory.mktemp("world")
    write_two_owners(folder)
    merged = compose(folder / "grafted", [folder / "math", folder / "code"], folder / "merged")
    sources = {"public": folder / "anchor", "math": folder / "math", "code": folder / "code"}
    AutoModelForCausalLM.from_pretrained(merged).save_composition(folder / "composition", sources=sources)
    return SimpleNamespace(folder=folder, grafted=folder / "grafted", merged=merged, sources=sources)


def test_classes_of_the_package_are_preferred(world):
    assert type(AutoConfig.from_pretrained(world.merged, trust_remote_code=True)) is FlexMoeConfig
    for auto, cls in ((AutoModel, FlexMoeModel), (AutoModelForCausalLM, FlexMoeForCausalLM)):
        assert type(auto.from_pretrained(world.merged, trust_remote_code=True)) is cls
        config = AutoConfig.from_pretrained(world.merged)
        assert type(auto.from_config(config, trust_remote_code=True)) is cls
    assert not [name for name in sys.modules if name.startswith("transformers_modules.merged")]


@pytest.fixture(scope="module")
def without_package(world, tmp_path_factory) -> SimpleNamespace:
    """The results of `without_flexmoe.py`, on folders and with a fake Hub."""
    out = tmp_path_factory.mktemp("without-package")
    with HubServer().running() as hub:
        for name in ("anchor", "math", "code", "merged"):
            hub.push_folder(f"lab/{name}", world.folder / name)
        by_id = push_composition(world, hub, out)
        hub.push_folder("lab/composition", by_id)
        job = {
            "tokens": random_tokens(2, 9).tolist(),
            "merged": str(world.merged),
            "code": str(world.folder / "code"),
            "composition": str(world.folder / "composition"),
            "sources": {name: str(path) for name, path in world.sources.items()},
            "hub_merged": "lab/merged",
            "hub_code": "lab/code",
            "hub_composition": "lab/composition",
        }
        (out / "job.json").write_text(json.dumps(job))
        environment = {
            **os.environ,
            "HF_HOME": str(out / "home"),
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, str(SCRIPT), str(out / "job.json")],
            env=environment, cwd=out, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]
        requested = {request.split(" ")[1] for request in hub.requests}
    results = json.loads((out / "results.json").read_text())
    logits = load_file(out / "logits.safetensors")
    return SimpleNamespace(out=out, results=results, logits=logits, requested=requested)


def push_composition(world: SimpleNamespace, hub: HubServer, folder: Path) -> Path:
    """A copy of the composition that refers to Hub repositories instead of folders."""
    copy = shutil.copytree(world.folder / "composition", folder / "by-id")
    config = json.loads((copy / "config.json").read_text())
    parts = {"anchor": config["composition"]["anchor"], **config["composition"]["experts"]}
    for name, entry in parts.items():
        del entry["folder"]
        entry |= {"repo": f"lab/{name}", "revision": hub.repositories[f"lab/{name}"].refs["main"]}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@torch.no_grad()
def logits_of(folder: Path, remove: str | None = None) -> torch.Tensor:
    model = realigned(FlexMoeForCausalLM.from_pretrained(folder))
    if remove:
        model.remove_expert(remove)
    return model(random_tokens(2, 9)).logits


class TestWithoutThePackage:
    def test_only_transformers_is_used(self, without_package):
        assert without_package.results["hidden but imported"] == []
        assert without_package.results["class"] == ["transformers_modules", "FlexMoeForCausalLM"]
        assert without_package.results["config"] == ["public", "math", "code"]

    def test_logits_equal_those_of_the_package(self, without_package, world):
        expected = logits_of(world.merged)
        without_code = {"masked code", "inactive code", "without code", "saved without code"}
        complete = {
            name: value for name, value in without_package.logits.items() if name not in without_code | {"decoder"}
        }
        assert len(complete) == 9
        for name, value in complete.items():
            assert torch.equal(value, expected), name
        for name in without_code:
            assert torch.equal(without_package.logits[name], logits_of(world.merged, remove="code")), name
        with torch.no_grad():
            hidden = realigned(FlexMoeModel.from_pretrained(world.merged))(random_tokens(2, 9)).last_hidden_state
        assert torch.equal(without_package.logits["decoder"], hidden)

    def test_generate_with_chosen_experts(self, without_package, world):
        model = FlexMoeForCausalLM.from_pretrained(world.merged)
        chosen = model.generate(random_tokens(2, 9), experts=["public", "math"], max_new_tokens=5, do_sample=False)
        assert chosen.tolist() == without_package.results["generated"]

    def test_calls_that_need_the_package_are_refused(self, without_package):
        assert len(without_package.results["refused"]) == 10
        for name, message in without_package.results["refused"].items():
            assert message.startswith(f"{name} needs the package flexmoe"), name
            assert message.endswith("pip install flexmoe"), name

    def test_eager_is_the_only_implementation(self, without_package):
        assert without_package.results["implementation"] == "eager"
        assert without_package.results["other implementation"] == (
            "experts_implementation='flexmoe_cpu' is not available for FlexMoE: use one of ['eager']. The package "
            "flexmoe adds others: pip install flexmoe, import flexmoe."
        )

    @pytest.mark.parametrize("saved", ["saved", "saved-from-hub", "composition"])
    def test_saved_folders_contain_the_code_and_load_with_the_package(self, without_package, saved):
        assert code_in(without_package.out / saved) == CODE
        assert auto_map(without_package.out / saved) == AUTO_MAP
        assert torch.equal(logits_of(without_package.out / saved), without_package.logits["merged"])

    def test_packages_and_compositions_load_from_the_hub_after_importing_flexmoe(self, without_package):
        assert without_package.results["source"] == "lab/code"
        for file in ("lab/code/resolve", "lab/composition/resolve", "lab/anchor/resolve", "lab/math/resolve"):
            assert any(file in path for path in without_package.requested), file

    def test_importing_flexmoe_extends_a_model_loaded_from_remote_code(self, without_package):
        assert without_package.results["the package's class"]
        assert without_package.results["usage"] == 18
        assert without_package.results["name of an opened package"] == "again"


def test_expert_package_is_not_loaded_as_a_model(world, tmp_path, monkeypatch):
    package = world.folder / "math"
    with HubServer().running() as hub:
        point_client_at(hub.url, monkeypatch)
        hub.push_folder("lab/math", package)
        for cls in (FlexMoeForCausalLM, FlexMoeModel, FlexMoeConfig, AutoConfig, AutoModelForCausalLM):
            with pytest.raises(ValueError, match=r"an expert package, not a model.*add_expert"):
                cls.from_pretrained(package)
            with pytest.raises(ValueError, match=r"an expert package, not a model.*add_expert"):
                cls.from_pretrained("lab/math", cache_dir=tmp_path / "cache")


def test_importing_registers_the_classes_for_saving():
    assert (FlexMoeConfig._auto_class, flexmoe.FlexMoeModel._auto_class) == ("AutoConfig", "AutoModel")
    assert FlexMoeForCausalLM._auto_class == "AutoModelForCausalLM"
