"""The commands on models and packages: graft, remove, inspect, evaluate, export, import.

The library is imported inside the functions, so `--help` and usage errors do not wait for torch. Does not cover
`compose` and `add` (`composing`), planning, training, the demo, or tools for contributors.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from flexmoe_cli.arguments import (
    ROUTER,
    Debug,
    Device,
    Embedder,
    Json,
    Model,
    Out,
    Overwrite,
    RouterBias,
    RouterMethod,
    RouterTokens,
    ShardSize,
    SkipEmpty,
    TextColumn,
    TextTemplate,
    given,
    parse_domains,
    parse_experts,
    parse_names,
)
from flexmoe_cli.early_checks import check_data
from flexmoe_cli.output import byte_progress, large_import, library_call, print_json
from flexmoe_cli.tables import show_export, show_import, show_inspection, show_result, show_scores


def graft(
    out: Out,
    anchor: Annotated[
        str | None,
        typer.Argument(help="Dense model: a folder, a Hub id or a GGUF file. Not with --recipe.", show_default=False),
    ] = None,
    gguf_file: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The GGUF file to take of the folder or Hub repository."),
    ] = None,
    expert: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="Add an expert: a dense fine-tune of the anchor, or a LoRA adapter on its FFNs. Repeatable.",
        ),
    ] = None,
    router_data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="Prompts or documents to route to an expert: its row is fitted on them against public text.",
            rich_help_panel=ROUTER,
        ),
    ] = None,
    router: RouterMethod = None,
    router_bias: RouterBias = None,
    router_tokens: RouterTokens = None,
    embedder: Embedder = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="A YAML file of mergekit-moe with the anchor, the experts and their prompts."),
    ] = None,
    shared: Annotated[
        str | None,
        typer.Option(
            metavar="anchor|average",
            help="Which tensors to use if fine-tunes differ outside of their feed-forward networks. By default they "
            "must not.",
        ),
    ] = None,
    public_data: Annotated[
        list[Path] | None,
        typer.Option(help="Public text; a sample is stored with the model, and all owners fit their rows against it."),
    ] = None,
    public_sample_bytes: Annotated[int, typer.Option(help="Size of that sample.")] = 2_000_000,
    text_column: TextColumn = "text",
    text_template: TextTemplate = None,
    skip_empty: SkipEmpty = False,
    seed: Annotated[int, typer.Option(help="Seed of the sample and of random choices for rows.")] = 0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    num_experts_per_tok: Annotated[int | None, typer.Option(help="Experts per token (k).")] = None,
    norm_topk_prob: Annotated[
        bool | None,
        typer.Option(
            "--norm-topk-prob/--no-norm-topk-prob",
            help="Normalise the k weights to a sum of 1. Default: as fits the anchor's architecture.",
            show_default=False,
        ),
    ] = None,
    fingerprint: Annotated[
        bool, typer.Option(help="Hash the anchor, so experts for other anchors are refused.")
    ] = True,
    max_shard_size: ShardSize = "5GB",  # type: ignore[assignment] # typer parses the default as it does the option
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert a dense model to a FlexMoE model with the same weights; dense fine-tunes can become experts."""
    experts, texts = parse_experts(expert or []), parse_domains(router_data or [], "--router-data")
    check_data([*texts.values(), *([public_data] if public_data else [])], text_column, text_template, skip_empty)
    with large_import():
        from flexmoe.grafting import graft as library_graft

    with library_call(as_json), byte_progress("Grafting", anchor) as progress:
        folder = library_graft(
            anchor,
            out,
            experts,
            shared=shared,  # type: ignore[arg-type] # the library checks it
            **given(
                gguf_file=gguf_file,
                recipe=recipe,
                router_data=texts or None,
                router=router,
                router_bias=router_bias,
                router_tokens=router_tokens,
                embedder=embedder,
                public_data=public_data,
                revision=revision,
                num_experts_per_tok=num_experts_per_tok,
            ),
            public_sample_bytes=public_sample_bytes,
            text_column=text_column,
            text_template=text_template,
            skip_empty=skip_empty,
            seed=seed,
            norm_topk_prob=norm_topk_prob,
            fingerprint=fingerprint,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=progress,
        )
    hint: str | None = f"Next, at each owner: flexmoe train {folder} --name NAME --data FILES --out PACKAGE"
    if experts:
        hint = _zero_rows_hint(list(experts), list(texts))
    elif recipe:
        hint = None
    show_result(folder, as_json, hint)


def _zero_rows_hint(experts: Sequence[str], routed: Sequence[str]) -> str | None:
    """A hint about experts that were grafted without router data; None if all had some."""
    if not routed:
        return (
            "All router rows are zero: all experts have equal weight for every token. Fit rows on text with "
            "--router-data NAME=FILE."
        )
    without = [name for name in experts if name not in routed]
    return f"Experts without router data, whose rows are zero: {', '.join(without)}." if without else None


