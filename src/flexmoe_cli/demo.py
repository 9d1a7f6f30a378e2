"""The command that runs the complete workflow on real text, from the corpus to an opt-out: demo.

Does not cover the sizes of corpus and anchor (`flexmoe.demo.DemoSettings`).
"""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from flexmoe_cli.arguments import Debug, Json, given
from flexmoe_cli.output import library_call, print_json, print_line


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the run; its unchanged stages are reused.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of all random choices.")] = 0,
    owners: Annotated[str | None, typer.Option(metavar="A,B,...", help="Only these owners.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps of each expert; the anchor gets four times as many.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the workflow on real text: owners train in isolation, experts are composed, an owner opts out.

    It takes about ten minutes on two cores. It fails if the opt-out is not exact. Missed thresholds, as in short runs,
    are listed in the report and are no failure.
    """
    from flexmoe.demo import run_demo
    from flexmoe.demo.report import unequal_parts

    with library_call(as_json):
        path = run_demo(out, seed=seed, **given(owners=tuple(owners.split(",")) if owners else None, steps=steps))
    report = json.loads(Path(path).read_text(encoding="utf-8"))
    if as_json:
        print_json(report)
    else:
        print_line(f"Report: {escape(str(Path(path).with_suffix('.md')))}")
    if differing := unequal_parts(report["opt_out"]):
        raise ValueError(
            f"The opt-out was not exact: the model from which {report['opt_out']['owner']} was removed differs from "
            f"the one composed without it, in {', '.join(differing)}. This is a bug in FlexMoE; the report in {out} "
            "has the details."
        )
