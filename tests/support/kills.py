"""Commands that write folders, killed with SIGKILL: they leave the old folder or the new one, byte for byte.

A writer is killed at a point, just before its n-th call that accesses the disk (so that kills are spread over the
writing, between the files and around the renaming, independently of durations), or after a time. Writers are forked
from a process that has imported everything.

Does not cover power failures, or two runs that write to one folder at once.
"""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexmoe.conversion.compose import compose
from flexmoe.conversion.export import export
from flexmoe.conversion.graft import graft
from flexmoe.conversion.import_flex_olmo import import_flex_olmo
from flexmoe.io.folders import TEMPORARY_MARK, atomic_folder
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.packages.package import ExpertPackage
from flexmoe.testing import perturb_expert, tiny_anchor
from tests.support.processes import PRELOADED

VERSIONS = ("1", "2")  # a writer that is killed while it writes one replaces the other
EXPORTS = {"dense": "llama", "mixtral": "llama", "flex_olmo": "olmo2", "qwen3_moe": "qwen3"}  # and the anchor's family
SECONDS = 60  # that a writer may take
MORE_TIMES = 40  # kills at a time, at most, until one comes while a folder is written

DISK_CALLS = {
    # functions in C that change the disk, or flush or release what was written
    *("open", "write", "pwrite", "writelines", "flush", "close", "__exit__", "truncate", "ftruncate", "fsync"),
    *("mkdir", "rename", "replace", "unlink", "remove", "rmdir", "link", "symlink", "sendfile", "utime", "chmod"),
}
FILES = (io.BufferedWriter, io.TextIOWrapper, io.FileIO, type(os))  # whose functions those are; the last of modules
EXCHANGE = "_exchange"  # of two folders, by a system call that is no function in C: before it, and after

Step = Callable[[], None]


@dataclass(frozen=True)
class Kill:
    """One kill, and the state that it left.

    Attributes:
        at: the number of the point, and of all points; or the seconds.
        timed: whether it was after some seconds rather than at a point.
        found: the version in the folder.
        writing: whether there was a temporary folder beside it.
    """

    command: str
    at: str
    timed: bool
    found: str
    writing: bool


# Commands


def write(command: str, version: str, world: Path, out: Path, models: dict[str, FlexMoeForCausalLM]) -> None:
    """Runs one of the commands, replacing the existing folder."""
    if command == "graft":
        graft(world / f"anchor-{version}", out, overwrite=True)
    elif command == "compose":
        package = world / f"save_expert-{version}"
        compose(world / f"graft-{version}", [package], out, public_prior=0.0, overwrite=True)
    elif command == "save_expert":
        models[version].save_expert("math", out, overwrite=True)
    elif command == "import":
        import_flex_olmo(world / f"flex_olmo-{version}", out, names=["public", "math"], overwrite=True)
    else:
        expert = "math" if command == "dense" else None
        export(world / f"{EXPORTS[command]}-{version}", out, to=command, expert=expert, overwrite=True)


def make_world(folder: Path, commands: Sequence[str]) -> Path:
    """The inputs of the commands in two versions: `<name>-<version>`."""
    exported = {EXPORTS[command] for command in commands if command in EXPORTS}
    families = sorted({"llama", *exported, *(["olmo2"] if "import" in commands else [])})
    for version, family in itertools.product(VERSIONS, families):
        tiny_anchor(family, seed=int(version)).save_pretrained(folder / "anchor")
        graft(folder / "anchor", folder / "grafted")
        model = FlexMoeForCausalLM.from_pretrained(folder / "grafted")
        model.add_expert_copy("math")
        perturb_expert(model, "math", seed=int(version))
        for block in model.flexmoe_blocks():
            torch.nn.init.zeros_(block.router["math"].bias)
        package = model.save_expert("math", folder / "package")
        compose(folder / "grafted", [package], folder / f"{family}-{version}", public_prior=0.0)
        for made, name in {"anchor": "anchor", "grafted": "graft", "package": "save_expert"}.items():
            if family == "llama":
                shutil.move(folder / made, folder / f"{name}-{version}")
            else:
                shutil.rmtree(folder / made)
        if family == "olmo2":
            export(folder / f"olmo2-{version}", folder / f"flex_olmo-{version}", to="flex_olmo")
    return folder


