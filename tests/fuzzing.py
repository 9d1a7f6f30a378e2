"""Hostile expert packages against a model and against folders: what each case must end in, and how that is counted.

A case copies a good package, lets one of `MUTATORS` at it, and adds it: to a live model that has two experts already,
or to one on disk (`add`, `compose`). It ends well in an error of FlexMoE's own that names the package and the fault,
with the model and the disk as they were; or, for a mutation that may be without effect, in the expert of the good
package. Cases run in batches, each in a process of its own, so that a crash or a hang is a case's end, not the run's.

Not here: the mutations (`tests/mutators`), and packages from the Hub, which are folders when they are opened.
"""

from __future__ import annotations

import dis
import gc
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import stat
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import flexmoe
from flexmoe.conversion.compose import add, compose
from flexmoe.conversion.graft import graft
from flexmoe.modeling import FlexMoeForCausalLM, UnsupportedAnchorError, packages_flexmoe
from flexmoe.modeling.packages_flexmoe import PackageError
from flexmoe.modeling.tensor_writer_flexmoe import write_checkpoint
from flexmoe.modeling.tensors_flexmoe import CheckpointFolder, tensor_bytes
from flexmoe.testing import perturb_expert, tiny_anchor
from tests.mutators import MUTATORS, MayPass
from tests.processes import PRELOADED

BASES = (("llama", "full"), ("llama", "sharded"), ("llama", "low_rank"), ("gpt2", "full"), ("gpt2", "low_rank"))
WAYS = ("add_expert", "add", "add_expert", "compose")  # every second case is on disk
RANK = 4
SHARD_BYTES = 10_000

BATCH = 50
CPU_SECONDS, WALL_SECONDS = 5.0, 60.0  # of one case: the machine may be busy, and what waits takes no CPU
MEGABYTE = 1 << 20
MEMORY = 64 * MEGABYTE  # that a case may take beyond what was there; packages are smaller than 0.1 MB
MEMORY_OF = {"big JSON": 256 * MEGABYTE, "big header": 256 * MEGABYTE}  # 30 MB, as bytes, as text and as numbers
MESSAGE = 2000  # characters, for a person to read
OUR_ERRORS = (PackageError, ValueError, FileNotFoundError, NotADirectoryError, UnsupportedAnchorError)


@dataclass(frozen=True)
class Case:
    """One attack: which mutator, on which package (an index of `BASES`), by which way in, from which seed."""

    number: int
    mutator: str
    base: int
    way: str
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        what: what the mutator did.
        error: the error's class, or "" where the package was accepted.
        message: its text, without the folder.
        fault: why this is a failure of FlexMoE, or "".
        memory: bytes taken at the peak, beyond what was there before.
    """

    case: Case
    what: str
    error: str
    message: str
    fault: str
    seconds: float
    memory: int


def make_cases(count: int, seed: int = 0) -> list[Case]:
    """`count` cases, dealt evenly to the mutators; of each, to packages and ways."""
    chance, mutators = random.Random(seed), list(MUTATORS)
    cases = []
    for number in range(count):
        turn, which = divmod(number, len(mutators))
        way = WAYS[(turn + which // 2) % len(WAYS)]
        cases.append(Case(number, mutators[which], (turn + which) % len(BASES), way, chance.getrandbits(32)))
    return cases


# What the cases need


def make_world(folder: Path) -> Path:
    """The models on disk, a good package of each kind, and what it makes of them. Returns `folder`."""
    for family in sorted({family for family, _ in BASES}):
        home = folder / family
        tiny_anchor(family).save_pretrained(home / "anchor")
        graft(home / "anchor", home / "grafted")
        model = FlexMoeForCausalLM.from_pretrained(home / "grafted")
        others = [_package(model, name, home / name) for name in ("code", "legal")]
        compose(home / "grafted", others, home / "model", public_prior=0.0)
        for kind in [kind for of, kind in BASES if of == family]:
            package = _package(model, "math", home / kind / "math", kind)
            add(home / "model", package, home / f"add-{kind}")
            compose(home / "grafted", [package], home / f"compose-{kind}", public_prior=0.0)
    return folder


def _package(model: FlexMoeForCausalLM, name: str, folder: Path, kind: str = "full") -> Path:
    model.add_expert_copy(name, **({"rank": RANK, "alpha": 8.0} if kind == "low_rank" else {}))
    perturb_expert(model, name)
    size = SHARD_BYTES if kind == "sharded" else 1 << 30
    with mock.patch.object(packages_flexmoe, "write_checkpoint", partial(write_checkpoint, max_shard_size=size)):
        model.save_expert(name, folder, training={"tokens": 1000, "config": {"rate": 0.1}}, license="mit")
    model.remove_expert(name)
    return folder


class Target:
    """What one family's packages are added to."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.model = FlexMoeForCausalLM.from_pretrained(home / "model")
        self.before = state_of(self.model)

    def take(self, way: str, package: Path, out: Path) -> None:
        """Adds the package, as "math"."""
        if way == "add_expert":
            self.model.add_expert(package)
        elif way == "add":
            add(self.home / "model", package, out)
        else:
            compose(self.home / "grafted", [package], out, public_prior=0.0)

    def difference(self, kind: str, way: str, out: Path) -> str:
        """How what was made differs from what the good package makes; "" if it does not. The model is reset."""
        if way != "add_expert":
            return (
                "" if stored(out) == stored(self.home / f"{way}-{kind}") else "other tensors than the good package's"
            )
        made = {name: bytes(tensor_bytes(tensor)) for name, tensor in self.model.state_dict().items()}
        name = (set(self.model.expert_names) - {"public", "code", "legal"}).pop()
        self.model.remove_expert(name)
        good = stored(self.home / f"add-{kind}")
        same = made.keys() == good.keys() and all(made[key] == good[key] for key in made)
        return "" if name == "math" and same else f"expert {name!r} has other tensors than the good package's"


