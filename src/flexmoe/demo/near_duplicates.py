"""Near-duplicate documents, found by word shingles.

A document is represented by the set of its hashed word shingles (five consecutive words, lower-cased). The overlap of
two documents is the number of common shingles divided by the size of the *smaller* set, so a short text inside a long
one has overlap 1. Overlaps are exact: a sparse matrix product counts the common shingles.

Does not cover paraphrases, translations, and corpora of more than about 10,000 documents (the product is quadratic in
the worst case; use MinHash).
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence

import numpy as np
from scipy import sparse

SHINGLE_WORDS = 5
NEAR_DUPLICATE = 0.5

_WORD = re.compile(r"\w+|[^\w\s]")
_MASK = (1 << 61) - 1


def shingles(text: str, words: int = SHINGLE_WORDS) -> np.ndarray:
    """Sorted unique 61-bit hashes of all runs of `words` words; a shorter text is one shingle."""
    tokens = [_word_hash(word) for word in _WORD.findall(text.lower())]
    if len(tokens) <= words:
        return np.array([_combine(tokens)], dtype=np.int64)
    return np.unique(
        np.array([_combine(tokens[i : i + words]) for i in range(len(tokens) - words + 1)], dtype=np.int64)
    )


def overlaps(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> sparse.csr_matrix:
    """The overlap of each pair, as a sparse matrix `[len(left), len(right)]`."""
    if not left or not right:
        return sparse.csr_matrix((len(left), len(right)))
    vocabulary, columns = np.unique(np.concatenate([*left, *right]), return_inverse=True)
    split = sum(len(s) for s in left)
    counts = (
        _incidence(left, columns[:split], len(vocabulary)) @ _incidence(right, columns[split:], len(vocabulary)).T
    ).tocoo()
    sizes_left = np.array([len(s) for s in left])[counts.row]
    sizes_right = np.array([len(s) for s in right])[counts.col]
    shares = counts.data / np.minimum(sizes_left, sizes_right)
    return sparse.csr_matrix((shares, (counts.row, counts.col)), shape=(len(left), len(right)))


def drop_near_duplicates(texts: Sequence[str], threshold: float = NEAR_DUPLICATE) -> list[int]:
    """Indices of the texts to keep: those whose overlap with each earlier kept text is below `threshold`."""
    sets = [shingles(text) for text in texts]
    matrix = overlaps(sets, sets)
    kept: list[int] = []
    is_kept = np.zeros(len(texts), dtype=bool)
    for i in range(len(texts)):
        start, stop = matrix.indptr[i], matrix.indptr[i + 1]
        others, shares = matrix.indices[start:stop], matrix.data[start:stop]
        if not np.any(is_kept[others] & (shares >= threshold)):
            is_kept[i] = True
            kept.append(i)
    return kept


def largest_overlap(held_out: Sequence[str], training: Sequence[str]) -> tuple[float, int, int]:
    """The largest overlap of a held-out text with a training text: (overlap, index in held_out, index in training)."""
    matrix = overlaps([shingles(t) for t in held_out], [shingles(t) for t in training]).tocoo()
    if not matrix.nnz:
        return 0.0, -1, -1
    worst = int(matrix.data.argmax())
    return float(matrix.data[worst]), int(matrix.row[worst]), int(matrix.col[worst])


def _incidence(sets: Sequence[np.ndarray], columns: np.ndarray, width: int) -> sparse.csr_matrix:
    rows = np.repeat(np.arange(len(sets)), [len(s) for s in sets])
    return sparse.csr_matrix((np.ones(len(rows), dtype=np.int32), (rows, columns)), shape=(len(sets), width))


@functools.lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    # hash() of a string differs between processes
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little") & _MASK


def _combine(hashes: Sequence[int]) -> int:
    value = 0
    for h in hashes:
        value = (value * 1_000_003 + h) & _MASK
    return value
