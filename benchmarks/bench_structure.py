"""The size of what travels with a checkpoint, and the sub-packages that each step of the main job enters.

Runs the steps of the main job on a tiny model, with a Hub on the loopback, and records which source files execute a
function in each step. Module-level code does not count: every step runs once before it is traced. Asserts the limits
on the files that travel and on the Python calls of `remove_expert`. Does not cover speed.

Run: python benchmarks/bench_structure.py [--out JSON].
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from machine import keep, machine

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import flexmoe  # noqa: E402
from flexmoe.modeling import FlexMoeForCausalLM  # noqa: E402
from flexmoe.testing import perturb_expert, tiny_anchor  # noqa: E402
from tests.support.hub.client import point_client_at  # noqa: E402
from tests.support.hub.server import HubServer  # noqa: E402
from tests.support.letters import letter_tokenizer  # noqa: E402

RESULT = ROOT / "docs" / "benchmarks" / "structure.json"
LIMITS = {"files": 12, "lines": 3520, "calls": 500}
FOLDERS = ("modeling", "conversion", "model_cards", "src/flexmoe", "src/flexmoe_cli")
LAZY_IMPORTS = "src/flexmoe/__init__.py"  # `__getattr__` of the package runs wherever a name is looked up
TOKENS = torch.tensor([[5, 6, 7, 8]])


class Trace:
    """Source files of this repository whose functions were called, and the number of all Python calls."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.calls = 0

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            self.calls += 1
            self.files.add(frame.f_code.co_filename)

    def sources(self) -> list[str]:
        """Paths relative to the repository, of the package only."""
        paths = {Path(file).resolve() for file in self.files if file.endswith(".py")}
        inside = (path.relative_to(ROOT).as_posix() for path in paths if path.is_relative_to(ROOT))
        return sorted(path for path in inside if path.startswith(FOLDERS) and path != LAZY_IMPORTS)


@contextmanager
def traced() -> Iterator[Trace]:
    """Traces the calls of this thread, and of threads that are started meanwhile."""
    trace = Trace()
    threading.setprofile(trace)
    sys.setprofile(trace)
    try:
        yield trace
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def room(path: str) -> str:
    """The sub-package that a file belongs to; modules directly in src/flexmoe are called by their own name."""
    parts = path.split("/")
    if parts[0] != "src":
        return parts[0]
    return parts[2].removesuffix(".py")


class MainJob:
    """The eight steps, in order, in a folder of their own. The Hub must be reachable."""

    def __init__(self, folder: Path, repository: str) -> None:
        self.folder, self.repository = folder, repository
        self.anchor, self.data = folder / "anchor", folder / "text.txt"
        tiny_anchor("llama").save_pretrained(self.anchor)
        letter_tokenizer().save_pretrained(self.anchor)
        self.data.write_text("\n<|endofdocument|>\n".join("the river rose. " * 8 for _ in range(40)), encoding="utf-8")
        self.private = flexmoe.keygen(folder / "key").private
        self.model: Any = None

    def steps(self) -> dict[str, Callable[[], object]]:
        """Step -> what to call."""
        return {
            "graft": self.graft,
            "train": self.train,
            "sign and push": self.publish,
            "verify": self.verify,
            "compose": self.compose,
            "load": self.load,
            "generate": self.generate,
            "remove": self.remove,
        }

    def graft(self) -> None:
        flexmoe.graft(self.anchor, self.folder / "grafted", public_data=[self.data])

    def train(self) -> None:
        options = {"max_steps": 2, "sequence_length": 16, "progress": False, "license": "cc0-1.0"}
        flexmoe.train_expert(self.folder / "grafted", "math", [self.data], self.folder / "math", **options)

    def publish(self) -> None:
        flexmoe.sign(self.folder / "math", self.private)
        flexmoe.push(self.folder / "math", self.repository)

    def verify(self) -> None:
        assert flexmoe.verify(self.repository, self.folder / "grafted").accepted

    def compose(self) -> None:
        flexmoe.compose(self.folder / "grafted", [self.repository], self.folder / "model")

    def load(self) -> None:
        self.model = FlexMoeForCausalLM.from_pretrained(self.folder / "model")

    def generate(self) -> None:
        self.model.generate(TOKENS, experts=["public", "math"], max_new_tokens=4)

    def remove(self) -> None:
        self.model.remove_expert("math")


def steps() -> dict[str, Any]:
    """For each step of the main job: sub-packages, files and lines that it enters."""
    with HubServer().running() as hub, pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        hub.tokens["secret"] = "alice"
        point_client_at(hub.url, patch, token="secret")
        jobs = []
        for name in ("first", "second"):
            (Path(folder) / name).mkdir()
            jobs.append(MainJob(Path(folder) / name, f"alice/{name}"))
        for step in jobs[0].steps().values():
            step()
        result = {}
        for name, step in jobs[1].steps().items():
            with traced() as trace:
                step()
            files = trace.sources()
            result[name] = {"rooms": sorted(set(map(room, files))), "files": files, "lines": sum(map(lines, files))}
        return result


def lines(path: str) -> int:
    """Lines of a file of the repository."""
    return len((ROOT / path).read_text(encoding="utf-8").splitlines())


def travels() -> dict[str, int]:
    """What `save_pretrained` writes beside the weights of a tiny model: Python files, their lines and bytes."""
    with tempfile.TemporaryDirectory() as folder:
        grafted_model().save_pretrained(folder)
        paths = list(Path(folder).glob("*.py"))
        return {
            "files": len(paths),
            "lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths),
            "bytes": sum(path.stat().st_size for path in paths),
        }


def grafted_model() -> FlexMoeForCausalLM:
    """A tiny model of two layers with one expert more than the anchor."""
    from flexmoe.testing import tiny_flexmoe

    model = tiny_flexmoe("llama")
    model.add_expert_copy("math")
    perturb_expert(model, "math")
    return model


def calls_of_removal() -> int:
    """Python calls of a second `remove_expert`, on a model of two layers."""
    for _ in range(2):
        model = grafted_model()
        model(TOKENS)
        with traced() as trace:
            model.remove_expert("math")
    return trace.calls


def block() -> dict[str, int]:
    """Lines of `FlexMoeBlock` and of its longest method."""
    from flexmoe.modeling import FlexMoeBlock

    tree = ast.parse(inspect.getsource(FlexMoeBlock)).body[0]
    assert isinstance(tree, ast.ClassDef)
    methods = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in methods}
    return {
        "lines": (tree.end_lineno or 0) - tree.lineno + 1,
        "methods": len(methods),
        "forward": lengths["forward"],
        "longest_method": max(lengths.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT, help="where the result goes")
    arguments = parser.parse_args()
    before = machine()
    travelling, calls = travels(), calls_of_removal()
    passed = travelling["files"] <= LIMITS["files"] and travelling["lines"] <= LIMITS["lines"]
    result = {
        "travels": travelling,
        "block": block(),
        "remove_expert_calls": calls,
        "steps": steps(),
        "thresholds": LIMITS,
        "passed": passed and calls < LIMITS["calls"],
    }
    keep(result | before, arguments.out)
    assert result["passed"], f"{travelling}, {calls} calls of remove_expert: more than {LIMITS}"


if __name__ == "__main__":
    main()
