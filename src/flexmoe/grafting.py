"""`flexmoe.graft`: a dense model becomes a FlexMoE model, with fine-tunes as experts and rows from text or prompts.

Rows are fitted on text (`flexmoe.routers.text_rows`) or made from the prompts of a mergekit-moe recipe
(`flexmoe.recipes`), after all other checks and before anything is written. Without either, no model is loaded.

A GGUF file is first converted to a dense checkpoint, in a temporary folder beside the output.

Does not cover the streaming of the weights (`flexmoe.conversion.graft`), what a GGUF file becomes (`flexmoe.io.gguf`)
or the methods for rows (`flexmoe.routers.rows`).
"""

from __future__ import annotations

import glob
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexmoe.conversion.fine_tunes import Shared
from flexmoe.conversion.graft import graft as graft_files
from flexmoe.conversion.router_tensors import RowMaker
from flexmoe.data import Documents, check_template_is_used, data_paths, read_documents
from flexmoe.hub.client import ResolvedFolder, resolve_folder
from flexmoe.io.folders import check_apart, check_new_folder
from flexmoe.io.gguf import dense_from_gguf, is_gguf, open_gguf, provenance
from flexmoe.io.writer import MAX_SHARD_SIZE
from flexmoe.recipes import Recipe, RecipeRows, check_base, read_recipe
from flexmoe.routers.rows import row_method
from flexmoe.routers.text_rows import TextRows

ROUTER, ROUTER_TOKENS = "log_odds", 40_000  # defaults for rows fitted on router data


