"""Each script of examples/ runs as a program, offline, and prints what it promises.

`make test` runs them in its own process, because importing the libraries takes longer than most of them; `make soak`
each in a fresh one. The one that publishes talks to a Hub on the loopback (`tests/support/hub`).
"""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest

from tests.support.hub import HubServer, point_client_at
from tests.support.hub.client import environment
from tests.support.soak import thinned

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

LAST_LINES = {
    "use_a_model": "share of the routing weight:",
    "add_and_remove": "removed equals never added: yes",
    "train_an_expert": "loss on math text:",
    "peft_on_one_expert": "saved math",
    "serve_requests": "served; experts left: ['public', 'code']",
    "publish_and_withdraw": "loaded without it: ['public']",
}
"""How the last line that each example prints begins."""


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example in this process, as `python NAME.py ARGUMENTS` would, and returns its standard output."""
    modules = set(sys.modules)

    def run_here(name: str, *arguments: str) -> str:
        script = EXAMPLES / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        monkeypatch.syspath_prepend(EXAMPLES)
        capsys.readouterr()
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    yield run_here
    for module in {"tiny_anchor", "use_a_model"} - modules:  # the examples' own are not left to other tests
        sys.modules.pop(module, None)


def run_in_a_fresh_process(name: str, *arguments: str, environment: dict[str, str]) -> str:
    """The standard output of an example."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_every_example_is_run() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()}
    assert scripts == set(LAST_LINES)


@pytest.mark.parametrize("name", [name for name in LAST_LINES if name != "publish_and_withdraw"])
@pytest.mark.parametrize("is_fresh", thinned([False, True], [False]))
def test_the_example_runs_offline(name: str, is_fresh: bool, run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if is_fresh:
        settings = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        output = run_in_a_fresh_process(name, environment=settings)
    else:
        output = run(name)
    assert output.splitlines()[-1].startswith(LAST_LINES[name])


@pytest.mark.filterwarnings("ignore:Loaded without 'math'")  # what the example shows
@pytest.mark.parametrize("is_fresh", thinned([False, True], [False]))
def test_the_example_that_publishes_runs_against_a_hub(is_fresh: bool, run, tmp_path: Path, monkeypatch) -> None:
    arguments = ("publish_and_withdraw", "--namespace", "alice")
    with HubServer().running() as hub:
        hub.tokens["secret"] = "alice"
        if is_fresh:
            settings = environment(hub.url, tmp_path, token="secret")
            output = run_in_a_fresh_process(*arguments, environment=settings)
        else:
            point_client_at(hub.url, monkeypatch, token="secret")
            monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
            output = run(*arguments)
        assert not hub.repositories
    lines = output.splitlines()
    assert any(line.startswith("withdrawn:") and "flexmoe-example-expert" in line for line in lines)
    assert lines[-1].startswith(LAST_LINES["publish_and_withdraw"])
