"""Graft: a dense checkpoint becomes a FlexMoE model, file to file. Its own FFNs are "public", fine-tunes are experts.

Weights are streamed and never changed (unless shared tensors of fine-tunes are averaged): the names come from the two
models on the meta device, the bytes from the files. Only router rows are new: zero, or made by a `RowMaker`.

Does not cover which checkpoints can be read (`flexmoe.io.dense`), in what a fine-tune may differ (`fine_tunes`), how
files are written (`flexmoe.io.writer`), or how rows are fitted on text (`flexmoe.grafting`, which calls this module).
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from flexmoe.companions import copy_companions
from flexmoe.conversion.fine_tunes import SHARED, FineTune, Shared, averaged_source, check_shared
from flexmoe.conversion.lora_adapters import LoraAdapter, is_adapter
from flexmoe.conversion.router_tensors import RowMaker, router_tensors
from flexmoe.data import END_OF_DOCUMENT, Documents, check_template_is_used, data_paths
from flexmoe.hub.client import ResolvedFolder, resolve_folder
from flexmoe.io.dense import DenseCheckpoint
from flexmoe.io.folders import atomic_folder, check_apart, check_new_folder
from flexmoe.io.writer import MAX_SHARD_SIZE, TensorSource, source_from_file, source_from_tensor, write_checkpoint
from flexmoe.modeling.anchors_flexmoe import NameMap
from flexmoe.modeling.configuration_flexmoe import PUBLIC, FlexMoeConfig, check_expert_name, check_top_k
from flexmoe.modeling.fingerprint_flexmoe import fingerprint as fingerprint_of
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM

PUBLIC_SAMPLE = "public_sample.jsonl"


def graft(
    anchor: str | Path,
    out: str | Path,
    experts: Mapping[str, str | Path | ResolvedFolder] | None = None,
    *,
    make_rows: RowMaker | None = None,
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
    active_experts: Sequence[str] | None = None,
    fingerprint: bool = True,
    converted_from: Mapping[str, Any] | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes the dense causal LM `anchor` as a FlexMoE model whose expert "public" is the anchor's own FFNs.

    Without `experts`, the result computes exactly what the anchor computes. The output folder appears only once it is
    complete. Returns it.

    Args:
        anchor: a folder with a safetensors checkpoint, or a Hub id.
        experts: {name: folder or Hub id} of experts to add: dense fine-tunes of the anchor, whose FFNs become full
            experts, or LoRA adapters on the anchor's FFNs, which become low-rank experts.
        make_rows: makes the experts' router rows. Without it they are zero: all experts get equal weight until rows
            are trained.
        shared: which tensors are used if fine-tunes differ from the anchor outside of their FFNs: "anchor" (its own)
            or "average" (the mean of the anchor and all fine-tunes). None: they must not differ.
        revision, token: of the Hub repository.
        public_data: files of public text. A sample of complete documents, at most `public_sample_bytes` in all, is
            stored with the model (`public_sample.jsonl`): every owner's rows are fitted against it.
        text_column, text_template, skip_empty: how rows of tables become texts; see `flexmoe.data.Documents`.
        seed: of the choice of the sample.
        norm_topk_prob: divide the chosen experts' weights by their sum; None: decided by the anchor's block.
        num_experts_per_tok: k of the top-k; None: the default of the configuration.
        active_experts: names of the active experts; None: all.
        fingerprint: hash the anchor's tensors on the way. Without it, packages cannot be checked against this anchor.
        converted_from: the GGUF file that the anchor was converted from (see `flexmoe.io.gguf.provenance`), recorded
            in the config as `anchor["gguf"]`.
        max_shard_size: bytes per weight file.
        overwrite: replace an existing `out`.
        progress: called with the number of bytes just written.

    Raises:
        FileExistsError: `out` exists and `overwrite` is False.
        FileNotFoundError, PermissionError, ConnectionError: no such anchor (see `resolve_folder`), or no safetensors.
        ValueError: the model cannot be an anchor (see `DenseCheckpoint`); a fine-tune or adapter is not one of this
            anchor, differs where it must not (see `FineTune`, `LoraAdapter`, `check_shared`) or is not finite; rows
            have wrong shapes (see `router_tensors`); no document of the public data fits the sample; a template
            without a table among the public data; or `out` is or
            contains an input.

    The anchor's own values are copied unchecked: a graft computes what the anchor computes, including NaN.
    """
    if shared is not None and shared not in SHARED:
        raise ValueError(f"shared={shared!r}: must be one of {', '.join(SHARED)}, or None.")
    if num_experts_per_tok is not None:
        check_top_k(num_experts_per_tok)
    target = check_new_folder(out, overwrite)
    source = resolve_folder(anchor, revision=revision, token=token)
    check_apart(target, source.path, *([] if public_data is None else data_paths(public_data)))
    sample = None
    if public_data is not None:
        documents = Documents(public_data, column=text_column, template=text_template, skip_empty=skip_empty)
        if make_rows is None:  # else a template may be for the tables that rows are made from
            check_template_is_used([documents])
        sample = _sample(documents, public_sample_bytes, seed)
        if note := documents.skipped_note():
            warnings.warn(note, stacklevel=2)
    dense = DenseCheckpoint(source.path)
    names = NameMap(dense.sites)
    grafted = _open_experts(experts or {}, dense, shared, token)
    check_apart(target, *(expert.source.path for expert in grafted))
    fine_tunes = [expert for expert in grafted if isinstance(expert, FineTune)]
    if shared is None:
        check_shared(dense, fine_tunes, names)
    averaged = [dense, *(fine_tune.dense for fine_tune in fine_tunes)] if shared == "average" else []
    settings = {
        "norm_topk_prob": norm_topk_prob,
        "num_experts_per_tok": num_experts_per_tok,
        "active_experts": None if active_experts is None else list(active_experts),
    }
    config = FlexMoeConfig(
        anchor_config=dense.config,
        experts=[PUBLIC, *(expert.record() for expert in grafted)],
        **{key: value for key, value in settings.items() if value is not None},
    )
    with torch.device("meta"):
        model = FlexMoeForCausalLM(config)
    rows = {}
    if make_rows is not None:
        public = None if sample is None else [json.loads(line)["text"] for line in sample]
        rows = router_tensors(make_rows(dense, public), config.expert_names, dense)
    durable = overwrite  # a new folder can be written again; one that replaces another must not be lost
    with atomic_folder(target, overwrite, durable=durable) as folder:
        written = write_checkpoint(
            folder,
            _sources(model, dense, names, grafted, averaged, rows),
            max_shard_size=max_shard_size,
            hash_tensors={names.to_flexmoe(name) for name in dense.infos} if fingerprint else (),
            concurrent=True,
            flush=durable,
            progress=progress,
        )
        digests = None
        if fingerprint:
            digests = {name: written.tensor_sha256[names.to_flexmoe(name)] for name in dense.infos}
        # the average is a dense model that is stored nowhere: it has its own fingerprint and no repository
        origin = ResolvedFolder(source.path) if averaged else source
        model.config.anchor = _anchor_record(origin, dense, digests)
        if converted_from is not None:
            model.config.anchor = {**model.config.anchor, "gguf": dict(converted_from)}
        if sample is not None:
            model.config.public_sample = _write_sample(folder, sample)
        copy_companions(source.path, folder, model.config, repo=source.repo)
        # the dtype in which the anchor itself is loaded, so both compute in the same precision
        write_config(folder, model, dense.load_dtype)  # last: a folder without it does not load
    return target


