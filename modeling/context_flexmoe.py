"""What one forward pass tells its blocks, and what a `with` statement tells one model: both per thread and task.

A block cannot take the expert mask as an argument, because the decoder layer around it belongs to the anchor's family
and passes on only what it knows. Context variables carry it instead: nothing on a module changes while it runs, so two
threads, or two masks under one backward pass, do not meet. Does not cover what the values mean (`modeling_flexmoe`).
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers.utils.output_capturing import CompileableContextVar

# Both hold dictionaries or None: transformers' common tests look into every such variable.
_forward = CompileableContextVar("flexmoe_forward")
_scopes = CompileableContextVar("flexmoe_scopes")

_rehearsing = ContextVar("flexmoe_rehearsing", default=False)

# How many scopes of a (model, kind) are open in any thread: all that compiled code can see of them.
_open_scopes: Counter[tuple[int, str]] = Counter()
_counting = threading.Lock()


@contextlib.contextmanager
def _holding(variable: CompileableContextVar, value: dict) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def forward_values() -> dict[str, Any]:
    """The values of the forward pass that is running; empty outside of one (a block called on its own)."""
    return _forward.get() or {}


def forward_scope(values: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Runs one forward pass with `values`."""
    return _holding(_forward, values)


@contextlib.contextmanager
def model_scope(model: nn.Module, kind: str, value: Any) -> Iterator[None]:
    """Within it, `scoped_values(model, kind)` ends with `value`; other models and other threads don't see it."""
    key = (id(model), kind)
    outer = _scopes.get() or {}
    with _counting:
        _open_scopes[key] += 1
    try:
        with _holding(_scopes, {**outer, key: (*outer.get(key, ()), value)}):
            yield
    finally:
        with _counting:
            _open_scopes[key] -= 1
            if not _open_scopes[key]:
                del _open_scopes[key]


def scoped_values(model: nn.Module, kind: str) -> tuple[Any, ...]:
    """The values of the enclosing `model_scope`s of this model and kind, outermost first.

    Raises:
        RuntimeError: while compiling, a scope of this model is open in some thread. Compiled code cannot tell whose.
    """
    key = (id(model), kind)
    if torch.compiler.is_compiling():
        if key in _open_scopes:
            raise RuntimeError(
                "Compiled code cannot see the contexts only_experts and track_usage: pass expert_mask, use "
                "set_active_experts, or call the model that was not compiled."
            )
        return ()
    return (_scopes.get() or {}).get(key, ())


def is_recording() -> bool:
    """Whether this pass is compiled or captured as a CUDA graph: it is run again, so it must not look at values."""
    if torch.compiler.is_compiling():
        return True
    return _rehearsing.get() or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


@contextlib.contextmanager
def rehearsal() -> Iterator[None]:
    """Within it, passes of this thread run as they will be recorded: with the same kernels, and the same tables."""
    token = _rehearsing.set(True)
    try:
        yield
    finally:
        _rehearsing.reset(token)


def checkpoint_with_context(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an activation-checkpointing function run its recomputation with the values of the first forward pass.

    The recomputation happens in backward, when the variable is long reset; what it would collect a second time is
    thrown away.
    """

    def run_checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        first = forward_values()
        again = {name: ([] if isinstance(value, list) else value) for name, value in first.items() if name != "usage"}
        runs = iter([first])

        def run(*inputs: Any) -> Any:
            with forward_scope(next(runs, again)):
                return function(*inputs)

        return checkpoint(run, *args, **kwargs)

    return run_checkpointed


__all__ = [
    "checkpoint_with_context",
    "forward_scope",
    "forward_values",
    "is_recording",
    "model_scope",
    "rehearsal",
    "scoped_values",
]
