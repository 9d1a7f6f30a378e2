"""Continuous batching with a choice of experts: `init_continuous_batching`, `generate_batch`, paged `generate`.

A manager runs its requests in a thread of its own, packed into one row, over a KV cache that requests may share. Each
manager therefore has one set of experts, fixed when it is made; prompts with different sets run one set after the
other. Changes of the experts are refused while a manager runs. Evidence needs the tokens that each request has read,
which the cache does not keep: they are taken from the requests when a batch is prepared (`Requests`).

Shapes: R requests with equally many new tokens, Q of these, K tokens so far, T packed tokens of a batch.

Does not cover the batching itself (transformers), or one batch that mixes sets of experts.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from flexmoe.modeling.evidence_flexmoe import UNKNOWN
from flexmoe.modeling.masking_flexmoe import model_scope, scoped_values, select_experts

_KEYWORDS = frozenset(
    {
        "continuous_batching_config",
        "generation_config",
        "max_new_tokens",
        "persistent_manager",
        "progress_bar",
        "record_timestamps",
        "warmup",
    }
)
"""What `generate_batch` uses; transformers ignores other keywords."""


class Requests:
    """What the requests of the next batch have read before it.

    Args:
        window: the number of last tokens that evidence is read from.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self._read: list[tuple[list[int], int]] = []

    def watch(self, processor: Any) -> Any:
        """Records each batch that `processor`, a `ContinuousBatchProcessor`, prepares; returns the processor."""
        prepare = processor.inputs_and_outputs.prepare_batch_tensors

        def recording(requests_in_batch: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            self._read = [self._before(request) for request in requests_in_batch]
            return prepare(requests_in_batch, *args, **kwargs)

        if prepare.__name__ != recording.__name__:  # else it is a processor that is used again
            processor.inputs_and_outputs.prepare_batch_tensors = recording
        return processor

    def _before(self, request: Any) -> tuple[list[int], int]:
        """The last tokens of the window before the new ones, and the number of these."""
        state, end = request.state, request.state.position_offset
        start, prompt = max(0, end - self.window + 1), len(state.initial_tokens)
        tokens = (
            state.initial_tokens[start:end] + state.generated_tokens[max(0, start - prompt) : max(0, end - prompt)]
        )
        if len(tokens) != end - start:
            raise RuntimeError(
                f"Request {state.request_id} has {end} tokens in the cache, of which {end - start - len(tokens)} are "
                "unknown, so its evidence cannot be read: leave the experts with evidence out (experts=[...])."
            )
        return tokens, request.query_length

    def groups(self, ids_T: torch.Tensor) -> tuple[list[tuple[torch.Tensor, int]], torch.Tensor]:
        """The tokens so far of requests with as many new ones, int64 [R, K] and Q, and the index [T] of each packed
        token among the new ones of all groups. Before the beginning of a request, ids are `UNKNOWN`."""
        counts = [count for _, count in self._read]
        new = ids_T.split(counts)
        ends = torch.tensor(counts).cumsum(0).tolist()
        groups, places = [], []
        for count in sorted({count for count in counts if count}):  # 0: all of a prompt but its last token is shared
            members = [i for i, each in enumerate(counts) if each == count]
            pasts = [self._read[i][0] for i in members]
            longest = max(map(len, pasts))
            past_RK = torch.tensor([[UNKNOWN] * (longest - len(past)) + past for past in pasts], device=ids_T.device)
            groups.append((torch.cat([past_RK.long(), torch.stack([new[i] for i in members])], 1), count))
            places += [place for i in members for place in range(ends[i] - count, ends[i])]
        return groups, torch.tensor(places, dtype=torch.int64, device=ids_T.device).argsort()


def read_by_requests(
    model: Any, ids_1T: torch.Tensor, window: int
) -> tuple[list[tuple[torch.Tensor, int]], torch.Tensor]:
    """As `Requests.groups`, for the packed tokens of a forward pass whose experts read `window` tokens.

    Raises:
        RuntimeError: the pass is not of a manager that `start_manager` made for these experts.
    """
    requests = scoped_values(model, "requests")
    if not requests or requests[-1].window < window:
        raise RuntimeError(
            "What the requests of this paged forward pass have read is unknown: it is not of "
            "init_continuous_batching, generate_batch or a paged generate of this model, or experts with evidence "
            "were added or allowed after the manager was made. Make a new one."
        )
    return requests[-1].groups(ids_1T[0])


def start_manager(
    model: Any,
    make: Callable[..., Any],
    experts: Sequence[str] | None,
    args: tuple,
    kwargs: Mapping[str, Any],
) -> Any:
    """Makes a manager with `make` (transformers' `init_continuous_batching`) whose requests use these experts.

    Args:
        model: the FlexMoE model.
        experts: names; None takes `experts` of the generation config, or all that the active set and the enclosing
            `only_experts` allow now.

    Raises:
        ValueError: an unknown name; or an expert with evidence, where passes are compiled or replayed graphs.
        RuntimeError: a persistent manager with other experts runs.
    """
    if experts is None:
        experts = getattr(_generation_config(model, args, kwargs), "experts", None)
    with _only(model, experts):
        names = select_experts(model, None, None).names
        records = [r for r in model.config.expert_records if "evidence" in r and r["name"] in names]
        allowed = tuple(model.serial_of(name) for name in names)
        cached = getattr(model, "_cached_continuous_batching_manager", None)
        if cached is not None and getattr(cached, "_flexmoe_experts", allowed) != allowed:
            if cached.is_running():
                raise RuntimeError(
                    "The persistent manager runs with other experts: stop it, or choose the same ones (experts=...)."
                )
            model.destroy_cached_continuous_batching_manager()  # its cache was filled by others
        manager = make(*args, **kwargs)
        if not hasattr(manager, "_flexmoe_experts"):
            manager._flexmoe_experts = allowed
            manager.add_request = functools.partial(_add_request, manager.add_request)
            requests = Requests(max((r["evidence"]["window"] for r in records), default=0))
            if records:
                _check_runs_in_python(manager, [r["name"] for r in records])
                create = manager._create_batch_processor
                manager._create_batch_processor = lambda: requests.watch(create())
            with model_scope(model, "requests", requests):
                context = contextvars.copy_context()
            for name in ("_run_generation_loop", "warmup"):
                setattr(manager, name, functools.partial(_run_in, context, getattr(manager, name)))
            model._guard.managers.add(manager)
    return manager


def _check_runs_in_python(manager: Any, names: Sequence[str]) -> None:
    """ValueError: forward passes are compiled or replayed, which cannot look up what requests have read."""
    config = manager.continuous_batching_config
    compiled = config.varlen_compile_config is not None or config.decode_compile_config is not None
    if any(config.cuda_graph_booleans) or compiled:
        if manager._original_attn_impl is not None:  # making the manager has changed it
            manager.model.set_attn_implementation(manager._original_attn_impl)
        raise ValueError(
            f"Continuous batching with CUDA graphs or torch.compile cannot read the evidence of {names}: pass "
            "ContinuousBatchingConfig(use_cuda_graph=False) without compile configs, leave these experts out "
            "(experts=[...]), or train them with --evidence none (evidence='none')."
        )


def _generation_config(model: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """That of a call whose first argument after the inputs it is."""
    return kwargs.get("generation_config", args[0] if args else None) or model.generation_config


def _with_config(args: tuple, kwargs: Mapping[str, Any], config: Any) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call with this generation config, without its `experts`."""
    config = copy.deepcopy(config)
    config.experts = None
    return ((config, *args[1:]), dict(kwargs)) if args else ((), {**kwargs, "generation_config": config})


def _only(model: Any, experts: Sequence[str] | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if experts is None else model.only_experts(*experts)


def _run_in(context: contextvars.Context, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return context.copy().run(function, *args, **kwargs)  # a context cannot be entered twice


def _add_request(add_request: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    for name in ("experts", "expert_mask", "num_experts_per_tok"):
        if name in kwargs:
            raise TypeError(
                f"add_request does not take {name}: a manager has one set of experts, that of "
                "init_continuous_batching(experts=...). Use one manager per set, or generate_batch(experts=...)."
            )
    return add_request(*args, **kwargs)


def generate_batch(
    model: Any,
    run: Callable[..., dict[str, Any]],
    inputs: Sequence[Sequence[int]],
    experts: Any,
    args: tuple,
    kwargs: Mapping[str, Any],
) -> dict[str, Any]:
    """`generate_batch` of transformers (`run`) with `experts` as in `generate`; prompts are grouped by their set.

    Raises:
        ValueError, TypeError: as `generate`; or an unknown keyword, which transformers would ignore.
    """
    paged = scoped_values(model, "paged")
    if paged:  # transformers repeats what the prepared generation config has
        kwargs = {name: value for name, value in kwargs.items() if name in _KEYWORDS}
    if unknown := sorted(kwargs.keys() - _KEYWORDS):
        raise TypeError(
            f"generate_batch does not use {unknown}: it takes experts and {sorted(_KEYWORDS)}; other settings belong "
            "into the generation config."
        )
    config = _generation_config(model, args, kwargs)
    if experts is None:
        experts = paged[0] if paged else getattr(config, "experts", None)
    # what is chosen here is not intersected with the config's choice, which `start_manager` would read again
    args, kwargs = _with_config(args, kwargs, config)
    if experts is None or all(isinstance(name, str) for name in experts):
        with _only(model, experts):
            return run(inputs, *args, **kwargs)
    names = [tuple(model.expert_names) if row is None else tuple(row) for row in experts]
    model.mask_of(experts, len(inputs))  # checks the lists
    copies = getattr(config, "num_return_sequences", None) or 1
    outputs: dict[int, list[Any]] = {}
    for group in dict.fromkeys(names):
        members = [i for i, row in enumerate(names) if row == group]
        with model.only_experts(*group):
            results = list(run([inputs[i] for i in members], *args, **kwargs).values())
        for place, i in enumerate(members):
            outputs[i] = results[place * copies : (place + 1) * copies]
    return {out.request_id: out for i in sorted(outputs) for out in _renamed(outputs[i], f"req_{i}")}


def _renamed(outputs: Sequence[Any], name: str) -> list[Any]:
    """The outputs of one prompt under the request id `name`; children keep their suffix."""
    ids = [name + out.request_id[len(out.request_id.partition("__")[0]) :] for out in outputs]
    return [dataclasses.replace(out, request_id=new) for out, new in zip(outputs, ids, strict=True)]


def generate_paged(model: Any, run: Callable[..., Any], experts: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """`generate(cache_implementation="paged")`: transformers hands it over to `generate_batch`.

    Raises:
        ValueError: an argument of this call that continuous batching ignores.
    """
    for name in ("expert_mask", "num_experts_per_tok", "output_router_logits"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f'{name} does not reach generate(cache_implementation="paged"): use experts=[...], set the value in '
                "model.config, or use another cache."
            )
    mask = kwargs.get("attention_mask")
    if mask is not None and not mask.all():
        raise ValueError(
            'generate(cache_implementation="paged") ignores attention_mask, so padding would be read as text: pass '
            "the prompts without padding to generate_batch."
        )
    with model_scope(model, "paged", experts):
        return run(*args, **kwargs)


__all__ = ["generate_batch", "generate_paged", "start_manager"]
