"""Fuzzing with malicious expert packages: running cases against models, and checking their outcomes.

A case copies a valid package, applies one of `MUTATORS`, and adds it to a live model with two experts, or to one on
disk (`add`, `compose`). It passes with an error of FlexMoE that names the package and the problem, with model and disk
unchanged; or, for a mutation that may have no effect, with the expert of the valid package. Cases run in batches, each
in a process of its own, so that a crash or a hang ends one case, not the run.

Does not cover the mutations (`tests/support/mutators`), or packages from the Hub, which are folders when they are
opened.
"""

from __future__ import annotations

import copy
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
from flexmoe.admission.findings import AdmissionError
from flexmoe.conversion.compose import add as add_on_disk
from flexmoe.conversion.compose import compose, remove
from flexmoe.conversion.graft import graft
from flexmoe.hub.stored_model import StoredModel
from flexmoe.io.strict_json import parse_json_object
from flexmoe.io.tensors import CheckpointFolder
from flexmoe.io.writer import write_checkpoint
from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM, UnsupportedAnchorError
from flexmoe.modeling.fingerprint_flexmoe import tensor_bytes
from flexmoe.packages import package as package_module
from flexmoe.packages.package import PackageError
from flexmoe.testing import perturb_expert, tiny_anchor
from tests.support.mutators import MUTATORS, MayPass
from tests.support.processes import PRELOADED

BASES = (("llama", "full"), ("llama", "sharded"), ("llama", "low_rank"), ("gpt2", "full"), ("gpt2", "low_rank"))
WAYS = ("add_expert", "add", "add_expert", "compose")  # every second case is on disk
RANK = 4
SHARD_BYTES = 10_000

BATCH = 50
CPU_SECONDS, WALL_SECONDS = 5.0, 60.0  # of one case: the machine may be busy, and what waits takes no CPU
MEGABYTE = 1 << 20
MEMORY = 64 * MEGABYTE  # additional memory that a case may use; packages are smaller than 0.1 MB
MEMORY_OF = {"big JSON": 256 * MEGABYTE, "big header": 256 * MEGABYTE}  # 30 MB, as bytes, as text and as numbers
MESSAGE = 2000  # characters
OUR_ERRORS = (AdmissionError, PackageError, ValueError, FileNotFoundError, NotADirectoryError, UnsupportedAnchorError)


