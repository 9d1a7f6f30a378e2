"""Output of the commands: tables and JSON on stdout; progress, warnings and errors on stderr.

Colours follow the terminal and NO_COLOR (by rich). With `--json`, stdout holds only the JSON. Manifests and configs
are untrusted: control characters in their text are shown as escapes, `\\x1b`. Does not cover which facts are shown
(`tables`).
"""

import codecs
import functools
import gc
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

import typer.rich_utils
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

# Control characters (ESC starts sequences that move the cursor or set a title), characters that change the direction
# of text or have no width, and surrogates, which cannot be written. Not the two joiners, which letters and emoji need.
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


NARROW = 12  # characters to which a column of text may be narrowed
CELL_PADDING, TABLE_EDGES = 3, 2  # of rich's tables with this box

IMPORT_NOISE = {
    "torchao": re.compile("^Failed to load .*|^Skipping import of cpp extensions"),
    "torch.utils._pytree": re.compile("register_constant\\(\\) on Enum subclasses"),
}
"""Messages that are not shown, by logger."""
_NOISE_FILTERS: dict[str, Callable[[logging.LogRecord], bool]] = {
    logger: lambda record, noise=noise: not noise.search(record.getMessage())  # type: ignore[misc]
    for logger, noise in IMPORT_NOISE.items()
}

_FALLBACK = "flexmoe.symbols"  # name of the handler of encoding errors
_SYMBOLS = {
    **{"…": "...", "→": "->", "≤": "<=", "≥": ">=", "×": "x", "·": ".", "−": "-", "–": "-", "—": "-"},
    **dict.fromkeys("‘’", "'"),
    **dict.fromkeys("“”", '"'),
    **dict.fromkeys("─━╌╴╸╺", "-"),
    **dict.fromkeys("│┃╎", "|"),
    **dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼┏┓┗┛┡┩╇", "+"),
    **dict.fromkeys("•●", "*"),
}
"""Symbols of messages and tables, and what stands for them where an encoding lacks them."""


def print_json(value: Any) -> None:
    """Prints `value` as standard JSON; NaN and infinities become null."""
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    text = json.dumps(_standard(value), indent=2, ensure_ascii=not is_unicode)
    lines = text.split("\n")  # newlines in strings are escaped
    sys.stdout.write("\n".join(_CONTROL.sub(_json_escape, line) for line in lines) + "\n")


def print_line(text: str) -> None:
    """Prints a line of rich markup on stdout, without breaking paths."""
    Console().print(_escaped(text), soft_wrap=True, highlight=False)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table of plain text: numbers right-aligned, text left-aligned, empty columns left out.

    The first column, which tells rows apart, and numbers are not broken; other text is, over several lines. A table
    that is too wide even so is printed as a list, with a block of lines per row.
    """
    console = Console()
    cells = [[_escaped(cell) for cell in row] for row in rows]
    shown = [index for index in range(len(columns)) if index == 0 or any(row[index] for row in cells)]
    by_column = {columns[index]: [row[index] for row in cells] for index in shown}
    widths = {heading: max(map(cell_len, [heading, *column])) for heading, column in by_column.items()}
    first = columns[0]
    numeric = {heading for heading, column in by_column.items() if heading != first and all(map(_is_number, column))}
    fixed = {heading for heading in by_column if heading in (first, *numeric) or widths[heading] <= NARROW}
    least = sum(widths[heading] if heading in fixed else NARROW for heading in by_column)
    if least + CELL_PADDING * len(by_column) + TABLE_EDGES > console.width:
        _print_list(console, title, by_column)
        return
    table = Table(
        title=escape(_escaped(title)), title_justify="left", title_style="bold", header_style="bold", box=SIMPLE_HEAD
    )
    for heading in by_column:
        justify: Any = "right" if heading in numeric else "left"
        table.add_column(heading, justify=justify, overflow="fold", no_wrap=heading in fixed)
    for row in zip(*by_column.values(), strict=True):
        table.add_row(*map(escape, row))
    console.print(table)


def _print_list(console: Console, title: str, by_column: Mapping[str, Sequence[str]]) -> None:
    """Prints a block per row: the first cell, then the others that are not empty, one a line with its heading."""
    first, *others = by_column
    width = max(map(cell_len, others), default=0)
    console.print(f"[bold]{escape(_escaped(title))}[/]", soft_wrap=True, highlight=False)
    for at, name in enumerate(by_column[first]):
        lines = [f"  [bold]{escape(name)}[/]"]
        cells = {heading: by_column[heading][at] for heading in others}
        lines += [f"    {heading:<{width}}  {escape(cell)}" for heading, cell in cells.items() if cell]
        console.print("\n".join(lines), soft_wrap=True, highlight=False)


def prepare_streams() -> None:
    """Lets stdout and stderr take any text: characters that their encoding lacks get an equivalent, or an escape."""
    codecs.register_error(_FALLBACK, _without_symbols)
    for stream in (sys.stdout, sys.stderr):
        # "replace" and the like are a choice made with PYTHONIOENCODING
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape", "backslashreplace"):
            stream.reconfigure(errors=_FALLBACK)


def keep_option_names() -> None:
    """Lets typer's help break long option names, where it would cut them off."""
    for name in ("highlighter", "negative_highlighter"):
        highlight = getattr(typer.rich_utils, name, None)
        if highlight is not None and not isinstance(highlight, functools.partial):
            setattr(typer.rich_utils, name, functools.partial(_folded, highlight))