def remove(
    model: Model,
    name: Annotated[str, typer.Argument(help="The expert to remove.", show_default=False)],
    out: Out,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Remove an expert exactly: the result is byte for byte the model that never had it."""
    from flexmoe.conversion.compose import remove as library_remove

    with library_call(as_json):
        folder = library_remove(model, name, out, overwrite=overwrite)
    show_result(folder, as_json)


def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a model or of an expert package.", show_default=False)],
    device: Annotated[
        Device | None,
        typer.Option(help="Where inference would run. Default: cuda if available.", show_default=False),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show the contents of a model or package: experts, sizes, licences, rows, implementations. Loads no weights."""
    from torch import cuda

    from flexmoe.inspection import inspect as library_inspect

    found = library_inspect(path, device or ("cuda" if cuda.is_available() else "cpu"))
    if as_json:
        print_json(found)
    else:
        show_inspection(found)


def evaluate(
    model: Annotated[str, typer.Argument(help="FlexMoE or dense model: a folder or a Hub id.", show_default=False)],
    data: Annotated[
        list[str], typer.Option(metavar="NAME=FILE", help="Text of a domain: its name, then its files. Repeatable.")
    ],
    experts: Annotated[
        list[str] | None, typer.Option("--expert", metavar="NAME", help="Use only this expert. Repeatable.")
    ] = None,
    num_experts_per_tok: Annotated[int | None, typer.Option(help="Experts per token (k).")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per sequence. Default: at most 1024.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 8,
    text_column: TextColumn = "text",
    text_template: TextTemplate = None,
    skip_empty: SkipEmpty = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure loss per token and perplexity on held-out text, per domain."""
    domains = parse_domains(data)
    check_data(domains.values(), text_column, text_template, skip_empty)
    from flexmoe.evaluation import evaluate as library_evaluate

    with library_call(as_json):
        scores = library_evaluate(
            model,
            domains,
            experts=experts or None,
            num_experts_per_tok=num_experts_per_tok,
            sequence_length=sequence_length,
            batch_size=batch_size,
            text_column=text_column,
            text_template=text_template,
            skip_empty=skip_empty,
        )
    if as_json:
        print_json({"model": model, "domains": {domain: score.to_dict() for domain, score in scores.items()}})
    else:
        show_scores(model, scores)


def export(
    model: Model,
    to: Annotated[
        str,
        typer.Option(metavar="FORMAT", help="dense, flex_olmo, mixtral or qwen3_moe; depends on the anchor."),
    ],
    out: Out,
    expert: Annotated[
        str | None, typer.Option(metavar="NAME", help="For dense: the expert to write; 'public' is the anchor.")
    ] = None,
    drop_bias: Annotated[
        bool, typer.Option("--drop-bias", help="Leave out router biases and the public prior. Changes the model.")
    ] = False,
    drop_evidence: Annotated[
        bool, typer.Option("--drop-evidence", help="Route by the rows alone, without evidence. Changes the model.")
    ] = False,
    densify: Annotated[bool, typer.Option("--densify", help="Merge low-rank experts into full ones.")] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="Text on which model and export are compared, by domain: the cost of --drop-....",
        ),
    ] = None,
    text_column: TextColumn = "text",
    text_template: TextTemplate = None,
    skip_empty: SkipEmpty = False,
    max_shard_size: ShardSize = "5GB",  # type: ignore[assignment] # typer parses the default as it does the option
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Export a model to a transformers architecture, which also inference engines load; logits are equal."""
    domains = parse_domains(data or [])
    check_data(domains.values(), text_column, text_template, skip_empty)
    with large_import():
        from flexmoe.conversion.export import export as library_export

    with library_call(as_json), byte_progress("Exporting", model) as progress:
        folder = library_export(
            model,
            out,
            to=to,
            expert=expert,
            drop_bias=drop_bias,
            drop_evidence=drop_evidence,
            densify=densify,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=progress,
        )
    losses = None
    if domains:
        from flexmoe.evaluation import evaluate as library_evaluate

        with library_call(as_json):
            before, after = (
                library_evaluate(
                    which, domains, text_column=text_column, text_template=text_template, skip_empty=skip_empty
                )
                for which in (model, folder)
            )
        losses = {domain: (before[domain].loss, after[domain].loss) for domain in domains}
    show_export(folder, as_json, losses)


def import_(
    checkpoint: Annotated[str, typer.Argument(help="FlexOlmo model: a folder or a Hub id.", show_default=False)],
    names: Annotated[
        str,
        typer.Option(metavar="public,NAME,...", help="Names for its experts, in order; 'public' first."),
    ],
    out: Out,
    max_shard_size: ShardSize = "5GB",  # type: ignore[assignment] # typer parses the default as it does the option
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Split a FlexOlmo model into a grafted anchor, OUT/model, and one package per expert, OUT/NAME."""
    owners = parse_names(names)
    with large_import():
        from flexmoe.conversion.import_flex_olmo import import_flex_olmo

    with library_call(as_json), byte_progress("Importing", checkpoint) as progress:
        folder = import_flex_olmo(
            checkpoint, out, names=owners, max_shard_size=max_shard_size, overwrite=overwrite, progress=progress
        )
    show_import(folder, owners, as_json)
