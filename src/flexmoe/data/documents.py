"""The documents of data files, one at a time: texts, and the text columns of tables.

Tables are read row by row, and only the columns that are named: what the others hold does not matter. Texts stay as
they are stored; a text that looks like a date is no date.

Only the standard library is imported at the top; see `files`. Does not cover splitting and tokenisation (`tokens`).
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from .files import DataFile, HubDataset, find_sources, open_text

END_OF_DOCUMENT = "<|endofdocument|>"
COLUMN = "text"

Row = Mapping[str, Any]

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_CHUNK = 1 << 16  # characters that are read at once
_LINES_PER_BLOCK = 4096
_COLUMNS_SHOWN = 20
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class RowFormat:
    """How a row of a table becomes a text: the value of one column, or a template of several.

    Attributes:
        columns: those that are read.
        template: the text with {column} for each; None: the value of the only column.
    """

    columns: tuple[str, ...]
    template: str | None = None

    @classmethod
    def of(cls, column: str | None, template: str | None) -> RowFormat:
        """Parses "{title}\\n{body}"; `{{` and `}}` are braces.

        Raises:
            ValueError: a column as well as a template, no column in the template, or a single brace.
        """
        if template is None:
            return cls((COLUMN if column is None else column,))
        if column not in (None, COLUMN):
            raise ValueError(
                f"--text-column {column} and --text-template (text_column, text_template): give one of them."
            )
        marks = list(_FIELD.finditer(template))
        if single := next((mark for mark in marks if mark[0] in ("{", "}")), None):
            raise ValueError(
                f"--text-template (text_template) {template!r}: a single {single[0]!r}. Write {{column}} for a "
                "column, and two braces for one."
            )
        columns = tuple(dict.fromkeys(mark[1] for mark in marks if mark[1] is not None))
        if not columns or "" in columns:
            raise ValueError(
                f"--text-template (text_template) {template!r} must name columns in braces: '{{title}}\\n{{body}}'."
            )
        return cls(columns, template)

    def render(self, row: Mapping[str, str]) -> str:
        """The text of a row that has all columns."""
        if self.template is None:
            return row[self.columns[0]]
        return _FIELD.sub(lambda mark: mark[0][0] if mark[1] is None else row[mark[1]], self.template)


class Documents:
    """The documents of data files, in order; each iteration reads the files again, one document at a time.

    `.txt` and `.md`: a file is one document, unless lines that contain only `<|endofdocument|>` separate several.
    Tables: one document per row. Documents of whitespace only are left out.

    Args:
        data: paths, folders, patterns and data sets on the Hub; see `find_sources`.
        column: of tables; None: "text".
        template: a text made of several columns instead, "{title}\\n{body}".
        skip_empty: leave out rows without text (null, or without the column) instead of raising an error.

    Attributes:
        blank, skipped: the number of documents of whitespace only, and of rows without text, in the last iteration.

    Raises:
        FileNotFoundError, TypeError, ValueError: see `find_sources` and `RowFormat.of`.
    """

    def __init__(
        self,
        data: Sequence[str | Path],
        *,
        column: str | None = None,
        template: str | None = None,
        skip_empty: bool = False,
    ) -> None:
        self.row_format = RowFormat.of(column, template)
        self.sources = find_sources(data)
        self.skip_empty = skip_empty
        self.blank = self.skipped = 0

    def __iter__(self) -> Iterator[str]:
        """Yields the documents.

        Raises:
            TypeError: a value of a column is not a text.
            ValueError: a file cannot be read as what its name says, a column is missing, a row has no text, a text is
                cut inside a character, or there is no document at all.
        """
        self.blank = self.skipped = 0
        found = False
        for source in self.sources:
            for document in self._read(source):
                if not document or document.isspace():
                    self.blank += 1
                else:
                    found = True
                    yield document
        if not found:
            raise ValueError(
                f"{_listed(self.sources)}: no text found. An empty data set cannot be used; give files with text."
            )

    def skipped_note(self) -> str | None:
        """A warning about the rows without text that the last iteration skipped; None if there were none."""
        if not self.skipped:
            return None
        return f"{_listed(self.sources)}: {self.skipped:,} row(s) without text were skipped."

    def check(self) -> None:
        """Reads the beginning of each local file, and raises the errors that it shows; see `__iter__`."""
        for source in self.sources:
            if isinstance(source, HubDataset):
                continue
            if source.is_table:
                next(iter(self._table(source)), None)
            else:
                with _format_errors(source), open_text(source) as stream:
                    _refuse_binary(source, stream.read(_CHUNK))
        self.skipped = 0

    def _read(self, source: DataFile | HubDataset) -> Iterator[str]:
        if isinstance(source, DataFile) and not source.is_table:
            return _text_documents(source)
        return self._table(source)

    def _table(self, source: DataFile | HubDataset) -> Iterator[str]:
        seen = _Columns(source, self.row_format.columns)
        rows = _hub_rows(source, seen) if isinstance(source, HubDataset) else _READERS[source.format](source, seen)
        for number, row in enumerate(rows, 1):
            seen.add(row, number, required=not self.skip_empty)
            values: dict[str, Any] = {column: row.get(column) for column in self.row_format.columns}
            if absent := [column for column, value in values.items() if value is None]:
                if not self.skip_empty:
                    raise ValueError(
                        f"{source}: row {number} has no text in column {absent[0]!r}. Add text, or leave such rows "
                        "out with --skip-empty (skip_empty=True)."
                    )
                self.skipped += 1
                continue
            for column, value in values.items():
                _check_text(source, number, column, value)
            yield self.row_format.render(values)
        seen.check()


def read_documents(
    files: Sequence[str | Path],
    *,
    column: str | None = None,
    template: str | None = None,
    skip_empty: bool = False,
) -> list[str]:
    """All documents of some files, in order; the arguments and errors are those of `Documents` and its iteration.

    Warns:
        UserWarning: the number of rows without text that were skipped.

    Example:
        ```pycon
        >>> from flexmoe.data import read_documents
        >>> len(read_documents(["problems.txt"])) > 0
        True
        ```
    """
    documents = Documents(files, column=column, template=template, skip_empty=skip_empty)
    texts = list(documents)
    if note := documents.skipped_note():
        warnings.warn(note, stacklevel=2)
    return texts


def texts_of_json_lines(file: DataFile, content: bytes) -> list[str]:
    """The texts in column "text" of a .jsonl file whose bytes were read already.

    Raises:
        TypeError: a value of the column is not a text, or missing.
        ValueError: it is not UTF-8, a line is not a JSON object, or a text is cut inside a character.
    """
    with _format_errors(file):
        rows = list(_rows_of_lines(io.StringIO(content.decode("utf-8"), newline="\n")))
    for number, row in enumerate(rows, 1):
        _check_text(file, number, COLUMN, row.get(COLUMN))
    return [row[COLUMN] for row in rows]


def check_template_is_used(documents: Iterable[Documents]) -> None:
    """Raises ValueError if there is a template for the columns of tables, but no table."""
    documents = list(documents)
    sources = [source for one in documents for source in one.sources]
    if any(one.row_format.template is not None for one in documents) and not any(one.is_table for one in sources):
        raise ValueError(
            "--text-template (text_template) is for the columns of tables, and there is no table among the data: "
            f"{_listed(sources)}."
        )


@dataclass
class _Columns:
    """The columns of a table: those that are wanted, and those that were seen."""

    source: DataFile | HubDataset
    wanted: tuple[str, ...]
    seen: dict[str, None] = field(default_factory=dict)  # a set that keeps the order

    def add(self, row: Row, number: int, *, required: bool) -> None:
        """Takes note of a row's columns; if they are required, a wanted one that no row had until now is an error."""
        if number == 1 or not self.seen.keys() >= set(self.wanted):
            self.note(row)
            if required and number == 1:
                self.check()

    def note(self, names: Iterable[str]) -> None:
        """Takes note of these columns: of all that are wanted, and of some others, for the message."""
        for name in names:
            if name in self.wanted or len(self.seen) < _COLUMNS_SHOWN:
                self.seen[name] = None

    def check(self) -> None:
        """Raises ValueError if there were rows, and a wanted column in none of them."""
        if self.seen and (missing := [column for column in self.wanted if column not in self.seen]):
            raise ValueError(
                f"{self.source}: no column {missing[0]!r}. Its columns: {', '.join(self.seen)}. Choose one with "
                "--text-column (text_column=...), or several with --text-template (text_template=...)."
            )


