"""The README holds: its quickstart runs, its commands, targets and links exist, its figures are the measured ones.

docs/benchmarks.md has generated figures too and is checked with it. Other documents: `test_docs.py`.
"""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import typer.main

from flexmoe.demo.anchor import AnchorSettings, build_anchor, train_tokenizer
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


def test_it_is_short():
    assert len(README.splitlines()) <= 150


@pytest.fixture
def anchors(tmp_path, monkeypatch):
    """Tiny models in folders that are called as the quickstart's models on the Hub, in the working directory."""
    settings = AnchorSettings(vocabulary=300, layers=2, hidden=32, intermediate=64, heads=2)
    tokenizer = train_tokenizer(["The capital of France is"], settings.vocabulary)
    monkeypatch.chdir(tmp_path)
    (quickstart,) = blocks("python")
    names = re.findall(r'"(HuggingFaceTB/[^"]+)"', quickstart)
    assert len(names) == 2
    for name in names:
        for part in (build_anchor(tokenizer, settings), tokenizer):
            part.save_pretrained(tmp_path / name)
    config = tmp_path / names[1] / "config.json"
    differences = {
        "bos_token_id": 1,
        "pad_token_id": 2,
        "transformers.js_config": {"kv_cache_dtype": {}},
    }  # as published
    config.write_text(json.dumps({**json.loads(config.read_text()), **differences}))


@pytest.mark.usefixtures("anchors")
def test_the_quickstart_runs():
    (quickstart,) = blocks("python")
    scope: dict[str, object] = {}
    exec(compile(quickstart, "README.md", "exec"), scope)
    assert scope["model"].expert_names == ["public", "chat"]


@pytest.mark.parametrize("words", [words for words in commands() if words[0] == "flexmoe"], ids=" ".join)
def test_the_commands_exist(words):
    command = typer.main.get_command(app).commands[words[1]]
    with command.make_context(words[1], words[2:]) as context:
        assert context.params


def test_the_subcommands_it_lists_exist():
    (listed,) = re.findall(r"`flexmoe --help` lists\s+the others: (.*?) and more", README, flags=re.S)
    assert set(re.findall(r"`([a-z]+)`", listed)) <= set(typer.main.get_command(app).commands)


def test_the_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = {words[1] for words in commands() if words[0] == "make"} | set(re.findall(r"`make ([a-z-]+)`", README))
    assert {"demo", "test"} <= named <= targets


def test_links_lead_somewhere():
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link}
    missing = [path for path in sorted(links) if not (ROOT / path).exists()]
    assert links
    assert missing == []


def test_the_figures_are_the_measured_ones():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from readme_figures import figures
    finally:
        sys.path.pop(0)
    for name, generated in figures(ROOT / "docs").items():
        document = (ROOT / name).read_text()
        for marker, text in generated.items():
            between = re.search(rf"<!-- {marker}: begin[^>]*-->\n(.*?)<!-- {marker}: end -->", document, flags=re.S)
            assert between, f"{name} has no markers for {marker}"
            assert between[1] == text, f"{name} is out of date: run python benchmarks/readme_figures.py"
    assert json.loads((ROOT / "docs" / "results.json").read_text())["seeds"] == [0, 1, 2]