def stored(folder: Path) -> dict[str, bytes]:
    """The bytes of a stored model's tensors, tied duplicates included as a live one has them."""
    with CheckpointFolder(folder) as files:
        found = {name: b"".join(files.chunks(name)) for name in files.infos}
    config = json.loads((folder / "config.json").read_text())
    if config["anchor_config"].get("tie_word_embeddings", False):
        [tied] = [name for name in found if name.endswith((".wte.weight", ".embed_tokens.weight"))]
        found["anchor.lm_head.weight"] = found[tied]
    return found


def state_of(model: FlexMoeForCausalLM) -> dict[str, Any]:
    """All that adding an expert could change."""
    return {
        "tensors": {
            name: (str(tensor.dtype), hashlib.sha256(tensor_bytes(tensor)).hexdigest())
            for name, tensor in model.state_dict().items()
        },
        "order": list(model.state_dict()),
        "trains": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "config": json.dumps(model.config.to_dict(), default=str),
        "active": model.active_experts,
        "serials": {name: model.serial_of(name) for name in model.expert_names},
        "plans": repr((model._tp_plan, model._pp_plan)),
    }


def on_disk(folder: Path) -> dict[str, Any]:
    """Everything under a folder: kinds, links, bytes (of what is very large, the size and the time)."""
    found: dict[str, Any] = {}
    for root, folders, files in os.walk(folder):
        for path in (Path(root, name) for name in (*folders, *files)):
            entry = path.lstat()
            what: Any = stat.S_IFMT(entry.st_mode)
            if path.is_symlink():
                what = os.readlink(path)
            elif stat.S_ISREG(entry.st_mode):
                is_large = entry.st_size > 128 * MEGABYTE
                what = (entry.st_size, entry.st_mtime_ns) if is_large else hashlib.sha256(path.read_bytes()).digest()
            found[str(path.relative_to(folder))] = what
    return found


# One case


class OutOfTime(BaseException):
    """Raised by the alarm; not an Exception, so that nobody takes it for a fault of a file."""


@contextmanager
def time_limit() -> Iterator[None]:
    """Raises `OutOfTime` after `CPU_SECONDS` of work, or `WALL_SECONDS` in all."""

    def ring(number: int, _: object) -> None:
        raise OutOfTime(f"more than {CPU_SECONDS:g} s of work or {WALL_SECONDS:g} s in all")

    timers = ((signal.ITIMER_PROF, signal.SIGPROF, CPU_SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, WALL_SECONDS))
    for timer, number, seconds in timers:
        signal.signal(number, ring)
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, _, _ in timers:
            signal.setitimer(timer, 0)