class _format_errors:
    """Turns the errors of decoders and parsers into a ValueError that names the file."""

    def __init__(self, source: DataFile) -> None:
        self.source = source

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, UnicodeDecodeError):
            raise ValueError(
                f"{self.source}: not {error.encoding.upper()} text ({error.reason}: "
                f"{error.object[error.start : error.end]!r}). Convert it to UTF-8."
            ) from error
        if isinstance(error, _Malformed | csv.Error | OSError | EOFError) or (
            isinstance(error, Exception) and type(error).__module__ in ("zlib", "_lzma", "lzma", "pyarrow.lib")
        ):
            name = self.source.format[1:] + self.source.compression
            raise ValueError(f"{self.source}: cannot be read as {name} ({error}).") from error


class _Malformed(Exception):
    """A row that cannot be parsed."""


def _text_documents(file: DataFile) -> Iterator[str]:
    with _format_errors(file), open_text(file) as stream:
        blocks: list[str] = []
        lines: list[str] = []
        for line in stream:
            _refuse_binary(file, line)
            if line.strip() == END_OF_DOCUMENT:
                document = "".join((*blocks, *lines))
                blocks, lines = [], []  # not held while the document is used
                yield document
                continue
            # files that were joined have a byte-order mark at each beginning
            lines.append(line if lines or blocks else line.removeprefix("\ufeff"))
            if len(lines) == _LINES_PER_BLOCK:  # many short strings need several times the memory of a long one
                blocks.append("".join(lines))
                lines = []
        document = "".join((*blocks, *lines))
        del blocks, lines
        yield document


