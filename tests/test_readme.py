"""What the README says is so: its example runs, its commands and files exist, its figures are the measured ones."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer.main

from flexmoe.conversion.compose import compose
from flexmoe.conversion.graft import graft
from flexmoe.demo.anchor import AnchorSettings, build_anchor, train_tokenizer
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.testing import perturb_expert
from flexmoe_cli.application import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The README's fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


def commands() -> list[list[str]]:
    """Every command line of the README, as words."""
    lines = "\n".join(blocks("bash")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.fixture
def demo_folder(tmp_path, monkeypatch):
    """What `make demo` leaves, as far as the example needs it, around a tiny random model."""
    settings = AnchorSettings(vocabulary=300, layers=2, hidden=32, intermediate=64, heads=2)
    tokenizer = train_tokenizer(["Problem 1. Find x: x + 1 = 2."], settings.vocabulary)
    for part in (build_anchor(tokenizer, settings), tokenizer):
        part.save_pretrained(tmp_path / "anchor")
    demo = tmp_path / "runs" / "demo"
    (demo / "owners" / "math").mkdir(parents=True)
    (demo / "composed").mkdir()
    graft(tmp_path / "anchor", tmp_path / "grafted")
    model = FlexMoeForCausalLM.from_pretrained(tmp_path / "grafted")
    model.add_expert_copy("math")
    perturb_expert(model, "math")
    package = model.save_expert("math", demo / "owners" / "math" / "package")
    compose(tmp_path / "grafted", [package], demo / "composed" / "model", public_prior=0.0)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("demo_folder")
def test_the_example_runs():
    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line.startswith("model")]) == 4
    scope: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert scope["model"].expert_names == ["public", "math"]


@pytest.mark.parametrize("words", [words for words in commands() if words[0] == "flexmoe"], ids=" ".join)
def test_the_commands_are_ones(words):
    command = typer.main.get_command(app).commands[words[1]]
    with command.make_context(words[1], words[2:]) as context:
        assert context.params


def test_the_make_targets_are_ones():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = {words[1] for words in commands() if words[0] == "make"} | set(re.findall(r"`make ([a-z-]+)`", README))
    assert named
    assert named <= targets


def test_links_and_the_tree_lead_somewhere():
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link}
    tree = {line.split()[0] for line in README.splitlines() if re.match(r"[a-z_]+(/[a-z_]+)*/ ", line)}
    assert {"modeling/", "conversion/", "src/flexmoe/", "tests/"} <= tree
    missing = [path for path in sorted(links | tree) if not (ROOT / path).exists()]
    assert missing == []


def test_the_figures_are_the_measured_ones():
    sys.path.insert(0, str(ROOT / "tests" / "bench"))
    try:
        from readme_figures import figures
    finally:
        sys.path.pop(0)
    for name, text in figures(ROOT / "docs").items():
        between = re.search(rf"<!-- {name}: begin[^>]*-->\n(.*?)<!-- {name}: end -->", README, flags=re.S)
        assert between, f"README.md has no place for {name}"
        assert between[1] == text
    assert json.loads((ROOT / "docs" / "results.json").read_text())["seeds"] == [0, 1, 2]
