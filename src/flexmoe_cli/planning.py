"""The command that estimates the costs of a model before training: plan.

Does not cover the formulas (`flexmoe.planning.plan`) or the figures of GPUs (`flexmoe.planning.gpus`).
"""

from typing import Annotated

import typer

from flexmoe_cli.arguments import Debug, Json, given
from flexmoe_cli.output import library_call, print_json
from flexmoe_cli.tables import show_plan


def plan(
    anchor: Annotated[str, typer.Argument(help="Dense or FlexMoE model: a folder or a Hub id.", show_default=False)],
    experts: Annotated[
        int | None,
        typer.Option(help="Number of experts, including public. Default: those of a model with owners, else 7."),
    ] = None,
    k: Annotated[
        int | None, typer.Option("--k", help="Experts per token. Default: the FlexMoE model's, else 5.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of low-rank experts. Default: full experts.")] = None,
    tokens_per_expert: Annotated[
        float | None,
        typer.Option(
            metavar="TOKENS", help="Training tokens of each owner, such as 50e9. Default: the compute-optimal number."
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="h200 (default), b200, h100, a100 ...; or any other name with the three figures below."),
    ] = None,
    gpu_tflops: Annotated[float | None, typer.Option(help="Its peak in dense bfloat16, TFLOP/s.")] = None,
    gpu_memory_gb: Annotated[float | None, typer.Option(help="Its memory, GB.")] = None,
    gpu_bandwidth_tb: Annotated[float | None, typer.Option(help="Its memory bandwidth, TB/s.")] = None,
    mfu: Annotated[
        float | None, typer.Option(help="Assumed model FLOPs utilisation in training. Default: 0.4.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the frozen model in training and of packages: bfloat16 (default) or float32."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Estimate the costs of a model: parameters, memory, training, decoding. Reads only the configuration."""
    from flexmoe.planning.plan import plan as library_plan

    with library_call(as_json):
        planned = library_plan(
            anchor,
            **given(
                experts=experts,
                k=k,
                rank=rank,
                tokens_per_expert=tokens_per_expert,
                gpu=gpu,
                gpu_tflops=gpu_tflops,
                gpu_memory_gb=gpu_memory_gb,
                gpu_bandwidth_tb=gpu_bandwidth_tb,
                mfu=mfu,
                dtype=dtype,
                revision=revision,
            ),
        )
    if as_json:
        print_json(planned.to_dict())
    else:
        show_plan(planned)
