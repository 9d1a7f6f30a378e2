"""The commands that change the rank of an expert: compress, densify.

Does not cover training at low rank (`training`), or the conversions themselves (`flexmoe.conversion.low_rank`).
"""

from pathlib import Path
from typing import Annotated

import typer

from flexmoe_cli.arguments import DATA_FORMATS, Debug, Json, Out, Overwrite, parse_ranks
from flexmoe_cli.output import byte_progress, library_call, step_progress
from flexmoe_cli.tables import show_compression, show_result

Package = Annotated[str, typer.Argument(help="Expert package: a folder or a Hub id.", show_default=False)]
Anchor = Annotated[
    str | None,
    typer.Option(
        help="The dense model, or a FlexMoE model of it: folder or Hub id. Default: as the package records.",
        show_default=False,
    ),
]


def compress(
    package: Package,
    out: Out,
    rank: Annotated[
        str | None,
        typer.Option(metavar="R[,R...]", help="Singular values to keep, one number or one per layer."),
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="Instead: the share of the squared singular values to keep, such as 0.95.")
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="The owner's text, which decides what is kept; one rank is then the mean over layers. "
            f"{DATA_FORMATS}.",
            show_default=False,
        ),
    ] = None,
    anchor: Anchor = None,
    device: Annotated[str, typer.Option(help="Device for the computation.")] = "cpu",
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compress a full expert to a low-rank one: a truncated SVD of its difference from public."""
    from flexmoe.conversion.low_rank import compress as library_compress

    ranks = None if rank is None else parse_ranks(rank)
    with library_call(as_json), step_progress("Compressing") as progress:
        layers = library_compress(
            package,
            out,
            anchor=anchor,
            rank=ranks,
            energy=energy,
            data=data,
            device=device,
            overwrite=overwrite,
            progress=lambda layer: progress(),
        )
    show_compression(out, layers, as_json)


def densify(
    package: Package,
    out: Out,
    anchor: Anchor = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert a low-rank expert to a full one: public's networks with its differences added."""
    from flexmoe.conversion.low_rank import densify as library_densify

    with library_call(as_json), byte_progress("Writing", package) as progress:
        folder = library_densify(package, out, anchor=anchor, overwrite=overwrite, progress=progress)
    show_result(folder, as_json)
