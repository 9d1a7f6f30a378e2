"""A dense checkpoint on disk, with tensors named as in the state dict of its ForCausalLM class.

Stored names are mapped by transformers' own rules (renamings of the family, the base model's prefix, ties, ignored
tensors), so a checkpoint is read exactly as by `from_pretrained`, or refused.

`load_causal_lm` loads a model for inference and refuses what transformers would fill with random values.

Does not cover checkpoints whose tensors transformers computes at load (fused, split, transposed, dequantised),
pickles, or code from repositories.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from flexmoe.io.lfs import refuse_pointers
from flexmoe.io.package_config import ExpertPackageConfig
from flexmoe.io.strict_json import JsonDepthError, check_depth
from flexmoe.io.tensors import NOT_RANDOM, CheckpointFolder, TensorInfo, listed, same_bytes
from flexmoe.meta import build_on_meta
from flexmoe.modeling.anchors_flexmoe import FfnSite, UnsupportedAnchorError

MAX_LISTED = 12  # tensors in an error message

MAX_RENAMINGS = 4  # rules in a message

CONVERT = (
    "AutoModelForCausalLM.from_pretrained(folder{options}).save_pretrained(new_folder, save_original_format=False), "
    "then graft new_folder"
)

# Offered only if nothing is missing.
LEFTOVERS = f"If they are unused by transformers, save the checkpoint without them: {CONVERT.format(options='')}."


class CheckpointNamesError(ValueError):
    """The tensors of a checkpoint do not match its model; the message lists them."""


@dataclass(frozen=True)
class NameMatch:
    """The mapping between stored tensors and tensors of the model.

    Attributes:
        stored: name in the state dict -> name in the files, in state dict order; one name per group of tied tensors.
        duplicates: pairs (dropped, kept) of names in the files that the model ties. Their bytes must be equal.
        ignored: names in the files that transformers ignores, e.g. rotary frequencies saved by older versions.
    """

    stored: dict[str, str]
    duplicates: list[tuple[str, str]]
    ignored: list[str]


class DenseCheckpoint:
    """A dense causal LM in a folder: its config, its FFNs, and its tensors under their names in the state dict.

    Attributes:
        config: the model's config.
        model: the model on the meta device.
        sites: its feed-forward networks.
        infos: stored tensors by their name in the model's state dict, in its order.

    Raises:
        FileNotFoundError: no config.json or no safetensors.
        UnsupportedAnchorError: transformers has no such causal LM, or it is an encoder, a mixture of experts, a
            FlexMoE model, or quantised.
        CheckpointNamesError: tensors are missing, unknown, of a wrong shape, or computed at load.
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
            for dropped, kept in match.duplicates:
                _check_equal(self.files, dropped, kept)
        except CheckpointNamesError as error:
            raise CheckpointNamesError(f"{self.folder}: {error}") from error
        self.stored = match.stored
        self.infos = {name: _renamed(self.files.infos[stored], name) for name, stored in match.stored.items()}

    @property
    def dtype(self) -> str:
        """The torch name of the dtype of all floating-point tensors ("bfloat16"), or "mixed"."""
        codes = {info.dtype for info in self.infos.values() if info.dtype in FLOATING}
        return FLOATING[codes.pop()] if len(codes) == 1 else "mixed"

    @property
    def load_dtype(self) -> str:
        """The dtype in which transformers loads this checkpoint by default: its config's, else its tensors'."""
        if self.config.dtype is not None:
            return str(self.config.dtype).removeprefix("torch.")
        sizes: dict[str, int] = {}
        for info in self.infos.values():
            if info.dtype in FLOATING:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        return FLOATING[max(sizes, key=lambda code: sizes[code])] if sizes else "float32"


