"""Dense fine-tunes of an anchor as its experts: in what they may differ, and how shared tensors are chosen.

A fine-tune is a checkpoint of the anchor's own architecture, or of the text model that a multimodal anchor consists of
in part: training libraries often save that alone. Its feed-forward networks become an expert; all other
tensors (attention, norms, embeddings) exist once in a FlexMoE model, so they must equal the anchor's byte for byte, or
the caller decides: keep the anchor's, or average over all checkpoints as Branch-Train-MiX does (arXiv 2403.07816).

Does not cover the graft itself (`graft`), adapters (`lora_adapters`) or router rows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig

from flexmoe.hub.client import ResolvedFolder
from flexmoe.io.dense import DenseCheckpoint
from flexmoe.io.finite import all_finite
from flexmoe.io.tensors import Chunk, TensorInfo, listed, same_bytes
from flexmoe.io.writer import TensorSource, finite_source, source_from_file
from flexmoe.modeling.anchors_flexmoe import NameMap
from flexmoe.modeling.configuration_flexmoe import expert_record
from flexmoe.modeling.fingerprint_flexmoe import TORCH_DTYPES, tensor_bytes

Shared = Literal["anchor", "average"]
SHARED = ("anchor", "average")
LISTED = 6  # differences in a message

# Config fields about the origin and use of a checkpoint, which do not change what it computes; also in the parts of a
# composite config (text_config, vision_config).
METADATA_FIELDS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers.js_config",  # of the JavaScript library, in many published fine-tunes
        "transformers_version",
        "unsloth_fixed",  # of a training library, likewise
        "unsloth_version",
        "use_cache",
    }
)


# Config fields of attention, positions and the vocabulary. They may differ if only the FFNs of a fine-tune are used.
NON_FFN_FIELDS = frozenset(
    {
        "attention_dropout",
        "initializer_range",
        "layer_types",
        "max_position_embeddings",
        "max_window_layers",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sliding_window",
        "tie_word_embeddings",
        "use_sliding_window",
        "vocab_size",
    }
)


@dataclass(frozen=True)
class FineTune:
    """A dense fine-tune of the anchor that becomes the expert `name`."""

    name: str
    source: ResolvedFolder
    dense: DenseCheckpoint

    def record(self) -> dict[str, Any]:
        """The expert's record in the model's config; its origin is not a package, so it is not a `source`."""
        repo = {"repo": self.source.repo, "revision": self.source.revision}
        return expert_record({"name": self.name, "training": {"dense_fine_tune": repo} if self.source.repo else None})

    def sources(self, names: NameMap) -> dict[str, TensorSource]:
        """The expert's tensors to write, by their names in the FlexMoE model.

        Reading values that are not finite raises ValueError.
        """
        paths = {dense_name: names.to_flexmoe(dense_name, self.name) for dense_name in self.dense.infos}
        return {path: self._source(name, path) for name, path in paths.items() if names.is_ffn(name)}

    def _source(self, dense_name: str, name: str) -> TensorSource:
        source = source_from_file(self.dense.files, self.dense.stored[dense_name], name)
        if not TORCH_DTYPES[source.info.dtype].is_floating_point:
            return source
        fault = ValueError(
            f"{self.dense.folder} ({self.name}): tensor {self.dense.stored[dense_name]!r} holds NaN or an infinity, "
            "so it cannot be an expert. Use an earlier checkpoint of that training, or leave it out."
        )
        return finite_source(source, fault)

    @classmethod
    def open(cls, name: str, source: ResolvedFolder, anchor: DenseCheckpoint, *, shared: Shared | None) -> FineTune:
        """Opens the fine-tune in the folder `source` and compares headers and configurations with the anchor's.

        If `shared` is "anchor", only the FFNs must match in shape and dtype; vocabulary and positions may differ.
        Tensors of the anchor that a checkpoint of the text model alone does not have (an image encoder) are the
        anchor's.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: it is not a fine-tune of this anchor: another architecture, or tensors of other names, shapes
                or dtypes; lists the differences.
        """
        what = f"{name}={source.repo or source.path}"
        opened = DenseCheckpoint(source.path)
        names = _names_in(anchor, opened, what)
        dense = _renamed(opened, names)
        _check_same_architecture(anchor, dense, what, set(names.values()), networks_only=shared == "anchor")
        return cls(name, source, dense)


def check_shared(anchor: DenseCheckpoint, fine_tunes: Sequence[FineTune], names: NameMap) -> None:
    """Compares all bytes outside of the feed-forward networks.

    Raises:
        ValueError: some differ; lists the tensors and the options.
    """
    for fine_tune in fine_tunes:
        shared = [name for name in anchor.infos if not names.is_ffn(name) and name in fine_tune.dense.infos]
        different = [name for name in shared if not same_bytes(_chunks(anchor, name), _chunks(fine_tune.dense, name))]
        if different:
            raise ValueError(
                f"{fine_tune.dense.folder} ({fine_tune.name}) differs from the anchor outside of its feed-forward "
                f"networks, in {len(different)} of {len(shared)} tensors: {listed(different, LISTED)}. A FlexMoE "
                "model has these once: choose --shared anchor (shared='anchor') to keep the anchor's, or --shared "
                "average for the mean of the anchor and all fine-tunes."
            )


def averaged_source(name: str, dense_name: str, checkpoints: Sequence[DenseCheckpoint]) -> TensorSource:
    """The mean of the tensor `dense_name` over `checkpoints`, computed in float32 and rounded once, under `name`.

    Checkpoints of the text model alone do not have all tensors of the first one, and do not count for the others.
    Integers and booleans are not averaged: the first checkpoint's are used. Reading a mean that is not finite raises
    ValueError.
    """
    first = checkpoints[0].infos[dense_name]
    checkpoints = [checkpoint for checkpoint in checkpoints if dense_name in checkpoint.infos]
    if len(checkpoints) == 1 or not TORCH_DTYPES[first.dtype].is_floating_point:
        return source_from_file(checkpoints[0].files, checkpoints[0].stored[dense_name], name)
    info = TensorInfo(name, first.dtype, first.shape, first.nbytes)

    def chunks() -> Iterator[Chunk]:
        dtype = TORCH_DTYPES[first.dtype]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        streams = [_chunks(checkpoint, dense_name) for checkpoint in checkpoints]
        for parts in zip(*streams, strict=True):  # tensors of one size are split at the same offsets
            values = [torch.frombuffer(bytearray(part), dtype=dtype).to(wide) for part in parts]
            mean = torch.stack(values).mean(0).to(dtype)
            if not all_finite(mean):
                raise ValueError(
                    f"The mean of {dense_name!r} over the anchor and its fine-tunes holds NaN or an infinity. Choose "
                    "--shared anchor (shared='anchor'), or leave out the fine-tune that has it."
                )
            yield tensor_bytes(mean)

    return TensorSource(info, chunks)


def _check_same_architecture(
    anchor: DenseCheckpoint, dense: DenseCheckpoint, what: str, present: Collection[str], *, networks_only: bool
) -> None:
    """Compares configurations and headers; `present`: the names of the tensors that the class of `dense` has."""
    # the model's own config: a class for text alone has that part of a composite config
    config: PreTrainedConfig = anchor.model.config
    if type(dense.model) is not type(anchor.model):
        config = config.get_text_config()
    ours, theirs = _computation_fields(config), _computation_fields(dense.model.config)
    fields = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    outside = [key for key in fields if _is_outside_of_ffns(key, config)]
    only_outside = len(outside) == len(fields)
    if networks_only:
        fields = [key for key in fields if key not in outside]
    if fields:
        which = listed([f"{key} ({theirs.get(key)!r}, the anchor's is {ours.get(key)!r})" for key in fields], LISTED)
        raise ValueError(
            f"{what} is not a fine-tune of {anchor.folder}: their configurations differ in {which}. An expert is used "
            "with the anchor's attention and norms, so it must be trained with them."
            + (" --shared anchor (shared='anchor') uses only its feed-forward networks." if only_outside else "")
        )
    is_ffn = NameMap(anchor.sites).is_ffn
    different = [
        f"{name} ({_described(dense.infos.get(name))}, the anchor's is {_described(anchor.infos.get(name))})"
        for name in dict.fromkeys([*anchor.infos, *dense.infos])
        if name in present
        and (is_ffn(name) or not networks_only)
        and _described(dense.infos.get(name)) != _described(anchor.infos.get(name))
    ]
    if different:
        raise ValueError(
            f"{what} is not stored like {anchor.folder}, in {len(different)} tensors: "
            f"{listed(different, LISTED)}. Save both in one dtype, "
            "AutoModelForCausalLM.from_pretrained(folder, dtype=...).save_pretrained(new_folder), and with one "
            "vocabulary."
        )


def _names_in(anchor: DenseCheckpoint, dense: DenseCheckpoint, what: str) -> dict[str, str]:
    """The names of all tensors of the class of `dense`, and what they are called in the anchor's class.

    Both are of one class, or `dense` is of the class for the anchor's text model alone: "model.layers.0..." of
    Gemma3ForCausalLM is "model.language_model.layers.0..." in Gemma3ForConditionalGeneration.

    Raises:
        ValueError: it is of another class.
    """
    state = list(dense.model.state_dict())
    if type(dense.model) is type(anchor.model):
        return {name: name for name in state}
    text, prefix = dense.model.base_model, f"{dense.model.base_model_prefix}."
    paths = [path for path, module in anchor.model.named_modules() if type(module) is type(text)]
    if len(paths) == 1 and type(text) is not type(anchor.model.base_model):
        names = {
            name: f"{paths[0]}.{name.removeprefix(prefix)}" if name.startswith(prefix) else name for name in state
        }
        if anchor.model.state_dict().keys() >= set(names.values()):
            return names
    ours, theirs = type(anchor.model).__name__, type(dense.model).__name__
    raise ValueError(
        f"{what} is not a fine-tune of {anchor.folder}: it loads as {theirs} (model_type "
        f"{dense.config.model_type!r}), the anchor as {ours} (model_type {anchor.config.model_type!r}). Both must be "
        f"of one class, or the fine-tune of that of the anchor's text model: save it with {ours}, or graft the model "
        "that it is a fine-tune of."
    )


def _renamed(dense: DenseCheckpoint, names: Mapping[str, str]) -> DenseCheckpoint:
    """The checkpoint with its tensors under other names."""
    renamed = copy.copy(dense)
    renamed.stored = {names[name]: stored for name, stored in dense.stored.items()}
    renamed.infos = {names[name]: replace(info, name=names[name]) for name, info in dense.infos.items()}
    return renamed


def _computation_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that determine what a model computes; those of the parts of a composite config by dotted names."""
    fields: dict[str, Any] = {}
    for key, value in config.to_dict().items():
        part = getattr(config, key, None) if key in config.sub_configs else None
        if isinstance(part, PreTrainedConfig):
            fields |= {f"{key}.{inner}": theirs for inner, theirs in _computation_fields(part).items()}
        elif key not in METADATA_FIELDS:
            fields[key] = value
    return fields


def _is_outside_of_ffns(field: str, config: PreTrainedConfig) -> bool:
    """Whether a field says nothing about the FFNs: positions, vocabulary, or a part that is not the text model."""
    *parts, name = field.split(".")
    is_other_part = bool(parts) and getattr(config, parts[0]) is not config.get_text_config()
    return is_other_part or name in NON_FFN_FIELDS


def _chunks(dense: DenseCheckpoint, name: str) -> Iterator[memoryview]:
    return dense.files.chunks(dense.stored[name])


def _described(info: TensorInfo | None) -> str:
    return "missing" if info is None else f"{info.dtype} {list(info.shape)}, {math.prod(info.shape):,} elements"


__all__ = ["SHARED", "FineTune", "Shared", "averaged_source", "check_shared"]
