"""The application: its commands, its version, and error handling.

Exit codes: 0 success; 1 the command failed, with one paragraph on stderr; 2 invalid command line; 3 `verify` refuses
the expert; 130 interrupted. Does not cover the commands (`admission`, `cards`, `commands`, `composing`, `low_rank`,
`planning`, `sharing`, `training`, `trust`, `demo`).
"""

import functools
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer

from flexmoe_cli import admission, cards, commands, composing, demo, low_rank, planning, sharing, training, trust
from flexmoe_cli.arguments import FilesCommand, NamedFilesCommand
from flexmoe_cli.output import keep_option_names, prepare_streams, quiet_libraries, report_error, show_warning
from flexmoe_cli.wording import Options

app = typer.Typer(
    name="flexmoe",
    help="Mixture-of-experts language models whose training data stays with its owners: graft a dense model, train "
    "each owner's expert where its data is, compose them, and remove any of them exactly.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMMANDS = {
    "Build models": (planning.plan, commands.graft, training.train, composing.compose, composing.add, commands.remove),
    "Inspect": (commands.inspect, commands.evaluate),
    "Share experts": (cards.card, trust.keygen, trust.sign, sharing.push, sharing.pull, admission.verify),
    "Convert": (commands.export, commands.import_, low_rank.compress, low_rank.densify, training.fit_router),
    "Demo": (demo.demo,),
}
"""Commands by help panel."""
NAMED_FILES = (commands.graft, commands.evaluate, commands.export, cards.card)

keep_option_names()
for panel, functions in COMMANDS.items():
    for function in functions:
        kind = NamedFilesCommand if function in NAMED_FILES else FilesCommand
        app.command(function.__name__.removesuffix("_").replace("_", "-"), cls=kind, rich_help_panel=panel)(function)


def print_version(requested: bool) -> None:
    """Prints the version and exits, for `--version`."""
    if requested:
        typer.echo(f"flexmoe {version('flexmoe')}")
        raise typer.Exit


@app.callback()
def common(
    show_version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Holds the options of the application itself."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code.

    Args:
        arguments: the arguments after the program's name; None: those of `sys.argv`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    prepare_streams()
    quiet_libraries()
    reword = _options(given).reword
    warnings.showwarning = functools.partial(show_warning, reword=reword)
    try:
        app(given, prog_name="flexmoe")
    except SystemExit as done:  # typer exits for success and usage errors alike
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except Exception as error:
        if "--debug" in given:
            raise
        report_error(error, reword)
        return 1
    return 0


def _options(arguments: Sequence[str]) -> Options:
    """The options of the command that is called, if there is one."""
    commands: Any = typer.main.get_command(app)
    command = commands.commands.get(next(iter(arguments), ""))
    return Options.of(command.params if command else ())
