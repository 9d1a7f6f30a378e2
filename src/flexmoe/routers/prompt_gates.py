"""Router rows from prompts: the gates of mergekit-moe's `gate_mode`, for any family.

Shapes: N layers, E experts, B prompts of one set, L tokens of the longest, H hidden size, V vocabulary.

An expert's gate in a layer is the difference between a vector of its positive prompts and one of its negative prompts,
normalised to length 1. A mode is a pure function, registered by one line for each of its names. It gets what it
`needs`:

    states      x [N, B, L, H], the inputs of the layers of the dense anchor, in bfloat16 whatever the stored dtype
    embeddings  x [1, B, L, H], the anchor's input embeddings, float32
    nothing     a shape (N, E, H) and a generator; it returns all gates, of any length

The first two also get the prompts' attention mask int64 [B, L] and return one vector per layer. Prompts are padded on
the left and begin with the tokenizer's BOS token, if it has one.

Does not cover reading recipes (`flexmoe.recipes`), rows fitted on documents (`flexmoe.routers.text_rows`), or
quantised anchors.

Source: the behaviour of mergekit 0.1.5, reimplemented; https://github.com/arcee-ai/mergekit, docs/moe.md. Its states
are the inputs of layers, not of FFNs as in `flexmoe.routers.hidden_states`, and its means include padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexmoe.data import check_token_ids
from flexmoe.io.dense import DenseCheckpoint
from flexmoe.routers.hidden_states import load_dense
from flexmoe.tokenization import read_tokenizer

Needs = Literal["states", "embeddings", "nothing"]
PromptInputs = tuple[Tensor, Tensor]  # x and mask of a set of prompts, see the module's docstring

NORM_EPS = 1e-8  # shorter vectors are not normalised to length 1


@dataclass(frozen=True)
class Prompts:
    """Prompts that should be routed to an expert, and prompts that should not."""

    positive: Sequence[str]
    negative: Sequence[str] = ()


@dataclass(frozen=True)
class GateMode:
    """A method to make gates: `vectors(x, mask)`, or `vectors(shape, generator)` if it needs nothing."""

    name: str
    vectors: Callable[..., Tensor]
    needs: Needs


GATE_MODES: dict[str, GateMode] = {}


def gate_mode(name: str, *, needs: Needs) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Registers a function as a mode: `gate_mode: NAME` in a recipe."""

    def register(vectors: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name in GATE_MODES:
            raise ValueError(f"Gate mode {name!r} is registered already.")
        GATE_MODES[name] = GateMode(name, vectors, needs)
        return vectors

    return register


@gate_mode("hidden_last", needs="states")
@gate_mode("hidden", needs="states")
def last_token(x_NBLH: Tensor, mask_BL: Tensor) -> Tensor:
    """The state of the last token, averaged over prompts; [N, H]."""
    return x_NBLH[:, :, -1].sum(1) / x_NBLH.shape[1]


@gate_mode("hidden_avg", needs="states")
def mean_token(x_NBLH: Tensor, mask_BL: Tensor) -> Tensor:
    """The mean over all positions, including padding, and over prompts; [N, H]."""
    x_NBH = x_NBLH.sum(2) / x_NBLH.shape[2]
    return x_NBH.sum(1) / x_NBLH.shape[1]


@gate_mode("cheap_embed", needs="embeddings")
def mean_embedding(x_1BLH: Tensor, mask_BL: Tensor) -> Tensor:
    """The normalised sum over the tokens of all prompts; [1, H], for all layers."""
    return F.normalize((x_1BLH * mask_BL[..., None]).sum(2).sum(1), dim=-1, eps=NORM_EPS)


@gate_mode("random", needs="nothing")
def normal(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Standard normal; float32 [N, E, H]."""
    return torch.randn(shape, generator=generator)


@gate_mode("uniform_random", needs="nothing")
def uniform(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Uniform in (-1, 1) / sqrt(H), torch's default initialisation of linear layers; float32 [N, E, H]."""
    bound = math.sqrt(1.0 / shape[-1])
    return torch.rand(shape, generator=generator) * 2 * bound - bound


def check_gate_mode(mode: GateMode, model: PreTrainedModel) -> None:
    """Checks that gates of this mode fit the layers of a model, which may be on the meta device.

    Raises:
        ValueError: the mode uses embeddings, and they are narrower or wider than the layers (OPT-350m).
    """
    width, hidden = model.get_input_embeddings().weight.shape[-1], model.config.get_text_config().hidden_size
    if mode.needs == "embeddings" and width != hidden:
        raise ValueError(
            f"gate_mode: {mode.name} makes rows of the embeddings, which have {width} values per token in this "
            f"{type(model).__name__}, but its layers have {hidden}, as the rows must have. Set gate_mode: hidden, or "
            "graft with --expert and --router-data (experts=..., router_data=...)."
        )


def make_gates(mode: GateMode, experts: Sequence[Prompts], anchor: DenseCheckpoint, *, seed: int) -> Tensor:
    """The gates of all experts, [N, E, H] on the CPU: float32, or bfloat16 if they are made of states.

    Args:
        mode: how gates are made.
        experts: the prompts of each expert.
        anchor: the dense checkpoint.
        seed: of random gates.

    Raises:
        ValueError: as `check_gate_mode`; the family's hidden states are not the inputs of its layers; the tokenizer
            cannot be read; or a prompt has a token without an embedding.
    """
    depth, hidden = len(anchor.sites), anchor.config.get_text_config().hidden_size
    check_gate_mode(mode, anchor.model)
    if mode.needs == "nothing":
        return mode.vectors((depth, len(experts), hidden), torch.Generator().manual_seed(seed))
    tokenizer, vocab_size = _tokenizer(anchor), anchor.config.get_text_config().vocab_size
    read = _states_reader(anchor) if mode.needs == "states" else _embeddings_reader(anchor)
    gates = []
    for prompts in experts:
        vectors = mode.vectors(*read(_encoded(prompts.positive, tokenizer, vocab_size)))
        if prompts.negative:
            vectors = vectors - mode.vectors(*read(_encoded(prompts.negative, tokenizer, vocab_size)))
        gates.append(F.normalize(vectors, dim=-1, eps=NORM_EPS).cpu().expand(depth, hidden))
    return torch.stack(gates, dim=1)


def _tokenizer(anchor: DenseCheckpoint) -> PreTrainedTokenizerBase:
    tokenizer = read_tokenizer(anchor.folder)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.bos_token or tokenizer.eos_token
    return tokenizer


def _encoded(prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, Tensor]:
    texts = [(tokenizer.bos_token or "") + prompt for prompt in prompts]
    encoded = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    check_token_ids(encoded["input_ids"].flatten().tolist(), tokenizer, vocab_size, "A prompt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _states_reader(anchor: DenseCheckpoint) -> Callable[[dict[str, Tensor]], PromptInputs]:
    model: Any = load_dense(anchor, torch.bfloat16).base_model  # logits are not needed
    expected = (len(anchor.sites), anchor.config.get_text_config().hidden_size)

    @torch.no_grad()
    def read(encoded: dict[str, Tensor]) -> PromptInputs:
        given = {name: tensor.to(model.device) for name, tensor in encoded.items()}
        outputs = model(**given, output_hidden_states=True, use_cache=False)
        states = (outputs.hidden_states or ())[:-1]  # the last is the output of the layers
        if (len(states), *{state.shape[-1] for state in states}) != expected:
            raise ValueError(
                f"{anchor.folder} ({type(model).__name__}) returns {len(states)} hidden states for its {expected[0]} "
                f"layers of width {expected[1]}, so they are not the layers' inputs. Set gate_mode: cheap_embed, or "
                "graft with --expert and --router-data (experts=..., router_data=...)."
            )
        return torch.stack(states), given["attention_mask"]

    return read


def _embeddings_reader(anchor: DenseCheckpoint) -> Callable[[dict[str, Tensor]], PromptInputs]:
    """Reads the embedding matrix from the file; no model is loaded."""
    weight = anchor.model.get_input_embeddings().weight
    name = next(name for name, known in anchor.model.named_parameters(remove_duplicate=False) if known is weight)
    stored = anchor.stored[anchor.model.all_tied_weights_keys.get(name, name)]
    embeddings_VH = anchor.files.read(stored).float()

    def read(encoded: dict[str, Tensor]) -> PromptInputs:
        return embeddings_VH[encoded["input_ids"]][None], encoded["attention_mask"]

    return read
