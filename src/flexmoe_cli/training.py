"""The command that an owner runs where its data is: train.

Does not cover the defaults, which are those of `flexmoe.training.settings.TrainingSettings`; a test compares them with
the help texts.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from flexmoe_cli.arguments import (
    DATA_FORMATS,
    ROUTER,
    Debug,
    Embedder,
    Json,
    Out,
    Overwrite,
    RouterBias,
    RouterMethod,
    SkipEmpty,
    TextTemplate,
    given,
)
from flexmoe_cli.early_checks import check_data, check_training
from flexmoe_cli.output import library_call, print_status
from flexmoe_cli.tables import show_trained
from flexmoe_cli.wording import Options

EXPERT, LOOP, LOSS = "The expert", "The training loop", "The loss"
METADATA = "Package metadata"

OwnText = Annotated[list[Path], typer.Option(help=f"The owner's text. {DATA_FORMATS}.")]
PublicText = Annotated[
    list[Path] | None, typer.Option(help="Public text to use instead of the sample stored with the model.")
]
Column = Annotated[str | None, typer.Option(help="Column of tables that holds the text. Default: text.")]
RouterTokens = Annotated[
    int | None,
    typer.Option(help="Tokens to fit it on, of each side. Default: by the amount of text.", rich_help_panel=ROUTER),
]
EvidenceKind = Annotated[
    Literal["unigram", "none"] | None,
    typer.Option(
        help="Also route by the tokens so far, with a table of scores by token (docs/evidence.md). Default: unigram "
        "with log_odds.",
        rich_help_panel=ROUTER,
    ),
]


# typer derives the options from this signature; the body is one call.
def train(
    context: typer.Context,
    grafted: Annotated[
        str, typer.Argument(help="A model written by `flexmoe graft`: a folder or a Hub id.", show_default=False)
    ],
    name: Annotated[str, typer.Option(help="The expert's name, in lower case: math, code-2.")],
    data: OwnText,
    out: Out,
    public_data: PublicText = None,
    public_ratio: Annotated[
        float | None, typer.Option(help="Share of public text in each batch. Default: 0.1 with evidence, else 0.4.")
    ] = None,
    text_column: Column = None,
    text_template: TextTemplate = None,
    skip_empty: SkipEmpty = False,
    validation_fraction: Annotated[
        float | None, typer.Option(help="Share of documents held out for validation. Default: 0.05.")
    ] = None,
    validation_tokens: Annotated[
        int | None, typer.Option(help="At most, of own and of public text each. Default: by the amount of text.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="full|low_rank",
            help="Train full FFNs, or low-rank differences from public's. Default: full.",
            rich_help_panel=EXPERT,
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of a low-rank expert, 64 by default.", rich_help_panel=EXPERT)
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="Scale low-rank differences by alpha / rank; they are unscaled by default.", rich_help_panel=EXPERT
        ),
    ] = None,
    router: RouterMethod = None,
    router_bias: RouterBias = None,
    router_tokens: RouterTokens = None,
    evidence: EvidenceKind = None,
    embedder: Embedder = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps.", rich_help_panel=LOOP)] = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            help="Passes over the own text instead. Default: 1 to 3, by the amount of text.", rich_help_panel=LOOP
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Sequences per batch. Default: by the amount of text and the machine.", rich_help_panel=LOOP
        ),
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None, typer.Option(help="Batches per step. Default: 1.", rich_help_panel=LOOP)
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens per sequence. Default: by the amount of text and the machine.", rich_help_panel=LOOP
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak value. Default: by the anchor's hidden size.", rich_help_panel=LOOP)
    ] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(help="Warm-up steps. Default: 5 % of all steps, or 10.", rich_help_panel=LOOP)
    ] = None,
    eval_steps: Annotated[
        int | None, typer.Option(help="Steps between validations. Default: 2 to 10 of them.", rich_help_panel=LOOP)
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many validations without a lower loss; the best expert is kept. Default: 3.",
            rich_help_panel=LOOP,
        ),
    ] = None,
    save_steps: Annotated[
        int | None, typer.Option(help="Steps between checkpoints. Default: 100.", rich_help_panel=LOOP)
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Resume an interrupted run of the same command.", rich_help_panel=LOOP)
    ] = True,
    seed: Annotated[
        int | None, typer.Option(help="Seed of all random choices. Default: 0.", rich_help_panel=LOOP)
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of the frozen model: auto, float32, bfloat16. Default: auto.", rich_help_panel=LOOP),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing/--no-gradient-checkpointing",
            help="Trade time for memory. Default: no.",
            show_default=False,
            rich_help_panel=LOOP,
        ),
    ] = None,
    lm_z_loss: Annotated[
        float | None, typer.Option(help="Weight of the logit z-loss. Default: 1e-5.", rich_help_panel=LOSS)
    ] = None,
    router_z_loss: Annotated[
        float | None, typer.Option(help="Its weight. Default: 1e-3.", rich_help_panel=LOSS)
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Licence of the expert, as an SPDX identifier.", rich_help_panel=METADATA)
    ] = None,
    expert_version: Annotated[
        str | None,
        typer.Option(help="Version of the expert, 1.0.0 by default.", rich_help_panel=METADATA),
    ] = None,
    data_statement: Annotated[
        str | None, typer.Option(help="A description of the training data.", rich_help_panel=METADATA)
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train one owner's expert on its own text, in isolation. Only the package leaves the owner."""
    check_training(grafted, name, out, overwrite)
    check_data([data, *([public_data] if public_data else [])], text_column, text_template, skip_empty)
    with _interruption_shown(Options.of(context.command.params)), library_call(as_json):
        from flexmoe.training.experts import train_expert

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
            show=print_status,
            **given(
                version=expert_version,
                public_data=public_data,
                public_ratio=public_ratio,
                text_column=text_column,
                text_template=text_template,
                skip_empty=skip_empty or None,
                validation_fraction=validation_fraction,
                validation_tokens=validation_tokens,
                method=method,
                rank=rank,
                alpha=alpha,
                router=router,
                router_bias=router_bias,
                router_tokens=router_tokens,
                evidence=evidence,
                embedder=embedder,
                max_steps=max_steps,
                epochs=epochs,
                batch_size=batch_size,
                gradient_accumulation_steps=gradient_accumulation_steps,
                sequence_length=sequence_length,
                learning_rate=learning_rate,
                warmup_steps=warmup_steps,
                eval_steps=eval_steps,
                patience=patience,
                save_steps=save_steps,
                dtype=dtype,
                gradient_checkpointing=gradient_checkpointing,
                seed=seed,
                lm_z_loss=lm_z_loss,
                router_z_loss=router_z_loss,
            ),
        )
    show_trained(package, as_json, f"Send the folder, then: flexmoe compose GRAFTED {package} ... --out MODEL")