def load(command: str, folder: Path) -> dict[str, torch.Tensor]:
    """The folder's tensors, loaded as by its users, with all checks."""
    if command == "save_expert":
        return dict(ExpertPackage.open(folder).tensors())
    if command == "import":
        model = load("graft", folder / "model")
        return model | {f"math.{name}": tensor for name, tensor in load("save_expert", folder / "math").items()}
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


# Writers


def _maker(pipe: Connection, command: str, world: Path) -> None:
    """Writes each version once without interruption; sends the seconds per version."""
    models = _begin(command, world)
    for version in VERSIONS:
        begin = time.monotonic()
        write(command, version, world, world / f"made-{command}-{version}", models)
    pipe.send(time.monotonic() - begin)


def _counter(pipe: Connection, command: str, world: Path, out: Path) -> None:
    """Writes the version that is not in `out`, and sends the number of points; in a fresh process, because imports and
    caches are read only once."""
    models = _begin(command, world)
    pipe.send(with_points(lambda: write(command, _other(out, command, world), world, out, models), None))


def _victim(pipe: Connection, command: str, world: Path, out: Path, point: int) -> None:
    """As `_counter`, and is killed at a point."""
    models = _begin(command, world)
    with_points(lambda: write(command, _other(out, command, world), world, out, models), point)


def _writer(pipe: Connection, command: str, world: Path, out: Path) -> None:
    """Writes the versions in turn until it is killed; sends a message after the first one, which takes longer."""
    models = _begin(command, world)
    for number, version in enumerate(itertools.cycle(VERSIONS)):
        write(command, version, world, out, models)
        if number == 0:
            pipe.send("ready")


def _begin(command: str, world: Path) -> dict[str, FlexMoeForCausalLM]:
    warnings.simplefilter("ignore")  # about leftovers of earlier kills
    torch.set_num_threads(1)
    if command != "save_expert":
        return {}
    return {version: FlexMoeForCausalLM.from_pretrained(world / f"llama-{version}") for version in VERSIONS}


def _other(out: Path, command: str, world: Path) -> str:
    """The version that is not in `out`."""
    return next(version for version in VERSIONS if contents(out) != contents(world / f"made-{command}-{version}"))


