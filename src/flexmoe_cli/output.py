"""What the commands show: tables and JSON on stdout; progress, warnings and errors on stderr.

Colours follow the terminal and NO_COLOR (rich does). With `--json`, stdout carries the JSON and nothing else.
Manifests and configs are strangers': what in their text would steer a terminal is shown as an escape, `\\x1b`.
Not here: which facts are shown (`tables`).
"""

import gc
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn
from rich.table import Table

# Controls (of which ESC begins what moves the cursor or sets a title), what turns the direction of text or has no
# width, and halves of characters, which cannot be written. Not the two joiners, which letters and emoji need.
_STEERING = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def print_json(value: Any) -> None:
    """Prints `value` as JSON: standard JSON, so NaN and infinities become null."""
    lines = json.dumps(_standard(value), indent=2, ensure_ascii=False).split("\n")  # json escapes those in strings
    sys.stdout.write("\n".join(_STEERING.sub(_json_escape, line) for line in lines) + "\n")


def print_line(text: str) -> None:
    """Prints a line of rich markup on stdout, never broken in the middle of a path."""
    Console().print(_shown(text), soft_wrap=True, highlight=False)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a table: numbers to the right, text to the left, empty columns not at all. Cells are plain text."""
    table = Table(
        title=escape(_shown(title)), title_justify="left", title_style="bold", header_style="bold", box=SIMPLE_HEAD
    )
    cells = [[_shown(cell) for cell in row] for row in rows]
    shown = [index for index in range(len(columns)) if index == 0 or any(row[index] for row in cells)]
    for index in shown:
        numeric = index > 0 and all(_is_number(row[index]) for row in cells)
        table.add_column(columns[index], justify="right" if numeric else "left", overflow="fold", no_wrap=numeric)
    for row in cells:
        table.add_row(*(escape(row[index]) for index in shown))
    Console().print(table)


def quiet_libraries() -> None:
    """Keeps other libraries' progress bars out of log files. To be called before they are imported: they look then."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers follows it too
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


@contextmanager
def large_import() -> Iterator[None]:
    """Around imports of the model: their million objects all stay, so no time is spent on looking for garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def library_call(as_json: bool) -> Iterator[None]:
    """Around a call of the library: with `as_json`, whatever it prints goes to stderr."""
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        yield


@contextmanager
def byte_progress(what: str, source: str | Path | None = None) -> Iterator[Callable[[int], None]]:
    """Shows bytes as they are written; yields the function that is told of each further number of bytes.

    `source`, if it is a folder, tells how many there will be: about as many as its weight files hold.
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
    """Counts steps whose number nobody knows beforehand; yields the function that is called after each."""
    columns = (TextColumn("{task.description}"), TextColumn("{task.completed} layers"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda: progress.advance(task)


def report_error(error: Exception) -> None:
    """Prints what went wrong as one paragraph on stderr."""
    # A KeyError's text is its key between quotes, whatever the message is.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(text.split()) or type(error).__name__
    if not isinstance(error, ValueError | TypeError | LookupError | OSError | ImportError):
        text = f"{type(error).__name__}: {text} (This was not foreseen: --debug shows where it happened.)"
    _print_message("Error", "bold red", text)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Prints a warning for the person at the terminal: its words, without the line of code that said them."""
    if issubclass(category, UserWarning):
        _print_message("Warning", "bold yellow", " ".join(str(message).split()))


def human_bytes(count: int) -> str:
    """`1234567` as `1.2 MB`."""
    return _human(count, ("B", "kB", "MB", "GB", "TB"))


def human_count(count: int, digits: int = 3) -> str:
    """`1234567` as `1.23 M`, to so many digits."""
    return _human(count, ("", "K", "M", "B", "T"), digits)


def _human(count: float, units: Sequence[str], digits: int = 3) -> str:
    for unit in units[:-1]:
        if count < 1000 - 10.0 ** (3 - digits) / 2:
            return f"{count:.{digits}g} {unit}".rstrip()
        count /= 1000
    return f"{count:.{digits}g} {units[-1]}"


def _print_message(label: str, style: str, text: str) -> None:
    Console(stderr=True).print(f"[{style}]{label}:[/] {escape(_shown(text))}", soft_wrap=True, highlight=False)


def _shown(text: str) -> str:
    """The text with what would steer a terminal as an escape, as Python writes it."""
    return _STEERING.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


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
