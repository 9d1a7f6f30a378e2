"""Composing, adding and removing on disk: equal to the live model, and byte for byte exact removal."""

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmoe.admission.findings import AdmissionError
from flexmoe.conversion.compose import add, compose, remove
from flexmoe.conversion.graft import graft
from flexmoe.io.folders import TEMPORARY_MARK
from flexmoe.io.tensors import CheckpointFolder
from flexmoe.modeling.configuration_flexmoe import AUTO_MAP
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM
from flexmoe.packages.package import ExpertPackage, PackageError
from flexmoe.testing import perturb_expert, random_tokens, tiny_anchor
from flexmoe.tokenization import TokenizerError
from flexmoe_cli import main
from tests.support.soak import thinned

WEIGHTS = "model.safetensors"
FAMILIES = ("llama", "gpt2", "gemma2", "phi3")  # Linear; Conv1D with biases; tied and post-norm; fused gate_up


def make_world(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    """In `folder`: a graft, and packages that three owners trained independently; that of `code` is low-rank."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_anchor(family).to(dtype).save_pretrained(folder / "anchor")
    (folder / "text.txt").write_text("Public text.")
    graft(folder / "anchor", folder / "grafted", public_data=[folder / "text.txt"])
    (folder / "grafted" / "tokenizer_config.json").write_text("{}\n")
    for name in ("math", "code", "law"):
        save_expert(folder / "grafted", folder / name, name, biased=True, rank=3 if name == "code" else None)
    return folder


def save_expert(grafted: Path, out: Path, name: str, *, biased: bool, rank: int | None = None) -> Path:
    model = FlexMoeForCausalLM.from_pretrained(grafted)
    model.add_expert_copy(name, rank=rank)
    perturb_expert(model, name)
    if not biased:
        for block in model.flexmoe_blocks():
            torch.nn.init.zeros_(block.router[name].bias)
    return Path(model.save_expert(name, out, license="mit"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the world of a family, once."""
    return functools.cache(lambda family: make_world(tmp_path_factory.mktemp(family), family))


@pytest.fixture(scope="module", params=thinned(FAMILIES, ["llama", "gpt2"]))
def world(request: pytest.FixtureRequest, built: Callable[[str], Path]) -> Path:
    return built(request.param)


@pytest.fixture(scope="module")
def llama(built: Callable[[str], Path]) -> Path:
    return built("llama")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def packages(world: Path, *names: str) -> list[Path]:
    return [world / name for name in names]


def composed(world: Path, out: Path, *names: str) -> Path:
    return compose(world / "grafted", packages(world, *names), out)


def no_traces(folder: Path) -> bool:
    return not any(TEMPORARY_MARK in name for name in os.listdir(folder))


@pytest.mark.parametrize("one", ["owners/math", Path("owners/math")])
def test_one_package_instead_of_a_list(one: str | Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"one package .*expected a list of them\. Write \["):
        compose(tmp_path / "grafted", one, tmp_path / "out")


def test_a_new_expert_stays_inactive_with_a_choice_of_active_experts(llama: Path, tmp_path: Path, capsys) -> None:
    model = FlexMoeForCausalLM.from_pretrained(composed(llama, tmp_path / "one", "math"))
    model.set_active_experts(["public"])
    model.save_pretrained(tmp_path / "chosen")
    for start, note in (("one", False), ("chosen", True)):
        assert main(["add", str(tmp_path / start), str(llama / "code"), "--out", str(tmp_path / f"{start}-2")]) == 0
        assert ("Note: math, code will be inactive" in capsys.readouterr().out) is note
    assert FlexMoeForCausalLM.from_pretrained(tmp_path / "chosen-2").active_experts == ["public"]


class TestEqualsTheLiveModel:
    def test_tensors_config_and_logits(self, world: Path, tmp_path: Path) -> None:
        live = FlexMoeForCausalLM.from_pretrained(world / "grafted")
        for name in ("math", "code"):
            live.add_expert(world / name)
        live.save_pretrained(tmp_path / "live")
        folder = compose(world / "grafted", packages(world, "math", "code"), tmp_path / "out", public_prior=0.0)

        ours, theirs = load_file(folder / "model.safetensors"), load_file(tmp_path / "live" / "model.safetensors")
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype
            assert torch.equal(ours[name], tensor), name
        assert json.loads((folder / "config.json").read_text()) == json.loads(
            (tmp_path / "live" / "config.json").read_text()
        )
        loaded = FlexMoeForCausalLM.from_pretrained(folder)
        assert list(loaded.state_dict()) == list(live.state_dict())
        tokens = random_tokens(2, 12)
        with torch.no_grad():
            assert torch.equal(loaded(tokens).logits, live(tokens).logits)

    def test_other_files_are_copied(self, llama: Path, tmp_path: Path) -> None:
        folder = composed(llama, tmp_path / "out", "math")
        for name in ("public_sample.jsonl", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (llama / "grafted" / name).read_bytes()

    @pytest.mark.promise(
        "`compose`, `add`, `remove`",
        "other files in the folder of the model",
        "tokenizer, templates, terms and the public sample are copied; the others are named in a warning",
    )
    def test_which_other_files_are_copied(self, llama: Path, tmp_path: Path) -> None:
        model = shutil.copytree(llama / "grafted", tmp_path / "model")
        copied = ["TERMS.txt", "LICENSE", "chat_template.jinja", "additional_chat_templates/rag.jinja"]
        hidden = [".hidden", ".git/config", "old_flexmoe.py"]
        strays = ["notes.txt", "custom_generate/generate.py", "model-with-math.safetensors", "model.bin.index.json"]
        for name in copied + hidden + strays:
            (model / name).parent.mkdir(exist_ok=True)
            (model / name).write_text("Text.")
        with pytest.warns(UserWarning, match=r"Not copied from .*: custom_generate, model-with-.*, notes\.txt\."):
            folder = compose(model, packages(llama, "math"), tmp_path / "out")
        assert [name for name in copied + hidden + strays if (folder / name).exists()] == copied
        assert (folder / "TERMS.txt").read_text() == "Text."

    @pytest.mark.promise(
        "`compose`, `add`, `remove`", "overwriting a folder that holds other files", "refused with their names"
    )
    def test_files_that_would_be_lost_in_place(self, llama: Path, tmp_path: Path) -> None:
        model = composed(llama, tmp_path / "model", "math")
        (model / "scores.json").write_text("{}")
        before = content(model)
        with pytest.raises(ValueError, match=r"would delete scores\.json, which the model does not consist of"):
            remove(model, "math", model, overwrite=True)
        assert content(model) == before

    def test_k_is_that_of_the_graft_or_of_the_call(self, llama: Path, tmp_path: Path) -> None:
        def k_of(folder: Path) -> int:
            return json.loads((folder / "config.json").read_text())["num_experts_per_tok"]

        for given, expected in ((None, k_of(llama / "grafted")), (1, 1), (3, 3)):
            out = tmp_path / f"k = {given}"
            compose(llama / "grafted", packages(llama, "math"), out, num_experts_per_tok=given)
            assert k_of(out) == expected

    def test_two_names_for_one_package(self, llama: Path, tmp_path: Path) -> None:
        names = {str(llama / "math"): "maths", "code": "software"}
        folder = compose(llama / "grafted", packages(llama, "math", "code", "law"), tmp_path / "out", names=names)
        model = FlexMoeForCausalLM.from_pretrained(folder)
        assert model.expert_names == ["public", "maths", "software", "law"]

    def test_float32_experts_in_a_bfloat16_anchor(self, tmp_path: Path) -> None:
        world = make_world(tmp_path, "llama", torch.bfloat16)
        model = FlexMoeForCausalLM.from_pretrained(world / "grafted", dtype=torch.float32)
        model.add_expert_copy("wide")
        perturb_expert(model, "wide")
        model.save_expert("wide", tmp_path / "wide")
        assert ExpertPackage.open(tmp_path / "wide").manifest.dtype == "float32"
        stored = load_file(composed(world, tmp_path / "out", "wide", "math") / "model.safetensors")
        for block, live in enumerate(model.flexmoe_blocks()):
            up = stored[f"anchor.model.layers.{block}.mlp.experts.wide.up_proj.weight"]
            assert up.dtype == torch.bfloat16
            assert torch.equal(up, live.experts["wide"].up_proj.weight.to(torch.bfloat16))
            row = stored[f"anchor.model.layers.{block}.mlp.router.wide.weight"]
            assert row.dtype == torch.float32
            assert torch.equal(row, live.router["wide"].weight)


class TestRemovalIsExact:
    def test_every_file_equals_that_of_a_model_without_the_expert(self, world: Path, tmp_path: Path) -> None:
        everyone = composed(world, tmp_path / "all", "math", "code", "law")
        never = content(composed(world, tmp_path / "never", "math", "law"))
        assert content(remove(everyone, "code", tmp_path / "out")) == never

    def test_add_then_remove_restores_the_bytes(self, llama: Path, tmp_path: Path) -> None:
        before = composed(llama, tmp_path / "before", "math")
        both = add(before, llama / "code", tmp_path / "both")
        assert content(both) == content(composed(llama, tmp_path / "all", "math", "code"))
        assert content(remove(both, "code", tmp_path / "after")) == content(before)

    def test_removed_and_added_at_its_position_restores_the_bytes(self, llama: Path, tmp_path: Path) -> None:
        before = composed(llama, tmp_path / "before", "math", "code", "law")
        less = remove(before, "code", tmp_path / "less")
        for way in ("library", "command"):
            if way == "library":
                add(less, llama / "code", tmp_path / way, position=2)
            else:
                arguments = [str(less), str(llama / "code"), "--position", "2", "--out", str(tmp_path / way)]
                assert main(["add", *arguments]) == 0
            assert content(tmp_path / way) == content(before)
        for position in (0, 4, -1):
            with pytest.raises(ValueError, match=r"position=.*1 to 3"):
                add(less, llama / "code", tmp_path / "out", position=position)

    def test_in_place_and_in_shards(self, llama: Path, tmp_path: Path) -> None:
        def sharded(out: str, *names: str) -> Path:
            return compose(llama / "grafted", packages(llama, *names), tmp_path / out, max_shard_size=60_000)

        model = sharded("all", "math", "code")
        assert len(list(model.glob("model-*.safetensors"))) > 2
        assert remove(model, "math", model, max_shard_size=60_000, overwrite=True) == model
        assert content(model) == content(sharded("never", "code"))
        assert no_traces(tmp_path)
        FlexMoeForCausalLM.from_pretrained(model)

    def test_active_experts_as_in_a_live_removal(self, llama: Path, tmp_path: Path) -> None:
        folder = composed(llama, tmp_path / "all", "math", "code")
        model = FlexMoeForCausalLM.from_pretrained(folder)
        model.set_active_experts(["public", "code"])
        model.save_pretrained(tmp_path / "active")
        config = json.loads((remove(tmp_path / "active", "code", tmp_path / "out") / "config.json").read_text())
        assert config["active_experts"] == ["public"]

    def test_nothing_of_the_removed_expert_is_left(self, llama: Path, tmp_path: Path) -> None:
        folder = remove(composed(llama, tmp_path / "all", "math", "code"), "math", tmp_path / "out")
        code = {name for name in content(folder) if name.endswith("_flexmoe.py")}  # which imports math, for one
        assert not any(b"math" in data for name, data in content(folder).items() if name not in code)


class TestPrior:
    def priors(self, folder: Path) -> set[float]:
        with CheckpointFolder(folder) as tensors:
            return {tensors.read(name).item() for name in tensors.infos if name.endswith(".router.public.bias")}

    def test_defaults(self, llama: Path, tmp_path: Path) -> None:
        free = save_expert(llama / "grafted", tmp_path / "free", "free", biased=False)
        assert self.priors(composed(llama, tmp_path / "biased", "math", "code")) == {0.5}
        assert self.priors(compose(llama / "grafted", [free], tmp_path / "bias-free")) == {0.0}
        mixed: Sequence[Path] = [free, llama / "math"]
        with pytest.raises(ValueError, match=r"rows of math have biases, those of free have none.*--public-prior"):
            compose(llama / "grafted", mixed, tmp_path / "mixed")
        assert self.priors(compose(llama / "grafted", mixed, tmp_path / "mixed", public_prior=1.5)) == {1.5}

    def test_a_fitted_public_row_keeps_its_prior(self, llama: Path, tmp_path: Path) -> None:
        shutil.copytree(llama / "grafted", tmp_path / "grafted")
        tensors = load_file(tmp_path / "grafted" / "model.safetensors")
        tensors["anchor.model.layers.1.mlp.router.public.weight"][0, 3] = 2.0
        tensors["anchor.model.layers.0.mlp.router.public.bias"].fill_(-0.25)
        save_file(tensors, tmp_path / "grafted" / "model.safetensors", metadata={"format": "pt"})
        math = packages(llama, "math")
        assert self.priors(compose(tmp_path / "grafted", math, tmp_path / "kept")) == {-0.25, 0.0}
        assert self.priors(compose(tmp_path / "grafted", math, tmp_path / "said", public_prior=1.5)) == {1.5}

    def test_must_be_finite(self, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="finite"):
            compose(llama / "grafted", packages(llama, "math"), tmp_path / "out", public_prior=float("nan"))

    @pytest.mark.parametrize("prior", [True, "1"])
    def test_must_be_a_number(self, prior: object, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match="must be a number"):
            compose(llama / "grafted", packages(llama, "math"), tmp_path / "out", public_prior=prior)

    def test_biases_are_compared_with_it(self, llama: Path, tmp_path: Path) -> None:
        model = FlexMoeForCausalLM.from_pretrained(llama / "grafted")
        model.add_expert_copy("biased")
        for block in model.flexmoe_blocks():
            torch.nn.init.constant_(block.router["biased"].bias, 5.0)
        package = model.save_expert("biased", tmp_path / "biased")
        with pytest.raises(AdmissionError, match="the bias in layer 0"):
            compose(llama / "grafted", [package], tmp_path / "out", public_prior=0.0)
        assert self.priors(compose(llama / "grafted", [package], tmp_path / "out", public_prior=1.0)) == {1.0}


class TestErrors:
    def test_another_anchor(self, llama: Path, tmp_path: Path) -> None:
        tiny_anchor("llama", seed=1).save_pretrained(tmp_path / "anchor")
        other = graft(tmp_path / "anchor", tmp_path / "other")
        ours = json.loads((other / "config.json").read_text())["anchor"]["fingerprint"]
        theirs = ExpertPackage.open(llama / "math").manifest.anchor["fingerprint"]
        with pytest.raises(ValueError, match=f"(?s){theirs}.*{ours}"):
            compose(other, packages(llama, "math"), tmp_path / "out")

    def test_names(self, llama: Path, tmp_path: Path) -> None:
        grafted, out = llama / "grafted", tmp_path / "out"
        with pytest.raises(ValueError, match="'math' already"):
            compose(grafted, packages(llama, "math", "math"), out)
        with pytest.raises(ValueError, match="'public' already"):
            compose(grafted, packages(llama, "math"), out, names={"math": "public"})
        with pytest.raises(ValueError, match="is not an expert name"):
            compose(grafted, packages(llama, "math"), out, names={"math": "Maths!"})
        with pytest.raises(ValueError, match="no package 'maths'"):
            compose(grafted, packages(llama, "math"), out, names={"maths": "m"})
        with pytest.raises(ValueError, match="at least one"):
            compose(grafted, [], out)
        model = composed(llama, tmp_path / "model", "math")
        with pytest.raises(ValueError, match="cannot be removed"):
            remove(model, "public", out)
        with pytest.raises(ValueError, match="no expert 'law'"):
            remove(model, "law", out)
        with pytest.raises(ValueError, match="flexmoe add"):
            compose(model, packages(llama, "code"), out)
        assert not out.exists()

    def test_inputs_of_the_wrong_kind(self, llama: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="flexmoe graft"):
            compose(llama / "anchor", packages(llama, "math"), tmp_path / "out")
        with pytest.raises(ValueError, match="is an expert package, not a model"):
            compose(llama / "math", packages(llama, "math"), tmp_path / "out")
        with pytest.raises(FileNotFoundError, match=r"expert_config\.json"):
            compose(llama / "grafted", [llama / "grafted"], tmp_path / "out")

    def test_damage_found_at_the_end_leaves_no_output(self, llama: Path, tmp_path: Path) -> None:
        bad = shutil.copytree(llama / "math", tmp_path / "bad")
        data = bytearray((bad / "expert.safetensors").read_bytes())
        data[-1] ^= 1  # the last byte: it is found after all tensors were written
        (bad / "expert.safetensors").write_bytes(data)
        with pytest.raises(PackageError, match="SHA-256"):
            compose(llama / "grafted", [bad], tmp_path / "out")
        assert os.listdir(tmp_path) == ["bad"]

    @pytest.mark.parametrize("name", ["layers.1.router.weight", "layers.0.ffn.up_proj.weight"])
    def test_values_too_large_for_the_model(self, name: str, llama: Path, tmp_path: Path) -> None:
        bad = shutil.copytree(llama / "math", tmp_path / "bad")
        values = load_file(bad / "expert.safetensors")
        values[name] = torch.full_like(values[name], 1e300, dtype=torch.float64)
        save_file(values, bad / "expert.safetensors")
        manifest = json.loads((bad / "expert_config.json").read_text())
        digest = hashlib.sha256((bad / "expert.safetensors").read_bytes()).hexdigest()
        manifest["sha256"] = {"expert.safetensors": digest}
        manifest["dtype"] = "mixed" if ".ffn." in name else "float32"
        (bad / "expert_config.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=f"bad: '{name}' holds numbers too large"):
            compose(llama / "grafted", [bad], tmp_path / "out", public_prior=0.0, verify=False)
        assert os.listdir(tmp_path) == ["bad"]

    def test_outputs_are_kept_apart_from_inputs(self, llama: Path, tmp_path: Path) -> None:
        copy = shutil.copytree(llama / "math", tmp_path / "math")
        with pytest.raises(FileExistsError, match="--overwrite"):
            compose(llama / "grafted", [copy], copy)
        for out in (copy, tmp_path):
            with pytest.raises(ValueError, match="which is read"):
                compose(llama / "grafted", [copy], out, overwrite=True)
        assert ExpertPackage.open(copy)
        model = composed(llama, tmp_path / "model", "math")
        with pytest.raises(ValueError, match="which is read"):
            add(model, llama / "code", tmp_path, overwrite=True)

    def test_a_checkpoint_that_does_not_match_its_config(self, llama: Path, tmp_path: Path) -> None:
        model = composed(llama, tmp_path / "model", "math", "code")
        config = json.loads((model / "config.json").read_text())
        config["experts"] = config["experts"][:2]
        (model / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"\.code\.|config implies none"):
            remove(model, "math", tmp_path / "out")

    def test_stored_tensors_that_do_not_match_the_config(self, llama: Path, tmp_path: Path) -> None:
        model = shutil.copytree(llama / "grafted", tmp_path / "model")
        values = load_file(model / "model.safetensors")
        name = "anchor.model.layers.1.mlp.router.public.bias"

        def assert_refused(changed: dict[str, torch.Tensor], message: str) -> None:
            save_file(changed, model / "model.safetensors", metadata={"format": "pt"})
            with pytest.raises(ValueError, match=message):
                compose(model, packages(llama, "math"), tmp_path / "out", public_prior=0.0)

        assert_refused({**values, name: torch.zeros(2)}, rf"{name}' has shape \[2\]; its config implies \[1\]")
        assert_refused({**values, "extra": torch.zeros(2)}, r"'extra' has shape \[2\]; its config implies none")
        del values[name]
        assert_refused(values, f"lacks 1 tensors that its config implies, such as '{name}'")
        assert not (tmp_path / "out").exists()

    def test_an_existing_output_is_kept_without_overwrite(self, llama: Path, tmp_path: Path) -> None:
        model = composed(llama, tmp_path / "model", "math")
        before = content(model)
        for write in (
            lambda: composed(llama, model, "math"),
            lambda: add(model, llama / "code", model),
            lambda: remove(model, "math", model),
        ):
            with pytest.raises(FileExistsError, match="--overwrite"):
                write()
        assert content(model) == before

    @pytest.mark.promise(
        "`compose`, `add`, `remove`", "weights, config or other files that are links out of the folder", "refused"
    )
    @pytest.mark.parametrize("name", ["vocab.txt", "LICENSE", "generation_config.json", "config.json", WEIGHTS])
    def test_links_out_of_the_model_folder_are_not_copied(self, llama: Path, tmp_path: Path, name: str) -> None:
        model = shutil.copytree(llama / "grafted", tmp_path / "model")
        if (model / name).exists():
            shutil.move(model / name, tmp_path / "secret")
        else:
            (tmp_path / "secret").write_text("{}")
        (model / name).symlink_to(tmp_path / "secret")
        with pytest.raises(ValueError, match="leads out of the folder"):
            compose(model, packages(llama, "math"), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.promise(
        "`compose`, `add`, `remove`", "a model whose JSON files name code of others", "left out with a warning"
    )
    @pytest.mark.parametrize("way", ["compose", "add", "remove"])
    def test_code_of_others_is_left_out(self, llama: Path, tmp_path: Path, way: str) -> None:
        evil = "evil/repo--x.Evil"
        if way == "compose":
            model = shutil.copytree(llama / "grafted", tmp_path / "model")
        else:
            model = composed(llama, tmp_path / "model", "math", "code")
        for file, name in (
            ("config.json", "AutoModel"),
            ("tokenizer_config.json", "AutoTokenizer"),
            ("generation_config.json", "AutoConfig"),
        ):
            values = json.loads((model / file).read_text()) if (model / file).exists() else {}
            (model / file).write_text(json.dumps(values | {"a": 1, "auto_map": {name: evil}}))
        ways = {
            "compose": lambda: compose(model, packages(llama, "math"), tmp_path / "out"),
            "add": lambda: add(model, llama / "law", tmp_path / "out"),
            "remove": lambda: remove(model, "math", tmp_path / "out"),
        }
        with pytest.warns(UserWarning, match=evil):
            folder = ways[way]()
        assert not [name for name, data in content(folder).items() if evil.encode() in data]
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP


@pytest.mark.parametrize("way", ["compose", "add", "remove"])
def test_a_model_that_reads_other_tokens_than_its_anchor(
    llama: Path, tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = composed(llama, tmp_path / "model", "math")
    monkeypatch.setattr("flexmoe.tokenization.differs_from_anchor", lambda *_: "other tokens")
    ways = {
        "compose": lambda: composed(llama, tmp_path / "out", "math"),
        "add": lambda: add(model, llama / "code", tmp_path / "out"),
        "remove": lambda: remove(model, "math", tmp_path / "out"),
    }
    with pytest.raises(TokenizerError, match="other tokens"):
        ways[way]()
    assert not (tmp_path / "out").exists()


def test_progress_counts_every_byte_of_the_tensors(llama: Path, tmp_path: Path) -> None:
    counted: list[int] = []
    folder = compose(llama / "grafted", packages(llama, "math"), tmp_path / "out", progress=counted.append)
    with CheckpointFolder(folder) as tensors:
        assert sum(counted) == sum(info.nbytes for info in tensors.infos.values())
    added: list[int] = []
    add(folder, llama / "law", tmp_path / "added", progress=added.append)
    assert sum(added) > sum(counted)
