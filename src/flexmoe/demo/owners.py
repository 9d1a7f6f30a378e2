"""Trains the expert of one owner in a separate folder and process, which contain no text of other owners.

Each owner gets a copy of the grafted model and its own documents, and runs `flexmoe train` offline with all caches
inside its folder. The result is an expert package.

Does not cover sandboxing: the process could open any file of this machine. A test checks that it opens no file of
another owner.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

LOG = "train.log"
PACKAGE = "package"


@dataclass(frozen=True, kw_only=True)
class OwnerSettings:
    """Training settings of an owner; `sequence_length * batch_size` tokens per step, `public_ratio` of them public."""

    steps: int = 125
    sequence_length: int = 256
    batch_size: int = 8
    method: str = "full"
    rank: int | None = None
    router: str = "log_odds"
    router_bias: bool = False
    public_ratio: float = 0.4
    learning_rate: float = 2e-3
    warmup_steps: int = 10
    router_tokens: int = 40_000
    validation_tokens: int = 8_000
    seed: int = 0

    def as_dict(self) -> dict[str, object]:
        """For cache keys and reports."""
        return asdict(self)

    def arguments(self) -> list[str]:
        """The settings as options of `flexmoe train`."""
        settings = {key: value for key, value in self.as_dict().items() if value is not None}
        named = {key: value for key, value in settings.items() if key not in ("steps", "router_bias")}
        options = [part for key, value in named.items() for part in (f"--{key.replace('_', '-')}", str(value))]
        return [*options, "--max-steps", str(self.steps), "--router-bias" if self.router_bias else "--no-router-bias"]


def train_owner(
    owner: str, data: Path, grafted: Path, folder: Path, settings: OwnerSettings, *, threads: int, statement: str
) -> None:
    """Creates the owner's folder and trains there in a new process, which writes the package.

    Raises:
        RuntimeError: training failed; the message contains the last lines of the log.
    """
    (folder / "data").mkdir(parents=True)
    shutil.copyfile(data, folder / "data" / "documents.jsonl")
    shutil.copytree(grafted, folder / "grafted")
    command = [sys.executable, "-m", "flexmoe.cli", "train", "grafted", "--name", owner]
    command += [
        "--data",
        "data/documents.jsonl",
        "--out",
        PACKAGE,
        "--data-statement",
        statement,
        *settings.arguments(),
    ]
    with (folder / LOG).open("w", encoding="utf-8") as log:
        done = subprocess.run(
            command,
            cwd=folder,
            env=owner_environment(folder, threads),
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        tail = "\n".join((folder / LOG).read_text(errors="replace", encoding="utf-8").splitlines()[-15:])
        raise RuntimeError(
            f"owner {owner!r} failed to train (exit code {done.returncode}); its log ends with:\n{tail}"
        )


def owner_environment(folder: Path, threads: int, inherited: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment variables of an owner's process: offline, caches in the owner's folder, a number of threads."""
    cache = str(folder.resolve() / ".cache")
    return {
        **(os.environ if inherited is None else inherited),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": cache,
        "XDG_CACHE_HOME": cache,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads would slow down the other owners
        "TOKENIZERS_PARALLELISM": "false",
    }
