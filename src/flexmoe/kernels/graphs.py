"""A forward pass of one shape as a CUDA graph: decoding without the overhead of Python and launches.

`torch.compile(mode="reduce-overhead")` captures graphs too, and detects changes of the model by itself; this is for
decoding loops of your own. The expert mask is data, and an expert that is replaced by one of the same shapes takes
effect; after any other change of the experts, or if a parameter moves, the graph refuses to run. Does not cover other
changes of the model, such as adapters or hooks that are added after the capture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from flexmoe.kernels.expert_pointers import ExpertPointers, addresses, parameter_slots
from flexmoe.modeling.masking_flexmoe import warming_up
from flexmoe.modeling.modeling_flexmoe import FlexMoePreTrainedModel

WARMUP_PASSES = 3  # libraries choose their algorithms in the first ones


class CapturedForward:
    """`model(**inputs)` for inputs of one shape, captured once and replayed.

    Args:
        model: on CUDA, in eval mode, with every layer on fused kernels (see `model.implementation_paths()`; low-rank
            experts only with few tokens): modules would have the addresses of their weights in the graph.
        inputs: as for `model`. Tensors are copied in at each call, everything else (a static cache) is used as it is.
            Capturing runs the tokens given here, and leaves the caches as they were.

    Raises:
        ValueError: the model is in training mode, not on CUDA, a layer is not fused, or a cache grows or slides.

    Example:
        ```pycon
        >>> import flexmoe, torch
        >>> from transformers import AutoModelForCausalLM
        >>> model = AutoModelForCausalLM.from_pretrained("model", experts_implementation="flexmoe_triton").to("cuda")
        >>> token = torch.tensor([[5]], device="cuda")
        >>> forward = flexmoe.CapturedForward(model, input_ids=token, use_cache=False)
        >>> forward(input_ids=token).logits.shape
        torch.Size([1, 1, 99])
        ```
    """

    def __init__(self, model: FlexMoePreTrainedModel, **inputs: Any) -> None:
        _check(model, inputs)
        lengths = _cache_lengths(inputs)
        self._model = model
        device = next(model.parameters()).device  # a mask on the CPU would be copied to it in each layer
        self._inputs = {n: x.to(device, copy=True) if isinstance(x, Tensor) else x for n, x in inputs.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            model(**self._inputs)  # checks the values, such as a mask that allows no expert
            _reset_lengths(lengths)
            with warmup():  # an expert that is idle for these inputs may not be for the next ones
                for _ in range(WARMUP_PASSES):
                    model(**self._inputs)
                    _reset_lengths(lengths)
        torch.cuda.current_stream().wait_stream(stream)
        self._experts = ExpertPointers(model)
        self._slots = _other_parameters(model)
        self._addresses = addresses(self._slots)
        self._settings = _settings(model)
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self._graph):
            self._output = model(**self._inputs)

    def __call__(self, **inputs: Tensor) -> Any:
        """The model's output for these inputs; inputs that are not given keep their values.

        The output is overwritten by the next call.

        Raises:
            RuntimeError: the model's experts are no longer the captured ones, or a parameter has moved.
            ValueError: an input is unknown, not a tensor, or of another shape or dtype.
        """
        self._check_model()
        for name, value in inputs.items():
            held = self._inputs.get(name)
            if not isinstance(held, Tensor) or not isinstance(value, Tensor) or not _are_alike(held, value):
                raise ValueError(
                    f"{name} is {_described(value)}; this graph was captured with {_described(held)}: pass that, or "
                    "capture another."
                )
            held.copy_(value)
        self._graph.replay()
        return self._output

    def _check_model(self) -> None:
        intact = self._experts.update()
        serials = tuple(map(self._model.serial_of, self._model.expert_names))
        if (
            not intact
            or self._experts.serials != serials
            or self._settings != _settings(self._model)
            or self._addresses != addresses(self._slots)
        ):
            raise RuntimeError(
                "The model's experts are not those that this graph was captured with (one was added, removed, or "
                "replaced by one of other shapes, the active set or number per token changed, or parameters moved): "
                "capture it again."
            )


def _check(model: FlexMoePreTrainedModel, inputs: dict[str, Any]) -> None:
    if model.training:
        raise ValueError("A graph is for inference, and this model is in training mode: call eval() first.")
    if model.device.type != "cuda":
        raise ValueError(f"CUDA graphs are for models on CUDA; this one is on {model.device}.")
    given = (inputs.get(name) for name in ("input_ids", "inputs_embeds"))
    tokens = next((x.shape[0] * x.shape[1] for x in given if x is not None), None)
    paths = model.implementation_paths(tokens=tokens)
    reasons = {path.reason for path in paths if path.runs_modules or not path.fuses_router}
    if reasons:
        raise ValueError(
            f"Not all layers run on fused kernels: {'; '.join(sorted(reasons))}. What cannot be captured may be "
            'compiled: torch.compile(model, mode="reduce-overhead").'
        )


def _cache_lengths(inputs: dict[str, Any]) -> list[tuple[Any, list[Tensor]]]:
    """The caches among `inputs`, each with the number of tokens of its layers."""
    lengths = []
    for cache in (value for value in inputs.values() if isinstance(value, Cache)):
        if not cache.is_compileable or any(cache.is_sliding):
            raise ValueError(
                f"{type(cache).__name__} grows, or has layers with a sliding window, whose length is a number in "
                "Python that a graph would not see change: use a StaticCache, and a family without such windows."
            )
        lengths.append((cache, [layer.cumulative_length.clone() for layer in cache.layers]))
    return lengths


def _reset_lengths(lengths: list[tuple[Any, list[Tensor]]]) -> None:
    for cache, before in lengths:
        new = [torch.zeros(())] * (len(cache.layers) - len(before))  # the first pass adds a layer of token ids
        for layer, length in zip(cache.layers, [*before, *new], strict=True):
            layer.cumulative_length.copy_(length)


def _settings(model: FlexMoePreTrainedModel) -> tuple[Any, ...]:
    """The active experts, by position because names may change, and the number of experts per token."""
    return tuple(map(model.expert_names.index, model.active_experts)), model.config.num_experts_per_tok


def _other_parameters(model: FlexMoePreTrainedModel) -> list[tuple[dict[str, Any], str]]:
    """The model's parameters outside of its experts and router rows."""
    in_blocks = {id(part._parameters) for block in model.flexmoe_blocks() for part in block.modules()}
    return [slot for slot in parameter_slots(model) if id(slot[0]) not in in_blocks]


def _are_alike(held: Tensor, value: Tensor) -> bool:
    return held.shape == value.shape and held.dtype == value.dtype


def _described(value: Any) -> str:
    return f"{list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


@contextlib.contextmanager
def warmup() -> Iterator[None]:
    """Within it, passes of this thread run as they will be captured: with the same kernels and the same tables."""
    token = warming_up.set(True)
    try:
        yield
    finally:
        warming_up.reset(token)


__all__ = ["CapturedForward", "warmup"]
