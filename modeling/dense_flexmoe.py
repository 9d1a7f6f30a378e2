"""A dense checkpoint on disk, its tensors named as the state dict of its ForCausalLM names them.

What a stored tensor is called there is decided by transformers' own rules (its renamings for the family, the base
model's prefix added or taken away, ties, tensors it ignores), so a checkpoint is read here exactly as
`from_pretrained` would read it, or refused.

Not here: checkpoints whose tensors transformers computes while it loads (fused, split, transposed, dequantised),
pickles, and code from repositories.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from .anchors_flexmoe import FfnSite, UnsupportedAnchorError, build_on_meta
from .configuration_flexmoe import ExpertPackageConfig
from .tensors_flexmoe import CheckpointFolder, TensorInfo, listed, same_bytes

LISTED = 12  # tensors in a message

WAY_OUT = (
    "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder, save_original_format=False), "
    "then graft new_folder"
)

RELICS = f"If they are relics that transformers may leave out, write the checkpoint without them: {WAY_OUT}."


class CheckpointNamesError(ValueError):
    """The tensors of a checkpoint are not those of its model; the message lists them."""


@dataclass(frozen=True)
class NameMatch:
    """Which stored tensor is which tensor of the model.

    Attributes:
        stored: name in the state dict -> name in the files, in the state dict's order. Of tied tensors, one.
        duplicates: pairs of names in the files that the model ties: (left out, kept). Their bytes must agree.
        ignored: names in the files that transformers ignores when it loads, e.g. older versions' rotary frequencies.
    """

    stored: dict[str, str]
    duplicates: list[tuple[str, str]]
    ignored: list[str]


class DenseCheckpoint:
    """A dense causal LM in a folder: configuration, where its FFNs are, stored tensors under the model's own names.

    Attributes:
        config: the model's configuration.
        model: the model on the meta device.
        sites: its feed-forward networks.
        infos: stored tensors by their name in the model's state dict, in its order.

    Raises:
        FileNotFoundError: no config.json or no safetensors.
        UnsupportedAnchorError: transformers has no such causal LM, or it is an encoder, a mixture of experts already,
            a FlexMoE, or quantised.
        CheckpointNamesError: tensors are missing, unknown, of another shape, or need computing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = read_dense_config(self.folder)
        self.model: PreTrainedModel
        self.sites: list[FfnSite]
        self.model, self.sites = build_on_meta(self.config)
        self.files = CheckpointFolder(self.folder)
        try:
            match = match_names(self.files.infos, self.model)
            _check_shapes(match.stored, self.files.infos, self.model)
            for left_out, kept in match.duplicates:
                _check_equal(self.files, left_out, kept)
        except CheckpointNamesError as error:
            raise CheckpointNamesError(f"{self.folder}: {error}") from error
        self.stored = match.stored
        self.infos = {name: _renamed(self.files.infos[stored], name) for name, stored in match.stored.items()}

    @property
    def dtype(self) -> str:
        """torch's name of the dtype of all floating-point tensors ("bfloat16"), or "mixed"."""
        codes = {info.dtype for info in self.infos.values() if info.dtype in FLOATING}
        return FLOATING[codes.pop()] if len(codes) == 1 else "mixed"

    @property
    def load_dtype(self) -> str:
        """The dtype in which transformers loads this checkpoint when told nothing: its config's, else its tensors'."""
        if self.config.dtype is not None:
            return str(self.config.dtype).removeprefix("torch.")
        sizes: dict[str, int] = {}
        for info in self.infos.values():
            if info.dtype in FLOATING:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        return FLOATING[max(sizes, key=lambda code: sizes[code])] if sizes else "float32"


FLOATING = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def match_names(stored_names: Iterable[str], model: PreTrainedModel) -> NameMatch:
    """Finds each stored tensor's name in `model`'s state dict, as transformers does when it loads a checkpoint.

    Raises:
        CheckpointNamesError: a tensor is unknown, missing, there twice, or would be computed rather than copied.
    """
    stored_names = list(stored_names)
    wanted = dict(model.state_dict())
    # In the library's own order: some of its renamings depend on what came before.
    named = dict(_rename(sorted(stored_names, key=dot_natural_key), model, wanted))
    ignored = [stored for stored, name in named.items() if name not in wanted and _is_ignored(name, model)]
    unknown = [stored for stored, name in named.items() if name not in wanted and stored not in ignored]
    by_name: dict[str, str] = {}
    twice: list[str] = []
    for stored, name in named.items():
        if name in wanted and by_name.setdefault(name, stored) != stored:
            twice.append(f"{by_name[name]} and {stored} (both {name})")
    _refuse("stored twice", twice)
    _refuse(f"that {type(model).__name__} does not have", unknown, RELICS)
    duplicates = _untangle_ties(by_name, model)
    _refuse(f"missing that {type(model).__name__} needs", _missing(by_name, wanted, model))
    return NameMatch({name: by_name[name] for name in wanted if name in by_name}, duplicates, ignored)


