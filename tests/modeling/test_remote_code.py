"""The code that travels beside a checkpoint: what is written, who runs it, and what it does without the package."""

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
from flexmoe.conversion.graft import graft
from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM, FlexMoeModel, modeling_flexmoe
from flexmoe.modeling.configuration_flexmoe import AUTO_MAP
from flexmoe.testing import perturb_expert, random_tokens, realigned, tiny_anchor, tiny_flexmoe
from tests.hub_server import HubServer, point_client_at

SCRIPT = Path(__file__).with_name("without_flexmoe.py")
MODELING = Path(modeling_flexmoe.__file__)
CODE = {MODELING.name, *(Path(path).name for path in get_relative_import_files(MODELING))}


def code_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.py")}


def auto_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / "config.json").read_text())["auto_map"]


class TestWhatIsWritten:
    @pytest.mark.parametrize("cls", [FlexMoeForCausalLM, FlexMoeModel])
    def test_all_three_classes_whichever_was_saved(self, cls, tmp_path):
        cls(tiny_flexmoe("llama", ("math",)).config).save_pretrained(tmp_path)
        assert auto_map(tmp_path) == AUTO_MAP
        assert code_in(tmp_path) == CODE
        for name in CODE:
            assert (tmp_path / name).read_bytes() == (MODELING.parent / name).read_bytes()

    def test_the_map_names_classes_that_are_there(self):
        for reference in AUTO_MAP.values():
            module, name = reference.split(".")
            assert f"class {name}(" in (MODELING.parent / f"{module}.py").read_text()

    def test_conversions_write_it_too_and_drop_an_older_copys_files(self, world, tmp_path):
        for folder in (world.grafted, world.merged, remove(world.merged, "code", tmp_path / "without")):
            assert code_in(folder) == CODE
            assert auto_map(folder) == AUTO_MAP
        older = shutil.copytree(world.merged, tmp_path / "older")
        (older / "kernels_flexmoe.py").write_text("a file that this version has no more")
        (older / "modeling_flexmoe.py").write_text("an older copy")
        config = json.loads((older / "config.json").read_text())
        del config["auto_map"]
        (older / "config.json").write_text(json.dumps(config))
        again = remove(older, "code", tmp_path / "again")
        assert code_in(again) == CODE
        assert {p.name: p.read_bytes() for p in again.iterdir()} == {
            p.name: p.read_bytes() for p in (tmp_path / "without").iterdir()
        }

    def test_an_anchor_that_came_with_code_lends_none(self, tmp_path):
        anchor = tiny_anchor("llama").config
        anchor.auto_map = {"AutoModelForCausalLM": "modeling_other.OtherForCausalLM"}
        config = FlexMoeConfig(anchor_config=anchor)
        assert config.auto_map == AUTO_MAP
        FlexMoeForCausalLM(config).save_pretrained(tmp_path)
        assert auto_map(tmp_path) == AUTO_MAP
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)) is FlexMoeForCausalLM


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """A dense anchor, its graft, the packages math and code, and their model: merged, and by reference."""
    folder = tmp_path_factory.mktemp("world")
    tiny_anchor("llama").save_pretrained(folder / "anchor")
    graft(folder / "anchor", folder / "grafted")
    for name in ("math", "code"):
        model = FlexMoeForCausalLM.from_pretrained(folder / "grafted")
        model.add_expert_copy(name)
        perturb_expert(model, name)
        model.save_expert(name, folder / name)
    merged = compose(folder / "grafted", [folder / "math", folder / "code"], folder / "merged")
    sources = {"public": folder / "anchor", "math": folder / "math", "code": folder / "code"}
    AutoModelForCausalLM.from_pretrained(merged).save_composition(folder / "composition", sources=sources)
    return SimpleNamespace(folder=folder, grafted=folder / "grafted", merged=merged, sources=sources)


def test_with_the_package_its_own_classes_win(world):
    assert type(AutoConfig.from_pretrained(world.merged, trust_remote_code=True)) is FlexMoeConfig
    for auto, cls in ((AutoModel, FlexMoeModel), (AutoModelForCausalLM, FlexMoeForCausalLM)):
        assert type(auto.from_pretrained(world.merged, trust_remote_code=True)) is cls
        config = AutoConfig.from_pretrained(world.merged)
        assert type(auto.from_config(config, trust_remote_code=True)) is cls
    assert not [name for name in sys.modules if name.startswith("transformers_modules.merged")]


