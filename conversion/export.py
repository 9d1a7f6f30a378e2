"""Export: a FlexMoE model becomes a checkpoint of another transformers class, which also inference engines load.

Either one expert in the anchor's own dense class, or all experts in a mixture-of-experts class (`native_formats`). The
weights are copied byte for byte, a chunk at a time; only router rows are stacked, and low-rank experts merged on
request. A model that a format cannot represent is an error. Does not cover compositions by reference, quantised
models, or the cost of dropping biases (measure it with `flexmoe evaluate`).
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from flexmoe.companions import copy_companions
from flexmoe.conversion.low_rank import merged_source
from flexmoe.conversion.native_formats import ALTERNATIVES, FORMATS, NativeFormat, native_config
from flexmoe.conversion.public_networks import PublicNetworks
from flexmoe.hub.stored_model import CONFIG_FILE, StoredModel
from flexmoe.io.folders import atomic_folder, check_apart, check_new_folder
from flexmoe.io.strict_json import json_text
from flexmoe.io.writer import MAX_SHARD_SIZE, TensorSource, source_from_file, source_from_tensor, write_checkpoint
from flexmoe.meta import build_on_meta
from flexmoe.modeling.anchors_flexmoe import ANCHOR_PREFIX, FfnSite, NameMap
from flexmoe.modeling.configuration_flexmoe import PUBLIC
from flexmoe.modeling.experts_flexmoe import make_expert
from flexmoe.modeling.fingerprint_flexmoe import TORCH_DTYPES
from flexmoe.modeling.low_rank_flexmoe import low_rank_scale
from flexmoe.norms import norm_follows_each_ffn
from flexmoe.packages.names import packed_name
from flexmoe.tokenization import check_tokenizer

DENSE = "dense"


@dataclass(frozen=True)
class Exported:
    """The result of an export: the config, additional entries of its file, and the tensors in order."""

    config: PreTrainedConfig
    sources: list[TensorSource]
    aliases: Mapping[str, Any] = field(default_factory=dict)


MergedExperts = Mapping[str, Callable[[str], TensorSource]]
"""Merged tensors of low-rank experts, by the names that a full expert's would have in the FlexMoE model; each entry
makes the source for a given name."""


@dataclass(frozen=True)
class Options:
    """Arguments of `export` that concern the formats."""

    expert: str | None = None
    drop_bias: bool = False
    drop_evidence: bool = False
    densify: bool = False


class Exporter(Protocol):
    """Prepares the export to one format."""

    def __call__(self, stored: StoredModel, options: Options) -> Exported:
        """The checkpoint to write. ValueError: the format cannot represent this model."""


def export(
    model: str | Path,
    out: str | Path,
    *,
    to: str,
    expert: str | None = None,
    drop_bias: bool = False,
    drop_evidence: bool = False,
    densify: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Writes the stored FlexMoE `model` as a checkpoint of another transformers class, and returns its folder.

    The exported model has equal logits in float32, up to the order of sums. In half precision the router rows are
    rounded to the dtype of the weights beside them, in which the other classes hold them; a warning gives the number
    of values that change.

    Args:
        model: folder or Hub id of a merged checkpoint.
        to: one of `TARGETS`: "dense" (one expert, in the anchor's class), "flex_olmo" (OLMo-2 anchors), "mixtral"
            (Llama and Mistral anchors) or "qwen3_moe" (Qwen3 anchors).
        expert: for "dense", the expert whose networks are written; "public" is the anchor itself.
        drop_bias: leave out biases of router rows and the public prior, which no format has. This changes the model.
        drop_evidence: leave out the evidence of experts, which no format has: they are then routed by their rows
            alone, as those trained with evidence="none". This changes the model.
        densify: merge low-rank experts into public's networks, summed in float32 and rounded once.
        max_shard_size: bytes per weight file.
        overwrite: replace an existing `out`.
        progress: called with the number of bytes just written.

    Raises:
        FileExistsError: `out` exists and `overwrite` is False.
        FileNotFoundError: no such model.
        ValueError: no such format or expert, or the format cannot represent the model: biases, evidence, masked or
            low-rank experts, weights that are not normalised, another family, missing config fields.

    Example:
        ```pycon
        >>> import flexmoe
        >>> from transformers import AutoModelForCausalLM
        >>> flexmoe.export("model", "math-alone", to="dense", expert="math").name
        'math-alone'
        >>> type(AutoModelForCausalLM.from_pretrained("math-alone")).__name__
        'LlamaForCausalLM'
        ```
    """
    target = check_new_folder(out, overwrite)
    if to not in TARGETS:
        raise ValueError(f"There is no format {to!r} to export to; there are {', '.join(TARGETS)}.")
    stored = StoredModel(model, "exported")
    check_apart(target, stored.folder)
    tokenizer = check_tokenizer(stored.folder)
    exported = TARGETS[to](stored, Options(expert, drop_bias, drop_evidence, densify))
    durable = overwrite  # a new folder can be written again; one that replaces another must not be lost
    with atomic_folder(target, overwrite, durable=durable) as folder:
        write_checkpoint(
            folder,
            exported.sources,
            max_shard_size=max_shard_size,
            concurrent=True,
            flush=durable,
            progress=progress,
        )
        copy_companions(stored.folder, folder, exported.config, tokenizer=tokenizer)
        values = {**json.loads(exported.config.to_json_string()), **exported.aliases}
        # last: without it, a folder does not load
        (folder / CONFIG_FILE).write_text(json_text(values), encoding="utf-8")
    return target


