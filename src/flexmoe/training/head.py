"""The head of a causal language model as a function of hidden states, in its family's own arithmetic.

Families scale their logits, cap them, or apply layers before the head, and each does so in the `forward` of its model.
`HeadCall` runs this `forward` on a copy of the model whose decoder returns given states instead of computing them. So
logits can be computed for a few tokens at a time, without a list of families. `head_call` compares the logits with the
model's own once, and returns None if they differ.

Does not cover heads that are trained: the gradients are those of the hidden states only.

Shapes: B sequences in a batch, L tokens of each, N tokens of a part, H hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.modeling.low_rank_flexmoe import is_unwrapped

PROBE = (2, 7)  # sequences and tokens of the comparison
PROBED_AT_A_TIME = 3  # parts begin and end inside of sequences
# Of the largest logit: products of other shapes round differently, a missing scale or cap shows far above.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class HeadCall:
    """Logits [N, V] of hidden states [N, H] of the anchor's decoder, as its family computes them."""

    def __init__(self, anchor: PreTrainedModel, output_class: type[ModelOutput]) -> None:
        self._anchor = anchor
        self._output_class = output_class

    def __call__(self, states_NH: Tensor, input_ids_N: Tensor) -> Tensor:
        """The logits; `input_ids_N` are the tokens of the states, for families that look at them."""
        anchor = self._anchor
        copied = object.__new__(type(anchor))
        copied.__dict__.update(anchor.__dict__)
        decoder = _Returning(anchor.base_model, self._output_class(last_hidden_state=states_NH[None]))
        copied.__dict__["_modules"] = {**anchor._modules, anchor.base_model_prefix: decoder}
        out = type(anchor).forward(copied, input_ids=input_ids_N[None], use_cache=False, return_dict=True)
        return out.logits[0]


class _Returning:
    """A decoder that returns `output` when it is called; its attributes are those of the decoder itself."""

    def __init__(self, decoder: nn.Module, output: ModelOutput) -> None:
        self._decoder = decoder
        self._output = output

    def __call__(self, *_: Any, **__: Any) -> ModelOutput:
        return self._output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)


@contextlib.contextmanager
def capture_states(anchor: PreTrainedModel) -> Iterator[list[Any]]:
    """Within it, what the anchor's decoder returns is appended to the list."""
    outputs: list[Any] = []
    handle = anchor.base_model.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def head_call(model: FlexMoeForCausalLM) -> HeadCall | None:
    """The head of `model`; None if its logits cannot be computed apart from its decoder, or if it is trained."""
    anchor = model.anchor
    decoder = anchor._modules.get(anchor.base_model_prefix)
    if decoder is None or not is_unwrapped(anchor):
        return None
    blocks = [parameter for block in model.flexmoe_blocks() for parameter in block.parameters()]
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if not trained <= {id(p) for p in blocks}:
        return None
    return _checked(model, anchor)


@torch.no_grad()
def _checked(model: FlexMoeForCausalLM, anchor: PreTrainedModel) -> HeadCall | None:
    """The head, if it computes the model's logits for a few tokens."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(vocabulary, PROBE, generator=generator).to(model.device)
    was_training = model.training
    model.eval()
    try:
        with capture_states(anchor) as outputs:
            expected_NV = model(input_ids=input_ids, use_cache=False).logits.flatten(0, 1)
        (output,) = outputs
        states = output.last_hidden_state
        if states.shape[:2] != input_ids.shape:
            return None
        head = HeadCall(anchor, type(output))
        parts = zip(
            states.flatten(0, 1).split(PROBED_AT_A_TIME), input_ids.flatten().split(PROBED_AT_A_TIME), strict=True
        )
        logits_NV = torch.cat([head(*part) for part in parts])
    except Exception:  # whatever a forward does with a decoder that is none
        return None
    finally:
        model.train(was_training)
    if logits_NV.shape != expected_NV.shape or logits_NV.dtype != expected_NV.dtype:
        return None
    largest = float(expected_NV.float().abs().max())
    difference = float((logits_NV.float() - expected_NV.float()).abs().max())
    return head if difference <= TOLERANCES.get(logits_NV.dtype, 0.0) * largest else None


__all__ = ["HeadCall", "capture_states", "head_call"]
