"""Router rows for experts that are being grafted, fitted on text of each: prompts or documents that should reach it.

A grafted fine-tune has no owner who trained a row with it, and a row of zero sends it every token alike. Here the rows
are fitted as an owner fits its own (`flexmoe.hidden_states`): on the states of the frozen anchor, each expert's text
against the public sample, and no row depends on another's text.

NOT covered: what the methods compute (`flexmoe.router_rows`), rows from a recipe's prompts (`flexmoe.prompt_gates`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoTokenizer, PreTrainedModel

from flexmoe.conversion.router_tensors import StackedRows
from flexmoe.data import LONGEST_SEQUENCE, pack
from flexmoe.hidden_states import RowText, fit_rows, load_dense
from flexmoe.modeling.dense_flexmoe import DenseCheckpoint
from flexmoe.router_rows import RowMethod

PUBLIC_SIDE = "public text"


@dataclass(frozen=True, kw_only=True)
class TextRows:
    """Makes the rows of a graft (a `RowMaker`): one expert's after the other, on an anchor that is loaded once.

    Attributes:
        own: documents by expert.
        method: how a row is made of them.
        bias: fit a bias too.
        tokens: of each side that are looked at, at most.
        embedder: a sentence-transformers model, where the method needs one.
        seed: of what is drawn; an expert's draw depends on it and on the expert's name alone.
    """

    own: Mapping[str, Sequence[str]]
    method: RowMethod
    bias: bool
    tokens: int
    embedder: str | None
    seed: int

    def __call__(self, anchor: DenseCheckpoint, public: Sequence[str] | None) -> dict[str, StackedRows]:
        """The rows. ValueError: less than two tokens on a side, or no public text where the method needs it."""
        sides = {**self.own, **({} if public is None else {PUBLIC_SIDE: public})}
        if self.method.needs not in ("states", "moments"):  # then only the shapes of the model are asked for
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
        # two experts with one seed would draw the same random rows
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
    """Each side's tokens in a row, int64 [T]; an odd one at the end is dropped."""
    tokenizer = AutoTokenizer.from_pretrained(anchor.folder)
    streams = {}
    for side, documents in sides.items():
        try:
            streams[side] = pack(documents, tokenizer, 2).flatten()
        except ValueError as error:
            raise ValueError(f"Router data, {side}: {error}") from error
    return streams


def _cut(stream: torch.Tensor, length: int) -> torch.Tensor:
    return stream[: len(stream) // length * length].view(-1, length)