def _open_experts(
    experts: Mapping[str, str | Path | ResolvedFolder],
    anchor: DenseCheckpoint,
    shared: Shared | None,
    token: str | bool | None,
) -> list[FineTune | LoraAdapter]:
    opened: list[FineTune | LoraAdapter] = []
    for name, given in experts.items():
        if check_expert_name(name) == PUBLIC:
            raise ValueError(f"{PUBLIC!r} is the anchor's own network: give the expert of {given} another name.")
        source = given if isinstance(given, ResolvedFolder) else resolve_folder(given, token=token)
        if is_adapter(source.path):
            opened.append(LoraAdapter.open(name, source, anchor))
        else:
            opened.append(FineTune.open(name, source, anchor, shared=shared))
    return opened


def _sources(
    model: FlexMoeForCausalLM,
    dense: DenseCheckpoint,
    names: NameMap,
    experts: Sequence[FineTune | LoraAdapter],
    averaged: Sequence[DenseCheckpoint],
    rows: Mapping[str, torch.Tensor],
) -> list[TensorSource]:
    """The tensors to write, in the order of the model's state dict; rows that are not given are zero.

    Names in the state dict without a stored tensor are tied to another, or computed buffers.
    """
    sources = []
    stored = dict(dense.stored)
    owned = {path: source for expert in experts for path, source in expert.sources(names).items()}
    for name, tensor in model.state_dict().items():
        dense_name = names.to_dense(name)
        if name in owned:
            sources.append(owned[name])
        elif dense_name is None:
            row = rows[name] if name in rows else torch.zeros(tensor.shape, dtype=torch.float32)
            sources.append(source_from_tensor(name, row))
        elif dense_name in stored:
            theirs = stored.pop(dense_name)
            if averaged and not names.is_ffn(dense_name):
                sources.append(averaged_source(name, dense_name, averaged))
            else:
                sources.append(source_from_file(dense.files, theirs, name))
    assert not stored, f"no name in the FlexMoE model for {sorted(stored)}"
    return sources