def run_case(case: Case, target: Target, folder: Path) -> Outcome:
    """Runs a case in the empty folder `folder`."""
    kind = BASES[case.base][1]
    package, out = folder / "math", folder / "out"
    shutil.copytree(target.home / kind / "math", package)
    what = MUTATORS[case.mutator](package, random.Random(case.seed))
    disk, seconds, error = on_disk(folder), time.monotonic(), None
    _forget_peak()
    memory = _memory("VmRSS")
    try:
        with time_limit():
            target.take(case.way, package, out)
    except BaseException as caught:
        error = caught
    seconds, memory = time.monotonic() - seconds, _memory("VmHWM") - memory
    if error is None:
        fault = "" if isinstance(what, MayPass) else "it was accepted"
        fault = "; ".join(filter(None, (fault, target.difference(kind, case.way, out))))
        shutil.rmtree(out, ignore_errors=True)
    else:
        fault = fault_of(error, package)
    faults = [fault, *_traces(case, target, disk, on_disk(folder), memory)]
    return Outcome(
        case,
        str(what),
        type(error).__name__ if error else "",
        str(error).replace(str(folder), "")[:MESSAGE] if error else "",
        "; ".join(filter(None, faults)),
        seconds,
        memory,
    )


def fault_of(error: BaseException, package: Path) -> str:
    """What is wrong with an error that refuses a package; "" if nothing is."""
    text = str(error)
    links: BaseException | None = error
    while links is not None:
        if type(links) not in OUR_ERRORS or (isinstance(links, OSError) and links.errno is not None):
            return f"{type(links).__name__} is no error of FlexMoE's: {_where(links)}"
        if not _is_raised_by_us(links):
            return f"{type(links).__name__} was raised by others: {_where(links)}"
        links = links.__cause__
    if str(package) not in text:
        return f"the message names no file: {text[:200]!r}"
    if len(text) > MESSAGE + len(str(package)) or not text.isprintable():
        return f"the message is no paragraph for people: {len(text)} characters, {text[:200]!r}"
    return ""


def _is_raised_by_us(error: BaseException) -> bool:
    """Whether what ended it is a `raise` in a file of FlexMoE, and not a call, a subscript or an operation."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    code = last.tb_frame.f_code
    path, root = Path(code.co_filename).resolve(), Path(flexmoe.__file__).resolve().parents[2]
    is_ours = any(path.is_relative_to(root / part) for part in ("modeling", "conversion", "src"))
    return is_ours and dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def _where(error: BaseException) -> str:
    return " < ".join(reversed(traceback.format_exception(error)[-4:])).replace("\n", " ")[:600]


def _traces(
    case: Case, target: Target, before: Mapping[str, Any], after: Mapping[str, Any], memory: int
) -> Iterator[str]:
    if before != after:
        changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        yield f"the disk changed: {changed[:3]}"
    now = state_of(target.model)
    if now != target.before:
        yield f"the model changed: {[key for key, value in now.items() if value != target.before[key]]}"
        target.model = FlexMoeForCausalLM.from_pretrained(target.home / "model")
        target.before = state_of(target.model)
    if memory > (bound := MEMORY_OF.get(case.mutator, MEMORY)):
        yield f"it took {memory / MEGABYTE:.0f} MB of memory; at most {bound / MEGABYTE:.0f} are due"


def _memory(field: str) -> int:
    """Bytes of memory: VmRSS, now; VmHWM, at the peak since `_forget_peak`."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:  # not Linux: the peak of all time, which can only rise
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(re.findall(rf"{field}:\s+(\d+) kB", text)[0]) * 1024


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # the peak of all time then stays, which is the stricter
        return


# Many cases


