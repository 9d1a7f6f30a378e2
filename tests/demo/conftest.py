"""A demo small enough for a test: two owners, a 2-layer anchor, a few steps; run once, with every `open` watched."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

pytest.importorskip("sympy", reason="the demo's extra is not installed")

from flexmoe.demo import DemoSettings, run_demo
from flexmoe.demo.anchor import AnchorSettings
from flexmoe.demo.corpus import CorpusSettings
from flexmoe.demo.owners import OwnerSettings

# Runs in every child process before anything else: a line per file opened, "<owner's folder or -> <path>".
WATCHER = """
import os, sys
_log = os.open(os.environ["FLEXMOE_TEST_OPENS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
_home = os.getcwd()
def _watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        os.write(_log, f"{_home}\\t{os.path.realpath(os.fsdecode(arguments[0]))}\\n".encode())
sys.addaudithook(_watch)
"""


def tiny_settings(seed: int = 0) -> DemoSettings:
    """Seconds instead of minutes; the losses mean nothing."""
    return DemoSettings(
        corpus=CorpusSettings(
            owners=("math", "code"),
            seed=seed,
            public_characters=60_000,
            owner_characters=24_000,
            held_out_characters=3_000,
        ),
        anchor=AnchorSettings(
            vocabulary=300, layers=2, hidden=32, intermediate=64, heads=2, steps=3, sequence_length=64, seed=seed
        ),
        owner=OwnerSettings(steps=2, sequence_length=64, router_tokens=1_000, warmup_steps=1, seed=seed),
    )


@dataclass(frozen=True)
class TinyRun:
    """Where the run's files are, and what its child processes opened: (working directory, path)."""

    out: Path
    opened: list[tuple[Path, Path]]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> TinyRun:
    # workers of pytest-xdist share one run: the folder above theirs is the whole session's
    several = hasattr(request.config, "workerinput")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if several else base) / "tiny-demo"
    with FileLock(f"{folder}.lock"):
        if not (folder / "out" / "report.json").is_file():
            _run_watched(folder)
    pairs = (line.split("\t") for line in (folder / "opens.log").read_text().splitlines())
    return TinyRun(folder / "out", [(Path(home), Path(path)) for home, path in pairs])


def _run_watched(folder: Path) -> None:
    (folder / "hook").mkdir(parents=True)
    (folder / "hook" / "sitecustomize.py").write_text(WATCHER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder / "hook"), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("FLEXMOE_TEST_OPENS", str(folder / "opens.log"))
        run_demo(folder / "out", settings=tiny_settings(), console=Console(quiet=True))
