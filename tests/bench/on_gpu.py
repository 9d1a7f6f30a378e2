"""All that needs a GPU, in one call of some minutes: tests of the kernels, memory checks, CUDA graphs, the benchmark.

    python3 tests/bench/on_gpu.py --out DIR        # logs and routing.json in DIR, a short table at the very end

It needs torch, Triton, transformers and pytest, and installs nothing: the package is laid out in a temporary folder,
of links, without what only its command line and its training need. A step that fails or takes too long ends, and the
next one starts. Meanwhile the benchmark's kernels are compiled in the background; it waits for them, because nothing
else may run beside it. Does not cover other devices than CUDA's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "tests" / "bench"
MINUTES = 9.0
RESERVED = 200.0  # seconds that earlier steps leave to the benchmark
SHOWN = 12  # lines of the log of a step that failed
WARMED = ("bfloat16", "float16", "float32")
CHECKER_FOUND = 97  # what the memory checker exits with


@dataclass(frozen=True)
class Step:
    """A command with a limit of its own.

    Attributes:
        command: None: what it needs is not there.
        seconds: at most; what earlier steps leave goes to the last one, which has none.
        last_lines: of its log, shown also if all went well.
    """

    name: str
    command: Sequence[str | Path] | None
    seconds: float | None = None
    environment: dict[str, str] = field(default_factory=dict)
    last_lines: int = 1


@dataclass(frozen=True)
class Ran:
    """How a step ended: "passed", "failed (code)", "took too long", "not there"."""

    name: str
    verdict: str
    seconds: float
    last_line: str


def layout(folder: Path) -> dict[str, str]:
    """Lays the package out in `folder`; returns the environment in which `flexmoe` and `tests` are found."""
    package = folder / "flexmoe"
    package.mkdir(parents=True)
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), flags=re.M)
    assert version, "pyproject.toml has no version"
    (package / "__init__.py").write_text(f'"""FlexMoE without its commands."""\n\n__version__ = "{version[1]}"\n')
    for path in (ROOT / "src" / "flexmoe").iterdir():
        if path.name not in ("__init__.py", "__main__.py", "__pycache__"):
            (package / path.name).symlink_to(path)
    (package / "modeling").symlink_to(ROOT / "modeling")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "PYTHONDONTWRITEBYTECODE": "1"}


def steps(out: Path, tiny: bool) -> list[Step]:
    """What is run, in this order."""
    python = sys.executable
    parallel = ["-p", "xdist", "-n", "8"] if importlib.util.find_spec("xdist") and not tiny else []
    # whatever plugins are installed there, and however old its pytest is
    options = ["-p", "no:cacheprovider", "-o", "minversion=7", "-W", "default", "--durations=5"]
    pytest = [python, "-m", "pytest", "-q", *options]
    elsewhere = ("compiled", "graphs", "moves")  # the second has a step of its own; the others need no GPU
    kernels = ["tests/kernels", *(f"--ignore=tests/kernels/test_{name}.py" for name in elsewhere)]
    every = [python, BENCH / "every_kernel.py"]
    bench = [python, BENCH / "bench_routing.py", "--out", out / "routing.json", *(["--tiny"] if tiny else [])]
    return [
        Step("tests of the kernels", [*pytest, *parallel, *kernels], 160),
        Step("every kernel once", every, 60),
        Step("memcheck", checked("memcheck", every), 75, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        Step("racecheck", checked("racecheck", every), 75),
        Step("CUDA graphs", [*pytest, "tests/kernels/test_graphs.py"], 90),
        Step("benchmark", bench, last_lines=30),
    ]


def checked(tool: str, command: Sequence[str | Path]) -> list[str | Path] | None:
    """The command under CUDA's checker; None if there is no checker."""
    checker = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if checker is None:
        return None
    options = ["--tool", tool, "--error-exitcode", str(CHECKER_FOUND), "--target-processes", "application-only"]
    return [checker, *options, *command]


