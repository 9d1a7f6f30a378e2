"""Text files to token sequences: reading documents, splitting them into training and validation, packing them.

Shapes: N sequences, L tokens of each.

Files are streamed through `datasets`, so no copy of the text is left in a cache folder, and nothing here opens a
network connection. Does not cover the mix of texts in training (`flexmoe.training.experts`), text on the Hub, or
corpora larger than memory.
"""

from __future__ import annotations

import glob
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_SEQUENCE = 1024
"""Default number of tokens per sequence, unless the model's limit is lower."""

END_OF_DOCUMENT = "<|endofdocument|>"
TEXT_SUFFIXES = (".txt", ".md")
TABLE_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}  # file suffix -> builder of `datasets`


def read_documents(files: Sequence[str | Path], *, column: str = "text") -> list[str]:
    """All documents of some files, in order; documents of whitespace only are left out.

    `.txt` and `.md`: a file is one document, unless lines that contain only `<|endofdocument|>` separate several.
    `.jsonl`, `.json`, `.parquet`: one document per row, in `column`.

    Raises:
        FileNotFoundError: a file is missing.
        TypeError: `files` is one path instead of a list, or a value of `column` is not a string.
        ValueError: no files, an unknown file type, a file that cannot be parsed, a missing column, a row without text,
            or no document in all of the files.
    """
    paths = data_paths(files)
    documents = [document for path in paths for document in _documents_of(path, column) if document.strip()]
    if not documents:
        raise ValueError(f"{_listed(paths)}: no text found. An empty data set cannot be used; give files with text.")
    return documents


def data_paths(files: Sequence[str | Path]) -> list[Path]:
    """The paths in a list of data files. TypeError: one path instead of a list; ValueError: an empty list."""
    if isinstance(files, str | Path):
        raise TypeError(f"files: one path ({str(files)!r}), expected a list of them. Write [{str(files)!r}].")
    paths = [Path(file) for file in files]
    if not paths:
        raise ValueError("No data files. Give at least one .txt, .md, .jsonl, .json or .parquet file.")
    return paths


def read_public_sample(folder: str | Path, record: Mapping[str, Any] | None) -> list[str]:
    """The documents of the public sample that a graft stores with its model; the parsed bytes are those hashed.

    Args:
        folder: the model's.
        record: the config's `public_sample`.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the model has no sample, the record names a file elsewhere, or the file has changed.
    """
    if not record:
        raise ValueError(
            f"No public sample is stored with {folder}. Graft it with --public-data, or give --public-data here."
        )
    name = record["file"]
    # the record is untrusted: it must not choose which file of this machine is read
    if not isinstance(name, str) or name in ("", ".", "..") or any(mark in name for mark in "/\\\0"):
        raise ValueError(f"{folder}: the config's public_sample names {name!r}, which is not a plain file name.")
    path = Path(folder) / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the model's public sample is missing here. Restore it, or give public text.")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != record["sha256"]:
        raise ValueError(
            f"{path} has sha256 {found}, but the model was grafted with {record['sha256']}: the file was changed. "
            "Restore it, or choose other public text with --public-data."
        )
    return [json.loads(line)["text"] for line in content.split(b"\n") if line]


def split_documents(documents: Sequence[str], validation_fraction: float, seed: int) -> tuple[list[str], list[str]]:
    """(training, validation) documents; all copies of a document are on the same side.

    The split depends on the seed and on the set of texts, not on their order. Of n distinct documents, ceil(f n) are
    for validation at a fraction f, but at least one remains for training.

    Raises:
        ValueError: the fraction is out of range, or there are fewer than two distinct documents to split.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction={validation_fraction}: must be at least 0 and below 1.")
    distinct = sorted(set(documents), key=lambda document: _order(document, seed))
    if validation_fraction > 0 and len(distinct) < 2:
        raise ValueError(
            f"{len(distinct)} distinct document(s): too few to hold one out for validation. Give more files, separate "
            f"the documents of a text file by lines of {END_OF_DOCUMENT!r}, or set validation_fraction=0."
        )
    held_out = set(distinct[: min(ceil(validation_fraction * len(distinct)), len(distinct) - 1)])
    training = [document for document in documents if document not in held_out]
    validation = [document for document in documents if document in held_out]
    return training, validation


def pack(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> torch.Tensor:
    """The tokens of all documents, each followed by an end-of-sequence token, as sequences int64 [N, L].

    A remainder shorter than L is dropped.

    Raises:
        ValueError: the tokenizer has no `eos_token`, or there is less text than one sequence.
    """
    if sequence_length < 2:
        raise ValueError(f"sequence_length={sequence_length}: must be at least 2 (a token and the next one).")
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no eos_token to put between documents. Set tokenizer.eos_token.")
    tokens = array("q")
    for batch in _batches(documents, 1000):
        # verbose=False: no warning about long documents, which are split afterwards
        for ids in tokenizer(batch, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]:
            tokens.extend(ids)
            tokens.append(tokenizer.eos_token_id)
    sequences = len(tokens) // sequence_length
    if sequences == 0:
        raise ValueError(
            f"{len(documents)} document(s) with {len(tokens)} tokens in all: less than one sequence of "
            f"{sequence_length}. Give more text or a smaller sequence_length."
        )
    return torch.frombuffer(tokens, dtype=torch.int64)[: sequences * sequence_length].view(-1, sequence_length).clone()


def _documents_of(path: Path, column: str) -> Iterator[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    if path.suffix in TEXT_SUFFIXES:
        return _text_documents(path)
    if path.suffix in TABLE_BUILDERS:
        return _table_documents(path, column)
    known = ", ".join((*TEXT_SUFFIXES, *TABLE_BUILDERS))
    raise ValueError(f"{path}: data files end in {known}; {path.suffix or 'no suffix'!r} is not one of them.")


def _text_documents(path: Path) -> Iterator[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}). Convert it.") from error
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        if line.strip() == END_OF_DOCUMENT:
            yield "".join(lines)
            lines = []
        else:
            lines.append(line)
    yield "".join(lines)


def _table_documents(path: Path, column: str) -> Iterator[str]:
    if path.stat().st_size == 0:  # `datasets` would complain about a missing schema
        return
    row = 0
    for batch in _table_batches(path):
        if column not in batch:
            raise ValueError(
                f"{path}: no column {column!r}. Its columns: {', '.join(batch)}. Choose one with text_column."
            )
        for value in batch[column]:
            row += 1
            if value is None:
                raise ValueError(
                    f"{path}: row {row} has no text in column {column!r}. Add text, or leave the row out."
                )
            if not isinstance(value, str):
                raise TypeError(f"{path}: column {column!r} holds {type(value).__name__} values, expected text.")
            yield value


def _table_batches(path: Path) -> Iterator[dict[str, list[Any]]]:
    """Rows, up to 1000 at a time, as {column: values}."""
    from datasets import load_dataset  # seconds to import; must not slow down --help

    try:
        # streaming: otherwise `datasets` would leave a copy of the owner's text in its cache folder
        files = glob.escape(str(path))  # `datasets` expands patterns
        rows = load_dataset(TABLE_BUILDERS[path.suffix], data_files=files, split="train", streaming=True)
        yield from rows.iter(batch_size=1000)
    except Exception as error:  # each builder raises its parser's own exceptions
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:]} ({error}).") from error


def _order(document: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\n{document}".encode("utf-8", "surrogatepass")).digest()


def _batches(documents: Sequence[str], size: int) -> Iterable[list[str]]:
    return (list(documents[start : start + size]) for start in range(0, len(documents), size))


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
