"""The command that shows the main job from raw text to the opt-out: demo."""

import json
from pathlib import Path
from typing import Annotated

import typer

from flexmoe_cli.arguments import Debug, Json, given
from flexmoe_cli.output import library_call, print_json, print_line


def demo(
    out: Annotated[
        Path, typer.Option("--out", help="Folder of the run. What hasn't changed in it is used again.")
    ] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything drawn.")] = 0,
    owners: Annotated[str | None, typer.Option(metavar="A,B,...", help="Only these owners.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps of each expert; the anchor gets four times as many.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the main job on real text: owners train apart, compose, one opts out. Ten minutes on two cores."""
    from flexmoe.demo import run_demo

    with library_call(as_json):
        report = run_demo(out, seed=seed, **given(owners=tuple(owners.split(",")) if owners else None, steps=steps))
    if as_json:
        print_json(json.loads(Path(report).read_text(encoding="utf-8")))
    else:
        print_line(f"The report: {Path(report).with_suffix('.md')}")
