"""Hostile expert packages: 200 cases from fixed seeds, each refused in words or without effect (`tests/fuzzing.py`).

And the judge itself: what he must not let pass. Not here: 2,000 cases (`make soak`).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.modeling.packages_flexmoe import PackageError
from tests import fuzzing
from tests.mutators import MUTATORS

CASES = 200


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fuzzing.make_world(tmp_path_factory.mktemp("world"))


def test_hostile_packages_are_refused_in_words(world: Path, tmp_path: Path) -> None:
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


def another(model: FlexMoeForCausalLM, source: Path) -> str:
    return model.add_expert_copy("math")


def hanging(model: FlexMoeForCausalLM, source: Path) -> None:
    while True:
        pass


JUDGED: dict[str, tuple[Callable[..., Any], str, str]] = {
    # what stands in for add_expert, the mutator before it, and the fault
    "others' errors": (raising(KeyError("layers.0")), "truncation", "KeyError is no error of FlexMoE's"),
    "errors of the system": (raising(FileNotFoundError(2, "No such file")), "truncation", "no error of FlexMoE's"),
    "errors from others": (raising(ValueError("bad")), "truncation", "ValueError was raised by others"),
    "a changed model": (changing, "truncation", "the model changed: ['tensors']"),
    "a litter": (littering, "truncation", "the disk changed: ['.math.flexmoe-0']"),
    "a hoard": (hoarding, "truncation", "MB of memory; at most 64 are due"),
    "a hang": (hanging, "truncation", "OutOfTime is no error"),
    "a good package": (FlexMoeForCausalLM.add_expert, "index games", ""),
    "another expert": (another, "index games", "expert 'math' has other tensors"),
    "what must be refused": (another, "wrong hash", "it was accepted"),
}


@pytest.mark.parametrize("case", JUDGED)
def test_the_judge(case: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add, mutator, fault = JUDGED[case]
    monkeypatch.setattr(fuzzing, "CPU_SECONDS", 0.2)
    monkeypatch.setattr(FlexMoeForCausalLM, "add_expert", add)
    target = fuzzing.Target(world / "llama")
    found = fuzzing.run_case(fuzzing.Case(0, mutator, 0, "add_expert", 0), target, tmp_path).fault
    assert fault in found if fault else not found
    assert fuzzing.state_of(target.model) == target.before


def test_a_message_names_the_package_and_is_a_paragraph(tmp_path: Path) -> None:
    for text, fault in {
        "no tensor": "names no file",
        f"{tmp_path}: {'x' * 5000}": "no paragraph",
        f"{tmp_path}: \x1b[2J": "no paragraph",
    }.items():
        with pytest.raises(PackageError) as caught:
            raise PackageError(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fuzzing, "_is_raised_by_us", lambda error: True)
            assert fault in fuzzing.fault_of(caught.value, tmp_path)


def test_a_process_that_dies_is_the_fault_of_its_case_alone(world: Path, tmp_path: Path) -> None:
    deadly, harmless = (fuzzing.Case(number, "pipe", 0, "add_expert", 0) for number in range(2))
    deadly = dataclasses.replace(deadly, mutator="no mutator")
    first, second = fuzzing.run([deadly, harmless], world, tmp_path)
    assert first.fault == "the process hung or died (1)"
    assert not second.fault
