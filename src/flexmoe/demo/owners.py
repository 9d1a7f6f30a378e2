"""Trains the expert of one owner in a separate folder and process, which contain no text of other owners.

Each owner gets the grafted model (as hard links) and its own documents, and runs `flexmoe train` offline with all
caches inside its folder. The result is an expert package.

Does not cover sandboxing: the process could open any file of this machine. A test checks that it opens no file of
another owner.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from flexmoe.demo.anchor_source import link_tree

LOG = "train.log"
PACKAGE = "package"


@dataclass(frozen=True, kw_only=True)
class OwnerSettings:
    """Training settings of an owner, options of `flexmoe train`; that command chooses those that are None.

    The defaults are those for the anchor that the demo trains itself; `chosen` is for others.
    """

    steps: int | None = 125
    epochs: float | None = None
    sequence_length: int | None = 256
    batch_size: int | None = 8
    method: str = "full"
    rank: int | None = None
    router: str | None = "log_odds"
    router_bias: bool | None = False
    public_ratio: float | None = 0.4
    learning_rate: float | None = 2e-3
    warmup_steps: int | None = 10
    router_tokens: int | None = 40_000
    validation_tokens: int | None = 8_000
    seed: int = 0

    @classmethod
    def chosen(cls, *, seed: int = 0, steps: int | None = None, epochs: float | None = None) -> OwnerSettings:
        """Settings that `flexmoe train` chooses, but for the duration."""
        free: dict[str, Any] = {
            field.name: None for field in fields(cls) if field.name not in ("method", "seed", "steps", "epochs")
        }
        return cls(seed=seed, steps=steps, epochs=epochs, **free)

    def as_dict(self) -> dict[str, object]:
        """For cache keys and reports."""
        return asdict(self)

    def arguments(self) -> list[str]:
        """The settings as options of `flexmoe train`."""
        settings = {key: value for key, value in self.as_dict().items() if value is not None}
        flags = {"router_bias": {True: "--router-bias", False: "--no-router-bias"}}
        options: list[str] = []
        for key, value in settings.items():
            name = "--max-steps" if key == "steps" else f"--{key.replace('_', '-')}"
            options += [flags[key][bool(value)]] if key in flags else [name, str(value)]
        return options


def train_owner(
    owner: str, data: Path, grafted: Path, folder: Path, settings: OwnerSettings, *, threads: int, statement: str
) -> None:
    """Creates the owner's folder and trains there in a new process, which writes the package.

    Raises:
        RuntimeError: training failed; the message contains the last lines of the log.
    """
    (folder / "data").mkdir(parents=True)
    shutil.copyfile(data, folder / "data" / "documents.jsonl")
    link_tree(grafted, folder / "grafted")
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