def run(cases: Sequence[Case], world: Path, scratch: Path) -> list[Outcome]:
    """Runs the cases in batches, each in a process that is forked from a warm one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, "tests.fuzzing"])
    outcomes: list[Outcome] = []
    waiting = list(cases)
    while waiting:
        here, there = context.Pipe(duplex=False)
        batch = waiting[:BATCH]
        process = context.Process(target=_serve, args=(there, batch, world, scratch), daemon=True)
        process.start()
        there.close()
        told = list(_told(here))
        process.kill()  # it has ended, or hangs
        process.join()
        if len(told) < len(batch):
            case = batch[len(told)]
            told.append(Outcome(case, "", "", "", f"the process hung or died ({process.exitcode})", 0.0, 0))
        outcomes += told
        waiting = waiting[len(told) :]
    return outcomes


def _told(pipe: Connection) -> Iterator[Outcome]:
    try:
        while pipe.poll(WALL_SECONDS * 2):
            yield pipe.recv()
    except EOFError:
        return


def _serve(pipe: Connection, cases: Sequence[Case], world: Path, scratch: Path) -> None:
    warnings.simplefilter("error")
    gc.freeze()  # what was imported is not looked at again at every collection
    targets: dict[str, Target] = {}
    for number, case in enumerate(cases):
        family = BASES[case.base][0]
        target = targets[family] if family in targets else targets.setdefault(family, Target(world / family))
        folder = scratch / f"case-{case.number}"
        folder.mkdir()
        opened = _descriptors()
        outcome = run_case(case, target, folder)
        if number and _descriptors() > opened:
            gc.collect()  # what an error's traceback held
            if (left := _descriptors() - opened) > 0:
                outcome = Outcome(**{**vars(outcome), "fault": f"{outcome.fault}; {left} files stayed open"})
        pipe.send(outcome)
        shutil.rmtree(folder)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0


# What came of them


def report(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Counts per mutator, per error and per kind of message, and the extremes."""
    rows: dict[str, Counter[str]] = {name: Counter() for name in MUTATORS}
    for outcome in outcomes:
        result = "faults" if outcome.fault else "refused" if outcome.error else "without effect"
        rows[outcome.case.mutator].update(["cases", result])
    small = [outcome for outcome in outcomes if outcome.case.mutator not in MEMORY_OF]
    refused = [outcome for outcome in outcomes if outcome.error]
    return {
        "cases": len(outcomes),
        "mutators": len(MUTATORS),
        "ways": dict(Counter(outcome.case.way for outcome in outcomes)),
        "packages": dict(Counter(" ".join(BASES[outcome.case.base]) for outcome in outcomes)),
        "refused": sum(1 for outcome in refused if not outcome.fault),
        "without_effect": sum(1 for outcome in outcomes if not outcome.error and not outcome.fault),
        "faults": sum(1 for outcome in outcomes if outcome.fault),
        "slowest": _extreme(outcomes, "seconds"),
        "most_memory_of_large_json": _extreme([o for o in outcomes if o not in small], "memory"),
        "most_memory_otherwise": _extreme(small, "memory"),
        "by_mutator": {
            name: {key: row[key] for key in ("cases", "refused", "without effect", "faults")}
            for name, row in rows.items()
        },
        "by_error": dict(Counter(outcome.error for outcome in refused).most_common()),
        "by_message": dict(Counter(shape_of(outcome.message) for outcome in refused).most_common()),
    }


def _extreme(outcomes: Sequence[Outcome], field: str) -> dict[str, Any]:
    worst = max(outcomes, key=lambda outcome: getattr(outcome, field), default=None)
    if worst is None:
        return {}
    value = {"seconds": round(worst.seconds, 2), "memory": round(worst.memory / MEGABYTE, 1)}[field]
    unit = {"seconds": "seconds", "memory": "megabytes"}[field]
    return {unit: value, "mutator": worst.case.mutator, "what": worst.what[:80], "way": worst.case.way}


_NAMED = (
    (r"\S*/\S+", "PATH"),
    (r"'[^']*'|\"[^\"]*\"", "'...'"),
    (r"\b[0-9a-f]{64}\b", "SHA"),
    (r"\b0x[0-9a-f]{2}\b", "BYTE"),
    (r"[\d,]*\d", "N"),
    (r"\[[^\]]*\]", "[...]"),
)


def shape_of(message: str) -> str:
    """A message without what it names, so that alike ones are counted together."""
    for pattern, sign in _NAMED:
        message = re.sub(pattern, sign, message)
    return message[:80]


def table(outcomes: Sequence[Outcome]) -> str:
    """The report as text, the failures first."""
    counts = report(outcomes)
    lines = [f"{o.case}: {o.what}\n    {o.error}: {o.message[:300]}\n    FAULT {o.fault}" for o in outcomes if o.fault]
    lines += [f"{'mutator':28}{'cases':>8}{'refused':>9}{'no effect':>11}{'faults':>8}"]
    for name, row in counts["by_mutator"].items():
        lines.append(f"{name:28}{row['cases']:8}{row['refused']:9}{row['without effect']:11}{row['faults']:8}")
    lines += [f"{count:6}  {key}" for part in ("by_error", "by_message") for key, count in counts[part].items()]
    return "\n".join(lines)


__all__ = ["Case", "Outcome", "Target", "fault_of", "make_cases", "make_world", "report", "run", "run_case", "table"]
