"""Hidden states on which router rows are fitted: FFN inputs of the frozen dense anchor, layer by layer.

Shapes: N sequences of L tokens, T tokens in all, H hidden size.

The anchor is a FlexMoE model with "public" as its only active expert, or the dense model itself, which has the same
states. All owners' rows are fitted on them; states of the two-expert model would train the row to recognise its own
expert instead of its text.

At 7B, the states of all layers (32 x 80,000 x 4096) do not fit in memory, so a byte budget limits how many layers are
held at a time, and the text is processed once per group of layers, up to the last layer needed. The rows do not depend
on the budget.

Does not cover the fits themselves (`flexmoe.routers.rows`), or sharded models (FSDP): each process needs all weights.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from flexmoe.io.dense import DenseCheckpoint, load_causal_lm
from flexmoe.modeling import PUBLIC, FlexMoeConfig, find_ffn_sites
from flexmoe.routers.evidence import Evidence, FitLayer, FitRow, fit_layer
from flexmoe.routers.rows import Logits, Moments, RouterRow, RowMethod, embed_documents

STATES_BYTES = 2_000_000_000  # budget for own and public states together


@dataclass(frozen=True)
class RowText:
    """One side's text: its documents, and the same packed into sequences, int64 or int32 [N, L].

    `documents` may be empty if the rows are not made of embeddings.
    """

    documents: Sequence[str]
    sequences: torch.Tensor


class _LastLayerReached(Exception):
    """Ends a forward pass after the last layer needed."""


def load_dense(anchor: DenseCheckpoint, dtype: str | torch.dtype | None = None) -> PreTrainedModel:
    """Loads the dense anchor for inference, on an accelerator if there is one; `dtype` defaults to the stored one."""
    model = load_causal_lm(anchor.folder, dtype=dtype or anchor.load_dtype)
    device = torch.accelerator.current_accelerator(check_available=True)
    return model.to(device or "cpu").eval()


def ffn_inputs(
    model: PreTrainedModel, sequences: torch.Tensor, layers: Sequence[int], *, batch_size: int = 8
) -> Iterator[dict[int, torch.Tensor]]:
    """Yields {layer: FFN inputs [tokens of the batch, H]} of the anchor for each batch, without gradients."""
    networks = _networks(model)
    captured: dict[int, torch.Tensor] = {}

    def capture(layer: int) -> Any:
        def hook(block: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            captured[layer] = args[0].detach().flatten(0, -2)
            if layer == max(layers):
                raise _LastLayerReached

        return hook

    was_training = model.training
    model.eval()
    try:
        for batch in sequences.split(batch_size):
            captured.clear()
            with ExitStack() as stack:
                for layer in layers:
                    stack.callback(networks[layer].register_forward_pre_hook(capture(layer)).remove)
                stack.enter_context(torch.no_grad())
                stack.enter_context(_only_the_anchor(model))
                stack.enter_context(suppress(_LastLayerReached))
                model(input_ids=batch.to(model.device, torch.int64), use_cache=False)
            yield dict(captured)
    finally:
        model.train(was_training)


def collect_states(
    model: PreTrainedModel,
    sequences: torch.Tensor,
    layers: Sequence[int],
    tokens: int,
    advance: Callable[[int], object] = int,
) -> dict[int, torch.Tensor]:
    """{layer: FFN inputs [T, H]} of the first `tokens` tokens, in the model's dtype and on its device.

    `advance` is called with the number of tokens of each batch.
    """
    held: dict[int, torch.Tensor] = {}
    start = 0
    for batch in ffn_inputs(model, _first(sequences, tokens), layers):
        for layer, x_TH in batch.items():
            if layer not in held:  # filled in place: concatenating batches would need the memory twice
                held[layer] = x_TH.new_empty(tokens, x_TH.shape[1])
            part = x_TH[: tokens - start]
            held[layer][start : start + len(part)] = part
        start += len(x_TH)
        advance(len(x_TH))
    return held


def collect_moments(
    model: PreTrainedModel,
    sequences: torch.Tensor,
    layers: Sequence[int],
    tokens: int,
    advance: Callable[[int], object] = int,
) -> dict[int, Moments]:
    """{layer: moments of the FFN inputs} of the first `tokens` tokens, on the model's device.

    `advance` is called with the number of tokens of each batch.
    """
    moments: dict[int, Moments] = {}
    start = 0
    for batch in ffn_inputs(model, _first(sequences, tokens), layers):
        for layer, x_TH in batch.items():
            if layer not in moments:
                moments[layer] = Moments(x_TH.shape[1], x_TH.device)
            moments[layer].update(x_TH[: tokens - start])
        start += len(x_TH)
        advance(len(x_TH))
    return moments


def fit_rows(
    model: PreTrainedModel,
    method: RowMethod,
    own: RowText,
    public: RowText | None,
    *,
    tokens: int,
    bias: bool,
    seed: int,
    embedder: str | None = None,
    evidence: Evidence | None = None,
    max_bytes: int = STATES_BYTES,
    progress: bool = False,
) -> list[RouterRow]:
    """Fits one row per layer; they are on the CPU.

    The tokens are those of a seeded random choice of sequences.

    Args:
        model: the anchor, dense or as a FlexMoE model.
        method: how a row is fitted.
        own, public: text of both sides; `public` may be None if the method needs nothing.
        tokens: the maximum number of tokens of each side.
        bias: fit a bias, too.
        seed: of random choices.
        embedder: a sentence-transformers model, for methods that need embeddings.
        evidence: made of the sequences of both sides; rows get a calibration. For methods that need states.
        max_bytes: memory for states, own and public together.
        progress: show progress bars on stderr.

    Raises:
        ValueError: no public text, or no embedder, although the method needs it; evidence, and a method without folds.
    """
    depth, hidden = len(_networks(model)), model.config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"hidden_size": hidden, "bias": bias, "generator": generator}
    if method.needs == "nothing":
        return [method.fit(None, None, **options) for _ in range(depth)]
    if public is None:
        raise ValueError(
            f"router={method.name!r} needs public text to compare own text with, and there is none. Graft the anchor "
            "with --public-data (public_data=...), or give it here."
        )
    if method.needs == "embeddings":
        if embedder is None:
            raise ValueError("router='embedding' needs embedder=..., a sentence-transformers folder or Hub id.")
        row = method.fit(*(embed_documents(side.documents, embedder, seed=seed) for side in (own, public)), **options)
        return [row] * depth

    # the first ones only: a copy of all sequences would double the memory of large text
    drawn = [
        torch.randperm(len(side.sequences), generator=generator)[: -(-tokens // side.sequences.shape[1])].sort().values
        for side in (own, public)
    ]
    sides = [side.sequences[indices] for side, indices in zip((own, public), drawn, strict=True)]
    counts = [min(tokens, side_NL.numel()) for side_NL in sides]
    fit_row: FitRow = functools.partial(method.fit, **options)
    fit: FitLayer = functools.partial(fit_layer, fit_row)
    if evidence is not None:
        if "folds" not in inspect.signature(method.fit).parameters:
            raise ValueError(
                f"router={method.name!r} has no argument `folds` (flexmoe.routers.rows), from which evidence is "
                "calibrated. Add it, or train with --evidence none (evidence='none')."
            )
        fit = evidence.fitting(fit_row, sides, drawn, counts)
    collect: Callable[..., dict[int, Any]] = collect_states if method.needs == "states" else collect_moments
    nbytes = {"states": sum(counts) * hidden * model.dtype.itemsize, "moments": 16 * hidden * (hidden + 1)}
    groups = torch.arange(depth).split(max(1, max_bytes // nbytes[method.needs]))
    passes = sum(side_NL.numel() for side_NL in sides) * len(groups)
    rows: list[RouterRow] = []
    logits: Logits | None = None
    with (
        logging.tqdm(total=passes, desc="Reading states", unit="token", unit_scale=True, disable=not progress) as read,
        logging.tqdm(total=depth, desc="Fitting router rows", unit="layer", disable=not progress) as fitted,
    ):
        for layers in groups:
            own_by_layer, public_by_layer = (
                collect(model, side_NL, layers.tolist(), count, read.update)
                for side_NL, count in zip(sides, counts, strict=True)
            )
            for layer in layers.tolist():  # popped: the states of a layer are not needed after its fit
                pair = own_by_layer.pop(layer), public_by_layer.pop(layer)
                if method.needs == "states":
                    row, logits = fit(*pair, logits)
                else:
                    row = fit_row(*pair)
                rows.append(replace(row, weight=row.weight.cpu()))
                fitted.update()
    return rows


def is_flexmoe(model: PreTrainedModel) -> bool:
    """Whether a model is FlexMoE's, of the package or of remote code."""
    return bool(model.config.model_type == FlexMoeConfig.model_type)


def _networks(model: PreTrainedModel) -> list[nn.Module]:
    """The modules whose input is the FFN input, in layer order."""
    if is_flexmoe(model):
        return list(model.flexmoe_blocks())
    return [model.get_submodule(site.block) for site in find_ffn_sites(model)]


def _only_the_anchor(model: PreTrainedModel) -> AbstractContextManager[None]:
    return model.only_experts(PUBLIC) if is_flexmoe(model) else nullcontext()


def _first(sequences: torch.Tensor, tokens: int) -> torch.Tensor:
    return sequences[: -(-tokens // sequences.shape[1])]