FLOATING = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def match_names(stored_names: Iterable[str], model: PreTrainedModel) -> NameMatch:
    """Maps stored tensors to `model`'s state dict, as transformers does when it loads a checkpoint.

    Raises:
        CheckpointNamesError: a tensor is unknown, missing, stored twice, or computed at load.
    """
    stored_names = list(stored_names)
    wanted = dict(model.state_dict())
    # In the library's order: some of its renamings depend on earlier names.
    named = dict(_rename(sorted(stored_names, key=dot_natural_key), model, wanted))
    ignored = [stored for stored, name in named.items() if name not in wanted and _is_ignored(name, model)]
    unknown = [stored for stored, name in named.items() if name not in wanted and stored not in ignored]
    by_name: dict[str, str] = {}
    duplicated: list[str] = []
    for stored, name in named.items():
        if name in wanted and by_name.setdefault(name, stored) != stored:
            duplicated.append(f"{by_name[name]} and {stored} (both {name})")
    _raise_for("stored twice", duplicated)
    duplicates = _drop_tied(by_name, model)
    if missing := _missing(by_name, wanted, model):
        raise _incomplete(missing, [*unknown, *ignored], model)
    _raise_for(f"that {type(model).__name__} does not have", unknown, LEFTOVERS)
    return NameMatch({name: by_name[name] for name in wanted if name in by_name}, duplicates, ignored)


def _rename(
    stored_names: Sequence[str], model: PreTrainedModel, wanted: Mapping[str, object]
) -> Iterator[tuple[str, str]]:
    """Pairs (name in the files, name in the model), computed as in `convert_and_load_state_dict_in_model`."""
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
            f"transformers computes {len(computed)} tensor(s) of this checkpoint when it loads them (fuses, splits or "
            f"transposes them), so their bytes cannot be copied: {listed(computed, MAX_LISTED)}. "
            f"Save it in the model's own format first: {CONVERT.format(options='')}. {NOT_RANDOM}"
        )


def _incomplete(missing: Sequence[str], unknown: Sequence[str], model: PreTrainedModel) -> CheckpointNamesError:
    """The error for missing tensors, which `from_pretrained` would fill with random values.

    Converting such a checkpoint by transformers is suggested only with rules that find every missing tensor.
    """
    family = type(model).__name__
    text = f"{len(missing)} tensor(s) missing that {family} needs: {listed(missing)}"
    if unknown:
        text += f"; and {len(unknown)} that it does not have: {listed(unknown)}"
    text += ". transformers would fill the missing ones with random values. "
    if rules := _renamings(missing, unknown, model):
        mapping = ", ".join(f'r"{pattern}": "{prefix}"' for pattern, prefix in rules.items())
        convert = CONVERT.format(options=f", key_mapping={{{mapping}}}")
        return CheckpointNamesError(f"{text}They are stored under other names. Rename them: {convert}.")
    return CheckpointNamesError(
        f"{text}Check that model_type in config.json is that of the weights, and that the folder is complete."
    )


def _renamings(missing: Sequence[str], unknown: Sequence[str], model: PreTrainedModel) -> dict[str, str]:
    """Rules, as transformers' `key_mapping` takes them, that turn unknown tensors into all missing ones; else none.

    Each replaces one prefix by another, such as "model.language_model." by "model.". All tensors under it must be the
    model's, so another part of the checkpoint (an image encoder) is not taken for it.
    """
    known = set(model.state_dict())
    rules: dict[str, str] = {}
    remaining, renamed = list(missing), list(unknown)
    while remaining and len(rules) < MAX_RENAMINGS:
        theirs, ours = _prefixes(remaining[0], unknown)
        under = [name for name in unknown if theirs and name.startswith(theirs)]
        found = {ours + name.removeprefix(theirs) for name in under}
        if remaining[0] not in found or not all(name in known or _is_ignored(name, model) for name in found):
            return {}
        rules[f"^{re.escape(theirs)}"] = ours
        renamed = [re.sub(f"^{re.escape(theirs)}", ours, name) for name in renamed]
        remaining = [name for name in remaining if name not in found]
    return rules if set(renamed).issuperset(missing) else {}


def _prefixes(name: str, others: Iterable[str]) -> tuple[str, str]:
    """What precedes the longest common end of `name` and one of `others`, in that one and in `name`."""
    parts = name.split(".")
    for count in range(len(parts), 1, -1):  # one common part, such as "weight", says nothing
        end = ".".join(parts[-count:])
        for other in others:
            if other.endswith(f".{end}"):
                return other.removesuffix(end), name.removesuffix(end)
    return "", ""