def _anchor_record(
    source: ResolvedFolder, dense: DenseCheckpoint, digests: dict[str, str] | None
) -> dict[str, str | None]:
    infos = dense.infos.values()
    return {
        "repo": source.repo,
        "revision": source.revision,
        "fingerprint": digests and fingerprint_of((i.name, i.dtype, i.shape, digests[i.name]) for i in infos),
        "model_type": dense.config.model_type,
        "dtype": dense.dtype,
    }


def write_config(folder: Path, model: FlexMoeForCausalLM, dtype: str | torch.dtype | None) -> None:
    """Writes the model's config and its remote code; `dtype` is the one to load it in."""
    config = model.config
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    model.save_code(folder)
    config.save_pretrained(folder)


def _sample(documents: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """JSON lines of distinct documents, ordered by a seeded hash of each and added while they fit.

    The hash is of the document alone, so the sample does not depend on the order of files and changes little with more
    data. `documents` is iterated twice, and of each only hash and size are held: public text may exceed the memory.
    """
    count = 0
    sizes: dict[bytes, int] = {}
    for count, document in enumerate(documents, 1):  # noqa: B007
        sizes[_sample_order(document, seed)] = len(_sample_line(document).encode("utf-8"))
    chosen: dict[bytes, str] = {}
    room = max_bytes
    for order in sorted(sizes):
        if sizes[order] <= room:
            chosen[order] = ""
            room -= sizes[order]
    for document in documents:
        if (order := _sample_order(document, seed)) in chosen:
            chosen[order] = _sample_line(document)
    lines = list(chosen.values())
    if not all(lines):
        raise ValueError("The public data changed while it was read. Graft again when it is complete.")
    if not lines:
        raise ValueError(
            f"None of the {count} public documents fits into a sample of {max_bytes:,} bytes. Give a larger "
            "--public-sample-bytes (public_sample_bytes=...), or more and smaller documents: .jsonl rows, or text "
            f"separated by lines of {END_OF_DOCUMENT}."
        )
    return lines


def _sample_line(document: str) -> str:
    return json.dumps({"text": document}, ensure_ascii=False) + "\n"


def _sample_order(document: str, seed: int) -> bytes:
    return hashlib.sha256(f"public sample {seed}\n{document}".encode()).digest()


def _write_sample(folder: Path, lines: Iterable[str]) -> dict[str, Any]:
    lines = list(lines)
    content = "".join(lines).encode("utf-8")
    (folder / PUBLIC_SAMPLE).write_bytes(content)
    return {
        "file": PUBLIC_SAMPLE,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
        "documents": len(lines),
    }


__all__ = ["PUBLIC_SAMPLE", "graft", "write_config"]