def as_dense(stored: StoredModel, options: Options) -> Exported:
    """One expert in the anchor's own class, without its router row and bias."""
    names, expert = stored.config.expert_names, options.expert
    if expert is None or expert not in names:
        fault = "none is given" if expert is None else f"{expert!r} is not one of them"
        raise ValueError(
            f"{DENSE} writes one expert of {stored.folder}, and {fault}: give --expert {' | '.join(names)} (expert=)."
        )
    _check_kinds(stored, [expert], options, DENSE)
    dense, sites = build_on_meta(_anchor_config(stored))
    paths = NameMap(sites)
    merged = _merged_experts(stored, sites, [expert])
    sources = _copies(stored, dense, {name: paths.to_flexmoe(name, expert) for name in dense.state_dict()}, merged)
    return Exported(_of_class(dense, stored), sources)


def as_native(native: NativeFormat, stored: StoredModel, options: Options) -> Exported:
    """All experts in a mixture-of-experts class of transformers, in the order of the config."""
    if options.expert is not None:
        raise ValueError(f"{native.model_type} holds all experts: expert={options.expert!r} is for to={DENSE!r} only.")
    _check_kinds(stored, stored.config.expert_names, options, native.model_type)
    if stored.config.norm_topk_prob is None:
        stored.config.norm_topk_prob = not norm_follows_each_ffn(_anchor_config(stored))
    config = native_config(native, stored.config)
    if not options.drop_bias:
        _check_bias_free(native, stored)
    if not options.drop_evidence:
        _check_evidence_free(native, stored)
    dense, sites = build_on_meta(_anchor_config(stored))
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(config)
    _check_equal_outside_blocks(native, dense, target, sites)
    gates = _gates(native, stored, sites)
    merged = _merged_experts(stored, sites, stored.config.expert_names)
    sources: list[TensorSource] = []
    for site, names in _by_site(dense, sites):
        if site is None:
            sources += _copies(stored, dense, {name: ANCHOR_PREFIX + name for name in names})
        else:
            sources += _block_sources(native, stored, dense, site, gates[site], merged)
    counts = dict.fromkeys(native.count_fields, len(stored.config.expert_names))
    return Exported(_of_class(target, stored), sources, counts)


TARGETS: Mapping[str, Exporter] = {
    DENSE: as_dense,
    **{name: functools.partial(as_native, native) for name, native in FORMATS.items()},
}
"""The export formats by name."""


def _anchor_config(stored: StoredModel) -> PreTrainedConfig:
    config: Any = stored.config.anchor_config
    return config


def _of_class(model: PreTrainedModel, stored: StoredModel) -> PreTrainedConfig:
    """The model's config as it is written: with its architecture and the dtype to load it in."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = stored.config.dtype or config.dtype
    return config


def _by_site(dense: PreTrainedModel, sites: Sequence[FfnSite]) -> Iterator[tuple[FfnSite | None, list[str]]]:
    """The state dict's names in order, grouped: those of an FFN with its site, others with None."""
    blocks = {f"{site.block}.": site for site in sites}

    def site_of(name: str) -> FfnSite | None:
        return next((site for prefix, site in blocks.items() if name.startswith(prefix)), None)

    for site, names in itertools.groupby(dense.state_dict(), site_of):
        yield site, list(names)


