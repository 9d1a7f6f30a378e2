"""Each script of examples/ runs in a fresh process, offline, and prints what it promises.

The one that publishes talks to a Hub on the loopback (`tests/support/hub`).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.hub import HubServer
from tests.support.hub.client import environment

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

LAST_LINES = {
    "use_a_model": "share of the routing weight:",
    "add_and_remove": "removed equals never added: yes",
    "train_an_expert": "loss on math text:",
    "peft_on_one_expert": "saved math",
    "publish_and_withdraw": "loaded without it: ['public']",
}
"""How the last line that each example prints begins."""


def run(name: str, *arguments: str, environment: dict[str, str]) -> str:
    """The standard output of an example."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_every_example_is_run() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text()}
    assert scripts == set(LAST_LINES)


@pytest.mark.parametrize("name", [name for name in LAST_LINES if name != "publish_and_withdraw"])
def test_the_example_runs_offline(name: str, tmp_path: Path) -> None:
    output = run(name, environment={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert output.splitlines()[-1].startswith(LAST_LINES[name])


def test_the_example_that_publishes_runs_against_a_hub(tmp_path: Path) -> None:
    with HubServer().running() as hub:
        hub.tokens["secret"] = "alice"
        settings = environment(hub.url, tmp_path, token="secret")
        output = run("publish_and_withdraw", "--namespace", "alice", environment=settings)
        assert not hub.repositories
    lines = output.splitlines()
    assert any(line.startswith("withdrawn:") and "flexmoe-example-expert" in line for line in lines)
    assert lines[-1].startswith(LAST_LINES["publish_and_withdraw"])
