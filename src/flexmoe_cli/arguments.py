"""Arguments that several commands share, and the parsing of their values.

Does not cover whether values are consistent, which the library checks.
"""

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand

Out = Annotated[Path, typer.Option("--out", help="Folder to write. It appears only once it is complete.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print only the result on stdout, as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the Python traceback of errors.")]
Device = Literal["cpu", "cuda"]
Policy = Annotated[
    Path | None,
    typer.Option(
        help="Which packages are trusted: a policy file. Default: the one that FLEXMOE_POLICY names, if it is set.",
        show_default=False,
    ),
]
DATA_FORMATS = (
    "Files (.txt, .md, .jsonl, .csv, .parquet ...), folders, quoted patterns, or data sets on the Hub: "
    "hf:OWNER/NAME@CONFIG:SPLIT"
)
TextColumn = Annotated[str, typer.Option(help="Column of tables (.jsonl, .csv, .parquet ...) that holds the text.")]
SkipEmpty = Annotated[
    bool,
    typer.Option("--skip-empty", help="Leave out rows without text (null); they are counted. By default an error."),
]

Model = Annotated[str, typer.Argument(help="FlexMoE model: a folder or a Hub id.", show_default=False)]

ROUTER = "The router row"
RouterMethod = Annotated[
    str | None,
    typer.Option(
        "--router",
        help="log_odds, lda, hidden_mean, embedding, random. Default: log_odds.",
        show_default=False,
        rich_help_panel=ROUTER,
    ),
]
RouterBias = Annotated[
    bool | None,
    typer.Option(
        "--router-bias/--no-router-bias",
        help="Fit a bias, too. Default: no.",
        show_default=False,
        rich_help_panel=ROUTER,
    ),
]
RouterTokens = Annotated[
    int | None, typer.Option(help="Tokens to fit it on, of each side. Default: 40000.", rich_help_panel=ROUTER)
]
Embedder = Annotated[
    str | None, typer.Option(help="A sentence-transformers model, for --router embedding.", rich_help_panel=ROUTER)
]

FILE_OPTIONS = ("--data", "--public-data", "--router-data")
NAMED_FILE_OPTIONS = ("--data", "--router-data")  # in commands whose files have names

_NAMED_FILE = re.compile(r"[\w.-]+=.")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)
_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\r": "\r", r"\\": "\\"}
_ESCAPE = re.compile(r"\\[ntr\\]")
_EXPONENTS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class FilesCommand(TyperCommand):
    """A command whose file options take several files, `--data a.txt b.txt`, so `--data *.txt` works."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeats the file option before each further file, then parses as usual."""
        return super().parse_args(ctx, repeat_file_options(args))


class NamedFilesCommand(TyperCommand):
    """A command whose files have names: in `--data math=a.txt b.txt code=c.txt`, `math` has two files."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As in `FilesCommand`; a file without a name gets that of the file before it."""
        return super().parse_args(ctx, repeat_file_options(args, named=True))


def repeat_file_options(arguments: Sequence[str], *, named: bool = False) -> list[str]:
    """Converts `--data a.txt b.txt` to `--data a.txt --data b.txt`.

    Arguments belong to the option as long as they are existing files, patterns (`notes/*.md`), `hf:owner/name` or
    `name=file`: a model folder after the files remains an argument, and a misspelt file is an error. With `named`, a
    name applies to the files after it: `--data x=a.txt b.txt` becomes `--data x=a.txt --data x=b.txt`.
    """
    result: list[str] = []
    option: str | None = None  # the file option of the current files
    name = ""  # the current files' name
    for position, argument in enumerate(arguments):
        if argument == "--":
            return [*result, *arguments[position:]]
        if argument.startswith("-"):
            option = argument if argument in FILE_OPTIONS else None
        elif option and result[-1] != option:  # the first file is the option's value in any case
            if _is_file(argument) or _NAMED_FILE.match(argument):
                result.append(option)
                if named and option in NAMED_FILE_OPTIONS and name and not split_name(argument)[0]:
                    argument = f"{name}={argument}"
            else:
                option = None
        name = split_name(argument)[0] if option else ""
        result.append(argument)
    return result


def _is_file(argument: str) -> bool:
    return Path(argument).is_file() or argument.startswith("hf:") or glob.has_magic(argument)


