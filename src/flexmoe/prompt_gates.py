"""Router rows from prompts: the gates that mergekit-moe's `gate_mode` makes, for any family.

Shapes: N layers, E experts, B prompts of one set, L tokens of the longest, H hidden size, V vocabulary.

An expert's gate in a layer is the direction from what stands for its negative prompts to what stands for its positive
ones, of length 1. A mode is one pure function and a line of registration for each of its names. It gets what it
`needs`:

    states      x [N, B, L, H], the inputs of the layers of the dense anchor, bfloat16 whatever it is stored in
    embeddings  x [1, B, L, H], the anchor's input embeddings, float32
    nothing     a shape (N, E, H) and a generator; it gives all gates, of any length

The first two get the prompts' mask int64 [B, L] as well and give one vector per layer. Prompts are filled up on the
left, and begin with the tokenizer's first token, if it has one.

Source: what mergekit 0.1.5 does, read and written anew; https://github.com/arcee-ai/mergekit, docs/moe.md. Its states
are the layers' inputs, not their FFNs' as in `flexmoe.hidden_states`, and padding counts where it takes a mean.
NOT covered: reading recipes (`flexmoe.recipes`), rows fitted on documents (`flexmoe.expert_rows`), quantised anchors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flexmoe.hidden_states import load_dense
from flexmoe.modeling.dense_flexmoe import DenseCheckpoint

Needs = Literal["states", "embeddings", "nothing"]
Looked = tuple[Tensor, Tensor]  # what a mode that needs prompts gets of a set of them: x and mask

SHORTEST = 1e-8  # a vector shorter than this keeps no direction


@dataclass(frozen=True)
class Prompts:
    """What should be routed to an expert, and what should not."""

    positive: Sequence[str]
    negative: Sequence[str] = ()


@dataclass(frozen=True)
class GateMode:
    """One way to make gates: `vectors(x, mask)`, or `vectors(shape, generator)` where it needs nothing."""

    name: str
    vectors: Callable[..., Tensor]
    needs: Needs


GATE_MODES: dict[str, GateMode] = {}


def gate_mode(name: str, *, needs: Needs) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Registers a function as a way to make gates: `gate_mode: NAME` in a recipe."""

    def register(vectors: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name in GATE_MODES:
            raise ValueError(f"Gate mode {name!r} is registered already.")
        GATE_MODES[name] = GateMode(name, vectors, needs)
        return vectors

    return register


@gate_mode("hidden_last", needs="states")
@gate_mode("hidden", needs="states")
def last_token(x_NBLH: Tensor, mask_BL: Tensor) -> Tensor:
    """The state of the last token, mean over prompts; [N, H]."""
    return x_NBLH[:, :, -1].sum(1) / x_NBLH.shape[1]


@gate_mode("hidden_avg", needs="states")
def mean_token(x_NBLH: Tensor, mask_BL: Tensor) -> Tensor:
    """The mean over all places, filled ones too, then over prompts; [N, H]."""
    x_NBH = x_NBLH.sum(2) / x_NBLH.shape[2]
    return x_NBH.sum(1) / x_NBLH.shape[1]


@gate_mode("cheap_embed", needs="embeddings")
def mean_embedding(x_1BLH: Tensor, mask_BL: Tensor) -> Tensor:
    """The sum over the tokens of all prompts, of length 1 before anything is taken from it; [1, H], for all layers."""
    return F.normalize((x_1BLH * mask_BL[..., None]).sum(2).sum(1), dim=-1, eps=SHORTEST)


@gate_mode("random", needs="nothing")
def normal(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Standard normal; float32 [N, E, H]."""
    return torch.randn(shape, generator=generator)


@gate_mode("uniform_random", needs="nothing")
def uniform(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Uniform in (-1, 1) / sqrt(H), as torch begins a linear layer; float32 [N, E, H]."""
    bound = math.sqrt(1.0 / shape[-1])
    return torch.rand(shape, generator=generator) * 2 * bound - bound


def make_gates(mode: GateMode, experts: Sequence[Prompts], anchor: DenseCheckpoint, *, seed: int) -> Tensor:
    """The gates of all experts, [N, E, H] on the CPU: float32, or bfloat16 where they come from states.

    Raises:
        ValueError: the family does not hand out the input of each layer.
    """
    depth, hidden = len(anchor.sites), anchor.config.get_text_config().hidden_size
    if mode.needs == "nothing":
        return mode.vectors((depth, len(experts), hidden), torch.Generator().manual_seed(seed))
    tokenizer = _tokenizer(anchor)
    look = _look_at_states(anchor) if mode.needs == "states" else _look_at_embeddings(anchor)
    gates = []
    for prompts in experts:
        vectors = mode.vectors(*look(_encoded(prompts.positive, tokenizer)))
        if prompts.negative:
            vectors = vectors - mode.vectors(*look(_encoded(prompts.negative, tokenizer)))
        gates.append(F.normalize(vectors, dim=-1, eps=SHORTEST).cpu().expand(depth, hidden))
    return torch.stack(gates, dim=1)


def _tokenizer(anchor: DenseCheckpoint) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(anchor.folder)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.bos_token or tokenizer.eos_token
    return tokenizer


def _encoded(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    begun = [(tokenizer.bos_token or "") + prompt for prompt in prompts]
    encoded = tokenizer(begun, return_tensors="pt", padding=True, add_special_tokens=False)
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _look_at_states(anchor: DenseCheckpoint) -> Callable[[dict[str, Tensor]], Looked]:
    model: Any = load_dense(anchor, torch.bfloat16).base_model  # the head's logits are not wanted
    expected = (len(anchor.sites), anchor.config.get_text_config().hidden_size)

    @torch.no_grad()
    def look(encoded: dict[str, Tensor]) -> Looked:
        given = {name: tensor.to(model.device) for name, tensor in encoded.items()}
        outputs = model(**given, output_hidden_states=True, use_cache=False)
        states = (outputs.hidden_states or ())[:-1]  # the last is what comes out of the layers
        if (len(states), *{state.shape[-1] for state in states}) != expected:
            raise ValueError(
                f"{anchor.folder} ({type(model).__name__}) hands out {len(states)} hidden states where its "
                f"{expected[0]} layers of width {expected[1]} begin; gates cannot be read off them. Set gate_mode: "
                "cheap_embed, or graft with --expert and --router-data."
            )
        return torch.stack(states), given["attention_mask"]

    return look


def _look_at_embeddings(anchor: DenseCheckpoint) -> Callable[[dict[str, Tensor]], Looked]:
    """Reads the one matrix from the file: no model is loaded."""
    weight = anchor.model.get_input_embeddings().weight
    name = next(name for name, known in anchor.model.named_parameters(remove_duplicate=False) if known is weight)
    stored = anchor.stored[anchor.model.all_tied_weights_keys.get(name, name)]
    embeddings_VH = anchor.files.read(stored).float()

    def look(encoded: dict[str, Tensor]) -> Looked:
        return embeddings_VH[encoded["input_ids"]][None], encoded["attention_mask"]

    return look
