"""The command that shows the main job from raw text to the opt-out: demo.

Not here: sizes of corpus and anchor, which `flexmoe.demo.DemoSettings` holds.
"""

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
    """Run the main job on real text: owners train apart, compose, one opts out. Ten minutes on two cores.

    Fails if opting out was not exact. A missed bar does not fail it (a short run may miss some): the report says so.
    """
    from flexmoe.demo import run_demo
    from flexmoe.demo.report import unequal_parts

    with library_call(as_json):
        path = run_demo(out, seed=seed, **given(owners=tuple(owners.split(",")) if owners else None, steps=steps))
    report = json.loads(Path(path).read_text(encoding="utf-8"))
    if as_json:
        print_json(report)
    else:
        print_line(f"The report: {Path(path).with_suffix('.md')}")
    if differing := unequal_parts(report["opt_out"]):
        raise ValueError(
            f"Opting out was not exact: the model that {report['opt_out']['owner']} left differs from the one that "
            f"never had it, in {', '.join(differing)}. The report in {out} holds the rest; this is a bug in FlexMoE."
        )
