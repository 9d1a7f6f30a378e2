"""The documents hold: their commands and recipes are valid, docs/peft.md runs, and the API reference is complete.

The README is checked in `test_readme.py`; links and the site in `make docs`.
"""

import pkgutil
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer.main
import yaml

import flexmoe
from flexmoe.recipes import parse_recipe
from flexmoe.testing import tiny_flexmoe
from flexmoe_cli.application import app
from tests.support.letters import letter_tokenizer
from tests.support.promises import promises_in_code, rows_on_page

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["ARCHITECTURE.md", "CONTRIBUTING.md", "SECURITY.md"]
DOCUMENTS += [f"docs/{path.relative_to(ROOT / 'docs').as_posix()}" for path in sorted(ROOT.glob("docs/**/*.md"))]


def blocks(document: str, language: str = "python") -> list[str]:
    """The fenced blocks of one language in a document."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), flags=re.M | re.S)


def commands(document: str) -> list[list[str]]:
    """The `flexmoe` command lines of a document, as words."""
    lines = "\n".join(blocks(document, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("flexmoe ")]


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if commands(document)])
def test_the_commands_exist(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    group = typer.main.get_command(app)
    for words in commands(document):
        for word in words:
            if Path(word).suffix in (".txt", ".md", ".jsonl"):  # several files follow an option only if they exist
                Path(word).parent.mkdir(parents=True, exist_ok=True)
                Path(word).touch()
        with group.commands[words[1]].make_context(words[1], words[2:]) as context:
            assert context.params, words


def test_the_table_of_promises_is_that_of_the_tests():
    """Written by `make compatibility`, which also notes tests that do not pass."""
    assert rows_on_page() == [promise.cells() for promise in promises_in_code()]


@pytest.mark.parametrize("document", ["README.md", *DOCUMENTS])
def test_the_names_of_the_library_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    imported = re.findall(r"^from (flexmoe[\w.]*) import (.+)$", text, flags=re.M)
    names = {f"{module}.{name.strip()}" for module, names in imported for name in names.split("#")[0].split(",")}
    names |= set(re.findall(r"(?<![\w./:-])flexmoe(?:\.[A-Za-z_]\w*)+(?![\w/-])", text)) - {"flexmoe.py"}
    assert [name for name in sorted(names) if not exists(name)] == []


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_most_documents_of_use_have_commands():
    assert sum(bool(commands(document)) for document in DOCUMENTS) >= 10


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if blocks(document)])
def test_the_python_blocks_are_valid(document):
    for block in blocks(document):
        compile(block, document, "exec")


@pytest.mark.filterwarnings("error:.*owners at once")
def test_the_examples_of_peft_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_flexmoe("llama", ["math", "code"]).save_pretrained("model")
    examples = blocks("docs/peft.md")
    assert len(examples) == 4
    scope: dict[str, object] = {}
    for example in examples:
        exec(compile(example, "docs/peft.md", "exec"), scope)
    adapted = scope["adapted"]
    assert adapted.base_model.active_adapters == ["default", "for-two"]
    assert adapted.expert_names == ["public", "math", "math-2"]
    adapted.save_pretrained("both")
    saved = {str(path.parent) for path in Path("both").rglob("adapter_model.safetensors")}
    assert saved == {"both", "both/for-two"}


@pytest.mark.promise(
    "chat templates, streamers, threads, batches, caches across turns",
    "the examples of docs/serving.md",
    "they run",
)
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*thread")
def test_the_examples_of_serving_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_flexmoe("llama", ["math", "code"]).save_pretrained("model")
    tokenizer = letter_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}\n{% endfor %}assistant "
    tokenizer.save_pretrained("model")
    scope: dict[str, object] = {}
    for example in blocks("docs/serving.md"):
        exec(compile(example, "docs/serving.md", "exec"), scope)
    assert len({tuple(output[0].tolist()) for output in scope["outputs"]}) > 1  # experts matter
    assert [message["role"] for message in scope["messages"]] == ["user", "assistant", "user", "assistant"]
    assert len(scope["texts"]) == 2
    assert "cache" in capsys.readouterr().out


def test_the_recipe_of_grafting_is_valid():
    (recipe,) = blocks("docs/grafting.md", "yaml")
    read = parse_recipe(yaml.safe_load(recipe))
    assert [expert.name for expert in read.experts] == ["math", "code-tuned"]
    assert read.active_experts == ["math", "code-tuned"]


def test_the_api_reference_has_every_exported_name():
    pages = "\n".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    assert sorted(re.findall(r"^::: flexmoe\.(\w+)$", pages, flags=re.M)) == sorted(flexmoe.__all__)
    index = (ROOT / "docs" / "api" / "index.md").read_text()
    assert [name for name in flexmoe.__all__ if f"`{name}`" not in index] == []
