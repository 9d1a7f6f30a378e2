"""Mutation tests with mutmut: finds changes of the code that no test notices. By hand, not in CI.

Run: python tests/soak/mutation.py [TARGET ...] [--every N]. Each target of `TARGETS` is copied to
`build/mutation/<target>`, laid out as an install would be, because mutmut does not follow setuptools' package-dir map.
mutmut runs there, one mutant at a time, in an environment of its own that also sees the packages of this one. Prints
the counts by file as a table, and the surviving mutants.

Does not cover functions with decorators other than `staticmethod` and `classmethod` (properties, context managers):
mutmut does not mutate these.
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


@dataclass(frozen=True)
class Target:
    """Files to mutate, as installed under `flexmoe/`, and tests.

    A mutant runs against those of the tests that call its function.
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
            "tests/modeling/test_low_rank.py",
            "tests/flexmoe/test_usage.py",
            "tests/admission/test_entry_points.py",
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
        tests=("tests/packages", "tests/modeling/test_low_rank.py", "tests/admission/test_entry_points.py"),
    ),
    "compose": Target(
        files=("conversion/compose.py", "admission/incoming.py"),
        tests=("tests/conversion/test_compose.py", "tests/admission/test_entry_points.py"),
    ),
}

LAYOUT = {
    "src/flexmoe": "src/flexmoe",
    "src/flexmoe_cli": "src/flexmoe_cli",
    "modeling": "src/flexmoe/modeling",
    "conversion": "src/flexmoe/conversion",
    "model_cards": "src/flexmoe/model_cards",
    "tests": "tests",
    "docs": "docs",
}
"""Folder of the project -> folder of the copy."""

# A server process collects the tests once, and each mutant runs in a fork of it, which has torch imported already.
# The plugin unraisableexception would collect garbage twice in each fork, which takes longer than most tests here.
CONFIG = """
[tool.mutmut]
source_paths = ["src"]
only_mutate = {files}
also_copy = ["docs"]
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = ["-p", "no:cacheprovider", "-p", "no:unraisableexception"]
process_isolation = "forkserver"
use_git_change_detection = false
timeout_multiplier = 5.0
timeout_constant = 5.0
"""

COLUMNS = ("generated", "run", "killed", "timeout", "survived", "not called")
STATUS = {0: "survived", 1: "killed", 3: "killed", 33: "not called", 36: "timeout", -24: "timeout"}
"""What an exit code of mutmut's means; a mutant is "not called" if none of the tests calls its function."""

MOST_MUTANTS = 1000  # of one function


def lay_out(folder: Path, target: Target) -> None:
    """Copies the project into `folder`, with mutmut's configuration in its pyproject.toml."""
    shutil.rmtree(folder, ignore_errors=True)
    no_caches = shutil.ignore_patterns("__pycache__")
    for source, place in LAYOUT.items():
        shutil.copytree(ROOT / source, folder / place, dirs_exist_ok=True, ignore=no_caches)
    files = json.dumps([f"src/flexmoe/{file}" for file in target.files])
    config = CONFIG.format(files=files, tests=json.dumps(target.tests))
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + config)


def make_environment(folder: Path) -> Path:
    """Makes an environment with mutmut that also sees this one's packages, but not flexmoe. Returns its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", MUTMUT], check=True)
        # Python does not read the .pth files of a folder that a .pth file names, here that of the editable install
        where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        packages = Path(subprocess.check_output(where, text=True).strip())
        (packages / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def mutmut(python: Path, folder: Path, *arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": "src", "OMP_NUM_THREADS": "1"}
    subprocess.run([python, "-m", "mutmut", *arguments], cwd=folder, env=environment, check=True)


def results(folder: Path, target: Target) -> Iterator[tuple[str, str, int | None]]:
    """Yields file, mutant and exit code, None if the mutant was not run."""
    for file in target.files:
        meta = folder / "mutants" / "src" / "flexmoe" / f"{file}.meta"
        for mutant, code in json.loads(meta.read_text())["exit_code_by_key"].items():
            yield file, mutant, code


def run(folder: Path, target: Target, python: Path, every: int) -> None:
    """Runs all mutants of a target, or the first, the n+1st, ... of each function for n = `every`."""
    lay_out(folder, target)
    sample = [f"*__mutmut_{number}" for number in range(1, MOST_MUTANTS, every)] if every > 1 else []
    mutmut(python, folder, "run", "--max-children", "1", *sample)


def report(folder: Path, target: Target, python: Path) -> None:
    """Prints the counts by file as a Markdown table, and the mutants that survived as diffs."""
    counts: dict[str, Counter[str]] = {file: Counter() for file in target.files}
    survivors = []
    for file, mutant, code in results(folder, target):
        status = "not run" if code is None else STATUS.get(code, f"exit code {code}")
        counts[file].update(["generated", status] if code is None else ["generated", "run", status])
        if status == "survived" or status.startswith("exit code"):
            survivors.append(mutant)
    rows = [f"| `{file}` | {' | '.join(str(count[column]) for column in COLUMNS)} |" for file, count in counts.items()]
    sys.stdout.write("\n".join([f"| file | {' | '.join(COLUMNS)} |", f"|---|{'---:|' * len(COLUMNS)}", *rows, ""]))
    sys.stdout.flush()
    for mutant in survivors:
        mutmut(python, folder, "show", mutant)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: all of {', '.join(TARGETS)}")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="run one in N mutants of each function")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "mutation", metavar="DIR")
    args = parser.parse_args()
    if unknown := set(args.targets) - TARGETS.keys():
        parser.error(f"unknown target {min(unknown)!r}; targets are {', '.join(TARGETS)}")
    python = make_environment(args.out / "environment")
    for name in args.targets or TARGETS:
        run(args.out / name, TARGETS[name], python, args.every)
        report(args.out / name, TARGETS[name], python)


if __name__ == "__main__":
    main()