def parse_template(text: str) -> str:
    r"""The template with line breaks and tabs for `\n` and `\t`, which a shell passes on as two characters."""
    return _ESCAPE.sub(lambda match: _ESCAPES[match[0]], text)


def parse_size(text: str) -> int:
    """The bytes in `5GB`, `500MB`, `2GiB` or a number. BadParameter: none of these, or zero."""
    match = _SIZE.fullmatch(text.strip())
    size = 0
    if match:
        number, prefix, binary = match.groups()
        size = int(float(number) * (1024 if binary else 1000) ** _EXPONENTS[prefix.upper()])
    if size < 1:
        raise typer.BadParameter(f"{text!r} is not a size. Write bytes, or a number and a unit: 500MB, 5GB, 2GiB.")
    return size


TextTemplate = Annotated[
    str | None,
    typer.Option(
        metavar="TEMPLATE",
        help=r"Instead, a text made of several columns: '{title}\n{body}'.",
        parser=parse_template,
        show_default=False,
    ),
]
ShardSize = Annotated[int, typer.Option(parser=parse_size, metavar="SIZE", help="Maximum size of a weight file.")]


def split_name(value: str) -> tuple[str, str]:
    """(name, file) of `name=file`; the name is empty if there is none."""
    name, separator, file = value.partition("=")
    return (name, file) if separator and "/" not in name else ("", value)  # a path may hold "=" in a folder's name


def parse_domains(values: Sequence[str], option: str = "--data") -> dict[str, list[Path]]:
    """Files by domain from `name=file`, or from `file`, whose stem is the name; a name may occur several times.

    Raises:
        ValueError: a value is malformed; names the `option`.
    """
    domains: dict[str, list[Path]] = {}
    for value in values:
        name, file = split_name(value)
        name = name or Path(value).stem
        if not name or not file or value.startswith("=") or glob.has_magic(name):
            raise ValueError(f"{option} {value}: write name=file, for example {option} math=math.txt.")
        domains.setdefault(name, []).append(Path(file))
    return domains


def parse_names(text: str) -> list[str]:
    """`["public", "math"]` from `public,math`; spaces around names are removed."""
    return [name.strip() for name in text.split(",")]


def parse_ranks(text: str) -> int | list[int]:
    """`64`, or `[16, 64]` from `16,64`. ValueError: a part is not an integer."""
    try:
        ranks = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--rank {text}: write an integer, or one per layer: --rank 16,16,64.") from None
    return ranks[0] if len(ranks) == 1 else ranks


def parse_renames(values: Sequence[str]) -> dict[str, str]:
    """Names in the model by package, from `package=name`. ValueError: a value is malformed, or a package repeated."""
    renames: dict[str, str] = {}
    for value in values:
        package, _, name = value.rpartition("=")
        if not package or not name:
            raise ValueError(f"--name {value}: write package=name, for example --name ./math-package=algebra.")
        if package in renames:
            raise ValueError(f"--name {value}: {package} is already {renames[package]!r}. Give one name per package.")
        renames[package] = name
    return renames


def parse_experts(values: Sequence[str]) -> dict[str, str]:
    """Checkpoints by expert, from `name=folder`. ValueError: a value is malformed, or a name repeated."""
    experts: dict[str, str] = {}
    for value in values:
        name, _, checkpoint = value.partition("=")
        if not name or not checkpoint:
            raise ValueError(f"--expert {value}: write name=folder, for example --expert math=./math-fine-tune.")
        if name in experts:
            raise ValueError(f"--expert {value}: {name!r} is already {experts[name]}. Names must be unique.")
        experts[name] = checkpoint
    return experts


def parse_revisions(values: Sequence[str]) -> dict[str, str | None]:
    """Revisions by expert, from `name` or `name=revision`. ValueError: a value is malformed, or a name repeated."""
    revisions: dict[str, str | None] = {}
    for value in values:
        name, separator, revision = value.partition("=")
        if not name or (separator and not revision):
            raise ValueError(f"--expert {value}: write a name, or name=revision, for example --expert math=v2.")
        if name in revisions:
            raise ValueError(f"--expert {value}: {name!r} is given twice.")
        revisions[name] = revision or None
    return revisions


def given(**options: Any) -> dict[str, Any]:
    """The options that were given; for others, the library's defaults apply."""
    return {name: value for name, value in options.items() if value is not None and value != []}
