"""The command that judges a contributed expert before anybody lets it in: verify.

Not here: the checks and their bars (`flexmoe.admission`, `flexmoe.modeling.admission_flexmoe`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from flexmoe_cli.arguments import Debug, Json, Policy, TextColumn, given
from flexmoe_cli.output import large_import, library_call, print_json, print_line, print_table

if TYPE_CHECKING:
    from flexmoe.admission import Finding, Verdict

REFUSED = 3
"""Exit code: the command has done its work, and the answer is no."""


def verify(
    package: Annotated[str, typer.Argument(help="Expert package: a folder or a Hub id.", show_default=False)],
    model: Annotated[
        str,
        typer.Option(
            help="Model or composition that it would join, as `flexmoe graft` or `compose` wrote it: a folder or a "
            "Hub id. It stays as it is."
        ),
    ],
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Public text, best such that nobody has seen: what the newcomer takes of it is measured."),
    ] = None,
    public_sample: Annotated[
        bool, typer.Option("--public-sample", help="Take the public text that the model keeps since its graft.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="What the expert would be called. By default the package's own name.")
    ] = None,
    policy: Policy = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the package on the Hub.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of public text to look at, at most. By default 32768.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 8,
    text_column: TextColumn = "text",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Judge an expert before it is let in: files, fit, router rows, weights; with public text, what it does to that.

    Example: flexmoe verify ./math-package --model ./composed --data public.txt

    Exit code 0: accepted. 3: refused. 1: it could not be judged (no such model, say).
    """
    with large_import():
        from flexmoe.admission import verify as library_verify

    with library_call(as_json):
        verdict = library_verify(
            package,
            model,
            public_sample=public_sample,
            batch_size=batch_size,
            text_column=text_column,
            **given(data=data, name=name, policy=policy, revision=revision, max_tokens=max_tokens),
        )
    if as_json:
        print_json(verdict.to_dict())
    else:
        show_verdict(verdict)
    if not verdict.accepted:
        raise typer.Exit(REFUSED)


def show_verdict(verdict: Verdict) -> None:
    """The findings as a table, and the answer as a sentence."""
    called = str(verdict.package.get("name", verdict.package["source"]))
    print_table(
        f"{called} for {verdict.model}", ("check", "figure", "bar", "verdict", "found"), map(_row, verdict.findings)
    )
    if verdict.replaces:
        print_line(
            f"The model has an expert {escape(verdict.replaces)}: the newcomer was judged in its place. "
            "--name judges it beside that one."
        )
    if verdict.accepted:
        unjudged = sum(finding.verdict == "not judged" for finding in verdict.findings)
        but = f" {unjudged} of {len(verdict.findings)} checks could not be made." if unjudged else ""
        print_line(f"[bold green]Accepted:[/] no check refuses {escape(called)}.{but}")
    else:
        checks = ", ".join(finding.check for finding in verdict.refusals)
        print_line(f"[bold red]Refused:[/] {escape(called)} fails {escape(checks)}.")


def _row(finding: Finding) -> list[str]:
    def shown(value: float | None, sign: str = "") -> str:
        return "" if value is None else f"{sign}{value:.4g}"

    least = finding.check.startswith("empty")  # the one figure that must not be too small
    return [
        finding.check,
        shown(finding.figure),
        shown(finding.bar, "≥ " if least else "≤ "),
        finding.verdict,
        finding.sentence,
    ]
