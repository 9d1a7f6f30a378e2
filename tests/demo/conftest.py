"""A small run of the demo: two owners, a 2-layer anchor, a few steps. It runs once and records every file opened.

In `make test` its processes are forked from one that has imported the libraries; in `make soak` they are new ones, as
in the demo itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

pytest.importorskip("sympy", reason="the extra `demo` is not installed")

from flexmoe.demo import DemoSettings, opt_out, owners, run_demo
from flexmoe.demo.anchor import AnchorSettings
from flexmoe.demo.corpus import CorpusSettings
from flexmoe.demo.owners import OwnerSettings
from tests.support.forked import replace_new_processes
from tests.support.soak import thinned

# A sitecustomize module that runs first in each child process: logs "<working directory>\t<path>" of each file opened.
AUDIT_HOOK = """
import os, sys
_log = os.open(os.environ["FLEXMOE_TEST_OPENS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
_cwd = os.getcwd()
def _log_open(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        os.write(_log, f"{_cwd}\\t{os.path.realpath(os.fsdecode(arguments[0]))}\\n".encode())
sys.addaudithook(_log_open)
"""


def tiny_settings(seed: int = 0) -> DemoSettings:
    """Settings of a run that takes seconds; its losses are meaningless."""
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
    """The output folder of the run, the files that its child processes opened (working directory, path), and which
    processes these were."""

    out: Path
    opened: list[tuple[Path, Path]]
    processes: str


@pytest.fixture(scope="session", params=thinned(["forked", "new"], ["forked"]))
def tiny_run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> TinyRun:
    # workers of pytest-xdist share one run, in the parent of their own folders
    is_worker = hasattr(request.config, "workerinput")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if is_worker else base) / f"tiny-demo-{request.param}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "out" / "report.json").is_file():
            _run_with_audit_hook(folder, request.param)
    lines = (line.split("\t") for line in (folder / "opens.log").read_text().splitlines())
    return TinyRun(folder / "out", [(Path(cwd), Path(path)) for cwd, path in lines], request.param)


@pytest.fixture
def processes_of_the_run(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts processes as `tiny_run` did."""
    if tiny_run.processes == "forked":
        replace_new_processes(monkeypatch, [owners, opt_out])


def _run_with_audit_hook(folder: Path, processes: str) -> None:
    (folder / "hook").mkdir(parents=True)
    (folder / "hook" / "sitecustomize.py").write_text(AUDIT_HOOK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder / "hook"), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("FLEXMOE_TEST_OPENS", str(folder / "opens.log"))
        if processes == "forked":
            replace_new_processes(patch, [owners, opt_out], before=AUDIT_HOOK)
        run_demo(folder / "out", settings=tiny_settings(), console=Console(quiet=True))
