"""The text that an expert is trained on: own and public documents, split, tokenised and packed.

Shapes: N sequences, L tokens of each.

Texts are read one document at a time and held as tokens of 4 bytes. Does not cover reading files (`flexmoe.data`), or
the mix of both sides in training (`flexmoe.training.trainer`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from flexmoe.data import Documents, TokenizedText, cut_sequences, held_out, split_tokens, tokenize
from flexmoe.routers.hidden_states import RowText

OWN, PUBLIC_SIDE = "own", "public"

FEW_TOKENS = 20_000
"""With less own text than this, training warns."""


@dataclass(frozen=True, kw_only=True)
class SideCounts:
    """The amounts of text of one side, for the user.

    Attributes:
        documents, held_out: the number of documents, and of those among them that are held out for validation.
        tokens, held_out_tokens: of the documents for training, and of those for validation.
        blank, skipped: documents of whitespace only, and rows without text, which were dropped.
    """

    documents: int
    held_out: int
    tokens: int
    held_out_tokens: int
    blank: int = 0
    skipped: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainingText:
    """Packed own and public text.

    Attributes:
        own, public: for training, sequences int32 [N, L]; `public` is None if not needed.
        validation: sequences by side ("own", "public"); a side without held-out documents is not in it.
        counts: by side.
        sha256: of all documents (hex).
        tokens_sha256: of all tokens (hex).
    """

    own: RowText
    public: RowText | None
    validation: dict[str, torch.Tensor]
    counts: dict[str, SideCounts]
    sha256: str
    tokens_sha256: str

    def few(self) -> str | None:
        """A warning if there is little own text; None if there is enough."""
        counts = self.counts[OWN]
        if counts.tokens >= FEW_TOKENS:
            return None
        return (
            f"The own text is small: {counts.tokens:,} tokens to train on, {counts.held_out_tokens:,} held out. An "
            "expert memorises so little text, its router row is fitted on few tokens, and the validation loss is "
            f"uncertain. Give more than {FEW_TOKENS:,} tokens (some {4 * FEW_TOKENS // 1000} kB), or train a small "
            "low-rank expert for few steps: --method low_rank --rank 8 (method='low_rank', rank=8)."
        )


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """How text is prepared; the fields are those of `TrainingSettings`, and `vocab_size`: rows of the embedding.

    `keep_documents`: the texts themselves are needed, too.
    """

    sequence_length: int
    validation_fraction: float
    validation_tokens: int
    seed: int
    vocab_size: int
    keep_documents: bool


def prepare_text(
    sides: dict[str, Documents | Sequence[str]], tokenizer: PreTrainedTokenizerBase, settings: TextSettings
) -> TrainingText:
    """Reads, splits and packs the documents of both sides ("own", and perhaps "public").

    Raises:
        TypeError, ValueError: as the iteration of `Documents`, `tokenize` and `held_out`; or a side has less text than
            one sequence.
    """
    prepared = {side: _prepare(side, documents, tokenizer, settings) for side, documents in sides.items()}
    public = prepared.get(PUBLIC_SIDE)
    return TrainingText(
        own=prepared[OWN].text,
        public=None if public is None else public.text,
        validation={side: one.validation for side, one in prepared.items() if one.validation is not None},
        counts={side: one.counts for side, one in prepared.items()},
        sha256=_joint(f"{side} {one.sha256}" for side, one in prepared.items()),
        tokens_sha256=_joint(f"{side} {one.tokens_sha256}" for side, one in prepared.items()),
    )


@dataclass(frozen=True)
class _Prepared:
    text: RowText
    validation: torch.Tensor | None
    counts: SideCounts
    sha256: str
    tokens_sha256: str


def _prepare(
    side: str, documents: Documents | Sequence[str], tokenizer: PreTrainedTokenizerBase, settings: TextSettings
) -> _Prepared:
    kept: Sequence[str] = list(documents) if settings.keep_documents else ()
    try:
        text = tokenize(kept or documents, tokenizer, vocab_size=settings.vocab_size, seed=settings.seed)
        digests = text.sha256, text.tokens_sha256()  # before the split, which reuses the memory
        is_held = held_out(text.keys, _fraction(side, text, settings))
    except ValueError as error:
        raise ValueError(f"The {side} text: {error}") from error
    held = int(is_held.sum())
    training, validation = split_tokens(text, is_held)
    counts = SideCounts(
        documents=len(text),
        held_out=held,
        tokens=len(training),
        held_out_tokens=len(validation),
        blank=documents.blank if isinstance(documents, Documents) else 0,
        skipped=documents.skipped if isinstance(documents, Documents) else 0,
    )
    try:
        sequences = cut_sequences(training, settings.sequence_length, len(text) - held)
        sample = _sample(cut_sequences(validation, settings.sequence_length, held), settings) if held else None
    except ValueError as error:
        what = "validation" if len(training) >= settings.sequence_length else "training"
        raise ValueError(
            f"The {side} {what} text (validation_fraction={settings.validation_fraction:g}): {error}"
        ) from error
    documents_kept = [document for document, is_out in zip(kept, is_held, strict=True) if not is_out] if kept else ()
    return _Prepared(RowText(documents_kept, sequences), sample, counts, *digests)


def _fraction(side: str, text: TokenizedText, settings: TextSettings) -> float:
    """A single public document is not split, but used for training only."""
    single = side == PUBLIC_SIDE and len(text) > 0 and bool((text.keys == text.keys[0]).all())
    return 0 if single else settings.validation_fraction


def _sample(sequences: torch.Tensor, settings: TextSettings) -> torch.Tensor:
    count = max(1, settings.validation_tokens // sequences.shape[1])
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(settings.seed))
    return sequences[order[:count]]


def _joint(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
