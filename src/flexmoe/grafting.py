"""`flexmoe.graft`: a dense model becomes a FlexMoE, with fine-tunes as experts and rows made of text or of prompts.

Rows are made of data (`expert_rows`) or as a recipe of mergekit-moe says (`recipes`), once everything else has been
checked and before anything is written. Without either no model is loaded.

Not here: the streaming of the weights (`flexmoe.conversion.graft`), what rows are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexmoe.conversion.fine_tunes import Shared
from flexmoe.conversion.graft import graft as graft_files
from flexmoe.conversion.router_tensors import RowMaker
from flexmoe.data import data_paths, read_documents
from flexmoe.expert_rows import TextRows
from flexmoe.modeling.folders_flexmoe import check_apart, check_new_folder
from flexmoe.modeling.hub_flexmoe import ResolvedFolder, resolve_folder
from flexmoe.modeling.tensor_writer_flexmoe import MAX_SHARD_SIZE
from flexmoe.recipes import Recipe, RecipeRows, read_recipe
from flexmoe.router_rows import row_method

ROUTER, ROUTER_TOKENS = "log_odds", 40_000  # how rows are made of router data unless somebody says otherwise


def graft(
    anchor: str | Path | None,
    out: str | Path,
    experts: Mapping[str, str | Path] | None = None,
    *,
    recipe: str | Path | None = None,
    router_data: Mapping[str, Sequence[str | Path]] | None = None,
    router: str = ROUTER,
    router_bias: bool = False,
    router_tokens: int = ROUTER_TOKENS,
    embedder: str | None = None,
    shared: Shared | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    public_data: Sequence[str | Path] | None = None,
    public_sample_bytes: int = 2_000_000,
    text_column: str = "text",
    seed: int = 0,
    norm_topk_prob: bool | None = None,
    num_experts_per_tok: int | None = None,
    fingerprint: bool = True,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes the dense causal LM `anchor` as a FlexMoE: its feed-forward networks are the expert "public".

    Without `experts` the result computes exactly what the anchor computes. It appears whole or not at all. Returns its
    folder.

    Args:
        anchor: a folder with a safetensors checkpoint, or a Hub id; None with a recipe, whose base_model it is.
        experts: dense fine-tunes of the anchor, {name: folder or Hub id}, whose networks become experts of these
            names. Those without router data have rows of zero, by which they weigh as much as public.
        recipe: a YAML file of mergekit-moe (see `flexmoe.recipes`). It says what the anchor, the experts, their rows
            and k are; the k weights are divided by their sum, and what is shared is the anchor's. What of it does not
            matter here is named in a warning.
        router_data: {expert: files} of prompts or documents (see `read_documents`) that should reach it. Its rows are
            fitted to tell their hidden states in the frozen anchor from those of the public sample.
        router: how, a name in `ROUTER_ROWS`. All but "random" need `public_data`.
        router_bias: fit a bias too.
        router_tokens: of each side that are looked at, at most.
        embedder: a sentence-transformers model, for router="embedding".
        shared: what is taken where fine-tunes differ from the anchor outside of their networks: "anchor", its own;
            "average", the mean of the anchor and all fine-tunes. None: they must not differ. Rows are fitted on the
            anchor as it is stored.
        revision, token: of the Hub repository.
        public_data: files of public text; a sample of whole documents, at most `public_sample_bytes` in all, is kept
            beside the model (`public_sample.jsonl`), as what every owner means by "not mine".
        text_column: column of tabular data, public and the experts'.
        seed: which documents the sample holds; what is drawn for rows.
        norm_topk_prob: divide the chosen experts' weights by their sum; None lets the anchor's block decide.
        num_experts_per_tok: k of the top-k; None is the configuration's default.
        fingerprint: hash the anchor's tensors on the way. Without it, packages cannot be checked against this anchor.
        max_shard_size: bytes per weight file.
        progress: called with the number of bytes just written.

    Raises:
        FileExistsError: `out` exists and `overwrite` is False.
        FileNotFoundError, PermissionError, ConnectionError: no such model (see `resolve_folder`) or file.
        TypeError, ValueError: the recipe cannot be made (see `read_recipe`) or is given beside what it says; router
            data for what is not grafted, or without public text; ways to make rows, but no router data; whatever
            `flexmoe.conversion.graft` refuses.
    """
    target = check_new_folder(out, overwrite)
    options: dict[str, Any] = {
        "revision": revision,
        "shared": shared,
        "norm_topk_prob": norm_topk_prob,
        "num_experts_per_tok": num_experts_per_tok,
    }
    if recipe is not None:
        _check_only_the_recipe(anchor=anchor, experts=experts, router_data=router_data, **options)
        check_apart(target, recipe)
    given: Mapping[str, str | Path | ResolvedFolder] = experts or {}
    make_rows: RowMaker | None = _text_rows(
        router_data or {},
        given,
        target,
        has_public=public_data is not None,
        column=text_column,
        router=router,
        bias=router_bias,
        tokens=router_tokens,
        embedder=embedder,
        seed=seed,
    )
    if recipe is not None:
        read = read_recipe(recipe)
        for note in read.notes:
            warnings.warn(note, stacklevel=2)
        anchor, given, make_rows = read.base.path, _resolved(read, token), RecipeRows(read, seed)
        options = _as_the_recipe_says(read)
    if anchor is None:
        raise ValueError("Neither an anchor nor a recipe: give a dense model, or --recipe FILE (recipe=...).")
    return graft_files(
        anchor,
        target,
        given,
        make_rows=make_rows,
        token=token,
        public_data=public_data,
        public_sample_bytes=public_sample_bytes,
        text_column=text_column,
        seed=seed,
        fingerprint=fingerprint,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=progress,
        **options,
    )


