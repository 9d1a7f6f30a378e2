"""Which experts may take part in a forward pass, and how its blocks learn of it.

Three sets are intersected: the model's active set (saved in its config), the enclosing `only_experts` contexts, and
the `expert_mask` of the call. The result travels to the blocks in a context variable, because the decoder layer around
a block belongs to the anchor's family and passes on only the arguments that it knows. Nothing is stored on a module
during a forward pass, so concurrent threads, or two masks under one backward pass, do not interfere.

Does not cover which of the allowed experts a token is routed to (`routing_flexmoe`).

Shapes: B batch, A allowed experts, E experts.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import CompileableContextVar

from .distributed_flexmoe import is_distributed


@dataclass(frozen=True)
class Selection:
    """The allowed experts of a batch.

    Attributes:
        names: experts that at least one sequence may use, in the model's order; the others are not computed. In a
            distributed group, experts that the mask excludes from every local sequence are kept, because other ranks
            may need them to run here too.
        row_mask: bool [batch, len(names)] where sequences differ; None if every sequence may use all of `names`.
    """

    names: tuple[str, ...]
    row_mask: Tensor | None


@dataclass(frozen=True, eq=False, slots=True)
class CacheStamp:
    """Which experts filled a KV cache. Slots hide the mask from exporters, which take a `__dict__` for inputs."""

    serials: tuple[str, ...]
    names: tuple[str, ...]
    row_mask: Tensor | None

    def same_experts(self, other: CacheStamp) -> bool:
        """Whether a cache filled under one stamp may be continued under the other."""
        if self.serials != other.serials:
            return False
        if self.row_mask is None or other.row_mask is None:
            return self.row_mask is other.row_mask
        return torch.equal(self.row_mask, other.row_mask)


@dataclass(frozen=True)
class ForwardContext:
    """The settings of one forward pass, and what its blocks collect. A block called on its own sees the defaults."""

    names: tuple[str, ...] | None = None  # the allowed experts; None allows the active set of the config
    row_mask: Tensor | None = None  # bool [batch, len(names)] where sequences differ
    top_k: int | None = None  # experts per token; None takes the config's, as does `renormalize`
    renormalize: bool | None = None
    implementation: str = "eager"  # a key of `EXPERTS_FORWARDS`
    router_logits: list[Tensor] | None = None  # collects one [tokens, experts] per layer
    usage: tuple[Any, ...] = ()  # objects whose `record` each block calls with its routing weights
    token_mask: Tensor | None = None  # bool [tokens], False for padding
    stamp: CacheStamp | None = None  # of the KV cache that this pass fills
    evidence: Mapping[str, Tensor] | None = None  # features [tokens, F] of the experts that have it


_NO_CONTEXT = ForwardContext()
# Both hold dictionaries or None, because transformers' common tests look into every such variable.
_forward = CompileableContextVar("flexmoe_forward")
_scopes = CompileableContextVar("flexmoe_scopes")
warming_up = ContextVar("flexmoe_warmup", default=False)  # passes run as they will be captured: same kernels

# How many scopes of a (model, kind) are open in any thread: compiled code can see no more of them than that.
_open_scopes: Counter[tuple[int, str]] = Counter()
_counting = threading.Lock()


def forward_context() -> ForwardContext:
    """The context of the running forward pass; the defaults outside of one."""
    return (_forward.get() or {}).get("context", _NO_CONTEXT)


@contextlib.contextmanager
def _holding(variable: CompileableContextVar, value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def forward_scope(context: ForwardContext) -> contextlib.AbstractContextManager[None]:
    """Runs one forward pass with `context`."""
    return _holding(_forward, {"context": context})


@contextlib.contextmanager
def model_scope(model: nn.Module, kind: str, value: Any) -> Iterator[None]:
    """Within it, `scoped_values(model, kind)` ends with `value`, for this model and this thread or task only."""
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


def scoped_values(model: nn.Module, kind: str, required: bool = False) -> tuple[Any, ...]:
    """The values of the enclosing `model_scope`s of this model and kind, outermost first.

    Raises:
        RuntimeError: while compiling, a scope of this model is open in some thread; compiled code cannot tell which.
            Or one is `required` if any is open, and it is open in other threads only, as around a new thread.
    """
    key = (id(model), kind)
    if torch.compiler.is_compiling():
        if key in _open_scopes:
            raise RuntimeError(
                "Compiled code cannot see the contexts only_experts and track_usage: pass expert_mask, use "
                "set_active_experts, or call the model that was not compiled."
            )
        return ()
    values = (_scopes.get() or {}).get(key, ())
    if required and not values and key in _open_scopes:
        raise RuntimeError(
            "only_experts is open in another thread or task, and threads do not inherit it: this one would use all "
            "experts. Pass experts=[...] to generate or forward here (all names, if all may take part), open "
            "only_experts inside the thread, or start it as "
            "Thread(target=contextvars.copy_context().run, args=(model.generate, ...))."
        )
    return values


def is_capturing() -> bool:
    """Whether this pass is compiled or captured as a CUDA graph: it is replayed, so it must not depend on values."""
    if torch.compiler.is_compiling():
        return True
    return warming_up.get() or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def checkpoint_with_context(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an activation-checkpointing function recompute, in backward, with the context of the forward pass."""

    def run_checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        first = forward_context()
        logits: list[Tensor] | None = None if first.router_logits is None else []
        again = replace(first, router_logits=logits, usage=())
        runs = iter([first])

        def run(*inputs: Any) -> Any:
            with forward_scope(next(runs, again)):
                return function(*inputs)

        return checkpoint(run, *args, **kwargs)

    return run_checkpointed