@dataclass(frozen=True)
class Case:
    """One attack: the mutator, the package (an index of `BASES`), the way to add it, and the seed."""

    number: int
    mutator: str
    base: int
    way: str
    seed: int


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case.

    Attributes:
        what: the mutator's description.
        error: the error's class, or "" if the package was accepted.
        message: its text, without the folder.
        fault: why this is a failure of FlexMoE, or "".
        memory: additional bytes at the peak.
    """

    case: Case
    what: str
    error: str
    message: str
    fault: str
    seconds: float
    memory: int


def make_cases(count: int, seed: int = 0) -> list[Case]:
    """`count` cases, distributed evenly over mutators, packages and ways."""
    chance, mutators = random.Random(seed), list(MUTATORS)
    cases = []
    for number in range(count):
        turn, which = divmod(number, len(mutators))
        way = WAYS[(turn + which // 2) % len(WAYS)]
        cases.append(Case(number, mutators[which], (turn + which) % len(BASES), way, chance.getrandbits(32)))
    return cases


# Models and packages


def make_world(folder: Path) -> Path:
    """Writes the models, a valid package of each kind, and the models with it added. Returns `folder`."""
    for family in sorted({family for family, _ in BASES}):
        home = folder / family
        tiny_anchor(family).save_pretrained(home / "anchor")
        graft(home / "anchor", home / "grafted")
        model = FlexMoeForCausalLM.from_pretrained(home / "grafted")
        others = [_package(model, name, home / name) for name in ("code", "legal")]
        compose(home / "grafted", others, home / "model", public_prior=0.0)
        for kind in [kind for of, kind in BASES if of == family]:
            package = _package(model, "math", home / kind / "math", kind)
            add_on_disk(home / "model", package, home / f"add-{kind}")
            compose(home / "grafted", [package], home / f"compose-{kind}", public_prior=0.0)
    return folder


def _package(model: FlexMoeForCausalLM, name: str, folder: Path, kind: str = "full") -> Path:
    model.add_expert_copy(name, **({"rank": RANK, "alpha": 8.0} if kind == "low_rank" else {}))
    perturb_expert(model, name)
    size = SHARD_BYTES if kind == "sharded" else 1 << 30
    with mock.patch.object(package_module, "write_checkpoint", partial(write_checkpoint, max_shard_size=size)):
        model.save_expert(name, folder, training={"tokens": 1000, "config": {"rate": 0.1}}, license="mit")
    model.remove_expert(name)
    return folder


class Target:
    """The models to which the packages of one family are added."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.model = FlexMoeForCausalLM.from_pretrained(home / "model")
        self.before = state_of(self.model)

    def add(self, way: str, package: Path, out: Path) -> None:
        """Adds the package, as "math"."""
        if way == "add_expert":
            self.model.add_expert(package)
        elif way == "add":
            add_on_disk(self.home / "model", package, out)
        else:
            compose(self.home / "grafted", [package], out, public_prior=0.0)

    def difference(self, kind: str, way: str, out: Path) -> str:
        """How the result differs from that of the valid package; "" if it does not. Resets the model."""
        if way != "add_expert":
            if stored(out) != stored(self.home / f"{way}-{kind}"):
                return "other tensors than those of the valid package"
            return config_fault(StoredModel(out).config) or self.loss(way, out)
        if fault := config_fault(self.model.config):
            return fault
        made = {name: bytes(tensor_bytes(tensor)) for name, tensor in self.model.state_dict().items()}
        name = (set(self.model.expert_names) - {"public", "code", "legal"}).pop()
        self.model.remove_expert(name)
        expected = stored(self.home / f"add-{kind}")
        same = made.keys() == expected.keys() and all(made[key] == expected[key] for key in made)
        return "" if name == "math" and same else f"expert {name!r} has other tensors than those of the valid package"

    def loss(self, way: str, out: Path) -> str:
        """What is lost of the model when the expert is removed from the result again; "" if nothing is."""
        before = self.home / "model" if way == "add" else self.home / "grafted"
        again = remove(out, "math", out.with_name("again"))
        same = (
            stored(again) == stored(before) and StoredModel(again).config.experts == StoredModel(before).config.experts
        )
        shutil.rmtree(again)
        return "" if same else "without the expert, the result is not the model that it was added to"


def config_fault(config: FlexMoeConfig) -> str:
    """Why a model's config cannot be copied, written and read again with nothing lost; "" if it can."""
    try:
        text = copy.deepcopy(config).to_json_string()
        again = FlexMoeConfig.from_dict(parse_json_object(text.encode(), "config.json"))
    except (ValueError, RecursionError) as error:
        return f"the config of the result cannot be written and read: {str(error)[:200]}"
    return "" if again.experts == config.experts else "the config of the result is read with other experts"


def stored(folder: Path) -> dict[str, bytes]:
    """The bytes of a stored model's tensors, with tied duplicates as in a live one."""
    with CheckpointFolder(folder) as files:
        found = {name: b"".join(files.chunks(name)) for name in files.infos}
    config = json.loads((folder / "config.json").read_text())
    if config["anchor_config"].get("tie_word_embeddings", False):
        [tied] = [name for name in found if name.endswith((".wte.weight", ".embed_tokens.weight"))]
        found["anchor.lm_head.weight"] = found[tied]
    return found


def state_of(model: FlexMoeForCausalLM) -> dict[str, Any]:
    """Everything in a model that adding an expert could change."""
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
    """Everything in a folder: types, links, bytes (for large files, size and time)."""
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
    """Raised by the alarm; not an Exception, so that it is not caught as an error of a file."""