@pytest.fixture(scope="module")
def reader(world, tmp_path_factory) -> SimpleNamespace:
    """What `without_flexmoe.py` found, on folders and against a Hub on the loopback."""
    out = tmp_path_factory.mktemp("reader")
    with HubServer().running() as hub:
        for name in ("anchor", "math", "code", "merged"):
            hub.push_folder(f"lab/{name}", world.folder / name)
        by_ids = push_composition(world, hub, out)
        hub.push_folder("lab/composition", by_ids)
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
        asked = {request.split(" ")[1] for request in hub.requests}
    found = json.loads((out / "found.json").read_text())
    return SimpleNamespace(out=out, found=found, logits=load_file(out / "logits.safetensors"), asked=asked)


def push_composition(world: SimpleNamespace, hub: HubServer, folder: Path) -> Path:
    """The composition of the world as it would be if everything had come from the Hub."""
    copy = shutil.copytree(world.folder / "composition", folder / "by-ids")
    config = json.loads((copy / "config.json").read_text())
    parts = {"anchor": config["composition"]["anchor"], **config["composition"]["experts"]}
    for name, entry in parts.items():
        del entry["folder"]
        entry |= {"repo": f"lab/{name}", "revision": hub.repositories[f"lab/{name}"].refs["main"]}
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@torch.no_grad()
def logits_of(folder: Path, without: str | None = None) -> torch.Tensor:
    model = realigned(FlexMoeForCausalLM.from_pretrained(folder))
    if without:
        model.remove_expert(without)
    return model(random_tokens(2, 9)).logits


class TestWithoutThePackage:
    def test_nothing_but_transformers_was_there(self, reader):
        assert reader.found["absent but imported"] == []
        assert reader.found["class"] == ["transformers_modules", "FlexMoeForCausalLM"]
        assert reader.found["config"] == ["public", "math", "code"]

    def test_it_computes_what_the_package_computes(self, reader, world):
        everyone = logits_of(world.merged)
        same = {name: value for name, value in reader.logits.items() if name not in ("decoder", "without code")}
        assert len(same) == 10
        for name, value in same.items():
            assert torch.equal(value, everyone), name
        assert torch.equal(reader.logits["without code"], logits_of(world.merged, without="code"))
        with torch.no_grad():
            hidden = realigned(FlexMoeModel.from_pretrained(world.merged))(random_tokens(2, 9)).last_hidden_state
        assert torch.equal(reader.logits["decoder"], hidden)

    def test_it_generates_with_the_experts_that_are_named(self, reader, world):
        model = FlexMoeForCausalLM.from_pretrained(world.merged)
        chosen = model.generate(random_tokens(2, 9), experts=["public", "math"], max_new_tokens=5, do_sample=False)
        assert chosen.tolist() == reader.found["generated"]

    @pytest.mark.parametrize("saved", ["saved", "saved-from-hub", "by-reference"])
    def test_what_it_saves_has_the_code_and_loads_anywhere(self, reader, saved):
        assert code_in(reader.out / saved) == CODE
        assert auto_map(reader.out / saved) == AUTO_MAP
        assert torch.equal(logits_of(reader.out / saved), reader.logits["merged"])

    def test_a_package_and_a_composition_come_from_the_hub(self, reader):
        assert reader.found["source"] == "lab/code"
        for file in ("lab/code/resolve", "lab/composition/resolve", "lab/anchor/resolve", "lab/math/resolve"):
            assert any(file in path for path in reader.asked), file

    def test_the_package_wins_once_it_is_imported_and_serves_the_older_model(self, reader):
        assert reader.found["the package's class"]
        assert reader.found["usage"] == 18
        assert reader.found["named by an opened package"] == "again"


def test_an_expert_package_is_no_model(world, tmp_path, monkeypatch):
    package = world.folder / "math"
    with HubServer().running() as hub:
        point_client_at(hub.url, monkeypatch)
        hub.push_folder("lab/math", package)
        for cls in (FlexMoeForCausalLM, FlexMoeModel, FlexMoeConfig, AutoConfig, AutoModelForCausalLM):
            with pytest.raises(ValueError, match=r"math is an expert package, not a model.*add_expert"):
                cls.from_pretrained(package)
            with pytest.raises(ValueError, match=r"lab/math is an expert package, not a model.*add_expert"):
                cls.from_pretrained("lab/math", cache_dir=tmp_path / "cache")


def test_importing_registers_the_classes_for_saving():
    assert (FlexMoeConfig._auto_class, flexmoe.FlexMoeModel._auto_class) == ("AutoConfig", "AutoModel")
    assert FlexMoeForCausalLM._auto_class == "AutoModelForCausalLM"
