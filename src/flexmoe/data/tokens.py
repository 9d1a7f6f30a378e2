"""Documents to token sequences: tokenisation in little memory, splitting by document, packing.

Shapes: D documents, T tokens in all, N sequences, L tokens of each.

Tokens are held as int32, 4 bytes each; of the texts, only those of one batch are held, or one long document. Does not
cover reading files (`documents`), or corpora whose tokens do not fit in memory.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

import numpy as np
import torch

from flexmoe.data.documents import END_OF_DOCUMENT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_SEQUENCE = 1024
"""Default number of tokens per sequence, unless the model's limit is lower."""

BATCH_CHARACTERS = 1 << 20
"""Characters that are tokenised at once. A tokenizer needs some hundred bytes for each token while it works."""

_BATCH_DOCUMENTS = 1000
_CONTEXT = 200  # characters on both sides of a cut on which it is checked
_CUTS = re.compile(r"(?<=\n)(?=\S)|(?<=\S)(?= \S)")
_CUT_ATTEMPTS = 20
_KEY_BYTES = 16
_MOVED_AT_ONCE = 1 << 20


@dataclass(frozen=True, eq=False)
class TokenizedText:
    """The tokens of some documents.

    Attributes:
        tokens: int32 [T], the documents in order, each followed by an end-of-sequence token.
        ends: int64 [D], the index after the last token of each document.
        keys: big-endian uint64 [D, 2], the beginning of each document's seeded hash: equal for equal documents only.
        sha256: of all documents (hex), independent of the seed.
    """

    tokens: np.ndarray
    ends: np.ndarray
    keys: np.ndarray
    sha256: str

    def __len__(self) -> int:
        return len(self.ends)

    def tokens_sha256(self) -> str:
        """The digest (hex) of the tokens: another one for the same documents means another tokenizer."""
        return hashlib.sha256(self.tokens.astype("<i4", copy=False).data).hexdigest()


def tokenize(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, seed: int = 0
) -> TokenizedText:
    """The tokens of all documents; the documents are iterated over once.

    Args:
        vocab_size: rows of the model's embedding.
        seed: of the order in which documents are held out.

    Raises:
        ValueError: the tokenizer has no `eos_token`, or a document has a token without an embedding.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no eos_token to put between documents. Set tokenizer.eos_token.")
    check_token_ids([tokenizer.eos_token_id], tokenizer, vocab_size, "The end of each document")
    tokens, ends, keys, content = array("i"), array("q"), bytearray(), hashlib.sha256()
    for batch in _batches(documents):
        for document in batch:
            data = document.encode("utf-8", "surrogatepass")
            keys += _key(data, seed)
            content.update(hashlib.sha256(data).digest())
            del data  # a long one should not be held beside its tokens
        for ids in _encode(batch, tokenizer):
            check_token_ids(ids, tokenizer, vocab_size, f"Document {len(ends) + 1}")
            tokens.extend(ids)
            tokens.append(tokenizer.eos_token_id)
            ends.append(len(tokens))
    return TokenizedText(
        np.frombuffer(tokens, np.int32) if tokens else np.empty(0, np.int32),
        np.frombuffer(ends, np.int64) if ends else np.empty(0, np.int64),
        _as_keys(bytes(keys)),
        content.hexdigest(),
    )


def check_token_ids(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, vocab_size: int, where: str) -> None:
    """Checks that all ids have an embedding.

    Args:
        vocab_size: rows of the model's embedding.
        where: what holds the ids, for the message: "Document 3".

    Raises:
        ValueError: one has none.
    """
    if max(ids, default=0) < vocab_size:
        return
    beyond = next(i for i in ids if i >= vocab_size)
    raise ValueError(
        f"{where} holds the token {tokenizer.convert_ids_to_tokens(beyond)!r} with the id {beyond}, but the model has "
        f"embeddings for ids below {vocab_size} only. Take the token out of the text; or call resize_token_embeddings "
        "on the anchor, save it and graft that."
    )


def held_out(keys: np.ndarray, fraction: float) -> np.ndarray:
    """Which documents are for validation, bool [D]; all copies of a document are on the same side.

    The choice depends on the seed and on the set of documents, not on their order. Of n distinct documents,
    ceil(f n) are held out at a fraction f, but at least one remains for training.

    Args:
        keys: uint64 [D, 2]; see `TokenizedText`.
        fraction: at least 0 and below 1.

    Raises:
        ValueError: the fraction is out of range, or there are fewer than two distinct documents to split.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"validation_fraction={fraction}: must be at least 0 and below 1.")
    distinct, rank = np.unique(keys, axis=0, return_inverse=True)
    if fraction > 0 and len(distinct) < 2:
        raise ValueError(
            f"{len(distinct)} distinct document(s): too few to hold one out for validation. Give more files, separate "
            f"the documents of a text file by lines of {END_OF_DOCUMENT!r}, or set --validation-fraction 0 "
            "(validation_fraction=0)."
        )
    return rank.reshape(-1) < min(ceil(fraction * len(distinct)), len(distinct) - 1)