def _refuse_binary(file: DataFile, text: str) -> None:
    if "\0" in text:
        raise ValueError(
            f"{file}: holds NUL characters, so it is binary, or UTF-16 without a byte-order mark. Convert it to UTF-8."
        )


def _json_lines(file: DataFile, _: _Columns) -> Iterator[Row]:
    with _format_errors(file), open_text(file) as stream:
        yield from _rows_of_lines(stream)


def _json_rows(file: DataFile, _: _Columns) -> Iterator[Row]:
    """The objects of an array; or JSON lines, which often have this suffix, too."""
    with _format_errors(file), open_text(file) as stream:
        start = stream.read(1)
        while start and start.isspace():
            start = stream.read(1)
        yield from _rows_of_array(stream) if start == "[" else _rows_of_lines(stream, start)


def _rows_of_lines(stream: TextIO, start: str = "") -> Iterator[Row]:
    for number, line in enumerate(stream, 1):
        line = (start + line).removeprefix("\ufeff")
        start = ""
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _Malformed(f"line {number} is not a JSON object: {_fault(error)}") from error
            yield _object(row, f"line {number}")


def _rows_of_array(stream: TextIO) -> Iterator[Row]:
    """The objects of a JSON array whose first bracket was read; holds one of them at a time."""
    buffer = _next_character(stream, "")
    for number in itertools.count(1):
        if number == 1 and buffer[0] == "]":
            return
        row, buffer = _next_value(stream, buffer, f"element {number}")
        yield _object(row, f"element {number}")
        buffer = _next_character(stream, buffer)
        if buffer[0] == "]":
            return
        if buffer[0] != ",":
            raise _Malformed(f"no ',' or ']' after element {number}")
        buffer = _next_character(stream, buffer[1:])


