"""Router rows of grafted experts, fitted on text of each expert: prompts or documents that should be routed to it.

A grafted fine-tune comes without a trained row, and a row of zero gives it the same weight for every token. The rows
are fitted as in training (`flexmoe.routers.hidden_states`): on hidden states of the frozen anchor, each expert's text
against the public sample; no row depends on another expert's text.

Does not cover the methods (`flexmoe.routers.rows`), or rows from the prompts of a recipe
(`flexmoe.routers.prompt_gates`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from flexmoe.conversion.router_tensors import StackedRows
from flexmoe.data import LONGEST_SEQUENCE, pack
from flexmoe.io.dense import DenseCheckpoint
from flexmoe.routers.hidden_states import RowText, fit_rows, load_dense
from flexmoe.routers.rows import RowMethod
from flexmoe.tokenization import load_tokenizer

PUBLIC_SIDE = "public text"


@dataclass(frozen=True, kw_only=True)
class TextRows:
    """Fits the rows of a graft (a `RowMaker`), one expert after the other, on an anchor that is loaded once.

    Attributes:
        own: documents by expert.
        method: how a row is fitted.
        bias: fit a bias, too.
        tokens: the maximum number of tokens of each side.
        embedder: a sentence-transformers model, if the method needs one.
        seed: of random choices, which depend on it and on the expert's name alone.
    """

    own: Mapping[str, Sequence[str]]
    method: RowMethod
    bias: bool
    tokens: int
    embedder: str | None
    seed: int

    def __call__(self, anchor: DenseCheckpoint, public: Sequence[str] | None) -> dict[str, StackedRows]:
        """The rows. ValueError: less than two tokens on a side, or no public text although the method needs it."""
        sides = {**self.own, **({} if public is None else {PUBLIC_SIDE: public})}
        if self.method.needs not in ("states", "moments"):  # then only the shapes of the model are used
            texts = {side: RowText(documents, torch.empty(0, 0)) for side, documents in sides.items()}
            return {name: self._rows(name, anchor.model, texts[name], texts.get(PUBLIC_SIDE)) for name in self.own}
        streams = _streams(sides, anchor)
        limit = getattr(anchor.config.get_text_config(), "max_position_embeddings", None) or LONGEST_SEQUENCE
        model = load_dense(anchor)
        rows = {}
        for name in self.own:
            pair = [side for side in (name, PUBLIC_SIDE) if side in sides]
            length = min(LONGEST_SEQUENCE, limit, *(len(streams[side]) for side in pair))
            texts = {side: RowText(sides[side], _cut(streams[side], length)) for side in pair}
            rows[name] = self._rows(name, model, texts[name], texts.get(PUBLIC_SIDE))
        return rows

    def _rows(self, name: str, model: PreTrainedModel, own: RowText, public: RowText | None) -> StackedRows:
        # with one seed, two experts would get the same random row
        draw = hashlib.sha256(f"router row {self.seed} {name}".encode()).digest()
        rows = fit_rows(
            model,
            self.method,
            own,
            public,
            tokens=self.tokens,
            bias=self.bias,
            seed=int.from_bytes(draw[:7], "big"),
            embedder=self.embedder,
        )
        return StackedRows(torch.stack([row.weight for row in rows]), torch.tensor([row.bias for row in rows]))


def _streams(sides: Mapping[str, Sequence[str]], anchor: DenseCheckpoint) -> dict[str, torch.Tensor]:
    """Each side's tokens as one sequence, int64 [T]; an odd last token is dropped."""
    tokenizer = load_tokenizer(anchor.folder)
    vocab_size = anchor.config.get_text_config().vocab_size
    streams = {}
    for side, documents in sides.items():
        try:
            streams[side] = pack(documents, tokenizer, 2, vocab_size=vocab_size).flatten()
        except ValueError as error:
            raise ValueError(f"Router data, {side}: {error}") from error
    return streams


def _cut(stream: torch.Tensor, length: int) -> torch.Tensor:
    return stream[: len(stream) // length * length].view(-1, length)