def split_documents(documents: Sequence[str], validation_fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """(training, validation) documents, chosen as in `held_out`. Raises as it does."""
    keys = b"".join(_key(document.encode("utf-8", "surrogatepass"), seed) for document in documents)
    mask = held_out(_as_keys(keys), validation_fraction)
    sides: tuple[list[str], list[str]] = ([], [])
    for document, is_held in zip(documents, mask, strict=True):
        sides[bool(is_held)].append(document)
    return sides


def split_tokens(text: TokenizedText, is_held: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(training, validation) tokens, int32, in the order of the documents; uses up `text`, whose memory they share.

    Args:
        is_held: bool [D], see `held_out`.
    """
    tokens, ends = text.tokens, text.ends
    starts = np.concatenate(([0], ends[:-1]))
    held = [tokens[start:end] for start, end in zip(starts[is_held], ends[is_held], strict=True)]
    validation = np.concatenate(held) if held else np.empty(0, np.int32)
    # the rest moves up, run of documents by run
    filled = 0
    borders = [0, *(np.flatnonzero(np.diff(is_held)) + 1), len(ends)]
    for first, after in itertools.pairwise(borders):
        if first < after and not is_held[first]:
            filled = _move_up(tokens, int(starts[first]), int(ends[after - 1]), filled)
    return tokens[:filled], validation


def cut_sequences(tokens: np.ndarray, sequence_length: int, documents: int) -> torch.Tensor:
    """The tokens as sequences int32 [N, L], which share their memory; a remainder shorter than L is dropped.

    Args:
        tokens: int32 [T].
        sequence_length: L.
        documents: their number, for the message.

    Raises:
        ValueError: there is less text than one sequence.
    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length={sequence_length}: must be at least 2 (a token and the next one).")
    sequences = len(tokens) // sequence_length
    if sequences == 0:
        raise ValueError(
            f"{documents} document(s) with {len(tokens)} tokens in all: less than one sequence of {sequence_length}. "
            "Give more text or a smaller --sequence-length (sequence_length=...)."
        )
    return torch.from_numpy(tokens[: sequences * sequence_length]).view(-1, sequence_length)


def pack(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int, *, vocab_size: int
) -> torch.Tensor:
    """The tokens of all documents, each followed by an end-of-sequence token, as sequences int64 [N, L].

    A remainder shorter than L is dropped.

    Args:
        sequence_length: L.
        vocab_size: rows of the model's embedding.

    Raises:
        ValueError: the tokenizer has no `eos_token`, a document has a token without an embedding, or there is less
            text than one sequence.
    """
    text = tokenize(documents, tokenizer, vocab_size=vocab_size)
    return cut_sequences(text.tokens, sequence_length, len(text)).long()


def _key(document: bytes, seed: int) -> bytes:
    digest = hashlib.sha256(b"%d\n" % seed)
    digest.update(document)
    return digest.digest()[:_KEY_BYTES]


def _as_keys(keys: bytes) -> np.ndarray:
    return np.frombuffer(keys, ">u8").reshape(-1, _KEY_BYTES // 8)


def _move_up(tokens: np.ndarray, start: int, end: int, filled: int) -> int:
    """Moves tokens[start:end] to `filled`, which is not after `start`; returns the index after them."""
    for block in range(start, end, _MOVED_AT_ONCE):  # NumPy copies what overlaps
        size = min(_MOVED_AT_ONCE, end - block)
        if filled != block:
            tokens[filled : filled + size] = tokens[block : block + size]
        filled += size
    return filled


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        if batch and (characters + len(document) > BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS):
            yield batch
            batch, characters = [], 0
        batch.append(document)
        characters += len(document)
    if batch:
        yield batch


def _encode(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Sequence[int]]:
    if len(documents) > 1 or len(documents[0]) <= BATCH_CHARACTERS:
        yield from _ids(documents, tokenizer)
        return
    ids = array("i")
    for piece in _pieces(documents[0], tokenizer):
        ids.extend(_ids([piece], tokenizer)[0])
    yield ids


def _ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # verbose=False: no warning about long documents, which are split afterwards
    encoded = tokenizer(
        list(texts), add_special_tokens=False, truncation=False, verbose=False, return_attention_mask=False
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _pieces(document: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """A long document in pieces with the same tokens: cut between words where that does not change the tokens nearby.

    Where no such cut is found (a tokenizer that puts a space before each text), the piece is longer.
    """
    start = 0
    while len(document) - start > BATCH_CHARACTERS:
        cut = _cut(document, start + BATCH_CHARACTERS, tokenizer)
        if cut is None:
            break
        yield document[start:cut]
        start = cut
    yield document[start:]


def _cut(document: str, near: int, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """A position after `near` at which the tokens of the text before it and after it are those of both together."""
    for match in itertools.islice(_CUTS.finditer(document, near), _CUT_ATTEMPTS):
        cut = match.start()
        before, after = document[max(0, cut - _CONTEXT) : cut], document[cut : cut + _CONTEXT]
        together, one, other = _ids([before + after, before, after], tokenizer)
        if together == one + other:
            return cut
    return None
