"""Dense fine-tunes of an anchor as its experts: what they may differ in, and what becomes of what all share.

A fine-tune is a checkpoint of the anchor's own architecture. Its feed-forward networks become an expert; everything
else (attention, norms, embeddings) is there once in a FlexMoE, so it must be the anchor's, byte for byte, or somebody
decides: the anchor's is kept, or the average of all is taken, as Branch-Train-MiX does (arXiv 2403.07816).

Not here: the graft itself (`graft`), adapters (`lora_adapters`), router rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from flexmoe.modeling.anchors_flexmoe import NameMap
from flexmoe.modeling.configuration_flexmoe import expert_record
from flexmoe.modeling.dense_flexmoe import DenseCheckpoint
from flexmoe.modeling.finite_flexmoe import all_finite
from flexmoe.modeling.hub_flexmoe import ResolvedFolder
from flexmoe.modeling.tensor_writer_flexmoe import TensorSource, finite_source, source_from_file
from flexmoe.modeling.tensors_flexmoe import (
    TORCH_DTYPES,
    Chunk,
    TensorInfo,
    listed,
    same_bytes,
    tensor_bytes,
)

Shared = Literal["anchor", "average"]
SHARED = ("anchor", "average")
LISTED = 6  # of what differs, in a message

# Fields of a configuration that say where a checkpoint was made and how it is used, not what it computes.
NOT_COMPUTED = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "pad_token_id",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


# Fields that say how attention, positions and the vocabulary work. They may differ where all of that is the anchor's.
OUTSIDE_OF_NETWORKS = frozenset(
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
        """The expert's record in the model's config; where it came from is no package, so it is no `source`."""
        repo = {"repo": self.source.repo, "revision": self.source.revision}
        return expert_record({"name": self.name, "training": {"dense_fine_tune": repo} if self.source.repo else None})

    def sources(self, names: NameMap) -> dict[str, TensorSource]:
        """The expert's tensors to be written, by their names in the FlexMoE.

        Drawing numbers that are not finite is a ValueError.
        """
        paths = {dense_name: names.to_flexmoe(dense_name, self.name) for dense_name in self.dense.infos}
        return {path: self._source(name, path) for name, path in paths.items() if names.is_ffn(name)}

    def _source(self, dense_name: str, name: str) -> TensorSource:
        source = source_from_file(self.dense.files, self.dense.stored[dense_name], name)
        if not TORCH_DTYPES[source.info.dtype].is_floating_point:
            return source
        fault = ValueError(
            f"{self.dense.folder} ({self.name}): tensor {self.dense.stored[dense_name]!r} holds NaN or an infinity, "
            "so it is no expert. Take an earlier checkpoint of that training, or leave it out."
        )
        return finite_source(source, fault)

    @classmethod
    def open(cls, name: str, source: ResolvedFolder, anchor: DenseCheckpoint, *, shared: Shared | None) -> FineTune:
        """Opens the fine-tune in the folder `source`; compares headers and configurations with the anchor's.

        Where `shared` is "anchor", only the networks must be the anchor's in shape and dtype: another vocabulary or
        other positions are no matter.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: it is not a fine-tune of this anchor: another architecture, tensors of other names, shapes or
                dtypes; lists what differs.
        """
        dense, what = DenseCheckpoint(source.path), f"{name}={source.repo or source.path}"
        _check_same_architecture(anchor, dense, what, networks_only=shared == "anchor")
        return cls(name, source, dense)


def check_shared(anchor: DenseCheckpoint, fine_tunes: Sequence[FineTune], names: NameMap) -> None:
    """Compares all bytes outside of the feed-forward networks.

    Raises:
        ValueError: some differ; lists the tensors and says who can decide.
    """
    shared = [name for name in anchor.infos if not names.is_ffn(name)]
    for fine_tune in fine_tunes:
        different = [name for name in shared if not same_bytes(_chunks(anchor, name), _chunks(fine_tune.dense, name))]
        if different:
            raise ValueError(
                f"{fine_tune.dense.folder} ({fine_tune.name}) differs from the anchor outside of its feed-forward "
                f"networks, in {len(different)} of {len(shared)} tensors: {listed(different, LISTED)}. A FlexMoE "
                "has these once: choose --shared anchor (shared='anchor') to keep the anchor's, or --shared average "
                "for the mean of the anchor and all fine-tunes."
            )


def averaged_source(name: str, dense_name: str, checkpoints: Sequence[DenseCheckpoint]) -> TensorSource:
    """The mean of the tensor `dense_name` over `checkpoints`, in float32 and rounded once, to be called `name`.

    Integers and booleans cannot be averaged: the first checkpoint's are taken. Drawing a mean that is not finite is a
    ValueError.
    """
    first = checkpoints[0].infos[dense_name]
    if not TORCH_DTYPES[first.dtype].is_floating_point:
        return source_from_file(checkpoints[0].files, checkpoints[0].stored[dense_name], name)
    info = TensorInfo(name, first.dtype, first.shape, first.nbytes)

    def chunks() -> Iterator[Chunk]:
        dtype = TORCH_DTYPES[first.dtype]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        streams = [_chunks(checkpoint, dense_name) for checkpoint in checkpoints]
        for parts in zip(*streams, strict=True):  # files of one length are cut at the same places
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
    anchor: DenseCheckpoint, dense: DenseCheckpoint, what: str, *, networks_only: bool
) -> None:
    ours, theirs = _computed(anchor), _computed(dense)
    free = OUTSIDE_OF_NETWORKS if networks_only else frozenset()
    fields = sorted(key for key in (ours.keys() | theirs.keys()) - free if ours.get(key) != theirs.get(key))
    if fields:
        which = listed([f"{key} ({theirs.get(key)!r}, the anchor's is {ours.get(key)!r})" for key in fields], LISTED)
        raise ValueError(
            f"{what} is not a fine-tune of {anchor.folder}: their configurations differ in {which}. An expert stands "
            "beside the anchor's attention and norms, so it is trained with them."
            + (
                " --shared anchor (shared='anchor') takes its networks alone."
                if OUTSIDE_OF_NETWORKS.issuperset(fields)
                else ""
            )
        )
    is_ffn = NameMap(anchor.sites).is_ffn
    different = [
        f"{name} ({_described(dense.infos.get(name))}, the anchor's is {_described(anchor.infos.get(name))})"
        for name in dict.fromkeys([*anchor.infos, *dense.infos])
        if (is_ffn(name) or not networks_only)
        and _described(dense.infos.get(name)) != _described(anchor.infos.get(name))
    ]
    if different:
        raise ValueError(
            f"{what} is not stored as {anchor.folder} is, in {len(different)} tensors: "
            f"{listed(different, LISTED)}. Save both in one dtype, "
            "AutoModelForCausalLM.from_pretrained(folder, dtype=...).save_pretrained(new_folder), and with one "
            "vocabulary."
        )


def _computed(dense: DenseCheckpoint) -> dict[str, Any]:
    return {key: value for key, value in dense.config.to_dict().items() if key not in NOT_COMPUTED}


def _chunks(dense: DenseCheckpoint, name: str) -> Iterator[memoryview]:
    return dense.files.chunks(dense.stored[name])


def _described(info: TensorInfo | None) -> str:
    return "missing" if info is None else f"{info.dtype} {list(info.shape)}, {math.prod(info.shape):,} numbers"


__all__ = ["SHARED", "FineTune", "Shared", "averaged_source", "check_shared"]