def _next_character(stream: TextIO, buffer: str) -> str:
    """The buffer from its next character on that is no space; reads on if there is none."""
    while not (buffer := buffer.lstrip()):
        if not (buffer := stream.read(_CHUNK)):
            raise _Malformed("the array has no end; the file may be cut off")
    return buffer


def _next_value(stream: TextIO, buffer: str, where: str) -> tuple[object, str]:
    """The JSON value at the beginning of the buffer, and what follows it."""
    while True:
        try:
            value, end = json.JSONDecoder().raw_decode(buffer)
        except RecursionError as error:
            raise _Malformed(f"{where} is not a JSON object: {_fault(error)}") from error
        except ValueError as error:
            more = stream.read(max(_CHUNK, len(buffer)))
            if not more:
                raise _Malformed(f"{where} is not a JSON object: {error}") from error
            buffer += more
        else:
            return value, buffer[end:]


def _fault(error: ValueError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "objects and lists are nested too deep"
    return f"{error.msg} at character {error.pos}" if isinstance(error, json.JSONDecodeError) else str(error)


def _object(row: object, where: str) -> Row:
    if not isinstance(row, dict):
        raise _Malformed(f"{where} is a {type(row).__name__}, expected an object with columns")
    return row


def _csv_rows(file: DataFile, columns: _Columns) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the default of 131,072 characters
    with _format_errors(file), open_text(file, newline="") as stream:
        # strict: otherwise a quote that is not closed makes one text of the rest of the file
        rows = csv.reader(stream, delimiter="\t" if file.format == ".tsv" else ",", strict=True)
        header = next(rows, [])
        if twice := [column for column in columns.wanted if header.count(column) > 1]:
            raise _Malformed(f"two columns are called {twice[0]!r}")
        columns.note(header)
        for row in rows:
            if len(row) > len(header):
                raise _Malformed(f"line {rows.line_num} has {len(row)} fields, the first line {len(header)}")
            if row:
                yield dict(zip(header, row, strict=False))


def _parquet_rows(file: DataFile, columns: _Columns) -> Iterator[Row]:
    import pyarrow.parquet as pq

    if file.path.stat().st_size == 0:
        return
    with _format_errors(file), pq.ParquetFile(file.path) as table:
        columns.note(table.schema_arrow.names)
        columns.check()
        for batch in table.iter_batches(batch_size=256, columns=list(columns.wanted)):
            yield from batch.to_pylist()


def _hub_rows(source: HubDataset, columns: _Columns) -> Iterator[Row]:
    from datasets import load_dataset  # seconds to import

    try:
        # streaming: otherwise `datasets` would leave a copy of the text in its cache folder
        rows = load_dataset(source.repo, source.config, split=source.split or "train", streaming=True)
        if rows.column_names is not None:
            columns.note(rows.column_names)
        if columns.seen.keys() >= set(columns.wanted):
            rows = rows.select_columns(list(columns.wanted))
        yield from rows
    except Exception as error:  # of the Hub's client, and of each builder's parser
        raise ValueError(
            f"{source} cannot be read ({type(error).__name__}: {str(error).strip()[:500]}). A data set on the Hub is "
            "written hf:OWNER/NAME@CONFIG:SPLIT; the split is train by default. Log in for private ones."
        ) from error


_READERS: dict[str, Callable[[DataFile, _Columns], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
}


def _check_text(source: DataFile | HubDataset, number: int, column: str, value: Any) -> None:
    if not isinstance(value, str):
        raise TypeError(
            f"{source}: column {column!r} holds {type(value).__name__} values (row {number}), expected text."
        )
    if half := _SURROGATE.search(value):
        raise ValueError(
            f"{source}: row {number} holds half of a surrogate pair ({half[0]!a}) in column {column!r}: the text was "
            "cut inside a character. Repair it, or leave the row out."
        )


def _listed(sources: Iterable[DataFile | HubDataset]) -> str:
    names = [str(source) for source in sources]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
