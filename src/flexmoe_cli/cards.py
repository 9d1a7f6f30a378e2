"""The command for model cards: card.

Does not cover the text of a card (`flexmoe.cards`) or its file (`flexmoe.card_files`).
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from flexmoe_cli.arguments import Debug, Json, SkipEmpty, TextColumn, TextTemplate, parse_domains
from flexmoe_cli.early_checks import check_data
from flexmoe_cli.output import library_call, print_json, print_line, show_warning


def card(
    folder: Annotated[
        Path, typer.Argument(help="Folder of an expert package, a composition or a model.", show_default=False)
    ],
    evaluation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Scores: the output of `flexmoe evaluate --json`.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Instead of --evaluation: text to measure scores and expert usage on."),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            "--license",
            metavar="ID",
            help="Licence, such as apache-2.0: of the model, or of the expert (in its manifest).",
        ),
    ] = None,
    expert_version: Annotated[
        str | None, typer.Option("--expert-version", help="Of a package: its new version, in its manifest.")
    ] = None,
    data_statement: Annotated[
        str | None, typer.Option(help="Of a package: a description of its training data, in its manifest.")
    ] = None,
    anchor_license: Annotated[
        str | None, typer.Option(metavar="ID", help="Licence of the anchor, which is not recorded in a model's files.")
    ] = None,
    text_column: TextColumn = "text",
    text_template: TextTemplate = None,
    skip_empty: SkipEmpty = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write the README.md again: experts, conflicts between licences, scores, expert usage.

    Examples: flexmoe card model --data prose=held-out.txt --license apache-2.0;
    flexmoe card math-expert --license cc-by-4.0 --expert-version 1.1.0
    """
    if evaluation is not None and data:
        raise ValueError("--evaluation and --data: scores come from a file or are measured now. Pass one of them.")
    domains = parse_domains(data or [])
    check_data(domains.values(), text_column, text_template, skip_empty)
    from flexmoe.card_files import license_conflicts, measure, write_card

    with library_call(as_json):
        scores, usages = (
            measure(folder, domains, text_column=text_column, text_template=text_template, skip_empty=skip_empty)
            if domains
            else (evaluation, None)
        )
        path = write_card(
            folder,
            evaluation=scores,
            routing=usages,
            license=license,
            anchor_license=anchor_license,
            version=expert_version,
            data_statement=data_statement,
        )
        conflicts = license_conflicts(folder, license=license, anchor_license=anchor_license)
    if as_json:
        print_json({"path": str(folder), "card": str(path), "license_conflicts": conflicts})
        return
    print_line(f"Wrote [bold]{escape(str(path))}[/].")
    for conflict in conflicts:
        show_warning(conflict, UserWarning, "", 0)