def _check_only_the_recipe(**asked: Any) -> None:
    if others := [name for name, value in asked.items() if value is not None and value != {}]:
        raise ValueError(
            f"A recipe says what is grafted and how, and {', '.join(others)} would say it too: leave one of them out, "
            "or write it into the recipe."
        )


def _resolved(recipe: Recipe, token: str | bool | None) -> dict[str, ResolvedFolder]:
    return {
        name: resolve_folder(source.path, revision=source.revision, token=token)
        for name, source in recipe.grafted.items()
    }


def _as_the_recipe_says(recipe: Recipe) -> dict[str, Any]:
    return {
        "revision": recipe.base.revision,
        "shared": "anchor",
        "norm_topk_prob": True,
        "num_experts_per_tok": recipe.experts_per_token,
        "active_experts": recipe.active_experts,
    }


def _text_rows(
    router_data: Mapping[str, Sequence[str | Path]],
    experts: Mapping[str, Any],
    target: Path,
    *,
    has_public: bool,
    column: str,
    router: str,
    bias: bool,
    tokens: int,
    embedder: str | None,
    seed: int,
) -> TextRows | None:
    """What makes rows of the experts' text; None if there is none. ValueError: what is asked for makes no sense."""
    if not router_data:
        if (router, bias, tokens, embedder) != (ROUTER, False, ROUTER_TOKENS, None):
            raise ValueError(
                "--router, --router-bias, --router-tokens and --embedder say how rows are made of router data, and "
                "there is none: give --router-data NAME=FILE (router_data=...), or leave them out."
            )
        return None
    method = row_method(router)
    if strangers := [name for name in router_data if name not in experts]:
        there = f"the experts are {', '.join(experts)}" if experts else "no expert is given"
        raise ValueError(
            f"Router data for {', '.join(strangers)}, which is not grafted; {there}. Graft it: --expert NAME=FOLDER."
        )
    if tokens < 1:
        raise ValueError(f"router_tokens={tokens}: must be more than 0.")
    if method.needs != "nothing" and not has_public:
        raise ValueError(
            f"router={router!r} sets each expert's text against public text, and there is none: give --public-data "
            "FILES (public_data=...), of which a sample is kept beside the model, too."
        )
    for files in router_data.values():
        check_apart(target, *data_paths(files))
    own = {name: read_documents(files, column=column) for name, files in router_data.items()}
    return TextRows(own=own, method=method, bias=bias, tokens=tokens, embedder=embedder, seed=seed)