def _is_ignored(name: str, model: PreTrainedModel) -> bool:
    """Whether transformers ignores an unknown tensor: `PreTrainedModel._adjust_missing_and_unexpected_keys`."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [buffer for buffer, _ in model.named_buffers()]
    if any(buffer.endswith("rotary_emb.inv_freq") for buffer in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(buffer.endswith("position_ids") for buffer in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return any(re.search(pattern, name) for pattern in patterns)


def _drop_tied(by_name: dict[str, str], model: PreTrainedModel) -> list[tuple[str, str]]:
    """Keeps one stored tensor per group of tied ones in `by_name`, under the name that the others are tied to."""
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
    _raise_for(
        "whose shape is not that of the config",
        [
            f"{theirs} {list(infos[theirs].shape)} (expected {list(state[name].shape)})"
            for name, theirs in stored.items()
            if infos[theirs].shape != tuple(state[name].shape)
        ],
    )


def _check_equal(files: CheckpointFolder, one: str, other: str) -> None:
    """Checks, chunk by chunk, that two stored tensors that the model ties have equal bytes."""
    first, second = files.infos[one], files.infos[other]
    same = (first.dtype, first.shape) == (second.dtype, second.shape)
    if same and same_bytes(files.chunks(one), files.chunks(other)):
        return
    raise CheckpointNamesError(
        f"the configuration ties {one} to {other}, but both are stored and differ. "
        'Set "tie_word_embeddings": false in config.json if both are meant, or delete one.'
    )


def load_causal_lm(folder: str | Path, kind: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """The model in `folder` by `from_pretrained` of the class `kind`, with every tensor read from the folder.

    Raises:
        CheckpointNamesError: transformers would fill tensors that the folder does not have with random values.
        ValueError: a weight file is a Git LFS pointer.
    """
    refuse_pointers(Path(folder).glob("*.safetensors"))
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        unknown = sorted(info["unexpected_keys"])
        raise CheckpointNamesError(f"{folder}: {_incomplete(missing, unknown, model)}")
    return model


def read_dense_config(folder: Path) -> PreTrainedConfig:
    """The config of the dense model in `folder`.

    Raises:
        FileNotFoundError: no config.json.
        UnsupportedAnchorError: it is a FlexMoE model or quantised, or transformers does not know its model type.
        ValueError: it is an expert package, or a Git LFS pointer.
    """
    path = folder / "config.json"
    if not path.is_file():
        files = sorted(file.name for file in folder.glob("*.gguf"))
        graft = f" To graft {listed(files)}, give --gguf-file NAME (gguf_file=...)." if files else ""
        raise FileNotFoundError(f"{folder} has no config.json, so it is not a transformers checkpoint.{graft}")
    refuse_pointers([path])
    raw, _ = PreTrainedConfig.get_config_dict(folder)
    try:
        check_depth(raw)  # it becomes a part of the graft's config
    except JsonDepthError as error:
        raise UnsupportedAnchorError(f"{path}: the JSON is {error}.") from None
    if raw.get("model_type") == "flexmoe":
        raise UnsupportedAnchorError(f"{folder} is a FlexMoE already: train experts for it, or add packages to it.")
    if raw.get("model_type") == ExpertPackageConfig.model_type:
        raise ExpertPackageConfig.error(folder)
    if raw.get("quantization_config"):
        raise UnsupportedAnchorError(
            f"{folder} is quantised ({raw['quantization_config'].get('quant_method', 'unknown method')}); an anchor's "
            "bytes are copied unchanged, and experts are trained on them. Graft the checkpoint that it was quantised "
            "from."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise UnsupportedAnchorError(
            f"{folder}: the installed transformers has no model_type {raw.get('model_type')!r} (code from the folder "
            "is not run). Update transformers, or choose another anchor."
        ) from error
    config._attn_implementation = config._experts_implementation = None  # a kernel of the Hub that the file names
    return config


def _renamed(info: TensorInfo, name: str) -> TensorInfo:
    return TensorInfo(name, info.dtype, info.shape, info.nbytes)


def _raise_for(fault: str, names: Sequence[str], remedy: str = "") -> None:
    if names:
        raise CheckpointNamesError(f"{len(names)} tensor(s) {fault}: {listed(names, MAX_LISTED)}. {remedy}".rstrip())


__all__ = [
    "CheckpointNamesError",
    "DenseCheckpoint",
    "NameMatch",
    "load_causal_lm",
    "match_names",
    "read_dense_config",
]
