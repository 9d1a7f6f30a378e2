"""The README.md of packages, models and compositions: written with them, written again, and by the command."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import flexmoe
from flexmoe.card_files import license_conflicts, measure, write_card
from flexmoe.cards.facts import model_facts
from flexmoe.cards.rendering import render
from flexmoe.conversion.compose import add, compose, remove
from flexmoe.conversion.graft import graft
from flexmoe.evaluation import DomainScore, evaluate
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.packages.package import ExpertPackage, PackageError
from flexmoe.testing import perturb_expert, tiny_anchor
from flexmoe_cli import main
from tests.support.letters import letter_tokenizer

LICENSES = {"math": "mit", "code": "cc-by-nc-4.0"}
SCORE = DomainScore(loss=1.5, perplexity=4.4817, tokens=30, documents=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graft with the dense model's own card beside it, two packages, a model of both and a composition of them."""
    folder = tmp_path_factory.mktemp("world")
    tiny_anchor("llama").save_pretrained(folder / "anchor")
    letter_tokenizer().save_pretrained(folder / "anchor")
    graft(folder / "anchor", folder / "grafted")
    (folder / "grafted" / "README.md").write_text("The dense model's own card.")
    for name, license in LICENSES.items():
        model = FlexMoeForCausalLM.from_pretrained(folder / "grafted")
        model.add_expert_copy(name)
        perturb_expert(model, name)
        model.save_expert(name, folder / name, license=license, data_statement=f"The {name} of one owner.")
    compose(folder / "grafted", [folder / name for name in LICENSES], folder / "merged")
    sources = {"public": folder / "anchor", **{name: folder / name for name in LICENSES}}
    FlexMoeForCausalLM.from_pretrained(folder / "merged").save_composition(folder / "composition", sources=sources)
    (folder / "text.txt").write_text("some held out text of a few words.\n" * 4)
    return folder


@pytest.fixture
def copy(world: Path, tmp_path: Path) -> Path:
    shutil.copytree(world, tmp_path / "copy")
    return tmp_path / "copy"


class TestCardsWrittenWithFolders:
    def test_compose_writes_a_new_card(self, world: Path) -> None:
        model = FlexMoeForCausalLM.from_pretrained(world / "merged")
        card = (world / "merged" / "README.md").read_text(encoding="utf-8")
        assert card == render("model", model_facts(model.config))
        assert "The dense model's own card" not in card
        for name, license in LICENSES.items():
            assert f"| `{name}` | not recorded |" in card
            assert license in card
        assert "code (cc-by-nc-4.0) forbids commercial use, which the licences of math (mit) allow" in card

    def test_after_removal_it_is_the_card_of_the_model_that_never_had_the_expert(
        self, world: Path, tmp_path: Path
    ) -> None:
        never = compose(world / "grafted", [world / "code"], tmp_path / "never") / "README.md"
        after = remove(world / "merged", "math", tmp_path / "after") / "README.md"
        assert after.read_bytes() == never.read_bytes()
        again = add(tmp_path / "after", world / "math", tmp_path / "again") / "README.md"
        both = compose(world / "grafted", [world / "code", world / "math"], tmp_path / "both") / "README.md"
        assert again.read_bytes() == both.read_bytes() != never.read_bytes()

    def test_the_card_of_a_model_without_experts(self, world: Path, tmp_path: Path) -> None:
        alone = remove(remove(world / "merged", "math", tmp_path / "one"), "code", tmp_path / "none")
        card = (alone / "README.md").read_text(encoding="utf-8")
        assert "# A FlexMoE model, ready for experts" in card.splitlines()
        assert "| expert |" not in card

    def test_packages_and_compositions(self, world: Path) -> None:
        package = ModelCard.load(world / "math" / "README.md")
        assert (package.data.license, "> The math of one owner." in package.text) == ("mit", True)
        composition = ModelCard.load(world / "composition" / "README.md")
        assert "| `code` | not recorded | ../code |  | 1.0.0 | full | cc-by-nc-4.0 |" in composition.text


