"""The files of a data set: paths, folders, patterns and ids of the Hub, and the bytes of a file as text.

Only the standard library is imported at the top, by relative imports: the command line loads this module and
`documents` before torch, to refuse a misspelt path at once.

Does not cover what is in the files (`documents`).
"""

from __future__ import annotations

import codecs
import glob
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

TEXTS = (".txt", ".md")
TABLES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
FORMATS = ", ".join((*TEXTS, *TABLES)) + f" (also with {', '.join(COMPRESSIONS)}, but not parquet)"

_HUB = re.compile(
    r"hf:(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<config>[^@:/]+))?(?::(?P<split>[^@:/]+))?", re.ASCII
)
_HUB_FORM = "hf:OWNER/NAME, with @CONFIG and :SPLIT if needed (hf:owner/name@en:train)"
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_POINTERS = {  # first bytes -> name, and command that fetches the file
    b"version https://git-lfs.github.com/spec/": ("Git LFS", "git lfs pull"),
    b"/annex/objects/": ("git-annex", "git annex get"),
}
_MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class DataFile:
    """A file with its format (".jsonl") and its compression (".gz", or "" for none)."""

    path: Path
    format: str
    compression: str = ""

    @property
    def is_table(self) -> bool:
        """Whether it has rows and columns."""
        return self.format in TABLES

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class HubDataset:
    """A data set on the Hub: `hf:repo@config:split`."""

    repo: str
    config: str | None
    split: str | None
    is_table = True

    def __str__(self) -> str:
        config, split = (f"{mark}{name}" if name else "" for mark, name in (("@", self.config), (":", self.split)))
        return f"hf:{self.repo}{config}{split}"


def find_sources(data: Sequence[str | Path]) -> list[DataFile | HubDataset]:
    """The files that `data` names, in its order; those of a folder or pattern are sorted by name.

    Args:
        data: paths; patterns such as "notes/**/*.md"; folders, of which all files are read whose format is known,
            except hidden ones; and data sets on the Hub, "hf:owner/name@config:split".

    Raises:
        FileNotFoundError: nothing is there, or no file matches.
        TypeError: `data` is one path instead of a list.
        ValueError: an empty list, an unknown format, a folder with text files as well as tables, a pointer instead of
            a file, or a malformed id.
    """
    if isinstance(data, str | os.PathLike):
        raise TypeError(f"files: one path ({str(data)!r}), expected a list of them. Write [{str(data)!r}].")
    sources = [source for item in data for source in _sources(str(item))]
    if not sources:
        raise ValueError(f"No data files. Give at least one file: {FORMATS}.")
    return sources


def data_paths(data: Sequence[str | Path]) -> list[Path]:
    """The local files among the sources of `data`. Raises as `find_sources`."""
    return [source.path for source in find_sources(data) if isinstance(source, DataFile)]


def check_output_apart(out: Path, data: Sequence[str | Path]) -> None:
    """Raises ValueError if `out` is in a folder of `data`: what is written there would be read the next time."""
    for item in data:
        folder = Path(item).expanduser()
        if folder.is_dir() and out.is_relative_to(os.path.realpath(folder)):
            raise ValueError(
                f"The output {out} is in {folder}, a folder of data: its files would be read as text the next time. "
                "Choose another output folder."
            )


@contextmanager
def open_text(file: DataFile, *, newline: str | None = None) -> Iterator[TextIO]:
    """The decompressed text of a file: UTF-8, or UTF-16 or UTF-32 with a byte-order mark, which is left out."""
    stream = io.BufferedReader(_OPENERS[file.compression](file.path))
    with stream:
        start = stream.peek(4)[:4]
        encoding = next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8")
        with io.TextIOWrapper(stream, encoding=encoding, newline=newline) as text:
            yield text


def _sources(item: str) -> Iterator[DataFile | HubDataset]:
    if item.startswith("hf:"):
        yield _hub_dataset(item)
        return
    path = Path(item).expanduser()
    if path.is_dir():
        yield from _files_in(path)
    elif path.is_file():
        yield _data_file(path)
    elif path.exists():
        raise ValueError(f"{path} is neither a file nor a folder (a pipe?). Write its text to a file.")
    elif glob.has_magic(item):
        matches = (Path(match) for match in sorted(glob.glob(str(path), recursive=True)))
        files = [match for match in matches if match.is_file()]
        if not files:
            raise FileNotFoundError(f"{item}: no file matches this pattern.")
        yield from map(_data_file, files)
    else:
        may_be_of_the_hub = _REPOSITORY.fullmatch(item) and not path.parent.exists() and not path.suffix
        hint = f" A data set on the Hub is written hf:{item}." if may_be_of_the_hub else ""
        raise FileNotFoundError(f"{item}: no such file or folder.{hint}")


def _hub_dataset(item: str) -> HubDataset:
    match = _HUB.fullmatch(item)
    if match is None:
        raise ValueError(f"{item!r} is not the id of a data set on the Hub: write {_HUB_FORM}.")
    return HubDataset(match["repo"], match["config"], match["split"])


def _data_file(path: Path) -> DataFile:
    format, compression = _format(path)
    if format not in (*TEXTS, *TABLES) or (format == ".parquet" and compression):
        raise ValueError(f"{path}: data files end in {FORMATS}; {path.suffix or 'no suffix'!r} is not one of them.")
    with path.open("rb") as file:
        start = file.read(200)
    for mark, (name, command) in _POINTERS.items():
        if start.startswith(mark):
            raise ValueError(
                f"{path} is a {name} pointer, not the file that it stands for. Fetch that with `{command}` in its "
                "repository, or download it again."
            )
    return DataFile(path, format, compression)


def _format(path: Path) -> tuple[str, str]:
    """(format, compression) by the suffixes, in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        return (suffixes[0] if len(suffixes) == 2 else "", suffixes[-1])
    return (suffixes[-1] if suffixes else "", "")


def _files_in(folder: Path) -> list[DataFile]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_hidden(path.relative_to(folder)))
    known = [path for path in paths if _format(path)[0] in (*TEXTS, *TABLES)]
    if not known:
        raise FileNotFoundError(f"{folder} holds no data files: {FORMATS}.")
    texts = [path for path in known if _format(path)[0] in TEXTS]
    if texts and len(texts) < len(known):
        table = next(path for path in known if path not in texts)
        raise ValueError(
            f"{folder} holds text files ({texts[0].name}) as well as tables ({table.name}). Say which are meant, with "
            f"a pattern in quotes: '{folder}/**/*{table.suffix}'."
        )
    return [_data_file(path) for path in known]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _open_gz(path: Path) -> Any:
    import gzip

    return gzip.open(path)


def _open_zst(path: Path) -> Any:
    import pyarrow  # Python has had a reader of its own since 3.14; pyarrow comes with `datasets`

    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")


def _open_bz2(path: Path) -> Any:
    import bz2

    return bz2.open(path)


def _open_xz(path: Path) -> Any:
    import lzma

    return lzma.open(path)


_OPENERS: dict[str, Callable[[Path], Any]] = {
    "": lambda path: open(path, "rb", buffering=0),  # noqa: SIM115 - the caller closes it
    ".gz": _open_gz,
    ".zst": _open_zst,
    ".bz2": _open_bz2,
    ".xz": _open_xz,
}
