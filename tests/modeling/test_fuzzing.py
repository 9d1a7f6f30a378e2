"""Malicious expert packages: 120 cases from fixed seeds, each refused or without effect (`tests/support/fuzzing.py`).

Also tests that the harness detects each kind of failure. Does not cover 2,000 cases (`make soak`).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.packages.package import PackageError
from tests.support import fuzzing
from tests.support.mutators import MUTATORS

CASES = 120


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fuzzing.make_world(tmp_path_factory.mktemp("world"))


def test_malicious_packages_are_refused(world: Path, tmp_path: Path) -> None:
    outcomes = fuzzing.run(fuzzing.make_cases(CASES), world, tmp_path)
    assert len(outcomes) == CASES
    assert {outcome.case.mutator for outcome in outcomes} == MUTATORS.keys()
    assert not [outcome for outcome in outcomes if outcome.fault], f"\n{fuzzing.table(outcomes)}"
    results = fuzzing.report(outcomes)
    assert results["refused"] > results["without_effect"] > 0
    assert set(results["ways"]) == set(fuzzing.WAYS)
    assert len(results["packages"]) == len(fuzzing.BASES)


def raising(error: BaseException) -> Callable[..., None]:
    def add(self: FlexMoeForCausalLM, source: Path) -> None:
        raise error

    return add


def changing(model: FlexMoeForCausalLM, source: Path) -> None:
    with torch.no_grad():
        next(model.parameters()).add_(1)
    raise PackageError(f"{source}: fault")


def littering(model: FlexMoeForCausalLM, source: Path) -> None:
    (source.parent / ".math.flexmoe-0").mkdir()
    raise PackageError(f"{source}: fault")


def hoarding(model: FlexMoeForCausalLM, source: Path) -> None:
    torch.ones(100 * fuzzing.MEGABYTE, dtype=torch.uint8)
    raise PackageError(f"{source}: fault")


def adding_a_copy(model: FlexMoeForCausalLM, source: Path) -> str:
    return model.add_expert_copy("math")


def hanging(model: FlexMoeForCausalLM, source: Path) -> None:
    while True:
        pass


HARNESS: dict[str, tuple[Callable[..., Any], str, str]] = {
    # a replacement of add_expert, the mutator before it, and the fault
    "errors of other libraries": (raising(KeyError("layers.0")), "truncation", "KeyError is not an error of FlexMoE"),
    "errors of the system": (raising(FileNotFoundError(2, "No such file")), "truncation", "not an error of FlexMoE"),
    "errors raised elsewhere": (raising(ValueError("bad")), "truncation", "ValueError was raised by another library"),
    "a changed model": (changing, "truncation", "the model changed: ['tensors']"),
    "leftover files": (littering, "truncation", "the disk changed: ['.math.flexmoe-0']"),
    "too much memory": (hoarding, "truncation", "MB of memory; at most 64 are allowed"),
    "a hang": (hanging, "truncation", "OutOfTime is not an error"),
    "a valid package": (FlexMoeForCausalLM.add_expert, "invalid index", ""),
    "another expert": (adding_a_copy, "invalid index", "expert 'math' has other tensors"),
    "an accepted attack": (adding_a_copy, "wrong hash", "it was accepted"),
}


@pytest.mark.parametrize("case", HARNESS)
def test_the_harness_detects(case: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add, mutator, fault = HARNESS[case]
    monkeypatch.setattr(fuzzing, "CPU_SECONDS", 0.2)
    monkeypatch.setattr(FlexMoeForCausalLM, "add_expert", add)
    target = fuzzing.Target(world / "llama")
    found = fuzzing.run_case(fuzzing.Case(0, mutator, 0, "add_expert", 0), target, tmp_path).fault
    assert fault in found if fault else not found
    assert fuzzing.state_of(target.model) == target.before


def test_messages_name_the_package_and_are_readable(tmp_path: Path) -> None:
    for text, fault in {
        "no tensor": "names no file",
        f"{tmp_path}: {'x' * 5000}": "not readable",
        f"{tmp_path}: \x1b[2J": "not readable",
    }.items():
        with pytest.raises(PackageError) as caught:
            raise PackageError(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fuzzing, "_is_raised_by_flexmoe", lambda error: True)
            assert fault in fuzzing.fault_of(caught.value, tmp_path)


def test_a_crash_is_the_failure_of_its_case_only(world: Path, tmp_path: Path) -> None:
    crashing, harmless = (fuzzing.Case(number, "pipe", 0, "add_expert", 0) for number in range(2))
    crashing = dataclasses.replace(crashing, mutator="no mutator")
    first, second = fuzzing.run([crashing, harmless], world, tmp_path)
    assert first.fault == "the process hung or died (1)"
    assert not second.fault
