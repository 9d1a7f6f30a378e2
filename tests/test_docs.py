"""What documents show: docs/peft.md runs on a tiny model; commands and recipe of docs/grafting.md are ones."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml

from flexmoe.recipes import parse_recipe
from flexmoe.testing import tiny_flexmoe
from flexmoe_cli.application import app

ROOT = Path(__file__).resolve().parents[1]


def examples(document: str, language: str = "python") -> list[str]:
    """The fenced blocks of one language in a document."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "docs" / document).read_text(), flags=re.M | re.S)


@pytest.mark.filterwarnings("error:.*owners at once")
def test_the_examples_of_peft_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_flexmoe("llama", ["math", "code"]).save_pretrained("model")
    blocks = examples("peft.md")
    assert len(blocks) == 4
    scope: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/peft.md", "exec"), scope)
    adapted = scope["adapted"]
    assert adapted.base_model.active_adapters == ["default", "for-two"]
    assert adapted.expert_names == ["public", "math", "math-2"]
    adapted.save_pretrained("both")
    saved = {str(path.parent) for path in Path("both").rglob("adapter_model.safetensors")}
    assert saved == {"both", "both/for-two"}


def test_the_commands_and_the_recipe_of_grafting_are_ones():
    lines = "\n".join(examples("grafting.md", "bash")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("flexmoe ")]
    assert len(commands) == 4
    graft = typer.main.get_command(app).commands["graft"]
    for words in commands:
        with graft.make_context("graft", words[2:]) as context:
            assert context.params["out"]
    (recipe,) = examples("grafting.md", "yaml")
    read = parse_recipe(yaml.safe_load(recipe))
    assert [expert.name for expert in read.experts] == ["math", "code-tuned"]
    assert read.active_experts == ["math", "code-tuned"]