def _copies(
    stored: StoredModel, dense: PreTrainedModel, paths: Mapping[str, str], merged: MergedExperts | None = None
) -> list[TensorSource]:
    """Stored tensors under the dense model's names; `paths` maps these to the names in the FlexMoE model.

    Those in `merged` are computed. Names without a stored tensor are tied to another, or computed buffers.
    """
    state, parameters = dense.state_dict(), dict(dense.named_parameters(remove_duplicate=False))
    sources = []
    for name, path in paths.items():
        if merged and path in merged:
            sources.append(merged[path](name))
        elif path in stored.tensors.infos:
            _check_stored(stored, path, state[name].shape)
            sources.append(source_from_file(stored.tensors, path, name))
        elif name in parameters and name not in dense.all_tied_weights_keys:
            raise _missing(stored, path)
    return sources


def _block_sources(
    native: NativeFormat,
    stored: StoredModel,
    dense: PreTrainedModel,
    site: FfnSite,
    gate_EH: Tensor,
    merged: MergedExperts,
) -> Iterator[TensorSource]:
    """The tensors of a layer's block: the stacked router rows, then each expert's matrices."""
    shapes = {name: tensor.shape for name, tensor in site.ffn(dense).state_dict().items()}
    block = f"{ANCHOR_PREFIX}{site.block}"
    if shapes.keys() != native.matrices.keys():
        raise ValueError(
            f"{native.model_type} has {', '.join(native.matrices)} in each expert; this anchor has "
            f"{', '.join(shapes)}. {ALTERNATIVES}"
        )
    yield source_from_tensor(native.gate_name(site), gate_EH)
    for number, expert in enumerate(stored.config.expert_names):
        for name, shape in shapes.items():
            path, new_name = f"{block}.experts.{expert}.{name}", native.matrix_name(site, number, name)
            if path in merged:
                yield merged[path](new_name)
            else:
                _check_stored(stored, path, shape)
                yield source_from_file(stored.tensors, path, new_name)


def _merged_experts(stored: StoredModel, sites: Sequence[FfnSite], names: Sequence[str]) -> MergedExperts:
    """The low-rank experts among `names`, merged into public's networks."""
    records = [record for record in stored.config.expert_records if record["name"] in names]
    merged: dict[str, Callable[[str], TensorSource]] = {}
    low_rank = [record for record in records if record["kind"] == "low_rank"]
    if not low_rank:
        return merged
    public = PublicNetworks.of_flexmoe(stored)
    for record, site in itertools.product(low_rank, sites):
        start = f"{ANCHOR_PREFIX}{site.block}.experts.{record['name']}."
        expert = make_expert(
            public.networks[site.index], record, layer=site.index, hidden_size=_hidden_size(stored)
        ).state_dict()
        for key, tensor in expert.items():
            _check_stored(stored, start + key, tensor.shape)
        differences = {packed_name(key): stored.tensors.read(start + key) for key in expert}
        scale = low_rank_scale(record["rank"][site.index], record.get("alpha"))
        for key in public.networks[site.index].state_dict():
            merged[start + key] = functools.partial(
                merged_source, public=public, layer=site.index, key=key, differences=differences, scale=scale
            )
    return merged


def _gates(native: NativeFormat, stored: StoredModel, sites: Sequence[FfnSite]) -> dict[FfnSite, Tensor]:
    """The router rows of all experts [E, H] by layer, in the dtype of the weights beside them."""
    rows = {site: _rows(stored, site) for site in sites}
    gates = {site: rows_EH.to(_dtype_beside(stored, site)) for site, rows_EH in rows.items()}
    for site, gate_EH in gates.items():
        if not bool(gate_EH.isfinite().all()):
            raise ValueError(
                f"{site.block}: a router row is not finite in {gate_EH.dtype}, the dtype of the weights beside it, in "
                f"which {native.model_type} holds its gate."
            )
    if changed := sum(int((gates[site].float() != rows_EH).sum()) for site, rows_EH in rows.items()):
        warnings.warn(
            f"{native.model_type} holds its gate in the dtype of its weights: of the "
            f"{sum(rows_EH.numel() for rows_EH in rows.values()):,} values of the router rows, {changed:,} are "
            f"rounded from float32 to {next(iter(gates.values())).dtype}. If two experts have nearly equal logits, "
            "the exported model may choose the other one.",
            stacklevel=4,  # the caller of `export`
        )
    return gates


