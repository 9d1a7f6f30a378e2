"""The command that an owner runs, where its data is: train.

Not here: the defaults, which are those of `flexmoe.training.TrainingSettings`; the help repeats them, a test compares.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from flexmoe_cli.arguments import (
    Debug,
    Embedder,
    Json,
    Out,
    Overwrite,
    RouterBias,
    RouterMethod,
    RouterTokens,
    given,
)
from flexmoe_cli.output import library_call
from flexmoe_cli.tables import show_result

EXPERT, LOOP, LOSS = "The expert", "The training loop", "The loss"
PAPERS = "The package's papers"


# Long, but a table: typer reads the options off this signature, and the body is one call.
def train(
    grafted: Annotated[
        str, typer.Argument(help="What `flexmoe graft` wrote: a folder or a Hub id.", show_default=False)
    ],
    name: Annotated[str, typer.Option(help="The expert's name, in lower case: math, code-2.")],
    data: Annotated[list[Path], typer.Option(help="The owner's text: .txt, .md, .jsonl, .json, .parquet.")],
    out: Out,
    public_data: Annotated[
        list[Path] | None, typer.Option(help="Public text to use instead of the sample kept with the model.")
    ] = None,
    public_ratio: Annotated[
        float | None, typer.Option(help="Share of public text in each batch. Default: 0.4.")
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column of table files that holds the text. Default: text.")
    ] = None,
    validation_fraction: Annotated[
        float | None, typer.Option(help="Documents held out, as a share. Default: 0.05.")
    ] = None,
    validation_tokens: Annotated[int | None, typer.Option(help="Of each side, at most. Default: 20000.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="full|low_rank",
            help="Train whole networks, or low-rank differences from public's. Default: full.",
            rich_help_panel=EXPERT,
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Of a low-rank expert; 64 if none is given.", rich_help_panel=EXPERT)
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Its differences are scaled by alpha / rank. By default not scaled.", rich_help_panel=EXPERT
        ),
    ] = None,
    router: RouterMethod = None,
    router_bias: RouterBias = None,
    router_tokens: RouterTokens = None,
    embedder: Embedder = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps.", rich_help_panel=LOOP)] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Passes over the own text instead; 1 if neither is given.", rich_help_panel=LOOP),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences per batch. Default: 8.", rich_help_panel=LOOP)
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None, typer.Option(help="Batches per step. Default: 1.", rich_help_panel=LOOP)
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens per sequence. By default at most 1024.", rich_help_panel=LOOP)
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Its peak. Default: 2e-3.", rich_help_panel=LOOP)] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(help="Steps up to the peak. By default a twentieth of all.", rich_help_panel=LOOP)
    ] = None,
    eval_steps: Annotated[int | None, typer.Option(help="Validate every so many steps.", rich_help_panel=LOOP)] = None,
    save_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints. Default: 100.", rich_help_panel=LOOP)
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on where the same command was stopped.", rich_help_panel=LOOP)
    ] = True,
    seed: Annotated[
        int | None, typer.Option(help="Seed of everything drawn. Default: 0.", rich_help_panel=LOOP)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the frozen model: auto, float32, bfloat16. Default: auto.", rich_help_panel=LOOP),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Less memory for more time. Default: no.",
            show_default=False,
            rich_help_panel=LOOP,
        ),
    ] = None,
    lm_z_loss: Annotated[float | None, typer.Option(help="Its weight. Default: 1e-5.", rich_help_panel=LOSS)] = None,
    router_z_loss: Annotated[
        float | None, typer.Option(help="Its weight. Default: 1e-3.", rich_help_panel=LOSS)
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Licence of the expert, as an SPDX identifier.", rich_help_panel=PAPERS)
    ] = None,
    expert_version: Annotated[
        str | None,
        typer.Option(help="Of the expert, in your own counting; 1.0.0 if none is given.", rich_help_panel=PAPERS),
    ] = None,
    data_statement: Annotated[
        str | None, typer.Option(help="What the expert was trained on, in words.", rich_help_panel=PAPERS)
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train one owner's expert on its own text, alone. Nothing but the package leaves the owner."""
    from flexmoe.training import train_expert

    with library_call(as_json):
        package = train_expert(
            grafted,
            name,
            data,
            out,
            license=license,
            data_statement=data_statement,
            overwrite=overwrite,
            resume=resume,
            progress=sys.stderr.isatty(),
            **given(
                version=expert_version,
                public_data=public_data,
                public_ratio=public_ratio,
                text_column=text_column,
                validation_fraction=validation_fraction,
                validation_tokens=validation_tokens,
                method=method,
                rank=rank,
                alpha=alpha,
                router=router,
                router_bias=router_bias,
                router_tokens=router_tokens,
                embedder=embedder,
                max_steps=max_steps,
                epochs=epochs,
                batch_size=batch_size,
                gradient_accumulation_steps=gradient_accumulation_steps,
                sequence_length=sequence_length,
                learning_rate=learning_rate,
                warmup_steps=warmup_steps,
                eval_steps=eval_steps,
                save_steps=save_steps,
                dtype=dtype,
                gradient_checkpointing=gradient_checkpointing,
                seed=seed,
                lm_z_loss=lm_z_loss,
                router_z_loss=router_z_loss,
            ),
        )
    show_result(package, as_json, f"Send the folder, then: flexmoe compose GRAFTED {package} ... --out MODEL")
