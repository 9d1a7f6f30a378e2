"""The text that an expert is trained on: own and public documents, split, tokenised and packed.

Shapes: N sequences, L tokens of each.

Texts are read one document at a time and held as tokens of 4 bytes. Does not cover reading files (`flexmoe.data`), or
the mix of both sides in training (`flexmoe.training.trainer`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
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
class SplitText:
    """One side, as tokens, split by documents.

    Attributes:
        training, validation: tokens, int32.
        validation_fraction: share of the documents that were to be held out.
        documents: the texts for training, if they are needed.
        counts: for the user.
        sha256, tokens_sha256: of all documents, and of their tokens (hex).
    """

    training: np.ndarray
    validation: np.ndarray
    validation_fraction: float
    documents: Sequence[str]
    counts: SideCounts
    sha256: str
    tokens_sha256: str


def read_sides(
    sides: Mapping[str, Documents | Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    validation_fraction: float,
    seed: int,
    vocab_size: int,
    keep_documents: bool = False,
) -> dict[str, SplitText]:
    """Reads, tokenises and splits the documents of each side ("own", and perhaps "public").

    Args:
        sides: documents by side.
        tokenizer: the anchor's.
        validation_fraction: share of the documents to hold out.
        seed: of the split.
        vocab_size: rows of the embedding.
        keep_documents: the texts themselves are needed, too.

    Raises:
        TypeError, ValueError: as the iteration of `Documents`, `tokenize` and `held_out`.
    """
    read = {}
    for side, documents in sides.items():
        kept: Sequence[str] = list(documents) if keep_documents else ()
        try:
            text = tokenize(kept or documents, tokenizer, vocab_size=vocab_size, seed=seed)
            digests = text.sha256, text.tokens_sha256()  # before the split, which reuses the memory
            is_held = held_out(text.keys, _fraction(side, text, validation_fraction))
        except ValueError as error:
            raise ValueError(f"The {side} text: {error}") from error
        training, validation = split_tokens(text, is_held)
        counts = SideCounts(
            documents=len(text),
            held_out=int(is_held.sum()),
            tokens=len(training),
            held_out_tokens=len(validation),
            blank=documents.blank if isinstance(documents, Documents) else 0,
            skipped=documents.skipped if isinstance(documents, Documents) else 0,
        )
        documents_kept = [text for text, is_out in zip(kept, is_held, strict=True) if not is_out] if kept else ()
        read[side] = SplitText(
            training=training,
            validation=validation,
            validation_fraction=validation_fraction,
            documents=documents_kept,
            counts=counts,
            sha256=digests[0],
            tokens_sha256=digests[1],
        )
    return read


def pack_text(
    read: Mapping[str, SplitText], *, sequence_length: int, validation_tokens: int, seed: int
) -> TrainingText:
    """Packs what `read_sides` read into sequences; at most `validation_tokens` of each side for validation.

    Raises:
        ValueError: a side has less text than one sequence.
    """
    sequences = {side: _sequences(side, text, sequence_length) for side, text in read.items()}
    packed = {side: RowText(text.documents, sequences[side][0]) for side, text in read.items()}
    return TrainingText(
        own=packed[OWN],
        public=packed.get(PUBLIC_SIDE),
        validation={
            side: _sample(validation, validation_tokens, seed)
            for side, (_, validation) in sequences.items()
            if validation is not None
        },
        counts={side: one.counts for side, one in read.items()},
        sha256=_joint(f"{side} {one.sha256}" for side, one in read.items()),
        tokens_sha256=_joint(f"{side} {one.tokens_sha256}" for side, one in read.items()),
    )


def _sequences(side: str, text: SplitText, length: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sequences for training and for validation, if any document is held out."""
    counts = text.counts
    try:
        training = cut_sequences(text.training, length, counts.documents - counts.held_out)
        return training, cut_sequences(text.validation, length, counts.held_out) if counts.held_out else None
    except ValueError as error:
        what = "validation" if len(text.training) >= length else "training"
        raise ValueError(
            f"The {side} {what} text (validation_fraction={text.validation_fraction:g}): {error}"
        ) from error


def _fraction(side: str, text: TokenizedText, fraction: float) -> float:
    """A single public document is not split, but used for training only."""
    single = side == PUBLIC_SIDE and len(text) > 0 and bool((text.keys == text.keys[0]).all())
    return 0 if single else fraction


def _sample(sequences: torch.Tensor, tokens: int, seed: int) -> torch.Tensor:
    count = max(1, tokens // sequences.shape[1])
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(seed))
    return sequences[order[:count]]


def _joint(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