def _rows(stored: StoredModel, site: FfnSite) -> Tensor:
    """The router rows of all experts of a layer, float32 [E, H]."""
    hidden_size = _hidden_size(stored)
    rows = []
    for name in stored.config.expert_names:
        path = f"{ANCHOR_PREFIX}{site.block}.router.{name}.weight"
        _check_stored(stored, path, (1, hidden_size))
        rows.append(stored.tensors.read(path).float())
    return torch.cat(rows)


def _hidden_size(stored: StoredModel) -> int:
    return int(_anchor_config(stored).get_text_config().hidden_size)


def _dtype_beside(stored: StoredModel, site: FfnSite) -> torch.dtype:
    start = f"{ANCHOR_PREFIX}{site.block}.experts.{PUBLIC}."
    return next(TORCH_DTYPES[info.dtype] for path, info in stored.tensors.infos.items() if path.startswith(start))


def _check_kinds(stored: StoredModel, names: Sequence[str], options: Options, to: str) -> None:
    records = [record for record in stored.config.expert_records if record["name"] in names]
    if (others := [record["name"] for record in records if record["kind"] != "full"]) and not options.densify:
        raise ValueError(
            f"{to} has full experts only; low-rank in this model: {', '.join(others)}. --densify (densify=True) "
            "merges them into full experts; or remove them first (flexmoe remove)."
        )


def _check_bias_free(native: NativeFormat, stored: StoredModel) -> None:
    names = stored.config.expert_names
    ends = {f".router.{name}.bias": name for name in names}
    biased = {
        owner
        for path in stored.tensors.infos
        for end, owner in ends.items()
        if path.endswith(end) and bool(stored.tensors.read(path).any())
    }
    if not biased or len(names) == 1:  # a single expert has the weight 1 with any bias
        return
    raise ValueError(
        f"{native.model_type} has no router biases; those of {', '.join(n for n in names if n in biased)} are not zero"
        f" ({PUBLIC}'s is the public prior). --drop-bias (drop_bias=True) leaves them out and changes the model: give "
        "text (flexmoe export --data NAME=FILE) to measure by how much. Experts that were trained without biases and "
        "composed with a prior of 0 can be exported unchanged."
    )


def _check_evidence_free(native: NativeFormat, stored: StoredModel) -> None:
    if names := [record["name"] for record in stored.config.expert_records if "evidence" in record]:
        raise ValueError(
            f"{native.model_type} routes each token by its hidden state alone; {', '.join(names)} are also routed by "
            "the tokens so far. --drop-evidence (drop_evidence=True) leaves that out and changes the model: give text "
            "(flexmoe export --data NAME=FILE) to measure by how much. Experts that were trained with --evidence none "
            "(evidence='none') can be exported unchanged."
        )


def _check_equal_outside_blocks(
    native: NativeFormat, dense: PreTrainedModel, target: PreTrainedModel, sites: Sequence[FfnSite]
) -> None:
    """Checks that both classes hold the same tensors outside of the blocks, whatever their configs are."""
    blocks = tuple(f"{site.block}." for site in sites)

    def others(model: PreTrainedModel) -> set[tuple[str, tuple[int, ...]]]:
        return {(n, tuple(t.shape)) for n, t in model.state_dict().items() if not n.startswith(blocks)}

    if differing := sorted(others(dense) ^ others(target)):
        raise ValueError(
            f"{type(target).__name__} and {type(dense).__name__} differ in {len(differing)} tensors outside of their "
            f"feed-forward networks, such as {differing[0][0]}. {ALTERNATIVES}"
        )


def _check_stored(stored: StoredModel, path: str, shape: Sequence[int]) -> None:
    info = stored.tensors.infos.get(path)
    if info is None:
        raise _missing(stored, path)
    if info.shape != tuple(shape):
        raise ValueError(
            f"{stored.folder}: tensor {path!r} has shape {list(info.shape)}, and this format needs {list(shape)}: "
            "one width for all experts and layers."
        )


def _missing(stored: StoredModel, path: str) -> ValueError:
    return ValueError(
        f"{stored.folder} lacks the tensor {path!r}, which its config implies. Download or write it again."
    )


__all__ = ["DENSE", "TARGETS", "export"]