class TestWriteCard:
    @pytest.mark.parametrize("name", ["math", "merged", "composition"])
    def test_without_arguments_it_is_the_card_that_was_written_with_the_folder(self, copy: Path, name: str) -> None:
        before = (copy / name / "README.md").read_bytes()
        (copy / name / "README.md").write_text("written over")
        assert write_card(copy / name) == copy / name / "README.md"
        assert (copy / name / "README.md").read_bytes() == before
        assert not [entry for entry in os.listdir(copy / name) if entry.startswith(".")]

    @pytest.mark.parametrize("name", ["math", "merged", "composition"])
    def test_scores_from_python_and_from_a_file(self, copy: Path, name: str) -> None:
        direct = write_card(copy / name, evaluation={"prose": SCORE}).read_bytes()
        (copy / "scores.json").write_text(json.dumps({"model": "m", "domains": {"prose": SCORE.to_dict()}}))
        assert flexmoe.write_card(copy / name, evaluation=copy / "scores.json").read_bytes() == direct
        data = ModelCard.load(copy / name / "README.md").data
        assert data.model_name == name
        found = {result.metric_type: result.metric_value for result in data.eval_results}
        assert found == {"loss": 1.5, "perplexity": 4.4817}

    def test_licences(self, copy: Path) -> None:
        given = ModelCard.load(write_card(copy / "merged", license="MIT", anchor_license="llama3.1"))
        assert given.data.license == "mit"
        assert license_conflicts(copy / "merged", license="MIT", anchor_license="llama3.1") == [
            "the anchor (llama3.1) has terms of use that must be passed on; the licence of the model is mit.",
            "code (cc-by-nc-4.0) forbids commercial use, which the licence of the model (mit) allows.",
        ]
        assert license_conflicts(copy / "merged", license="cc-by-nc-4.0") == []
        assert license_conflicts(copy / "math") == []

    @pytest.mark.parametrize(
        ("name", "options", "error", "words"),
        [
            ("nowhere", {}, FileNotFoundError, "no such folder"),
            ("", {}, FileNotFoundError, "neither config.json"),
            ("anchor", {}, ValueError, "graft"),
            ("math", {"anchor_license": "mit"}, ValueError, "belong in the card of a model"),
            ("merged", {"version": "2"}, ValueError, "only experts have a version and a data statement"),
            ("math", {"version": ""}, PackageError, "'version' must be"),
            ("math", {"routing": {}}, ValueError, "belong in the card of a model"),
            ("merged", {"evaluation": "{}"}, ValueError, "has no domains"),
            ("merged", {"evaluation": '{"domains": {"a": {"loss": 1}}}'}, ValueError, "must have loss, perplexity"),
            (
                "merged",
                {"evaluation": '{"domains": {"a": {"loss": "1", "perplexity": 1, "tokens": 1, "documents": 1}}}'},
                ValueError,
                "loss must be a number; it is '1'",
            ),
        ],
    )
    def test_invalid_arguments(
        self, world: Path, tmp_path: Path, name: str, options: dict, error: type[Exception], words: str
    ) -> None:
        if "evaluation" in options:
            (tmp_path / "scores.json").write_text(options["evaluation"])
            options = {"evaluation": tmp_path / "scores.json"}
        with pytest.raises(error, match=words):
            write_card(world / name, **options)

    def test_metadata_of_a_package_is_written_into_its_manifest(self, copy: Path) -> None:
        before = ExpertPackage.open(copy / "math").manifest
        metadata = {"license": "cc-by-4.0", "version": "1.1.0", "data_statement": "Problems of ours."}
        card = ModelCard.load(write_card(copy / "math", **metadata))
        package = ExpertPackage.open(copy / "math")
        assert package.manifest == dataclasses.replace(before, **metadata)
        assert dict(package.tensors())  # the hashes are still valid
        assert card.data.license == "cc-by-4.0"
        assert all(text in card.text for text in ("> Problems of ours.", "1.1.0"))
        write_card(copy / "math", version="1.2.0")
        assert ExpertPackage.open(copy / "math").manifest.license == "cc-by-4.0"

    def test_the_card_of_a_signed_package_is_not_changed(self, copy: Path) -> None:
        (copy / "math" / "model.sig").write_text("{}")
        before = (copy / "math" / "README.md").read_bytes()
        with pytest.raises(ValueError, match=r"delete model\.sig"):
            write_card(copy / "math", evaluation={"prose": SCORE})
        assert (copy / "math" / "README.md").read_bytes() == before

    def test_a_failure_keeps_the_old_card(self, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = (copy / "merged" / "README.md").read_bytes()
        monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_card(copy / "merged", license="mit")
        monkeypatch.undo()
        assert (copy / "merged" / "README.md").read_bytes() == before
        assert not [entry for entry in os.listdir(copy / "merged") if entry.startswith(".")]


def test_scores_and_usage_are_measured_in_the_same_passes(world: Path) -> None:
    texts = {"prose": [world / "text.txt"]}
    scores, usages = measure(world / "merged", texts)
    assert scores == evaluate(str(world / "merged"), texts)
    assert list(usages) == ["prose"]
    assert sum(usages["prose"].share().values()) == pytest.approx(1)
    assert usages["prose"].tokens >= scores["prose"].tokens
    for name, words in (("math", "an expert package"), ("composition", "a composition")):
        with pytest.raises(ValueError, match=words):
            measure(world / name, texts)


class TestCommand:
    def test_it_measures_on_text(self, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
        line = ["card", str(copy / "merged"), "--data", f"prose={copy / 'text.txt'}", "--license", "apache-2.0"]
        assert main(line) == 0
        captured = capsys.readouterr()
        assert f"Wrote {copy / 'merged' / 'README.md'}." in captured.out
        assert "Warning: code (cc-by-nc-4.0) forbids commercial use" in captured.err
        card = ModelCard.load(copy / "merged" / "README.md")
        assert [result.dataset_name for result in card.data.eval_results] == ["prose", "prose"]
        assert "## Routing" in card.text
        assert "| expert | prose |" in card.text

    def test_json(self, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (copy / "scores.json").write_text(json.dumps({"domains": {"prose": SCORE.to_dict()}}))
        line = ["card", str(copy / "merged"), "--evaluation", str(copy / "scores.json"), "--license", "cc-by-nc-4.0"]
        assert main([*line, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {
            "path": str(copy / "merged"),
            "card": str(copy / "merged" / "README.md"),
            "license_conflicts": [],
        }
        assert "1.5000" in (copy / "merged" / "README.md").read_text(encoding="utf-8")

    def test_a_file_of_scores_and_text_exclude_each_other(
        self, world: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["card", str(world / "merged"), "--evaluation", "a.json", "--data", "a=b.txt"]) == 1
        assert "Pass one of them" in capsys.readouterr().err
