"""One shape of forward pass as a CUDA graph: decoding without the time that Python takes.

`torch.compile(mode="reduce-overhead")` captures graphs, too, and watches the model by itself; this is for loops of
your own. Which experts a sequence may use is data, and an expert that is replaced by one of the same shapes is
followed; after any other change of the experts the graph refuses to run. Does not cover other changes of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from flexmoe.modeling.context_flexmoe import rehearsal
from flexmoe.modeling.modeling_flexmoe import FlexMoePreTrainedModel

WARM_UP = 3  # passes: libraries choose algorithms in the first ones


class CapturedForward:
    """`model(**inputs)` for inputs of one shape, captured once and replayed.

    Args:
        model: on CUDA, in eval mode, all its layers on fused kernels (`model.implementation_paths()` says; low-rank
            experts are with few tokens): only those know of experts that go.
        inputs: as for `model`; tensors are copied in at each call, all else (a static cache) is taken as it is. The
            first call runs the tokens that come first: to capture adds nothing to a cache.

    Raises:
        ValueError: the model trains, is not on CUDA, a layer is not fused, or a cache grows or slides.
    """

    def __init__(self, model: FlexMoePreTrainedModel, **inputs: Any) -> None:
        _check(model, inputs)
        lengths = _lengths(inputs)
        self._model = model
        device = next(model.parameters()).device  # a mask on the CPU would be copied there in each layer
        self._inputs = {n: x.to(device, copy=True) if isinstance(x, Tensor) else x for n, x in inputs.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            model(**self._inputs)  # looks at the values, and refuses what it must
            _set(lengths)
            with rehearsal():  # an expert that is idle in these inputs may not be so in the next
                for _ in range(WARM_UP):
                    model(**self._inputs)
                    _set(lengths)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self._graph):
            self._output = model(**self._inputs)
        self._captured = _state(model)

    def __call__(self, **inputs: Tensor) -> Any:
        """The model's output for these inputs; those that are not given stay. The next call writes over it.

        Raises:
            RuntimeError: the model's experts are not those that were captured.
            ValueError: an input is unknown, no tensor, or of another shape or dtype.
        """
        if _state(self._model) != self._captured:
            raise RuntimeError(
                "The model's experts are not those that this graph was captured with (one was added, removed, moved, "
                "or replaced by one of other shapes, or the active set changed): capture it again."
            )
        for name, value in inputs.items():
            held = self._inputs.get(name)
            if not isinstance(held, Tensor) or not isinstance(value, Tensor) or not _alike(held, value):
                raise ValueError(
                    f"{name} is {_said(value)}; this graph was captured with {_said(held)}: give it that, or capture "
                    "another."
                )
            held.copy_(value)
        self._graph.replay()
        return self._output


def _check(model: FlexMoePreTrainedModel, inputs: dict[str, Any]) -> None:
    if model.training:
        raise ValueError("A graph is for inference, and this model trains: call eval() first.")
    if model.device.type != "cuda":
        raise ValueError(f"CUDA graphs are for models on CUDA; this one is on {model.device}.")
    given = (inputs.get(name) for name in ("input_ids", "inputs_embeds"))
    tokens = next((x.shape[0] * x.shape[1] for x in given if x is not None), None)
    paths = model.implementation_paths(tokens=tokens)
    reasons = {path.reason for path in paths if path.partly or not path.fuses_router}
    if reasons:
        raise ValueError(
            f"Not all layers run on fused kernels: {'; '.join(sorted(reasons))}. What cannot be captured may be "
            'compiled: torch.compile(model, mode="reduce-overhead").'
        )


def _lengths(inputs: dict[str, Any]) -> list[tuple[Any, Tensor]]:
    """The layers of the caches among `inputs`, and how many tokens each has."""
    lengths = []
    for cache in (value for value in inputs.values() if isinstance(value, Cache)):
        if not cache.is_compileable or any(cache.is_sliding):
            raise ValueError(
                f"{type(cache).__name__} grows, or has layers with a sliding window, whose length is a number in "
                "Python that a graph would not see change: use a StaticCache, and a family without such windows."
            )
        lengths += [(layer, layer.cumulative_length.clone()) for layer in cache.layers]
    return lengths


def _set(lengths: list[tuple[Any, Tensor]]) -> None:
    for layer, length in lengths:
        layer.cumulative_length.copy_(length)


def _state(model: FlexMoePreTrainedModel) -> tuple[Any, ...]:
    changes = sum(block.changes for block in model.flexmoe_blocks())
    active = tuple(map(model.expert_names.index, model.active_experts))
    return active, model.config.num_experts_per_tok, changes


def _alike(held: Tensor, value: Tensor) -> bool:
    return held.shape == value.shape and held.dtype == value.dtype


def _said(value: Any) -> str:
    return f"{list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


__all__ = ["CapturedForward"]