def run(step: Step, environment: dict[str, str], log: Path, seconds: float) -> Ran:
    """Runs a step to its end or its limit; what it started ends with it."""
    if step.command is None:
        return Ran(step.name, "not there", 0.0, "")
    start = time.monotonic()
    with open(log, "w") as file:
        process = subprocess.Popen(
            list(map(str, step.command)),
            cwd=ROOT,
            env=environment | step.environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(max(1.0, seconds))
            verdict = "passed" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            end(process)
            verdict = "took too long"
    lines = log.read_text(errors="replace").splitlines()
    shown = step.last_lines if verdict == "passed" else max(SHOWN, step.last_lines)
    say("\n".join(f"    {line[:200]}" for line in lines[-shown:]))
    last = next((line for line in reversed(lines) if line.strip()), "")
    return Ran(step.name, verdict, time.monotonic() - start, last)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and what it has started, which are a session of their own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


@contextlib.contextmanager
def warming(environment: dict[str, str], out: Path, wanted: bool) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Compiles the benchmark's kernels in the background, a process for each dtype."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        for dtype in WARMED if wanted else ():
            command = [sys.executable, BENCH / "bench_routing.py", "--warm", dtype]
            with open(out / f"warm-{dtype}.log", "w") as log:
                started.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=environment,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        yield started
    finally:
        for process in started:
            end(process)


def wait_for(warm: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    """Until the background is quiet, or for so long: it is ended then."""
    last = time.monotonic() + seconds
    for process in warm:
        try:
            code = process.wait(max(0.1, last - time.monotonic()))
            say(f"    compiled in the background: {'all of it' if code == 0 else f'failed ({code})'}")
        except subprocess.TimeoutExpired:
            end(process)
            say("    compiling in the background took too long")


def say(words: str) -> None:
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


def has_gpu() -> bool:
    """Asked in a process of its own: this one holds no memory of the device."""
    command = [sys.executable, "-c", "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"]
    return subprocess.run(command, check=False).returncode == 0


def environment_of(temporary: Path, gpu: bool) -> dict[str, str]:
    """Caches of its own, which all steps share, and kernels that run natively where there is a GPU."""
    return {
        **layout(temporary / "package"),
        "TRITON_CACHE_DIR": str(temporary / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(temporary / "inductor"),
        "TRITON_INTERPRET": "0" if gpu else "1",
        "HF_HUB_OFFLINE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }


def table(ran: Sequence[Ran]) -> str:
    return "\n".join(f"{r.name:22} {r.verdict:14} {r.seconds:6.0f} s  {r.last_line[:110]}" for r in ran)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and routing.json")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all of it (default: {MINUTES})")
    parser.add_argument("--only", default="", help="steps whose name contains one of these words, with commas between")
    parser.add_argument("--tiny", action="store_true", help="without a GPU, too: checks this program, tells nothing")
    arguments = parser.parse_args()
    gpu = has_gpu()
    if not gpu and not arguments.tiny:
        say("on_gpu.py needs a GPU with CUDA, and there is none: nothing run.")
        return 0
    deadline = time.monotonic() + 60 * arguments.minutes
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    words = arguments.only.split(",")
    chosen = [step for step in steps(out, arguments.tiny) if any(word in step.name for word in words)]
    ran = []
    with tempfile.TemporaryDirectory() as temporary:
        environment = environment_of(Path(temporary), gpu)
        wanted = gpu and not arguments.tiny and any(step.name == "benchmark" for step in chosen)
        with warming(environment, out, wanted) as warm:
            for step in chosen:
                left = deadline - time.monotonic()
                say(f"== {step.name} ({left:.0f} s left)")
                if step.seconds is None:
                    wait_for(warm, left / 3)
                    left = deadline - time.monotonic()
                elif chosen[-1].seconds is None:
                    left -= RESERVED
                log = out / f"{step.name.replace(' ', '-')}.log"
                ran.append(run(step, environment, log, min(left, step.seconds or left)))
    say(f"\n{table(ran)}")
    (out / "table.txt").write_text(table(ran) + "\n")
    return 0 if all(r.verdict in ("passed", "not there") for r in ran) else 1


if __name__ == "__main__":
    sys.exit(main())