def fit_router(
    package: Annotated[str, typer.Argument(help="Expert package: a folder or a Hub id.", show_default=False)],
    grafted: Annotated[
        str, typer.Option(help="The model written by `flexmoe graft` that it was trained in: folder or Hub id.")
    ],
    data: OwnText,
    out: Out,
    public_data: PublicText = None,
    text_column: Column = None,
    text_template: TextTemplate = None,
    skip_empty: SkipEmpty = False,
    router: Annotated[
        str | None,
        typer.Option(help="log_odds or lda. Default: log_odds.", show_default=False, rich_help_panel=ROUTER),
    ] = None,
    router_bias: RouterBias = None,
    router_tokens: RouterTokens = None,
    evidence: EvidenceKind = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all random choices. Default: 0.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fit the router row and the evidence of an expert that exists; its networks stay."""
    check_data([data, *filter(None, [public_data])], text_column or "text", text_template, skip_empty)
    from flexmoe.training.fit_router import fit_router as library_fit_router

    with library_call(as_json):
        folder = library_fit_router(
            package,
            grafted,
            data,
            out,
            public_data=public_data,
            overwrite=overwrite,
            progress=not as_json,
            **given(
                text_column=text_column,
                text_template=text_template,
                skip_empty=skip_empty or None,
                router=router,
                router_bias=router_bias,
                router_tokens=router_tokens,
                evidence=evidence,
                seed=seed,
            ),
        )
    show_trained(folder, as_json, f"Send the folder, then: flexmoe compose GRAFTED {folder} ... --out MODEL")


@contextmanager
def _interruption_shown(options: Options) -> Iterator[None]:
    """Prints what an interruption (Ctrl-C) leaves, in the words of the command line."""
    try:
        yield
    except KeyboardInterrupt as stop:
        print_status(
            options.reword(str(stop))
            or "Interrupted before training began: nothing was kept, and the same command starts it."
        )
        raise
