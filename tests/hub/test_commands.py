"""push, pull and compose --by-reference on the command line: their output, as text and as JSON, and exit codes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexmoe.conversion.graft import graft
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.testing import perturb_expert, tiny_anchor
from flexmoe_cli import main
from tests.support.hub import HubServer, point_client_at
from tests.support.soak import thinned

LICENSES = {"math": "apache-2.0", "code": "cc-by-nc-4.0"}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    tiny_anchor("llama").save_pretrained(folder / "anchor")
    graft(folder / "anchor", folder / "grafted")
    for name, license in LICENSES.items():
        model = FlexMoeForCausalLM.from_pretrained(folder / "grafted")
        model.add_expert_copy(name)
        perturb_expert(model, name)
        for block in model.flexmoe_blocks():
            torch.nn.init.zeros_(block.router[name].bias)
        model.save_expert(name, folder / name, license=license)
    return folder


@pytest.fixture
def world(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.chdir(stored)
    monkeypatch.setenv("COLUMNS", "200")
    with HubServer().running() as hub:
        hub.tokens["of-alice"] = "alice"
        point_client_at(hub.url, monkeypatch, token="of-alice")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield SimpleNamespace(hub=hub, out=tmp_path)


def run(capsys: pytest.CaptureFixture[str], *line: object, code: int = 0) -> tuple[str, str]:
    """The output of a command on stdout and stderr."""
    capsys.readouterr()
    assert main([str(word) for word in line]) == code
    captured = capsys.readouterr()
    return captured.out, " ".join(captured.err.split())


def test_push_and_pull(world: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = run(capsys, "push", "math", "alice/math", "--dry-run")
    assert all(name in out for name in ("To be pushed to alice/math", "expert.safetensors", "50.3 kB"))
    plan = json.loads(run(capsys, "push", "math", "alice/math", "--dry-run", "--json")[0])
    assert (plan["kind"], plan["repo"], plan["private"], plan["left_out"]) == ("package", "alice/math", [], [])
    assert not world.hub.repositories
    hashes = [file["sha256"] for file in plan["files"]]
    assert all(f" {digest[:16]}… " in out and len(digest) == 64 and digest not in out for digest in hashes)
    pushed = json.loads(run(capsys, "push", "math", "alice/math", "--json", "--message", "First")[0])
    assert pushed["url"] == f"{world.hub.url}/alice/math"
    assert world.hub.repositories["alice/math"].commits[pushed["revision"]].title == "First"
    folder = shutil.copytree("code", world.out / "with-notes")
    (folder / "notes.txt").write_text("Private.")
    out, _ = run(capsys, "push", folder, "alice/code")
    assert f"Pushed to {world.hub.url}/alice/code, commit " in out
    assert "Not pushed: notes.txt" in out
    pulled = json.loads(run(capsys, "pull", "alice/math", "--out", world.out / "pulled", "--json")[0])
    assert (pulled["kind"], pulled["experts"][0]["name"]) == ("package", "math")
    out, _ = run(capsys, "pull", "alice/code", "--out", world.out / "code")
    assert "holds the expert code (49.4 kB)" in out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("push nothing alice/x", "There is no folder nothing to push"),
        ("push anchor alice/x", "holds a 'llama' model, not a FlexMoE model"),
        ("push math bob/x", "may not write to 'bob/x'"),
        ("pull alice/nothing --out o", "neither a local folder nor a Hub repository"),
        ("compose grafted math --by-reference --out o", "give the checkpoint that was grafted"),
        ("compose grafted math --expert math --out o", "--expert requires --update"),
        ("compose grafted math --anchor anchor --out o", "--anchor requires --by-reference"),
        ("compose grafted math --update --out o", "give no packages"),
        ("compose grafted --update --anchor anchor --out o", "--anchor would have no effect"),
        ("compose grafted --update --name math=m --out o", "--name would have no effect"),
        ("compose grafted --update --public-prior 0 --out o", "--public-prior would have no effect"),
        ("compose grafted --update --num-experts-per-tok 2 --out o", "--num-experts-per-tok would have no effect"),
        ("compose grafted --update --by-reference --name a=b --anchor x --out o", "--anchor, --name would have no"),
        ("compose grafted --update --out o", "is not a composition"),
        ("compose grafted --out o", "There is no package to compose with"),
        ("compose grafted --update --expert math= --out o", "write a name, or name=revision"),
        ("compose grafted --update --expert m --expert m --out o", "given twice"),
    ],
)
def test_errors_are_one_paragraph(
    world: SimpleNamespace, capsys: pytest.CaptureFixture[str], line: str, words: str
) -> None:
    out, err = run(capsys, *line.split(), code=1)
    assert out == ""
    assert err.startswith("Error: ")
    assert words in err
    assert not Path("o").exists()


def test_a_refused_expert_is_added_with_no_verify(
    world: SimpleNamespace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = FlexMoeForCausalLM.from_pretrained("grafted")
    model.add_expert("math")
    for block in model.flexmoe_blocks():
        block.router["math"].bias.data.fill_(100.0)
    evil = str(model.save_expert("math", tmp_path / "evil"))
    for out, line in (
        ("added", ("add", "grafted", evil)),
        ("composed", ("compose", "grafted", evil)),
        ("named", ("compose", "grafted", evil, "--by-reference", "--anchor", "anchor")),
    ):
        _, err = run(capsys, *line, "--out", tmp_path / out, code=1)
        assert "is refused" in err
        assert "--no-verify" in err
        run(capsys, *line, "--out", tmp_path / out, "--no-verify")
    update = ("compose", tmp_path / "named", "--update", "--out", tmp_path / "updated")
    for block in model.flexmoe_blocks():
        block.router["math"].bias.data.fill_(200.0)
    model.save_expert("math", evil, overwrite=True)
    _, err = run(capsys, *update, code=1)
    assert "is refused" in err
    run(capsys, *update, "--no-verify")


def test_private_text_is_listed(world: SimpleNamespace, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "named"
    model = FlexMoeForCausalLM.from_pretrained("grafted")
    model.add_expert("math")
    model.save_expert("math", folder, data_statement="Ask jane@hospital.example.org")
    out, _ = run(capsys, "push", folder, "alice/math", "--dry-run", code=1)
    assert "A push is refused" in out
    assert out.count("Looks private:") == 2  # in the manifest, and in the card that quotes it
    _, err = run(capsys, "push", folder, "alice/math", code=1)
    assert "an e-mail address (jane@hospital.example.org)" in err
    _, err = run(capsys, "push", folder, "alice/math", "--allow-private-text-in", "README.md", code=1)
    assert "README.md, line" not in err
    both = ("--allow-private-text-in", "README.md", "--allow-private-text-in", "expert_config.json")
    run(capsys, "push", folder, "alice/math", "--dry-run", *both)
    run(capsys, "push", folder, "alice/math", "--allow-private-text")


def test_compose_by_reference_and_update(world: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("math", "code"):
        run(capsys, "push", name, f"alice/{name}")
    line = ("compose", "grafted", "alice/math", "alice/code", "--by-reference", "--anchor", "anchor")
    out, err = run(capsys, *line, "--out", world.out / "model")
    assert "references the parts of a model with the experts public, math, code" in out
    assert "Warning: code (cc-by-nc-4.0) forbids commercial use" in err
    out, _ = run(capsys, "inspect", world.out / "model")
    assert all(text in out for text in ("composition", "alice/math", "alice/code", "cc-by-nc-4.0"))
    out, _ = run(capsys, "compose", world.out / "model", "--update", "--out", world.out / "same")
    assert "0 of its pins moved" in out
    model = FlexMoeForCausalLM.from_pretrained("grafted")
    model.add_expert("math")
    model.save_expert("math", world.out / "newer", version="2.0.0")
    run(capsys, "push", world.out / "newer", "alice/math")
    update = ("compose", world.out / "model", "--update", "--expert", "math", "--out", world.out / "updated")
    (moved,) = json.loads(run(capsys, *update, "--json")[0])["moved"]
    assert (moved["name"], moved["old_version"], moved["new_version"]) == ("math", "1.0.0", "2.0.0")
    out, _ = run(capsys, *update, "--overwrite")
    assert "1 of its pins moved" in out
    assert "2.0.0" in out


def test_licence_conflicts_of_a_merged_model(world: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(capsys, "compose", "grafted", "math", "code", "--out", world.out / "model")
    assert "holds a model with the experts public, math, code" in out
    assert "the model cannot be used commercially" in err
    card = (world.out / "model" / "README.md").read_text()
    assert "forbids commercial use" in card


@pytest.mark.parametrize("is_fresh", thinned([False, True], [False]))
def test_without_colours(
    is_fresh: bool, world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm-256color", "NO_COLOR": "1"}.items():
        monkeypatch.setenv(name, value)
    line = ["push", "math", "alice/as-a-process", "--dry-run"]
    if is_fresh:
        environment = world.hub.environment(world.out / "home", token="of-alice")
        subprocess.run([sys.executable, "-m", "flexmoe", *line], env=environment, check=True)
    else:
        assert main(line) == 0
    shown = capfd.readouterr().out
    assert "To be pushed to alice/as-a-process" in shown
    assert "\x1b[1m" in shown
    # NO_COLOR disables colours, not bold type: https://no-color.org
    assert "\x1b[3" not in shown


def test_completion() -> None:
    shell = {"_FLEXMOE_COMPLETE": "complete_bash", "COMP_WORDS": "flexmoe pu", "COMP_CWORD": "1"}
    program = [sys.executable, "-c", "import sys; from flexmoe_cli import main; sys.exit(main())"]
    done = subprocess.run(program, env={**os.environ, **shell}, capture_output=True, text=True)
    assert done.stdout.split() == ["push", "pull"]
