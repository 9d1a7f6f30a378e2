"""Everything that needs a GPU, in one call of some minutes: kernel tests, memory checks, CUDA graphs, the benchmark.

    python3 benchmarks/on_gpu.py --out DIR        # logs and routing.json in DIR, a short table at the end

It needs torch, Triton, transformers and pytest, and installs nothing: the package is linked into a temporary folder,
without the dependencies of its command line and training. A step that fails or exceeds its time is ended, and the next
one starts. Meanwhile the benchmark's kernels are compiled in the background; the benchmark waits for that, because
nothing else may run beside it. Does not cover devices other than CUDA's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "benchmarks"
MINUTES = 9.0
RESERVED = 200.0  # seconds that are kept for the benchmark
SHOWN = 12  # lines of the log of a step that failed
WARMED = ("bfloat16", "float16", "float32")
CHECKER_FOUND = 97  # exit code of the memory checker


@dataclass(frozen=True)
class Step:
    """A command with a limit of its own.

    Attributes:
        command: None if its program is not installed.
        seconds: its limit; the last step has none, and gets the time that the others leave.
        last_lines: number of lines of its log to show even if it passes.
    """

    name: str
    command: Sequence[str | Path] | None
    seconds: float | None = None
    environment: dict[str, str] = field(default_factory=dict)
    last_lines: int = 1


@dataclass(frozen=True)
class Ran:
    """The result of a step: "passed", "failed (code)", "timed out" or "not installed"."""

    name: str
    verdict: str
    seconds: float
    last_line: str


def layout(folder: Path) -> dict[str, str]:
    """Links the package into `folder`; returns the environment in which `flexmoe` and `tests` can be imported."""
    package = folder / "flexmoe"
    package.mkdir(parents=True)
    for path in (*(ROOT / "src" / "flexmoe").iterdir(), ROOT / "modeling"):
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "PYTHONDONTWRITEBYTECODE": "1"}


def steps(out: Path, tiny: bool) -> list[Step]:
    """The steps, in order."""
    python = sys.executable
    parallel = ["-p", "xdist", "-n", "8"] if importlib.util.find_spec("xdist") and not tiny else []
    # for any installed plugins and any version of pytest
    options = ["-p", "no:cacheprovider", "-o", "minversion=7", "-W", "default", "--durations=5"]
    pytest = [python, "-m", "pytest", "-q", *options]
    # graphs are a separate step; the others need no GPU
    excluded = ("compiled", "dispatch", "expert_pointers", "forward", "graphs")
    kernels = ["tests/kernels", *(f"--ignore=tests/kernels/test_{name}.py" for name in excluded)]
    every = [python, BENCH / "every_kernel.py"]
    bench = [python, BENCH / "bench_kernels.py", "--out", out / "routing.json", *(["--tiny"] if tiny else [])]
    return [
        Step("tests of the kernels", [*pytest, *parallel, *kernels], 160),
        Step("every kernel once", every, 60),
        Step("memcheck", checked("memcheck", every), 75, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
        Step("racecheck", checked("racecheck", every), 75),
        Step("CUDA graphs", [*pytest, "tests/kernels/test_graphs.py"], 90),
        Step("benchmark", bench, last_lines=30),
    ]


def checked(tool: str, command: Sequence[str | Path]) -> list[str | Path] | None:
    """The command under compute-sanitizer; None if that is not installed."""
    checker = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if checker is None:
        return None
    options = ["--tool", tool, "--error-exitcode", str(CHECKER_FOUND), "--target-processes", "application-only"]
    return [checker, *options, *command]


def run(step: Step, environment: dict[str, str], log: Path, seconds: float) -> Ran:
    """Runs a step until it ends or reaches its limit; the processes that it started end with it."""
    if step.command is None:
        return Ran(step.name, "not installed", 0.0, "")
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
            verdict = "timed out"
    lines = log.read_text(errors="replace", encoding="utf-8").splitlines()
    shown = step.last_lines if verdict == "passed" else max(SHOWN, step.last_lines)
    report("\n".join(f"    {line[:200]}" for line in lines[-shown:]))
    last = next((line for line in reversed(lines) if line.strip()), "")
    return Ran(step.name, verdict, time.monotonic() - start, last)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and those that it has started, which form a session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


@contextlib.contextmanager
def warming(environment: dict[str, str], out: Path, wanted: bool) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Compiles the benchmark's kernels in the background, a process for each dtype."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        for dtype in WARMED if wanted else ():
            command = [sys.executable, BENCH / "bench_kernels.py", "--warm", dtype]
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
    """Waits for the background processes, and ends them after so many seconds."""
    last = time.monotonic() + seconds
    for process in warm:
        try:
            code = process.wait(max(0.1, last - time.monotonic()))
            report(f"    compiled in the background: {'all of it' if code == 0 else f'failed ({code})'}")
        except subprocess.TimeoutExpired:
            end(process)
            report("    compiling in the background took too long")


def report(words: str) -> None:
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


def has_gpu() -> bool:
    """Checks in a separate process, so that this one holds no memory of the device."""
    command = [sys.executable, "-c", "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"]
    return subprocess.run(command, check=False).returncode == 0


def environment_of(temporary: Path, gpu: bool) -> dict[str, str]:
    """Temporary caches that all steps share; kernels run natively on a GPU, and else in the interpreter."""
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
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"for all steps together (default: {MINUTES})")
    parser.add_argument("--only", default="", help="steps whose name contains one of these words, separated by commas")
    parser.add_argument("--tiny", action="store_true", help="also without a GPU: checks this program only")
    arguments = parser.parse_args()
    gpu = has_gpu()
    if not gpu and not arguments.tiny:
        report("on_gpu.py needs a GPU with CUDA, and there is none: nothing run.")
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
                report(f"== {step.name} ({left:.0f} s left)")
                if step.seconds is None:
                    wait_for(warm, left / 3)
                    left = deadline - time.monotonic()
                elif chosen[-1].seconds is None:
                    left -= RESERVED
                log = out / f"{step.name.replace(' ', '-')}.log"
                ran.append(run(step, environment, log, min(left, step.seconds or left)))
    report(f"\n{table(ran)}")
    (out / "table.txt").write_text(table(ran) + "\n", encoding="utf-8")
    return 0 if all(r.verdict in ("passed", "not installed") for r in ran) else 1


if __name__ == "__main__":
    sys.exit(main())