def graft(
    anchor: str | Path | None,
    out: str | Path,
    experts: Mapping[str, str | Path] | None = None,
    *,
    gguf_file: str | None = None,
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
    text_template: str | None = None,
    skip_empty: bool = False,
    seed: int = 0,
    norm_topk_prob: bool | None = None,
    num_experts_per_tok: int | None = None,
    fingerprint: bool = True,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes the dense causal LM `anchor` as a FlexMoE model whose expert "public" is the anchor's own FFNs.

    Without `experts`, the result computes exactly what the anchor computes. The output folder appears only once it is
    complete. Returns it.

    Args:
        anchor: a folder with a safetensors checkpoint, a Hub id, or a GGUF file; None with a recipe, which names it as
            base_model.
        out: the folder to write.
        experts: {name: folder or Hub id} of dense fine-tunes or LoRA adapters of the anchor that become experts.
            Experts without router data have rows of zero, so their weight equals public's.
        gguf_file: the GGUF file in the folder or repository `anchor`, as in `from_pretrained`.
        recipe: a YAML file of mergekit-moe (see `flexmoe.recipes`), which defines the anchor, the experts, their rows
            and k. Weights are normalised, and shared tensors are the anchor's. Entries without effect are warned of.
        router_data: {expert: files} of prompts or documents (see `read_documents`) that should be routed to it. Its
            rows are fitted to separate their hidden states in the frozen anchor from those of the public sample.
        router: the method, a name in `ROUTER_ROWS`. All but "random" need `public_data`.
        router_bias: fit a bias, too.
        router_tokens: the maximum number of tokens of each side.
        embedder: a sentence-transformers model, for router="embedding".
        shared: which tensors are used if fine-tunes differ from the anchor outside of their FFNs: "anchor" (its own)
            or "average" (the mean of the anchor and all fine-tunes). None: they must not differ. Rows are fitted on
            the anchor as it is stored.
        revision, token: of the Hub repository.
        public_data: files of public text. A sample of complete documents, at most `public_sample_bytes` in all, is
            stored with the model (`public_sample.jsonl`): every owner's rows are fitted against it.
        text_column, text_template, skip_empty: how rows of tables become texts, public and the experts'; see
            `flexmoe.data.Documents`.
        seed: of the choice of the sample and of random choices for rows.
        norm_topk_prob: divide the chosen experts' weights by their sum; None: decided by the anchor's block.
        num_experts_per_tok: k of the top-k; None: the default of the configuration.
        fingerprint: hash the anchor's tensors on the way. Without it, packages cannot be checked against this anchor.
        max_shard_size: bytes per weight file.
        overwrite: replace an existing `out`.
        progress: called with the number of bytes just written.

    Raises:
        FileExistsError: `out` exists and `overwrite` is False.
        FileNotFoundError, PermissionError, ConnectionError: no such model (see `resolve_folder`) or file.
        ImportError: a GGUF file, and the extra `gguf` is not installed.
        TypeError, ValueError: the GGUF file cannot be converted (see `open_gguf`); the recipe is invalid (see
            `read_recipe`) or given together with arguments that it defines; router data for an expert that is not
            grafted, or without public text; options for rows without router data; or as
            `flexmoe.conversion.graft.graft`.

    Example:
        ```pycon
        >>> import flexmoe
        >>> folder = flexmoe.graft("anchor", "new-graft", public_data=["public.txt"])
        >>> folder = flexmoe.graft("anchor", "moe", experts={"math": "math-tuned"})  # a dense fine-tune as an expert
        >>> [expert["name"] for expert in flexmoe.inspect(folder)["experts"]]
        ['public', 'math']
        ```
    """
    target = check_new_folder(out, overwrite)
    options: dict[str, Any] = {
        "revision": revision,
        "shared": shared,
        "norm_topk_prob": norm_topk_prob,
        "num_experts_per_tok": num_experts_per_tok,
    }
    if recipe is not None:
        _check_no_conflict(anchor=anchor, gguf_file=gguf_file, experts=experts, router_data=router_data, **options)
        check_apart(target, recipe)
    if text_template is not None:
        texts = [*(router_data or {}).values(), *([] if public_data is None else [public_data])]
        check_template_is_used([Documents(files, column=text_column, template=text_template) for files in texts])
    given: Mapping[str, str | Path | ResolvedFolder] = experts or {}
    make_rows: RowMaker | None = _text_rows(
        router_data or {},
        given,
        target,
        has_public=public_data is not None,
        rows={"column": text_column, "template": text_template, "skip_empty": skip_empty},
        router=router,
        bias=router_bias,
        tokens=router_tokens,
        embedder=embedder,
        seed=seed,
    )
    if recipe is not None:
        read = read_recipe(recipe)
        check_base(read, token)
        for note in read.notes:
            warnings.warn(note, stacklevel=2)
        anchor, given, make_rows = read.base.path, _resolved(read, token), RecipeRows(read, seed)
        options = _recipe_options(read)
    if anchor is None:
        raise ValueError("Neither an anchor nor a recipe is given: give a dense model, or --recipe FILE (recipe=...).")
    with _dense_anchor(anchor, gguf_file, target, options, token) as (source, converted_from):
        return graft_files(
            source,
            target,
            given,
            make_rows=make_rows,
            token=token,
            public_data=public_data,
            public_sample_bytes=public_sample_bytes,
            text_column=text_column,
            text_template=text_template,
            skip_empty=skip_empty,
            seed=seed,
            fingerprint=fingerprint,
            converted_from=converted_from,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=progress,
            **options,
        )


@contextmanager
def _dense_anchor(
    anchor: str | Path,
    gguf_file: str | None,
    target: Path,
    options: dict[str, Any],
    token: str | bool | None,
) -> Iterator[tuple[str | Path, dict[str, Any] | None]]:
    """The anchor, or the folder that its GGUF file is converted to, and what identifies that file."""
    if gguf_file is None and not is_gguf(anchor):
        yield anchor, None
        return
    place = {}
    if gguf_file is None:
        file = Path(anchor).expanduser()
        if options["revision"] is not None:
            raise ValueError(f"{file} is a file, and only Hub repositories have revisions: leave out the revision.")
    else:
        folder = resolve_folder(
            anchor, revision=options["revision"], token=token, allow_patterns=(glob.escape(gguf_file),)
        )
        file = folder.path / gguf_file
        if not file.is_file():
            raise FileNotFoundError(f"{anchor} has no file {gguf_file}")
        options["revision"] = None  # of the repository, not of the folder that is written
        place = {"repo": folder.repo, "revision": folder.revision} if folder.repo else {}
    check_apart(target, file)
    opened = open_gguf(file)
    with dense_from_gguf(opened, target) as dense:
        yield dense, {**place, **provenance(opened)}


def _check_no_conflict(**given: Any) -> None:
    if others := [name for name, value in given.items() if value is not None and value != {}]:
        raise ValueError(
            f"A recipe defines what is grafted and how, so it conflicts with {', '.join(others)}: leave one of them "
            "out, or write it into the recipe."
        )


def _resolved(recipe: Recipe, token: str | bool | None) -> dict[str, ResolvedFolder]:
    return {
        name: resolve_folder(source.path, revision=source.revision, token=token)
        for name, source in recipe.grafted.items()
    }


def _recipe_options(recipe: Recipe) -> dict[str, Any]:
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
    rows: Mapping[str, Any],
    router: str,
    bias: bool,
    tokens: int,
    embedder: str | None,
    seed: int,
) -> TextRows | None:
    """The row maker for the experts' text; None if there is none. ValueError: the arguments are inconsistent."""
    if not router_data:
        if (router, bias, tokens, embedder) != (ROUTER, False, ROUTER_TOKENS, None):
            raise ValueError(
                "--router, --router-bias, --router-tokens and --embedder (router, router_bias, router_tokens, "
                "embedder) apply to router data, but there is none: "
                "give --router-data NAME=FILE (router_data=...), or leave them out."
            )
        return None
    method = row_method(router)
    if unknown := [name for name in router_data if name not in experts]:
        known = f"the experts are {', '.join(experts)}" if experts else "no expert is given"
        raise ValueError(
            f"Router data for {', '.join(unknown)}, which is not grafted; {known}. Graft it: --expert NAME=FOLDER "
            "(experts=...)."
        )
    if tokens < 1:
        raise ValueError(f"router_tokens={tokens}: must be above 0.")
    if method.needs != "nothing" and not has_public:
        raise ValueError(
            f"router={router!r} needs public text to compare each expert's text with, and there is none: give "
            "--public-data FILES (public_data=...); a sample of it is also stored with the model."
        )
    for files in router_data.values():
        check_apart(target, *data_paths(files))
    own = {name: read_documents(files, **rows) for name, files in router_data.items()}
    return TextRows(own=own, method=method, bias=bias, tokens=tokens, embedder=embedder, seed=seed)
