"""The commands that combine models and packages: compose, add.

Does not cover the work itself (`flexmoe.conversion`, `flexmoe.composition`), or removing experts (`commands`).
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from flexmoe_cli.arguments import Debug, Json, Model, Out, Overwrite, Policy, ShardSize, parse_renames, parse_revisions
from flexmoe_cli.output import byte_progress, large_import, library_call, print_json, print_line, print_table
from flexmoe_cli.tables import show_composed

REFERENCE = "By reference"

NoVerify = Annotated[
    bool,
    typer.Option(
        "--no-verify",
        help="Accept experts that would dominate the routing or the outputs; files and hashes are always checked.",
    ),
]


def compose(
    base: Annotated[
        str,
        typer.Argument(
            help="A model written by `flexmoe graft`, or a composition: folder or Hub id.", show_default=False
        ),
    ],
    out: Out,
    packages: Annotated[
        list[str] | None,
        typer.Argument(help="Expert packages, in this order: folders or Hub ids.", show_default=False),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(metavar="PACKAGE=NAME", help="Rename an expert; PACKAGE as given, or its own name."),
    ] = None,
    public_prior: Annotated[
        float | None,
        typer.Option(
            help="Log prior odds of public. Default: 0 for experts without biases, 0.5 for experts with biases."
        ),
    ] = None,
    num_experts_per_tok: Annotated[
        int | None, typer.Option(help="Experts per token (k). Default: the base model's.")
    ] = None,
    by_reference: Annotated[
        bool,
        typer.Option(
            "--by-reference",
            help="Reference the parts instead of copying weights. If BASE is a composition, PACKAGES may be, too.",
            rich_help_panel=REFERENCE,
        ),
    ] = False,
    anchor: Annotated[
        str | None,
        typer.Option(help="The dense model, if it was not grafted from the Hub.", rich_help_panel=REFERENCE),
    ] = None,
    update: Annotated[
        bool,
        typer.Option(
            "--update", help="Move BASE's pins to the current versions of its experts.", rich_help_panel=REFERENCE
        ),
    ] = False,
    expert: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=REVISION]", help="With --update: only this expert. Repeatable.", rich_help_panel=REFERENCE
        ),
    ] = None,
    no_verify: NoVerify = False,
    policy: Policy = None,
    max_shard_size: ShardSize = "5GB",  # type: ignore[assignment] # typer parses the default as it does the option
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Combine a grafted model with independently trained experts, without any training.

    Examples: flexmoe compose grafted math-package org/code-expert --out model;
    flexmoe compose grafted org/math-expert --by-reference --out composition;
    flexmoe compose composition --update --out newer
    """
    if update:
        options = {
            "--anchor": anchor,
            "--name": name,
            "--public-prior": public_prior,
            "--num-experts-per-tok": num_experts_per_tok,
        }
        _refuse_beside_update(packages, [option for option, value in options.items() if value not in (None, [])])
        _update(base, out, expert or [], not no_verify, policy, overwrite, as_json)
        return
    if expert:
        raise ValueError("--expert requires --update; give packages as arguments, by folder or Hub id.")
    if anchor is not None and not by_reference:
        raise ValueError("--anchor requires --by-reference; without it, BASE holds the anchor's weights.")
    names = parse_renames(name or [])
    with large_import():
        from flexmoe.composition.edit import compose_by_reference
        from flexmoe.conversion.compose import compose as library_compose

    shared: dict[str, Any] = {"names": names, "public_prior": public_prior, "num_experts_per_tok": num_experts_per_tok}
    shared |= {"verify": not no_verify, "policy": policy, "overwrite": overwrite}
    with library_call(as_json), byte_progress("Composing", base) as progress:
        if by_reference:
            folder = compose_by_reference(base, packages or [], out, anchor=anchor, **shared)
        else:
            folder = library_compose(
                base, packages or [], out, max_shard_size=max_shard_size, progress=progress, **shared
            )
    hint = None if by_reference else f"An owner opts out with: flexmoe remove {folder} NAME --out FOLDER"
    show_composed(folder, as_json, hint)


def _refuse_beside_update(packages: list[str] | None, options: list[str]) -> None:
    if packages:
        raise ValueError(
            "--update moves the pins of one composition: give no packages, and add them in a second step."
        )
    if options:
        raise ValueError(
            f"{', '.join(options)} would have no effect: --update only moves the pins of a composition. Compose anew "
            "to change the rest."
        )


def _update(
    composition: str,
    out: Path,
    experts: list[str],
    verify: bool,
    policy: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    from flexmoe.composition.edit import update_composition

    with library_call(as_json):
        moves = update_composition(
            composition,
            out,
            experts=parse_revisions(experts) or None,
            verify=verify,
            policy=policy,
            overwrite=overwrite,
        )
    if as_json:
        print_json({"path": str(out), "moved": [move.to_dict() for move in moves]})
        return
    print_line(f"[bold]{escape(str(out))}[/]: {len(moves)} of its pins moved.")
    rows = [
        [
            move.name,
            f"{move.old_version or '?'} → {move.new_version or '?'}",
            f"{(move.old_revision or 'folder')[:12]} → {(move.new_revision or 'folder')[:12]}",
        ]
        for move in moves
    ]
    if rows:
        print_table("Moved", ("expert", "version", "commit"), rows)


def add(
    model: Model,
    package: Annotated[str, typer.Argument(help="Expert package: a folder or a Hub id.", show_default=False)],
    out: Out,
    name: Annotated[str | None, typer.Option(help="The expert's name in the model. Default: the package's.")] = None,
    position: Annotated[
        int | None, typer.Option(help="Its index among the experts; public's is 0. Default: last.")
    ] = None,
    no_verify: NoVerify = False,
    policy: Policy = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Add an expert to a model.

    Example: flexmoe add model org/law-expert --out model-with-law
    """
    from flexmoe.conversion.compose import add as library_add

    with library_call(as_json):
        folder = library_add(
            model,
            package,
            out,
            name=name,
            position=position,
            verify=not no_verify,
            policy=policy,
            overwrite=overwrite,
        )
    show_composed(folder, as_json)