@contextmanager
def time_limit() -> Iterator[None]:
    """Raises `OutOfTime` after `CPU_SECONDS` of CPU time, or `WALL_SECONDS` in total."""

    def on_alarm(number: int, _: object) -> None:
        raise OutOfTime(f"more than {CPU_SECONDS:g} s of CPU time or {WALL_SECONDS:g} s in total")

    timers = ((signal.ITIMER_PROF, signal.SIGPROF, CPU_SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, WALL_SECONDS))
    for timer, number, seconds in timers:
        signal.signal(number, on_alarm)
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
    _reset_peak()
    memory = _memory("VmRSS")
    try:
        with time_limit():
            target.add(case.way, package, out)
    except BaseException as caught:
        error = caught
    seconds, memory = time.monotonic() - seconds, _memory("VmHWM") - memory
    if error is None:
        fault = "" if isinstance(what, MayPass) else "it was accepted"
        fault = "; ".join(filter(None, (fault, target.difference(kind, case.way, out))))
        shutil.rmtree(out, ignore_errors=True)
    else:
        fault = fault_of(error, package)
    faults = [fault, *_side_effects(case, target, disk, on_disk(folder), memory)]
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
    """The problem with an error that refuses a package; "" if there is none."""
    text = str(error)
    links: BaseException | None = error
    while links is not None:
        if type(links) not in OUR_ERRORS or (isinstance(links, OSError) and links.errno is not None):
            return f"{type(links).__name__} is not an error of FlexMoE: {_where(links)}"
        if not _is_raised_by_flexmoe(links):
            return f"{type(links).__name__} was raised by another library: {_where(links)}"
        links = links.__cause__
    if str(package) not in text:
        return f"the message names no file: {text[:200]!r}"
    if len(text) > MESSAGE + len(str(package)) or not text.isprintable():
        return f"the message is not readable: {len(text)} characters, {text[:200]!r}"
    return ""


def _is_raised_by_flexmoe(error: BaseException) -> bool:
    """Whether the error comes from a `raise` in a file of FlexMoE, not from a call, a subscript or an operation."""
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


def _side_effects(
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
        yield f"it used {memory / MEGABYTE:.0f} MB of memory; at most {bound / MEGABYTE:.0f} are allowed"


def _memory(field: str) -> int:
    """Bytes of memory: VmRSS, now; VmHWM, the peak since `_reset_peak`."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:  # not Linux: the peak since the start
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(re.findall(rf"{field}:\s+(\d+) kB", text)[0]) * 1024


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # then the peak since the start is used, which is stricter
        return


# Many cases


def run(cases: Sequence[Case], world: Path, scratch: Path) -> list[Outcome]:
    """Runs the cases in batches, each in a process forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, "tests.support.fuzzing"])
    outcomes: list[Outcome] = []
    waiting = list(cases)
    while waiting:
        here, there = context.Pipe(duplex=False)
        batch = waiting[:BATCH]
        process = context.Process(target=_serve, args=(there, batch, world, scratch), daemon=True)
        process.start()
        there.close()
        received = list(_receive(here))
        process.kill()  # it has ended, or it hangs
        process.join()
        if len(received) < len(batch):
            case = batch[len(received)]
            received.append(Outcome(case, "", "", "", f"the process hung or died ({process.exitcode})", 0.0, 0))
        outcomes += received
        waiting = waiting[len(received) :]
    return outcomes


def _receive(pipe: Connection) -> Iterator[Outcome]:
    try:
        while pipe.poll(WALL_SECONDS * 2):
            yield pipe.recv()
    except EOFError:
        return


def _serve(pipe: Connection, cases: Sequence[Case], world: Path, scratch: Path) -> None:
    warnings.simplefilter("error")
    gc.freeze()  # imported modules are not scanned at every collection
    targets: dict[str, Target] = {}
    for number, case in enumerate(cases):
        family = BASES[case.base][0]
        target = targets[family] if family in targets else targets.setdefault(family, Target(world / family))
        folder = scratch / f"case-{case.number}"
        folder.mkdir()
        opened = _descriptors()
        outcome = run_case(case, target, folder)
        if number and _descriptors() > opened:
            gc.collect()  # files held by the traceback of an error
            if (left := _descriptors() - opened) > 0:
                outcome = Outcome(**{**vars(outcome), "fault": f"{outcome.fault}; {left} files stayed open"})
        pipe.send(outcome)
        shutil.rmtree(folder)


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0


# Reports


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
    """A message without paths, names and numbers, so that similar ones are counted together."""
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
