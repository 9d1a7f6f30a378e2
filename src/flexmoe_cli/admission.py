"""The command that checks an expert package before it is added to a model: verify.

Does not cover the checks and their thresholds (`flexmoe.admission`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from flexmoe_cli.arguments import Debug, Json, Policy, SkipEmpty, TextColumn, TextTemplate, given
from flexmoe_cli.early_checks import check_data
from flexmoe_cli.output import large_import, library_call, print_json, print_line, print_table

if TYPE_CHECKING:
    from flexmoe.admission.findings import Finding
    from flexmoe.admission.verification import Verdict

REFUSED = 3
"""Exit code: the command succeeded, and the expert is refused."""


def verify(
    package: Annotated[str, typer.Argument(help="Expert package: a folder or a Hub id.", show_default=False)],
    model: Annotated[
        str,
        typer.Option(
            help="Model or composition to check it for, from `flexmoe graft` or `compose`: a folder or a Hub id. It "
            "is not changed."
        ),
    ],
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Public text, preferably unpublished, to measure the effect of the expert on it."),
    ] = None,
    public_sample: Annotated[
        bool, typer.Option("--public-sample", help="Use the public text stored with the model at its graft.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="Name of the expert in the model. By default the package's own name.")
    ] = None,
    policy: Policy = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the package on the Hub.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Maximum number of tokens of public text. By default 32768.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 8,
    text_column: TextColumn = "text",
    text_template: TextTemplate = None,
    skip_empty: SkipEmpty = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Check an expert before adding it: files, shapes, router rows, weights; with public text, the effect on it.

    Example: flexmoe verify ./math-package --model ./composed --data public.txt

    Exit code 0: accepted. 3: refused. 1: an error, such as a missing model.
    """
    check_data([data] if data else [], text_column, text_template, skip_empty)
    with large_import():
        from flexmoe.admission.verification import verify as library_verify

    with library_call(as_json):
        verdict = library_verify(
            package,
            model,
            public_sample=public_sample,
            batch_size=batch_size,
            text_column=text_column,
            text_template=text_template,
            skip_empty=skip_empty,
            **given(data=data, name=name, policy=policy, revision=revision, max_tokens=max_tokens),
        )
    if as_json:
        print_json(verdict.to_dict())
    else:
        show_verdict(verdict)
    if not verdict.accepted:
        raise typer.Exit(REFUSED)


def show_verdict(verdict: Verdict) -> None:
    """Prints the findings as a table, and the verdict."""
    name = str(verdict.package.get("name", verdict.package["source"]))
    print_table(
        f"{name} for {verdict.model}",
        ("check", "value", "threshold", "verdict", "details"),
        map(_row, verdict.findings),
    )
    if verdict.replaces:
        print_line(
            f"The model has an expert {escape(verdict.replaces)}: the package was checked as its replacement. Pass "
            "--name to check it as an additional expert."
        )
    if verdict.accepted:
        skipped = sum(finding.verdict == "not checked" for finding in verdict.findings)
        note = f" {skipped} of {len(verdict.findings)} checks could not be made." if skipped else ""
        print_line(f"[bold green]Accepted:[/] no check refuses {escape(name)}.{note}")
    else:
        checks = ", ".join(finding.check for finding in verdict.refusals)
        print_line(f"[bold red]Refused:[/] {escape(name)} fails {escape(checks)}.")


def _row(finding: Finding) -> list[str]:
    def shown(value: float | None, sign: str = "") -> str:
        return "" if value is None else f"{sign}{value:.4g}"

    is_minimum = finding.check.startswith("empty")  # the only threshold from below
    return [
        finding.check,
        shown(finding.value),
        shown(finding.threshold, "≥ " if is_minimum else "≤ "),
        finding.verdict,
        finding.message,
    ]
