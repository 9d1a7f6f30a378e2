"""Messages name options on the command line, and arguments in Python."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from flexmoe_cli import main
from flexmoe_cli.application import app
from flexmoe_cli.wording import RENAMED, Options

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize(
    ("command", "message", "shown"),
    [
        ("graft", "or pass --overwrite (overwrite=True).", "or pass --overwrite."),
        ("graft", "router_tokens=0: must be above 0.", "--router-tokens 0: must be above 0."),
        ("graft", "give --public-data FILES (public_data=...); a sample", "give --public-data FILES; a sample"),
        ("graft", "choose --shared anchor (shared='anchor') to", "choose --shared anchor to"),
        (
            "graft",
            "with --expert and --router-data (experts=..., router_data=...).",
            "with --expert and --router-data.",
        ),
        ("graft", "norm_topk_prob=False: no", "--no-norm-topk-prob: no"),
        ("graft", "set fingerprint=True", "set --fingerprint"),
        ("graft", "give token=...", "give token=..."),
        ("graft", "AutoModel.from_pretrained(folder, dtype=..., revision='x')", None),
        ("train", "the text (validation_fraction=0.05): few", "the text (--validation-fraction 0.05): few"),
        (
            "train",
            "rank=3, alpha=None: for method='low_rank'.",
            "--rank 3, --alpha (not given): for --method low_rank.",
        ),
        ("train", "or resume=False (--no-resume) to start over", "or --no-resume to start over"),
        ("train", "version='x'", "--expert-version x"),
        ("train", "--text-column a (text_column) and", "--text-column a and"),
        ("compose", "give --name a=NAME (names=).", "give --name a=NAME."),
        ("compose", "--expert (experts=) moves the pin", "--expert moves the pin"),
        ("push", "with --allow-private-text (allow_private_text=True, or a list) if", "with --allow-private-text if"),
        ("plan", "k=9 experts, dtype='f' is no dtype", "--k 9 experts, --dtype f is no dtype"),
        ("inspect", "rank=3 (of another command), and a (usual) remark", None),
        ("compose", "--expert math=: write a name, or name=revision: --expert math=v2", None),
        ("export", "is for to='dense' only", "is for --to dense only"),
    ],
)
def test_reworded(command: str, message: str, shown: str | None) -> None:
    assert Options.of(COMMANDS[command].params).reword(message) == (message if shown is None else shown)


def test_errors_and_warnings_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    assert main(["graft", "anchor", "--out", "out"]) == 1
    assert capsys.readouterr().err.endswith("Choose another output folder, or pass --overwrite.\n")
    (tmp_path / "math.txt").write_text("text")
    assert main(["graft", "x", "--expert", "a=b", "--router-data", "a=math.txt", "--out", "o", "--router", "lda"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: --router lda needs public text")
    assert "give --public-data FILES; a sample" in error


def messages() -> Iterator[tuple[str, str]]:
    """Each text in the library that is no docstring: where it is, and the text with {} for values."""
    for folder in ("src/flexmoe", "conversion"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
            while pending:
                node = pending.pop()
                if isinstance(node, ast.JoinedStr):
                    parts = (part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", "".join(map(str, parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node.value
                elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                    pending += ast.iter_child_nodes(node)


COMMAND = re.compile(r"(flexmoe|hf|git|pip|model_signing|llama-gguf-split) [a-z{-].*?(?=[`.;:)]|$)")
FORMS = {"allow_private_text_in": "allow_private_text"}  # two options for one argument


def test_a_message_that_names_an_option_names_the_argument() -> None:
    alone = []
    for where, text in messages():
        for option in re.findall(r"--([a-z][a-z-]+)", COMMAND.sub("", text)):
            name = FORMS.get(option.replace("-", "_"), option.replace("-", "_"))
            arguments = {name, name.removeprefix("no_"), *(theirs for theirs, ours in RENAMED.items() if ours == name)}
            if " " in text and not re.search(rf"\b({'|'.join(arguments)})(=|\)|, )", text):
                alone.append(f"{where}: --{option} in {text!r}")
    assert not alone