def with_points(step: Step, fatal: int | None) -> int:
    """Runs `step` and counts its calls that access the disk, after the temporary folder is created.

    Kills this process just before call number `fatal`.
    """
    count, began = 0, False

    def on_audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal began
        began = began or (event == "os.mkdir" and TEMPORARY_MARK in str(arguments[0]))

    def on_profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        is_exchange = event in ("call", "return") and frame.f_code.co_name == EXCHANGE
        if began and (is_exchange or (event == "c_call" and _accesses_disk(argument))):
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(on_audit)
    sys.setprofile(on_profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    return count


def _accesses_disk(function: Any) -> bool:
    return function.__name__ in DISK_CALLS and isinstance(getattr(function, "__self__", None), FILES)


class Killer:
    """Kills writers of one command repeatedly, all on one folder `out`."""

    def __init__(self, command: str, world: Path, scratch: Path) -> None:
        self.command, self.world, self.out = command, world, scratch / "out"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*PRELOADED, "tests.support.kills"])
        self.seconds = self._receive(*self._start(_maker))
        self.versions = {version: contents(world / f"made-{command}-{version}") for version in VERSIONS}
        assert self.versions["1"] != self.versions["2"]
        self.tensors = {version: load(command, world / f"made-{command}-{version}") for version in VERSIONS}
        shutil.copytree(world / f"made-{command}-1", self.out)
        self.points = self._receive(*self._start(_counter, self.out))

    def at_point(self, point: int, *, loading: bool) -> Kill:
        """Kills a writer just before call number `point`."""
        _, process = self._start(_victim, self.out, point)
        process.join(SECONDS)
        assert process.exitcode == -signal.SIGKILL, f"{self.command}: it ended by itself ({process.exitcode})"
        return self._left(f"{point} of {self.points}", False, loading)

    def after(self, seconds: float, *, loading: bool) -> Kill:
        """Kills a writer that repeats the command, after some time."""
        here, process = self._start(_writer, self.out)
        assert here.poll(SECONDS), f"{self.command} did not begin in {SECONDS} s"
        time.sleep(seconds)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, f"{self.command}: it ended by itself ({process.exitcode})"
        return self._left(f"{seconds:.3f} s", True, loading)

    def _receive(self, pipe: Connection, process: Any) -> Any:
        assert pipe.poll(SECONDS), f"{self.command} did not end in {SECONDS} s"
        answer = pipe.recv()
        process.join()
        return answer

    def _start(self, target: Callable[..., None], *arguments: Any) -> tuple[Connection, Any]:
        here, there = self._context.Pipe()
        process = self._context.Process(target=target, args=(there, self.command, self.world, *arguments), daemon=True)
        process.start()
        there.close()
        return here, process

    def _left(self, at: str, timed: bool, loading: bool) -> Kill:
        now = contents(self.out)
        found = [version for version, files in self.versions.items() if files == now]
        differences = {version: _differences(files, now) for version, files in self.versions.items()}
        assert len(found) == 1, f"{self.command}, killed at {at}: neither version; differences: {differences}"
        if loading:
            loaded, wanted = load(self.command, self.out), self.tensors[found[0]]
            assert loaded.keys() == wanted.keys()
            assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.items())
        beside = [path for path in self.out.parent.iterdir() if path != self.out]
        assert all(TEMPORARY_MARK in path.name for path in beside), f"{self.command}, killed at {at}: left {beside}"
        if beside:
            self._check_next_run_warns(beside)
        for leftover in beside:
            shutil.rmtree(leftover)
        return Kill(self.command, at, timed, found[0], bool(beside))

    def _check_next_run_warns(self, leftovers: Sequence[Path]) -> None:
        """The next run into the folder warns about the leftovers; this one stops before it has written anything."""
        names = ".*".join(re.escape(path.name) for path in sorted(leftovers))
        warned = pytest.warns(UserWarning, match=f"interrupted.*{names}")
        with warned, pytest.raises(KeyboardInterrupt), atomic_folder(self.out, overwrite=True):
            raise KeyboardInterrupt


def kill(command: str, count: int, world: Path, scratch: Path, *, seed: int = 0) -> Iterator[Kill]:
    """Kills the command `count` times: two of three at points spread over its work, the others after random times.

    If none of these times was while a folder was written, more follow until one is.
    """
    killer, chance = Killer(command, world, scratch), random.Random(f"{command} {seed}")
    at_points, while_writing = -(-2 * count // 3), False
    for number in range(count):
        loading = number % 4 == 0 or number == count - 1
        if number < at_points:
            point = int((number + chance.random()) * killer.points / at_points)
            yield killer.at_point(point, loading=loading)
        else:
            yield (last := killer.after(chance.uniform(0, 2 * killer.seconds), loading=loading))
            while_writing = while_writing or last.writing
    for _ in range(MORE_TIMES if count > at_points else 0):
        if while_writing:
            return
        yield (last := killer.after(chance.uniform(0, 2 * killer.seconds), loading=True))
        while_writing = last.writing


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in the folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _differences(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def report(kills: Sequence[Kill]) -> dict[str, Any]:
    """Counts per command: kills, those while a folder was being written, and the versions found."""
    rows: dict[str, Counter[str]] = {}
    for one in kills:
        row = rows.setdefault(one.command, Counter())
        when = "at a time" if one.timed else "at a point"
        row.update(["kills", when, f"found version {one.found}"])
        row[f"{when}, while writing"] += one.writing
    return {
        "kills": len(kills),
        "while_writing": sum(one.writing for one in kills),
        "mixes": sum(one.found not in VERSIONS for one in kills),  # the run fails at the first
        "by_command": {command: dict(sorted(row.items())) for command, row in rows.items()},
    }


__all__ = ["EXPORTS", "Kill", "Killer", "contents", "kill", "load", "make_world", "report", "with_points", "write"]
