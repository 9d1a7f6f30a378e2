"""Runs `python -m MODULE` in a process forked from one that has imported the libraries, which saves the imports.

For programs that start such processes: `replace_new_processes` replaces `subprocess` in their modules. A forked
process has its own environment, working directory, arguments and output, as a new one has; but variables that
libraries read when they are imported keep the values of this process. Does not cover anything but `subprocess.run`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.support.processes import PRELOADED


def replace_new_processes(patch: pytest.MonkeyPatch, modules: Sequence[ModuleType], before: str = "") -> None:
    """Makes `modules` run their commands in forked processes, which first execute the source `before`."""

    def run_command(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return _run(command, before, **options)

    for module in modules:
        patch.setattr(module, "subprocess", SimpleNamespace(run=run_command, STDOUT=subprocess.STDOUT))


def _run(
    command: Sequence[str], before: str, *, cwd: Path, env: Mapping[str, str], stdout: Any = None, **_: Any
) -> subprocess.CompletedProcess[str]:
    python, option, module, *arguments = command
    assert (python, option) == (sys.executable, "-m"), command
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, "flexmoe_cli", "flexmoe.training.experts"])
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "err")]
        process = context.Process(target=_serve, args=(module, arguments, before, str(cwd), dict(env), files))
        process.start()
        process.join()
        out, err = (file.read_text() if file.exists() else "" for file in files)
    if stdout is not None:
        stdout.write(out + err)
    return subprocess.CompletedProcess(list(command), process.exitcode or 0, out, err)


def _serve(
    module: str, arguments: list[str], before: str, cwd: str, env: dict[str, str], files: Sequence[Path]
) -> None:
    import huggingface_hub.constants
    import torch

    for descriptor, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    # these two are read when the libraries are imported
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", 1)))
    huggingface_hub.constants.HF_HUB_OFFLINE = env.get("HF_HUB_OFFLINE") == "1"
    exec(compile(before, "before", "exec"), {})
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
