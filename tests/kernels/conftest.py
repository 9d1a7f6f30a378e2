"""Settings that the tests of the kernels need on a GPU, and the fixtures that several of them share."""

import dataclasses
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# Tests fill uninitialised memory by requesting determinism, which cuBLAS then needs to be configured for.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(scope="session", autouse=True)
def short_interpreter() -> Iterator[None]:
    """Halves the time in Triton's interpreter, where there is one, by leaving out two things that no test needs.

    It replaces Triton's functions with its own for each function that a kernel calls, of which one per module is
    enough; and it checks the sum and product of all integers for an overflow, which sizes as small as here cannot
    have (`tests/soak/test_kernel_*_grid.py` keep this check).
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # an older Triton, whose interpreter has other parts
        yield
        return
    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced = set()

    def launch_anew(*args: Any, **kwargs: Any) -> None:
        replaced.clear()  # at its end, a launch restores them
        launch(*args, **kwargs)

    def replace_once(function: Callable[..., Any]) -> Any:
        module = id(function.__globals__)
        if module in replaced:
            return interpreter._LangPatchScope()
        replaced.add(module)
        return replace(function)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        patch.setattr(interpreter, "_patch_lang", replace_once)
        builder = interpreter.interpreter_builder
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        yield


@pytest.fixture
def ordered_products(monkeypatch):
    """See `order_products`."""
    from tests.kernels.experts.inputs import order_products

    order_products(monkeypatch)


@pytest.fixture
def calls(monkeypatch):
    """Lists which operators run, through their CPU implementations."""
    from flexmoe.kernels.experts import op as experts
    from flexmoe.kernels.low_rank import op as low_rank
    from flexmoe.kernels.route import op as route

    made = []
    for module, name in ((route, "ROUTE"), (experts, "MIX"), (low_rank, "MIX_LOW_RANK")):
        operator = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, operator=operator, name=name: made.append(name) or operator(*args)
        )
    return made
