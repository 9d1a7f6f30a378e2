"""Changes of experts beside forward passes, generation and other changes, in threads of one process."""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from flexmoe.admission import live
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.testing import random_tokens, tiny_flexmoe

IDS = random_tokens(1, 6)
THREADS = 4


@pytest.fixture
def model() -> FlexMoeForCausalLM:
    return tiny_flexmoe("llama", ["math"])


@contextlib.contextmanager
def repeating(call: Callable[[], Any]) -> Iterator[list[Any]]:
    """Runs `call` in a thread again and again; yields its results, and raises what it raised."""
    results: list[Any] = []
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            results.append(call())

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run)
        while not results and not future.done():
            time.sleep(0.001)
        yield results
        stop.set()
        future.result()


@pytest.mark.promise(
    "threads", "forward passes beside `add_expert` and `remove_expert`", "each pass sees the model before or after it"
)
def test_forward_passes_see_no_half_change(model: FlexMoeForCausalLM, tmp_path: Path) -> None:
    package = model.save_expert("math", tmp_path / "math")
    with torch.no_grad():
        known = [model(IDS).logits, model(IDS, experts=["public"]).logits]
        with repeating(lambda: model(IDS).logits.detach()) as results:
            for _ in range(20):
                model.remove_expert("math")
                model.add_expert(package)
    assert len(results) > 1
    assert all(any(torch.equal(result, one) for one in known) for result in results)


@pytest.mark.promise("threads", "four that add experts at once", "no update is lost")
def test_no_update_is_lost(model: FlexMoeForCausalLM, tmp_path: Path) -> None:
    package = model.save_expert("math", tmp_path / "math")
    names = [f"owner-{i}" for i in range(4 * THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda name: model.add_expert(package, name), names))
    assert sorted(model.expert_names) == sorted(["public", "math", *names])
    assert all(set(block.experts) == set(block.router) == set(model.expert_names) for block in model.flexmoe_blocks())
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(model.remove_expert, names))
    assert model.expert_names == ["public", "math"]


def test_one_name_is_given_once(model: FlexMoeForCausalLM, tmp_path: Path) -> None:
    package = model.save_expert("math", tmp_path / "math")

    with ThreadPoolExecutor(THREADS) as pool:
        results = [pool.submit(model.add_expert, package, "new") for _ in range(2 * THREADS)]
    errors = [str(result.exception()) for result in results if result.exception() is not None]
    assert len(errors) == 2 * THREADS - 1
    assert all("has an expert 'new' already" in error for error in errors)
    assert model.expert_names == ["public", "math", "new"]


@pytest.mark.promise(
    "threads", "`add_expert` beside a `generate` that starts while the package is prepared", "`RuntimeError`"
)
def test_a_generation_that_starts_while_a_change_is_prepared(
    model: FlexMoeForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = model.save_expert("math", tmp_path / "math")
    check = live.check_expert

    def check_beside_generation(*args: Any, **kwargs: Any) -> Any:
        stack.enter_context(model._guard.generation())
        return check(*args, **kwargs)

    monkeypatch.setattr(live, "check_expert", check_beside_generation)
    with contextlib.ExitStack() as stack, pytest.raises(RuntimeError, match=r"add_expert while generate\(\) runs"):
        model.add_expert(package, "new")
    assert model.expert_names == ["public", "math"]
    model.remove_expert("math")


def test_a_change_inside_a_forward_pass_is_refused(model: FlexMoeForCausalLM) -> None:
    hook = model.flexmoe_blocks()[0].register_forward_hook(lambda *_: model.remove_expert("math"))
    with pytest.raises(RuntimeError, match="inside a forward pass"):
        model(IDS)
    hook.remove()
    model.remove_expert("math")


def test_copies_and_pickles_have_a_guard_of_their_own(model: FlexMoeForCausalLM) -> None:
    with model._guard.generation():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other.remove_expert("math")