def _folded(highlight: Callable[[str], Text], text: str) -> Text:
    folded = highlight(text)
    folded.overflow = "fold"
    return folded


def quiet_libraries() -> None:
    """Keeps other libraries' progress bars out of log files, and messages of imports that concern no user out of both.

    transformers imports torchao wherever it is installed, which complains of parts that are made for other machines.
    To be called before they are imported.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # also for transformers
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for logger, is_news in _NOISE_FILTERS.items():
        logging.getLogger(logger).addFilter(is_news)  # the same one once


@contextmanager
def large_import() -> Iterator[None]:
    """Disables garbage collection around imports of the model, which create many long-lived objects."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def library_call(as_json: bool) -> Iterator[None]:
    """Redirects the library's prints to stderr if `as_json`."""
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        yield


@contextmanager
def byte_progress(what: str, source: str | Path | None = None) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar of written bytes; yields the function to call with each number of bytes.

    If `source` is a folder, the size of its weight files is the estimated total.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=_weight_bytes(source))
        yield lambda count: progress.advance(task, count)


@contextmanager
def step_progress(what: str) -> Iterator[Callable[[], None]]:
    """Counts steps of an unknown number; yields the function to call after each step."""
    columns = (TextColumn("{task.description}"), TextColumn("{task.completed} layers"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda: progress.advance(task)


def print_status(text: str) -> None:
    """Prints a line about the progress of a command on stderr."""
    Console(stderr=True).print(escape(_escaped(text)), soft_wrap=True, highlight=False)


def report_error(error: Exception, reword: Callable[[str], str] = str) -> None:
    """Prints an error as one paragraph on stderr, in the words that `reword` chooses."""
    # str() of a KeyError is the repr of its message
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(text.split()) or type(error).__name__
    if isinstance(error, RuntimeError) and "home directory" in text:  # of pathlib
        text += " Set HOME; or set HF_HOME to a folder for downloads, and give paths without ~."
    elif not isinstance(error, ValueError | TypeError | LookupError | OSError | ImportError):
        text = f"{type(error).__name__}: {text} (Unexpected error: --debug shows the traceback.)"
    _print_message("Error", "bold red", reword(text))


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
    reword: Callable[[str], str] = str,
) -> None:
    """Prints a warning without the line of code that raised it; the signature is that of `warnings.showwarning`."""
    if issubclass(category, UserWarning):
        _print_message("Warning", "bold yellow", reword(" ".join(str(message).split())))


def human_bytes(count: int) -> str:
    """`1234567` as `1.2 MB`."""
    return _human(count, ("B", "kB", "MB", "GB", "TB"))


def human_count(count: int, digits: int = 3) -> str:
    """`1234567` as `1.23 M`, with `digits` significant digits."""
    return _human(count, ("", "K", "M", "B", "T"), digits)


def _human(count: float, units: Sequence[str], digits: int = 3) -> str:
    for unit in units[:-1]:
        if count < 1000 - 10.0 ** (3 - digits) / 2:
            return f"{count:.{digits}g} {unit}".rstrip()
        count /= 1000
    return f"{count:.{digits}g} {units[-1]}"


def _print_message(label: str, style: str, text: str) -> None:
    Console(stderr=True).print(f"[{style}]{label}:[/] {escape(_escaped(text))}", soft_wrap=True, highlight=False)


def _escaped(text: str) -> str:
    """The text with control characters as Python escapes."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def _without_symbols(error: UnicodeError) -> tuple[str, int]:
    """An error handler of `codecs`: equivalents of symbols, and Python escapes of other characters."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    return "".join(_SYMBOLS.get(c) or c.encode("unicode_escape").decode("ascii") for c in characters), error.end


def _json_escape(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1] if match[0] != "\x7f" else "\\u007f"


def _weight_bytes(source: str | Path | None) -> int | None:
    if source is None or not Path(source).is_dir():
        return None
    return sum(file.stat().st_size for file in Path(source).glob("*.safetensors")) or None


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in "-+" or cell in ("", "inf", "nan")


def _standard(value: Any) -> Any:
    if isinstance(value, float) and value - value != 0:  # NaN or an infinity
        return None
    if isinstance(value, Mapping):
        return {str(key): _standard(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_standard(item) for item in value]
    return str(value) if isinstance(value, Path) else value
