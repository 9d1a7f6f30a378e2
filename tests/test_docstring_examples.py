"""Examples in docstrings run: every exported name of `flexmoe` has one, and its methods may have one.

Below `Example:` stands either a fenced `pycon` block, which runs as a doctest, or an indented statement, which has to
run without an error. It runs in a copy of the folders of `tests/support/example_world.py`. A statement finds `model`
and `inputs`, a tokenized prompt, and the exported names; a doctest imports what it needs.
"""

from __future__ import annotations

import copy
import doctest
import functools
import inspect
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import flexmoe
from tests.support.example_world import build_world, copy_of_world, hub_of_world

NOT_RUN = {
    "CapturedForward": "captures a CUDA graph",
}
"""Examples that need what a machine may lack, and why. They run where there is a GPU."""

WITHOUT = {
    "FlexMoeModel": "is loaded and called as `FlexMoeForCausalLM`",
    "UnsupportedAnchorError": "is an error",
}
"""Exported names that need no example, and why: they are part of the code that travels, which is kept short."""

SECTION = re.compile(r"^Example:\n((?:    .*\n|\n)+)", re.M)
FENCED = re.compile(r"```pycon\n(.*?)```", re.S)


def example_of(documented: object) -> str | None:
    """The code below `Example:`, without its indentation and fence; None if there is none."""
    found = SECTION.search((inspect.getdoc(documented) or "") + "\n")
    if found is None:
        return None
    code = textwrap.dedent(found[1])
    fenced = FENCED.search(code)
    return code if fenced is None else fenced[1]


def documented() -> Iterator[tuple[str, object]]:
    """Every exported name, and the public methods of exported classes that FlexMoE defines, each once."""
    seen = set()
    for name in flexmoe.__all__:
        exported = getattr(flexmoe, name)
        yield name, exported
        if inspect.isclass(exported):
            for method, function in inspect.getmembers(exported, inspect.isroutine):
                function = getattr(function, "__func__", function)  # of a class method
                module = getattr(function, "__module__", None) or ""
                if not method.startswith("_") and module.startswith("flexmoe") and function not in seen:
                    seen.add(function)
                    yield f"{name}.{method}", function


EXAMPLES = {name: example for name, item in documented() if (example := example_of(item)) is not None}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = build_world(tmp_path_factory.mktemp("world"))
        with hub_of_world(folder, patch):
            yield folder


def test_every_exported_name_has_an_example() -> None:
    assert [name for name in flexmoe.__all__ if name not in EXAMPLES] == list(WITHOUT)


def test_the_exceptions_are_examples() -> None:
    assert set(NOT_RUN) <= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in NOT_RUN and not torch.cuda.is_available():
        pytest.skip(NOT_RUN[name])
    monkeypatch.chdir(copy_of_world(world, tmp_path / "world"))
    if ">>>" in EXAMPLES[name]:
        run_doctest(name)
    else:
        exec(compile(EXAMPLES[name], name, "exec"), namespace())
    assert os.getcwd() == str(tmp_path / "world")


def run_doctest(name: str) -> None:
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    test = doctest.DocTestParser().get_doctest(EXAMPLES[name], {}, name, None, None)
    report: list[str] = []
    failed, _ = doctest.DocTestRunner(optionflags=options, verbose=False).run(test, out=report.append)
    assert failed == 0, "".join(report)


@functools.cache
def model_of_world() -> flexmoe.FlexMoeForCausalLM:
    """The model in a copy of the world, which is the working directory; not to be changed."""
    return flexmoe.FlexMoeForCausalLM.from_pretrained("model")


def namespace() -> dict[str, Any]:
    """What the statement of an example finds."""
    model = copy.deepcopy(model_of_world())
    inputs = transformers.AutoTokenizer.from_pretrained("anchor")("find the sum", return_tensors="pt")
    exported = {name: getattr(flexmoe, name) for name in flexmoe.__all__}
    classes = {"LlamaConfig": transformers.LlamaConfig, "AutoModelForCausalLM": transformers.AutoModelForCausalLM}
    return {**exported, **classes, "flexmoe": flexmoe, "torch": torch, "model": model, "inputs": inputs}