def check_names(names: Iterable[str], known: Sequence[str], what: str) -> tuple[str, ...]:
    """`names` as a tuple in the order of `known`; `what` names their origin in errors.

    Raises:
        ValueError: there is no name, or one is unknown.
    """
    names = list(names)
    if not names:
        raise ValueError(f"{what} names no expert: name at least one of {list(known)}.")
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{what} names {unknown}, which this model does not have; its experts are {list(known)}.")
    return tuple(name for name in known if name in names)


def select_experts(model: Any, batch: int | None, expert_mask: Tensor | None, experts: Any = None) -> Selection:
    """Intersects the active set, the enclosing `only_experts` contexts, and the experts of the call.

    Args:
        model: the FlexMoE that runs.
        batch: number of sequences, if known.
        expert_mask: bool [batch, experts] in the order of `model.expert_names`, or None.
        experts: names, or one list of names (None for all) per sequence, or None.

    Raises:
        ValueError: the mask has another shape or no values, a name is unknown, or a sequence has no expert left.
        TypeError: the mask is not a bool tensor, or the names are a string.
        RuntimeError: nothing is given here, and `only_experts` is open in another thread only.
    """
    names = tuple(model.active_experts)
    is_given = experts is not None or expert_mask is not None
    for scope in scoped_values(model, "only", required=not is_given):
        names = tuple(name for name in names if model.serial_of(name) in scope)
    if not is_given and (masks := scoped_values(model, "generate")):
        expert_mask = masks[-1] if batch is None else masks[-1].repeat_interleave(batch // len(masks[-1]), 0)
    if experts is not None and all(isinstance(name, str) for name in experts) and not isinstance(experts, str):
        allowed = check_names(experts, model.expert_names, "experts")
        names = tuple(name for name in names if name in allowed)
    elif experts is not None:
        mask = model.mask_of(experts, len(experts) if batch is None else batch)
        expert_mask = mask if expert_mask is None else mask & expert_mask.to(mask.device)
    if not names:
        raise ValueError(
            f"No expert is allowed: what is chosen leaves nothing of the active set {list(model.active_experts)}."
        )
    if expert_mask is None:
        return Selection(names, None)
    all_names = model.expert_names
    _check_mask(expert_mask, batch, all_names)
    # indexing with a list would copy it to the device, which a captured graph cannot wait for
    rows_BA = torch.stack([expert_mask[:, all_names.index(name)] for name in names], 1)
    if is_capturing():  # the following depends on values
        return Selection(names, rows_BA)
    return _without_idle_experts(names, rows_BA)


def _check_mask(expert_mask: Tensor, batch: int | None, all_names: Sequence[str]) -> None:
    if not isinstance(expert_mask, Tensor) or expert_mask.dtype != torch.bool:
        got = expert_mask.dtype if isinstance(expert_mask, Tensor) else type(expert_mask).__name__
        raise TypeError(f"expert_mask must be a bool tensor [batch, experts], True = allowed; got {got}.")
    expected = (expert_mask.shape[0] if batch is None else batch, len(all_names))
    if tuple(expert_mask.shape) != expected:
        raise ValueError(
            f"expert_mask has shape {list(expert_mask.shape)}; expected {list(expected)}: [batch, experts], "
            f"columns in the order {list(all_names)}."
        )
    if expert_mask.is_meta:
        raise ValueError(
            "expert_mask is on the meta device and has no values: put it where the model is, or on the CPU."
        )


def _without_idle_experts(names: tuple[str, ...], rows_BA: Tensor) -> Selection:
    """Drops experts that no sequence may use, so that masking computes exactly what removal does.

    In a distributed group none is dropped: all ranks call the same modules in the same order.
    """
    rows_BA = rows_BA.cpu()
    empty = (~rows_BA.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"expert_mask allows no active expert for sequence(s) {empty} of the batch; active are {list(names)}."
        )
    used = rows_BA.any(0) | is_distributed()
    names = tuple(name for name, is_used in zip(names, used.tolist(), strict=True) if is_used)
    rows_BA = rows_BA[:, used]
    return Selection(names, None if rows_BA.all() else rows_BA)


def stamp_cache(cache: Any, stamp: CacheStamp | None) -> None:
    """Marks a KV cache with the experts that fill it, or compares with its mark (compiled code leaves none).

    Raises:
        ValueError: other experts filled the cache, so continuing would mix their influence in.
    """
    if cache is None or stamp is None or not hasattr(cache, "get_seq_length"):
        return
    known = getattr(cache, "_flexmoe_stamp", None)
    # the length is read last: for a static cache it is on the device
    if known is not None and not known.same_experts(stamp) and cache.get_seq_length() > 0:
        raise ValueError(
            f"This KV cache was filled by the experts {list(known.names)} (as they were then, or with another mask) "
            f"and would be continued with {list(stamp.names)}. It carries their influence: start with a fresh cache."
        )
    cache._flexmoe_stamp = stamp
