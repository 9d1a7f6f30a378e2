"""Saving and loading compositions: they load bit for bit as the model that was saved, or not at all."""

import copy
import functools
import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, TorchAoConfig

from flexmoe.conversion.compose import compose, remove
from flexmoe.conversion.graft import graft
from flexmoe.inspection import inspect
from flexmoe.io.folders import TEMPORARY_MARK
from flexmoe.modeling import FlexMoeForCausalLM, FlexMoeModel
from flexmoe.testing import perturb_expert, random_tokens, realigned, tiny_anchor
from tests.support.hub import Fault, HubServer, point_client_at
from tests.support.soak import soak, thinned

_numbers = itertools.count()  # transformers caches the commit of a repository per process
FAMILIES = ("llama", "gpt2", "gemma2")  # ordinary; stored under other names, tied, with buffers; tied and post-norm
OWNERS = ("math", "code")


def make_world(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    """An anchor, its graft, packages, and the model of all of them as a merged checkpoint and as a composition."""
    tiny_anchor(family).to(dtype).save_pretrained(folder / "anchor")
    graft(folder / "anchor", folder / "grafted")
    for name in OWNERS:
        save_package(folder / "grafted", folder / name, name)
    merged = compose(folder / "grafted", [folder / name for name in OWNERS], folder / "merged")
    sources = {"public": folder / "anchor", **{name: folder / name for name in OWNERS}}
    composition = FlexMoeForCausalLM.from_pretrained(merged).save_composition(folder / "composition", sources=sources)
    return SimpleNamespace(folder=folder, merged=merged, sources=sources, composition=composition)


def save_package(grafted: Path, out: Path, name: str, seed: int = 0) -> Path:
    model = FlexMoeForCausalLM.from_pretrained(grafted)
    model.add_expert_copy(name)
    perturb_expert(model, name, seed)
    return model.save_expert(name, out)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Makes the world of a family, once."""
    return functools.cache(lambda family: make_world(tmp_path_factory.mktemp(family), family))


@pytest.fixture(scope="module", params=thinned(FAMILIES, ["llama", "gpt2"]))
def world(request, built) -> SimpleNamespace:
    return built(request.param)


@pytest.fixture(scope="module")
def llama(built) -> SimpleNamespace:
    return built("llama")


@pytest.fixture
def copied(llama, tmp_path) -> SimpleNamespace:
    """A copy of the llama world that may be changed."""
    folder = shutil.copytree(llama.folder, tmp_path / "world")
    sources = {name: folder / path.name for name, path in llama.sources.items()}
    return SimpleNamespace(
        folder=folder, merged=folder / "merged", sources=sources, composition=folder / "composition"
    )


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit_config(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def assert_same_model(one, other) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
    ignored = {"_name_or_path": None}
    assert {**one.config.to_dict(), **ignored} == {**other.config.to_dict(), **ignored}
    with torch.no_grad():
        outputs = [realigned(model)(random_tokens(2, 9))[0] for model in (one, other)]
    assert torch.equal(*outputs)


class TestEqualsTheMergedModel:
    @pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModel])
    def test_through_the_auto_classes(self, world, auto):
        loaded, info = auto.from_pretrained(world.composition, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert_same_model(loaded, auto.from_pretrained(world.merged))
        assert loaded.name_or_path == loaded.config.name_or_path == str(world.composition)

    @pytest.mark.parametrize(
        "options",
        [{"dtype": torch.bfloat16}, soak({"device_map": "cpu"}), {"device_map": "auto"}, {"num_experts_per_tok": 1}],
    )
    def test_with_options_of_from_pretrained(self, llama, options):
        models = [
            FlexMoeForCausalLM.from_pretrained(folder, **options) for folder in (llama.composition, llama.merged)
        ]
        assert_same_model(*models)

    def test_generation_settings_are_kept(self, copied):
        model = FlexMoeForCausalLM.from_pretrained(copied.merged)
        model.generation_config.top_k = 7
        model.generation_config.do_sample = True
        model.save_composition(copied.composition, sources=copied.sources, overwrite=True)
        assert AutoModelForCausalLM.from_pretrained(copied.composition).generation_config == model.generation_config

    def test_saving_a_loaded_one_gives_a_merged_checkpoint(self, world, tmp_path):
        for folder in (world.merged, world.composition):
            AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / folder.name)
        assert content(tmp_path / "composition") == content(tmp_path / "merged")

    def test_experts_can_be_added_and_removed(self, llama, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(llama.composition)
        model.remove_expert("math")
        expected = AutoModelForCausalLM.from_pretrained(remove(llama.merged, "math", tmp_path / "without"))
        assert_same_model(model, expected)
        sources = {"public": llama.sources["public"], "code": llama.sources["code"]}
        assert_same_model(AutoModel.from_pretrained(model.save_composition(tmp_path / "c", sources=sources)),
                          AutoModel.from_pretrained(tmp_path / "without"))  # fmt: skip

    def test_of_a_model_without_head(self, world, tmp_path):
        decoder = FlexMoeModel.from_pretrained(world.merged)
        composition = decoder.save_composition(tmp_path / "decoder", sources=world.sources)
        again = AutoModel.from_pretrained(composition)
        assert again.config.architectures == ["FlexMoeModel"]
        decoder.config.architectures = ["FlexMoeModel"]
        assert_same_model(again, decoder)
        with_head = AutoModelForCausalLM.from_pretrained(composition)  # the anchor's head is loaded
        with_head.config.architectures = ["FlexMoeForCausalLM"]
        assert_same_model(with_head, AutoModelForCausalLM.from_pretrained(world.merged))

    def test_half_precision_anchor_with_float32_experts(self, tmp_path):
        world = make_world(tmp_path, "llama", torch.bfloat16)
        assert_same_model(*map(FlexMoeForCausalLM.from_pretrained, (world.composition, world.merged)))
        wide = FlexMoeForCausalLM.from_pretrained(tmp_path / "grafted", dtype=torch.float32)
        wide.add_expert_copy("law")
        perturb_expert(wide, "law")
        wide.save_expert("law", tmp_path / "law")
        sources = {"public": tmp_path / "anchor", "law": tmp_path / "law"}
        again = FlexMoeForCausalLM.from_pretrained(wide.save_composition(tmp_path / "wide", sources=sources))
        assert again.dtype == torch.float32
        assert_same_model(again, wide)

    def test_a_given_config_is_used(self, llama):
        config = AutoConfig.from_pretrained(llama.composition)
        config.experts = [record for record in config.experts if record["name"] != "math"]
        part = AutoModelForCausalLM.from_pretrained(llama.composition, config=config)
        assert part.expert_names == ["public", "code"]
        assert config.composition is not None
        assert part.config.composition is None

    def test_active_experts_k_and_renamed_experts(self, llama, tmp_path):
        model = FlexMoeForCausalLM.from_pretrained(llama.merged)
        model.rename_expert("math", "mathematics")
        model.set_active_experts(["public", "mathematics"])
        model.config.num_experts_per_tok = 2
        sources = {
            "public": llama.sources["public"],
            "code": llama.sources["code"],
            "mathematics": llama.folder / "math",
        }
        again = FlexMoeForCausalLM.from_pretrained(model.save_composition(tmp_path / "c", sources=sources))
        assert again.active_experts == ["public", "mathematics"]
        assert_same_model(again, model)


class TestFiles:
    def test_kilobytes_with_references(self, llama):
        files = {name: len(data) for name, data in content(llama.composition).items()}
        assert {name for name in files if not name.endswith("_flexmoe.py")} == {
            "README.md", "config.json", "generation_config.json", "router.safetensors",
        }  # fmt: skip
        assert sum(size for name, size in files.items() if not name.endswith(".py")) < 10_000
        composition = json.loads((llama.composition / "config.json").read_text())["composition"]
        assert composition["anchor"] == {"folder": "../anchor"}
        assert composition["experts"]["math"]["folder"] == "../math"
        assert set(composition["experts"]) == set(OWNERS)
        card = (llama.composition / "README.md").read_text()
        assert all(part in card for part in ("../anchor", "../math", "../code", "flexmoe-composition"))

    def test_only_rows_that_differ_from_the_sources(self, llama, tmp_path):
        # compose gives public a prior, so its biases are stored; the rows of the packages are not
        stored = load_file(llama.composition / "router.safetensors")
        assert set(stored) == {f"anchor.model.layers.{i}.mlp.router.public.bias" for i in range(2)}
        model = FlexMoeForCausalLM.from_pretrained(llama.folder / "grafted")
        model.add_expert(llama.folder / "math")
        sources = {"public": llama.sources["public"], "math": llama.sources["math"]}
        plain = model.save_composition(tmp_path / "plain", sources=sources)
        assert not (plain / "router.safetensors").exists()
        row = model.flexmoe_blocks()[1].router["math"].weight
        row.data += 0.25
        tuned = model.save_composition(tmp_path / "tuned", sources=sources)
        assert set(load_file(tuned / "router.safetensors")) == {"anchor.model.layers.1.mlp.router.math.weight"}
        assert_same_model(FlexMoeForCausalLM.from_pretrained(tuned), model)

    def test_folders_beside_it_are_relative_others_absolute(self, copied, tmp_path):
        moved = shutil.move(copied.folder, tmp_path / "moved")  # with its neighbours
        assert FlexMoeForCausalLM.from_pretrained(Path(moved) / "composition").expert_names == ["public", *OWNERS]
        model = FlexMoeForCausalLM.from_pretrained(Path(moved) / "merged")
        sources = {name: Path(moved) / path.name for name, path in copied.sources.items()}
        far = model.save_composition(tmp_path / "far" / "composition", sources=sources)
        shutil.move(far, tmp_path / "farther")  # alone
        assert FlexMoeForCausalLM.from_pretrained(tmp_path / "farther").expert_names == ["public", *OWNERS]

    def test_written_atomically(self, copied):
        model = FlexMoeForCausalLM.from_pretrained(copied.merged)
        before = content(copied.composition)
        with pytest.raises(FileExistsError, match="overwrite"):
            model.save_composition(copied.composition, sources=copied.sources)
        with pytest.raises(ValueError, match="which is read"):
            model.save_composition(copied.sources["math"], sources=copied.sources, overwrite=True)
        model.save_code = lambda folder: 1 / 0  # a failure when most is written
        with pytest.raises(ZeroDivisionError):
            model.save_composition(copied.composition, sources=copied.sources, overwrite=True)
        assert content(copied.composition) == before
        assert not [path for path in copied.folder.iterdir() if TEMPORARY_MARK in path.name]


class TestSavingErrors:
    @pytest.mark.parametrize(
        ("part", "owner"),
        [("experts.math.up_proj", "math"), ("experts.public.up_proj", "public"), ("embed_tokens", "public")],
    )
    def test_changed_tensors(self, llama, tmp_path, part, owner):
        model = FlexMoeForCausalLM.from_pretrained(llama.merged)
        next(p for name, p in model.named_parameters() if part in name).data.view(-1)[-1] += 1
        with pytest.raises(ValueError, match=rf"(?s)^{owner}: the tensors differ.*save_expert.*save_pretrained"):
            model.save_composition(tmp_path / "out", sources=llama.sources)
        assert not list(tmp_path.iterdir())

    def test_a_model_that_lost_precision(self, llama, tmp_path):
        sources = llama.sources
        model = FlexMoeForCausalLM.from_pretrained(llama.merged).to(torch.bfloat16).to(torch.float32)
        with pytest.raises(ValueError, match="public, math, code: the tensors differ"):
            model.save_composition(tmp_path / "out", sources=sources)

    def test_another_vocabulary(self, llama, tmp_path):
        model = FlexMoeForCausalLM.from_pretrained(llama.merged)
        model.resize_token_embeddings(120)
        with pytest.raises(ValueError, match="public: the tensors differ"):
            model.save_composition(tmp_path / "out", sources=llama.sources)

    def test_an_adapter(self, llama, tmp_path):
        peft = pytest.importorskip("peft")
        model = FlexMoeForCausalLM.from_pretrained(llama.merged)
        targets = {"target_modules": r".*\.experts\.math\.up_proj", "modules_to_save": ["router.math"]}
        model.add_adapter(peft.LoraConfig(**targets))
        with pytest.raises(ValueError, match="merge adapters first"):
            model.save_composition(tmp_path / "out", sources=llama.sources)

    def test_unknown_and_missing_sources(self, llama, tmp_path):
        model = FlexMoeForCausalLM.from_pretrained(llama.merged)
        with pytest.raises(ValueError, match=r"No source is recorded for \['public', 'code'\]"):
            model.save_composition(tmp_path / "out", sources={"math": llama.sources["math"]})
        with pytest.raises(ValueError, match=r"sources names \['law'\]"):
            model.save_composition(tmp_path / "out", sources={**llama.sources, "law": "x/y"})
        with pytest.raises(ValueError, match="math: the tensors differ"):
            model.save_composition(tmp_path / "out", sources={**llama.sources, "math": llama.sources["code"]})
        with pytest.raises(FileNotFoundError, match="no folder"):
            model.save_composition(tmp_path / "out", sources={**llama.sources, "math": tmp_path / "math"})

    def test_another_anchor_or_none(self, llama, tmp_path):
        tiny_anchor("llama", seed=1).save_pretrained(tmp_path / "other")
        model = FlexMoeForCausalLM.from_pretrained(llama.merged)
        fingerprint = model.config.anchor["fingerprint"]
        with pytest.raises(ValueError, match=f"not the anchor of this model.*model's is {fingerprint}"):
            model.save_composition(tmp_path / "out", sources={**llama.sources, "public": tmp_path / "other"})
        model.config.anchor = None
        with pytest.raises(ValueError, match="has no fingerprint"):
            model.save_composition(tmp_path / "out", sources=llama.sources)

    def test_offloaded_weights(self, llama, tmp_path):
        model = FlexMoeForCausalLM.from_pretrained(llama.merged)
        model.anchor.lm_head.to("meta")
        with pytest.raises(ValueError, match="quantised, sharded or offloaded"):
            model.save_composition(tmp_path / "out", sources=llama.sources)


class TestLoadingErrors:
    def test_another_version_of_a_package(self, copied):
        shutil.rmtree(copied.folder / "math")
        save_package(copied.folder / "grafted", copied.folder / "math", "math", seed=1)
        with pytest.raises(ValueError, match=r"is not the one.*saved with as 'math'.*--update"):
            FlexMoeForCausalLM.from_pretrained(copied.composition)

    def test_a_damaged_package(self, copied):
        file = copied.folder / "math" / "expert.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        with pytest.raises(ValueError, match="SHA-256"):
            FlexMoeForCausalLM.from_pretrained(copied.composition)

    def test_another_anchor(self, copied):
        tiny_anchor("llama", seed=1).save_pretrained(copied.folder / "anchor")
        fingerprint = AutoConfig.from_pretrained(copied.composition).anchor["fingerprint"]
        with pytest.raises(ValueError, match=f"not the anchor of this model.*model's is {fingerprint}"):
            FlexMoeForCausalLM.from_pretrained(copied.composition)

    def test_a_missing_part(self, copied):
        shutil.rmtree(copied.folder / "code")
        with pytest.raises(FileNotFoundError, match="code"):
            FlexMoeForCausalLM.from_pretrained(copied.composition)

    @pytest.mark.parametrize("name", ["anchor.model.layers.0.mlp.router.law.weight", "anchor.lm_head.weight"])
    def test_rows_of_unknown_experts(self, copied, name):
        file = copied.composition / "router.safetensors"
        save_file({name: torch.zeros(1, 32)}, file)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        edit_config(copied.composition, lambda config: config["composition"].update(router_sha256=digest))
        with pytest.raises(ValueError, match=f"'{name}'.*is not a router row of this model"):
            FlexMoeForCausalLM.from_pretrained(copied.composition)

    def test_damaged_or_missing_rows(self, copied):
        file = copied.composition / "router.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[:-1] + b"\1")
        with pytest.raises(ValueError, match=r"router\.safetensors: its SHA-256"):
            FlexMoeForCausalLM.from_pretrained(copied.composition)
        file.unlink()
        with pytest.raises(FileNotFoundError, match=r"router\.safetensors"):
            FlexMoeForCausalLM.from_pretrained(copied.composition)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda c: c["composition"].update(format_version=2), "format_version is 2"),
            (lambda c: c["composition"].update(more=1), "its keys must be"),
            (lambda c: c["composition"]["experts"].pop("math"), r"no reference for.*\['math'\]"),
            (lambda c: c["composition"]["experts"].update(math="../math"), "'math'.*is not a reference"),
            (lambda c: c["composition"].update(anchor={"folder": "a", "repo": "b"}), "anchor.*is not a reference"),
            (lambda c: c["anchor"].update(fingerprint="0" * 64), "made for another anchor"),
            (lambda c: c["anchor_config"].update(num_hidden_layers=3), "missing tensors|lacks tensors"),
        ],
    )
    def test_malformed_configs(self, copied, change, words):
        edit_config(copied.composition, change)
        with pytest.raises(ValueError, match=words):
            FlexMoeForCausalLM.from_pretrained(copied.composition)

    def test_through_an_adapter(self, copied):
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(
            FlexMoeForCausalLM.from_pretrained(copied.composition),
            peft.LoraConfig(target_modules=r".*\.experts\.math\.up_proj"),
        )
        model.save_pretrained(copied.folder / "adapter")
        with pytest.raises(ValueError, match="is a composition: load it on its own, then the adapter"):
            AutoModelForCausalLM.from_pretrained(copied.folder / "adapter")
        model = AutoModelForCausalLM.from_pretrained(copied.composition)
        model.load_adapter(str(copied.folder / "adapter"))

    def test_commands_that_need_weights(self, llama, tmp_path):
        with pytest.raises(ValueError, match="composition, which refers to its parts"):
            remove(llama.composition, "math", tmp_path / "out")

    def test_inspection_shows_references(self, llama):
        found = inspect(llama.composition)
        assert (found["kind"], found["bytes"], found["parameters"]) == ("composition", None, None)
        assert found["anchor"]["folder"] == "../anchor"
        assert {expert["name"]: expert["source"]["folder"] for expert in found["experts"]} == {
            "public": "../anchor", "math": "../math", "code": "../code",
        }  # fmt: skip


class TestOnTheHub:
    @pytest.fixture(scope="class")
    def published(self, llama, tmp_path_factory) -> Iterator[SimpleNamespace]:
        """A model whose parts all came from the Hub, its composition, and the cache after that; not to be changed."""
        folder = tmp_path_factory.mktemp("published")
        with pytest.MonkeyPatch.context() as patch, HubServer().running() as server:
            point_client_at(server.url, patch)
            patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "cache"))
            for name in ("anchor", "math", "code"):
                server.push_folder(f"lab/{name}", llama.folder / name)
            model = FlexMoeForCausalLM.from_pretrained(graft("lab/anchor", folder / "grafted"))
            for name in OWNERS:
                model.add_expert(f"lab/{name}")
            composition = model.save_composition(folder / "composition")
            yield SimpleNamespace(model=model, folder=composition, hub=server, cache=folder / "cache")

    @pytest.fixture
    def pushed(self, published, tmp_path, monkeypatch) -> Iterator[SimpleNamespace]:
        """A copy of `published` that may be changed, pushed as `repo`, and its Hub, which is restored afterwards."""
        hub, cache = published.hub, tmp_path / "cache"
        point_client_at(hub.url, monkeypatch)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        shutil.copytree(published.cache, cache, symlinks=True)
        folder = shutil.copytree(published.folder, tmp_path / "composition")
        repositories = copy.deepcopy(hub.repositories)
        repo = f"lab/composition-{next(_numbers)}"
        hub.push_folder(repo, folder)
        yield SimpleNamespace(model=copy.deepcopy(published.model), folder=folder, hub=hub, repo=repo)
        hub.repositories = repositories
        hub.faults.clear()
        hub.requests.clear()

    def test_sources_are_recorded_by_the_model(self, pushed):
        composition = json.loads((pushed.folder / "config.json").read_text())["composition"]
        commits = {name: pushed.hub.repositories[f"lab/{name}"].refs["main"] for name in ("anchor", *OWNERS)}
        assert composition["anchor"] == {"repo": "lab/anchor", "revision": commits["anchor"]}
        for name in OWNERS:
            entry = composition["experts"][name]
            assert (entry["repo"], entry["revision"]) == (f"lab/{name}", commits[name])

    def test_download_into_another_cache(self, pushed, tmp_path):
        cache = tmp_path / "other-cache"
        for auto in (AutoModelForCausalLM, FlexMoeForCausalLM):
            assert_same_model(auto.from_pretrained(pushed.repo, cache_dir=cache), pushed.model)
        names = {path.name for path in cache.iterdir() if path.name.startswith("models--")}
        assert names == {f"models--lab--{name}" for name in ("anchor", pushed.repo.partition("/")[2], *OWNERS)}
        asked = len(pushed.hub.requests)
        offline = FlexMoeForCausalLM.from_pretrained(pushed.repo, cache_dir=cache, local_files_only=True)
        assert_same_model(offline, pushed.model)
        assert len(pushed.hub.requests) == asked

    def test_a_newer_version_of_a_part_changes_nothing(self, pushed, llama, tmp_path):
        newer = save_package(llama.folder / "grafted", tmp_path / "newer", "math", seed=1)
        pushed.hub.push_folder("lab/math", newer)
        again = AutoModelForCausalLM.from_pretrained(pushed.repo, cache_dir=tmp_path / "other-cache")
        assert_same_model(again, pushed.model)

    def test_a_revision_of_the_composition(self, pushed, tmp_path):
        first = pushed.hub.repositories[pushed.repo].refs["main"]
        pushed.model.remove_expert("math")
        pushed.hub.push_folder(pushed.repo, pushed.model.save_composition(tmp_path / "second"))
        cache = {"cache_dir": tmp_path / "other-cache"}
        for revision, names in ((None, ["public", "code"]), (first, ["public", "math", "code"])):
            loaded = AutoModelForCausalLM.from_pretrained(pushed.repo, revision=revision, **cache)
            assert loaded.expert_names == names

    def test_gated_and_deleted_experts(self, pushed, tmp_path):
        repository = pushed.hub.repositories["lab/math"]
        repository.gated, repository.tokens = True, {"friend"}
        cache = {"cache_dir": tmp_path / "other-cache"}
        with pytest.raises(PermissionError, match=r"lab/math.*gated"):
            AutoModelForCausalLM.from_pretrained(pushed.repo, **cache)
        assert_same_model(AutoModelForCausalLM.from_pretrained(pushed.repo, token="friend", **cache), pushed.model)
        del pushed.hub.repositories["lab/code"]
        with pytest.raises(FileNotFoundError, match="lab/code"):
            AutoModelForCausalLM.from_pretrained(pushed.repo, cache_dir=tmp_path / "third", token="friend")

    @pytest.mark.parametrize("withdraw", [
        lambda repositories: repositories.pop("lab/math"),
        lambda repositories: setattr(repositories["lab/math"], "gated", True),
        lambda repositories: setattr(repositories["lab/math"], "private", True),
    ], ids=["deleted", "gated", "private"])  # fmt: skip
    def test_withdrawn_although_cached(self, pushed, tmp_path, withdraw):
        AutoModelForCausalLM.from_pretrained(pushed.repo)  # fills the cache
        withdraw(pushed.hub.repositories)
        with pytest.raises((FileNotFoundError, PermissionError), match=r"lacks 1 of its experts.*'math'.*\"skip\""):
            AutoModelForCausalLM.from_pretrained(pushed.repo)
        with pytest.warns(UserWarning, match="Loaded without 'math'"):
            rest = AutoModelForCausalLM.from_pretrained(pushed.repo, missing_experts="skip", num_experts_per_tok=1)
        pushed.model.remove_expert("math")
        without = pushed.model.save_composition(tmp_path / "without")
        assert_same_model(rest, AutoModelForCausalLM.from_pretrained(without, num_experts_per_tok=1))
        offline = AutoModelForCausalLM.from_pretrained(pushed.repo, local_files_only=True)
        assert offline.expert_names == ["public", *OWNERS], "a withdrawal has no effect offline"

    def test_each_load_sends_one_request_per_expert(self, pushed):
        AutoModelForCausalLM.from_pretrained(pushed.repo)
        for _ in range(2):
            asked = len(pushed.hub.requests)
            AutoModelForCausalLM.from_pretrained(pushed.repo)
            checks = [request for request in pushed.hub.requests[asked:] if request.endswith("/auth-check")]
            assert sorted(checks) == [f"GET /api/models/lab/{name}/auth-check" for name in sorted(OWNERS)]

    def test_unreachable_hub(self, pushed, monkeypatch):
        AutoModelForCausalLM.from_pretrained(pushed.repo)
        point_client_at("http://127.0.0.1:9", monkeypatch)
        with pytest.warns(UserWarning, match="Could not check whether the owner of 'lab/math' has withdrawn it"):
            assert_same_model(AutoModelForCausalLM.from_pretrained(pushed.repo), pushed.model)

    @pytest.mark.parametrize("status", [500, soak(503)])
    def test_server_errors_are_not_withdrawals(self, pushed, tmp_path, status):
        pushed.hub.faults.append(Fault("/api/models/lab/code/*", "status", status=status, times=None))
        pushed.hub.faults.append(Fault("/lab/code/*", "status", status=status, times=None))
        for missing in ("error", "skip"):
            with (
                pytest.warns(UserWarning, match="Could not check whether the owner of 'lab/code' has withdrawn it"),
                pytest.raises(ConnectionError, match="'code': the Hub"),
            ):
                AutoModelForCausalLM.from_pretrained(
                    pushed.repo, missing_experts=missing, cache_dir=tmp_path / f"cold-{missing}"
                )

    def test_forbidden_repository(self, pushed):
        AutoModelForCausalLM.from_pretrained(pushed.repo)
        pushed.hub.faults.append(Fault("*/code/auth-check", "status", status=403, times=None))
        with pytest.raises(PermissionError, match="'code': this account has no access to 'lab/code'"):
            AutoModelForCausalLM.from_pretrained(pushed.repo)

    def test_folders_named_like_repositories(self, pushed, tmp_path, monkeypatch):
        (tmp_path / "here" / "lab" / "math").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / "here")
        assert_same_model(AutoModelForCausalLM.from_pretrained(pushed.folder), pushed.model)

    @pytest.mark.parametrize(
        "values",
        [
            {"repo": "/etc", "revision": "0" * 40},
            {"repo": "../math", "revision": "0" * 40},
            {"repo": "lab/math", "revision": "main"},
            {"repo": "lab/math", "revision": "../../../etc/passwd"},
        ],
    )
    def test_malformed_references(self, pushed, values):
        edit_config(pushed.folder, lambda config: config["composition"]["experts"]["math"].update(values))
        with pytest.raises(ValueError, match="must name a Hub repository and a commit of 40 hexadecimal digits"):
            AutoModelForCausalLM.from_pretrained(pushed.folder)

    def test_a_config_from_another_folder_with_skip(self, pushed, tmp_path):
        other = AutoConfig.from_pretrained(pushed.repo)
        other.num_experts_per_tok = 1
        other.save_pretrained(tmp_path / "other")
        del pushed.hub.repositories["lab/math"]
        with pytest.warns(UserWarning, match="Loaded without 'math'"):
            rest = FlexMoeForCausalLM.from_pretrained(  # an Auto class would read the repository's own
                pushed.repo, config=str(tmp_path / "other"), missing_experts="skip"
            )
        assert (rest.expert_names, rest.config.num_experts_per_tok) == (["public", "code"], 1)

    def test_several_missing_experts(self, pushed):
        for name in OWNERS:
            del pushed.hub.repositories[f"lab/{name}"]
        with pytest.raises(FileNotFoundError, match=r"lacks 2 of its experts.*'math': .*'code': "):
            AutoModelForCausalLM.from_pretrained(pushed.repo)
        with pytest.warns(UserWarning, match="Loaded without 'math', 'code'"):
            rest = AutoModelForCausalLM.from_pretrained(pushed.repo, missing_experts="skip")
        assert rest.expert_names == ["public"]

    def test_what_cannot_be_skipped(self, pushed, tmp_path):
        pushed.model.set_active_experts(["math"])
        folder = pushed.model.save_composition(tmp_path / "active")
        with pytest.raises(ValueError, match="missing_experts='maybe'"):
            AutoModelForCausalLM.from_pretrained(folder, missing_experts="maybe")
        del pushed.hub.repositories["lab/math"]
        with pytest.raises(ValueError, match="Without math no active expert is left"):
            AutoModelForCausalLM.from_pretrained(folder, missing_experts="skip")
        del pushed.hub.repositories["lab/anchor"]
        with pytest.raises(FileNotFoundError, match="lab/anchor"):
            AutoModelForCausalLM.from_pretrained(folder, missing_experts="skip", cache_dir=tmp_path / "cold")

    def test_changed_rows_of_remaining_experts_are_kept(self, pushed, tmp_path):
        for name in OWNERS:
            pushed.model.flexmoe_blocks()[1].router[name].weight.data += 0.25
        folder = pushed.model.save_composition(tmp_path / "tuned")
        del pushed.hub.repositories["lab/math"]
        with pytest.warns(UserWarning, match="Loaded without 'math'"):
            rest = FlexMoeForCausalLM.from_pretrained(folder, missing_experts="skip")
        pushed.model.remove_expert("math")
        assert_same_model(rest, pushed.model)

    def test_a_given_config_with_skip(self, pushed):
        config = AutoConfig.from_pretrained(pushed.repo)
        del pushed.hub.repositories["lab/code"]
        with pytest.warns(UserWarning, match="Loaded without 'code'"):
            rest = AutoModelForCausalLM.from_pretrained(pushed.repo, config=config, missing_experts="skip")
        assert rest.expert_names == ["public", "math"]
        assert config.expert_names == ["public", *OWNERS]

    def test_quantized(self, pushed):
        torchao = pytest.importorskip("torchao.quantization")
        settings = TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2))
        quantized = AutoModelForCausalLM.from_pretrained(pushed.repo, quantization_config=settings)
        expert = quantized.flexmoe_blocks()[0].experts["math"]
        assert type(expert.up_proj.weight).__name__ != "Parameter"
        assert type(quantized.flexmoe_blocks()[0].router["math"].weight) is torch.nn.Parameter
        with torch.no_grad():
            tokens = random_tokens(2, 9)
            torch.testing.assert_close(quantized(tokens)[0].float(), pushed.model(tokens)[0], rtol=0.2, atol=0.2)

    def test_folders_in_a_composition_on_the_hub(self, pushed, llama, tmp_path):
        pushed.hub.push_folder("lab/local", llama.composition)
        with pytest.raises(ValueError, match=r"lab/local names the folder '\.\./anchor'"):
            AutoModelForCausalLM.from_pretrained("lab/local", cache_dir=tmp_path / "other-cache")

    def test_no_subfolder(self, copied, tmp_path):
        with pytest.raises(ValueError, match="in a subfolder"):
            AutoModelForCausalLM.from_pretrained(copied.folder, subfolder="composition")
