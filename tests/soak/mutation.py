"""Mutation testing with mutmut: which changes of the code does no test notice?

Run: python tests/soak/mutation.py [TARGET ...] [--every N] [--show NAME]. Each target of `TARGETS` is copied to
`build/mutation/<target>`, laid out as an install would be, because mutmut does not follow setuptools' package-dir map.
mutmut runs there, in an environment of its own that sees the packages of this one. Prints a table of the results by
file and the surviving mutants, which `docs/mutation.md` lists with what became of them.

Does not cover functions with a decorator other than `staticmethod` and `classmethod`: mutmut leaves these alone.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MUTMUT = "mutmut==3.8.1"
MOST_MUTANTS = 1000  # of one function


@dataclass(frozen=True)
class Target:
    """Files to mutate, as installed under `flexmoe/`, and the tests that run for each of their mutants.

    A mutant is run against those of the tests that call its function.
    """

    files: tuple[str, ...]
    tests: tuple[str, ...]


TARGETS = {
    "routing": Target(
        files=("modeling/routing_flexmoe.py",),
        tests=("tests/modeling/test_routing.py", "tests/modeling/test_exactness.py"),
    ),
    "lifecycle": Target(
        files=("modeling/lifecycle_flexmoe.py",),
        tests=(
            "tests/modeling/test_lifecycle.py",
            "tests/modeling/test_refusals.py",
            "tests/modeling/test_generation.py",
        ),
    ),
    "packages": Target(
        files=(
            "packages/package.py",
            "packages/manifest.py",
            "packages/checks.py",
            "packages/modules.py",
            "packages/export.py",
            "packages/names.py",
        ),
        tests=("tests/packages",),
    ),
    "compose": Target(
        files=("conversion/compose.py", "admission/incoming.py"),
        tests=("tests/conversion/test_compose.py",),
    ),
}

COPIED = {
    "src/flexmoe": "src/flexmoe",
    "src/flexmoe_cli": "src/flexmoe_cli",
    "modeling": "src/flexmoe/modeling",
    "conversion": "src/flexmoe/conversion",
    "model_cards": "src/flexmoe/model_cards",
    "tests": "tests",
    "docs": "docs",
}

# The plugin collects garbage twice per run, which takes longer than most tests here.
PYTEST_ARGUMENTS = ["-p", "no:cacheprovider", "-p", "no:unraisableexception"]

# A forked server collects the tests once; each mutant is a fork of it, which has imported torch already.
CONFIG = """
[tool.mutmut]
source_paths = ["src"]
only_mutate = {files}
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = {arguments}
also_copy = ["docs"]
process_isolation = "forkserver"
use_git_change_detection = false
timeout_multiplier = 5.0
timeout_constant = 5.0
"""

STATUS = {0: "survived", 1: "killed", 3: "killed", 33: "not called by the tests", 36: "timeout", -24: "timeout"}


def lay_out(folder: Path, target: Target) -> None:
    """Copies the project into `folder`, as installed, with mutmut's configuration in its pyproject.toml."""
    shutil.rmtree(folder, ignore_errors=True)
    for source, destination in COPIED.items():
        shutil.copytree(
            ROOT / source, folder / destination, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    config = CONFIG.format(
        files=json.dumps([f"src/flexmoe/{file}" for file in target.files]),
        tests=json.dumps(target.tests),
        arguments=json.dumps(PYTEST_ARGUMENTS),
    )
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + config)


def make_environment(folder: Path) -> Path:
    """An environment with mutmut that also sees this one's packages, except flexmoe itself. Returns its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", MUTMUT], check=True)
        # an entry of a .pth file is a plain path: this environment's own .pth files, its editable install, are unread
        purelib = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
        (Path(purelib.decode().strip()) / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def mutmut(python: Path, folder: Path, *arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "mutmut", *arguments]
    subprocess.run(command, cwd=folder, env=environment, check=True)


def results(folder: Path, target: Target) -> Iterator[tuple[str, str, int | None]]:
    """Yields file, mutant and pytest's exit code, None if the mutant was not run."""
    for file in target.files:
        meta = folder / "mutants" / "src" / "flexmoe" / f"{file}.meta"
        for mutant, code in json.loads(meta.read_text())["exit_code_by_key"].items():
            yield file, mutant, code


def run(name: str, out: Path, python: Path, every: int) -> list[str]:
    """Runs a target, prints its counts, and returns the mutants that survived.

    Args:
        every: 1 runs all mutants; n runs the first, the n+1st, ... of each function.
    """
    folder, target = out / name, TARGETS[name]
    lay_out(folder, target)
    numbers = [f"*__mutmut_{number}" for number in range(1, MOST_MUTANTS, every)]
    mutmut(python, folder, "run", "--max-children", "1", *(numbers if every > 1 else ()))
    counts = {file: Counter() for file in target.files}
    survivors = []
    for file, mutant, code in results(folder, target):
        counts[file]["generated"] += 1
        if code is not None:
            counts[file]["run"] += 1
            counts[file][STATUS.get(code, f"exit code {code}")] += 1
            if STATUS.get(code) not in ("killed", "timeout"):
                survivors.append(mutant)
    for file, count in counts.items():
        sys.stdout.write(f"{name}: {file}: {dict(count)}\n")
    return survivors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"of {', '.join(TARGETS)}; by default all")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="run one in N mutants of each function")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutation")
    args = parser.parse_args()
    python = make_environment(args.out / "environment")
    for name in args.targets or TARGETS:
        for mutant in run(name, args.out, python, args.every):
            mutmut(python, args.out / name, "show", mutant)


if __name__ == "__main__":
    sys.exit(main())