def _rename(
    stored_names: Sequence[str], model: PreTrainedModel, wanted: Mapping[str, object]
) -> Iterator[tuple[str, str]]:
    """Pairs (name in the files, name in the model), found as `convert_and_load_state_dict_in_model` finds them."""
    transforms = get_model_conversion_mapping(model)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    computed: list[str] = []
    for stored in stored_names:
        name, converter = rename_source_key(stored, renamings, converters, prefix, wanted)
        if name not in wanted and stored in wanted:
            name, converter = rename_source_key(stored, [], [], prefix, wanted)
        if converter is not None:
            computed.append(stored)
        yield stored, name
    if computed:
        raise CheckpointNamesError(
            f"transformers computes {len(computed)} tensor(s) of this checkpoint while it loads them (fuses, splits, "
            f"turns them), so their bytes cannot be copied: {listed(computed, LISTED)}. "
            f"Write it in the model's own format first: {WAY_OUT}."
        )


def _is_ignored(name: str, model: PreTrainedModel) -> bool:
    """As `PreTrainedModel._adjust_missing_and_unexpected_keys` decides for a stored tensor that the model has not."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [buffer for buffer, _ in model.named_buffers()]
    if any(buffer.endswith("rotary_emb.inv_freq") for buffer in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(buffer.endswith("position_ids") for buffer in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return any(re.search(pattern, name) for pattern in patterns)


def _untangle_ties(by_name: dict[str, str], model: PreTrainedModel) -> list[tuple[str, str]]:
    """Leaves one stored tensor per group of tied ones in `by_name`, under the name that the others are tied to."""
    duplicates = []
    for target, source in model.all_tied_weights_keys.items():
        if target not in by_name:
            continue
        stored = by_name.pop(target)
        if source in by_name:
            duplicates.append((stored, by_name[source]))
        else:
            by_name[source] = stored
    return duplicates


def _missing(by_name: Mapping[str, str], wanted: Iterable[str], model: PreTrainedModel) -> list[str]:
    optional = model._keys_to_ignore_on_load_missing or ()
    tied = model.all_tied_weights_keys
    return [
        name
        for name in wanted
        if name not in by_name and name not in tied and not any(re.search(pattern, name) for pattern in optional)
    ]


def _check_shapes(stored: Mapping[str, str], infos: Mapping[str, TensorInfo], model: PreTrainedModel) -> None:
    state = model.state_dict()
    _refuse(
        "whose shape is not the configuration's",
        [
            f"{theirs} {list(infos[theirs].shape)} (expected {list(state[name].shape)})"
            for name, theirs in stored.items()
            if infos[theirs].shape != tuple(state[name].shape)
        ],
    )


def _check_equal(files: CheckpointFolder, one: str, other: str) -> None:
    """Bytes of tied tensors are compared chunk by chunk: a tie over two different tensors has no right answer."""
    first, second = files.infos[one], files.infos[other]
    same = (first.dtype, first.shape) == (second.dtype, second.shape)
    if same and same_bytes(files.chunks(one), files.chunks(other)):
        return
    raise CheckpointNamesError(
        f"the configuration ties {one} to {other}, but both are stored and differ. "
        'Set "tie_word_embeddings": false in config.json if both are meant, or delete one.'
    )


def read_dense_config(folder: Path) -> PreTrainedConfig:
    """The configuration of the dense model in `folder`.

    Raises:
        FileNotFoundError: no config.json.
        UnsupportedAnchorError: it is a FlexMoE or quantised, or transformers does not know its model type.
        ValueError: it is an expert package.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so it is no checkpoint of transformers.")
    raw, _ = PreTrainedConfig.get_config_dict(folder)
    if raw.get("model_type") == "flexmoe":
        raise UnsupportedAnchorError(f"{folder} is a FlexMoE already: train experts for it, or add packages to it.")
    if raw.get("model_type") == ExpertPackageConfig.model_type:
        raise ExpertPackageConfig.error(folder)
    if raw.get("quantization_config"):
        raise UnsupportedAnchorError(
            f"{folder} is quantised ({raw['quantization_config'].get('quant_method', 'unknown method')}); an anchor's "
            "bytes are copied as they are, and experts are trained on them. Graft the checkpoint it was made from."
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise UnsupportedAnchorError(
            f"{folder}: the installed transformers has no model_type {raw.get('model_type')!r} (code from the folder "
            "is not run). Update transformers, or choose another anchor."
        ) from error


def _renamed(info: TensorInfo, name: str) -> TensorInfo:
    return TensorInfo(name, info.dtype, info.shape, info.nbytes)


def _refuse(fault: str, names: Sequence[str], way_out: str = "") -> None:
    if names:
        raise CheckpointNamesError(f"{len(names)} tensor(s) {fault}: {listed(names, LISTED)}. {way_out}".rstrip())


__all__ = ["CheckpointNamesError", "DenseCheckpoint", "NameMatch", "match_names", "read_dense_config"]
