"""LoRA adapters of an anchor as its low-rank experts: reads PEFT's folder, makes the tensors of a FlexMoE model.

An adapter that changes only FFN matrices is a low-rank expert: `W + scale * B A`, with the anchor's W.

Does not cover other kinds of adapters, adapters whose initialisation changes the anchor's weights (such as PiSSA), or
whether the adapter was trained on this very anchor, which its folder does not record.

Sources: LoRA, arXiv 2106.09685; rank-stabilised LoRA, arXiv 2312.03732; PEFT's adapter folders.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexmoe.hub.client import ResolvedFolder
from flexmoe.io.dense import DenseCheckpoint
from flexmoe.io.finite import all_finite
from flexmoe.io.folders import file_inside
from flexmoe.io.strict_json import read_json_object
from flexmoe.io.tensors import TensorFile, listed
from flexmoe.io.writer import TensorSource, source_from_tensor
from flexmoe.modeling.anchors_flexmoe import ANCHOR_PREFIX, NameMap
from flexmoe.modeling.configuration_flexmoe import PUBLIC, expert_record
from flexmoe.modeling.experts_flexmoe import make_expert
from flexmoe.modeling.fingerprint_flexmoe import TORCH_DTYPES
from flexmoe.modeling.low_rank_flexmoe import as_out_in

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
LISTED = 6  # tensors in a message

ALTERNATIVE = (
    "Merge it into the model (PEFT: merge_and_unload), save that, and give the folder instead; if it differs from the "
    "anchor outside of its feed-forward networks, --shared (shared=) decides"
)

# Fields of PEFT's LoraConfig that, if set, change what an adapter computes in a way that a low-rank expert cannot.
_UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "lora_bias",
    "modules_to_save",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
)
_CHANGES_THE_ANCHOR = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Where classes of transformers have the text model, whose layers an adapter may name.
TEXT_MODELS = ("model.language_model.", "language_model.model.", "model.text_model.", "language_model.", "model.", "")

_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

Factors = tuple[Tensor, Tensor]
"""The factors A [rank, in] and B [out, rank] of one matrix."""


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter on the anchor's FFN matrices that becomes the low-rank expert `name`.

    Attributes:
        name: of the expert.
        source: the adapter's folder.
        rank: of the expert, per layer.
        alpha: the scale is `alpha / rank`; None: the scale is 1.
        tensors: the expert's tensors, by their names in the FlexMoE model.
    """

    name: str
    source: ResolvedFolder
    rank: list[int]
    alpha: float | None
    tensors: Mapping[str, Tensor]

    @classmethod
    def open(cls, name: str, source: ResolvedFolder, anchor: DenseCheckpoint) -> LoraAdapter:
        """Reads the adapter in the folder `source`.

        Raises:
            FileNotFoundError: there are no weights in safetensors format.
            ValueError: it is not a LoRA adapter on FFN matrices of this anchor only; names the reason.
        """
        config = read_json_object(file_inside(source.path, CONFIG_FILE))
        _check_config(source.path, config)
        factors, names = _read_factors(source.path, anchor)
        layers = [f"{site.layer}." for site in anchor.sites]
        rank = [max([len(a) for path, (a, _) in factors.items() if path.startswith(at)], default=1) for at in layers]
        # PEFT's patterns are for the names of the class that was trained
        scales = {path: _scale(config, names[path], len(a_RI)) for path, (a_RI, _) in factors.items()}
        # with one scale and one rank, the default of adapters, alpha holds the scale; else it is merged into B
        uniform = len(set(scales.values())) == 1 and len({len(a_RI) for a_RI, _ in factors.values()} | set(rank)) == 1
        alpha = next(iter(scales.values())) * rank[0] if uniform else None
        adapter = cls(name, source, rank, alpha, {})
        return replace(adapter, tensors=dict(adapter._fill(factors, {} if uniform else scales, anchor)))

    def record(self) -> dict[str, Any]:
        """The expert's record in the model's config."""
        repo = {"repo": self.source.repo, "revision": self.source.revision}
        values = {"name": self.name, "kind": "low_rank", "rank": self.rank, "alpha": self.alpha}
        return expert_record({**values, "training": {"lora_adapter": repo} if self.source.repo else None})

    def sources(self, names: NameMap) -> dict[str, TensorSource]:
        """The expert's tensors to write, by their names in the FlexMoE model."""
        return {path: source_from_tensor(path, tensor) for path, tensor in self.tensors.items()}

    def _fill(
        self, factors: Mapping[str, Factors], scales: Mapping[str, float], anchor: DenseCheckpoint
    ) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the expert, in the anchor's dtypes: the factors, padded with zeros to the layer's rank."""
        hidden_size = anchor.config.get_text_config().hidden_size
        names = NameMap(anchor.sites)
        for site in anchor.sites:
            network = site.ffn(anchor.model)
            expert = make_expert(network, self.record(), layer=site.index, hidden_size=hidden_size)
            start = f"{ANCHOR_PREFIX}{site.block}.experts.{self.name}."
            for key, empty in expert.state_dict().items():
                path, side, parameter = key.rsplit(".", 2)
                weight = str(names.to_dense(f"{ANCHOR_PREFIX}{site.block}.experts.{PUBLIC}.{path}.weight"))
                module = weight.removesuffix(".weight")
                filled = torch.zeros(empty.shape)
                if module in factors and parameter == "weight":
                    given = factors[module]["AB".index(side)]
                    filled[: given.shape[0], : given.shape[1]] = given.float()
                    if side == "B":
                        filled *= scales.get(module, 1.0)
                made = filled.to(TORCH_DTYPES[anchor.infos[weight].dtype])
                if not all_finite(made):
                    raise ValueError(
                        f"{self.source.path}: a factor of {module} holds values too large for {made.dtype}, the "
                        "dtype of this anchor. Graft an anchor that is stored in bfloat16 or float32."
                    )
                yield start + key, made


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter and no model weights (some trainers save the model's config with it)."""
    return (folder / CONFIG_FILE).is_file() and not any(folder.glob("model*.safetensors*"))


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(
            f"{folder} is an adapter of type {config.get('peft_type')!r}; only LORA is supported. {ALTERNATIVE}."
        )
    settings = [key for key in _UNSUPPORTED if config.get(key)]
    settings += ["bias"] if config.get("bias", "none") != "none" else []
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_ANCHOR):
        settings.append("init_lora_weights")
    if settings:
        which = ", ".join(f"{key}={config[key]!r}" for key in settings)
        raise ValueError(
            f"{folder}: {which}: a low-rank expert is W + scale * B A and cannot represent that. {ALTERNATIVE}."
        )


def _read_factors(folder: Path, anchor: DenseCheckpoint) -> tuple[dict[str, Factors], dict[str, str]]:
    """The factors of each matrix, and the module's name in the adapter; both by its name in the dense model."""
    if not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS_FILE}, and no other format is read (pickles run code). Load the adapter with "
            "PEFT and save it again: save_pretrained(folder, safe_serialization=True)."
        )
    modules = _module_names(anchor)
    found: dict[str, dict[str, Tensor]] = {}
    theirs: dict[str, str] = {}
    unsupported = []
    with TensorFile(file_inside(folder, WEIGHTS_FILE)) as file:
        for stored in file.infos:
            match = _TENSOR.fullmatch(stored)
            module = modules.get(match["module"]) if match else None
            if match is None or module is None:
                unsupported.append(stored)
                continue
            if theirs.setdefault(module, match["module"]) != match["module"]:
                raise ValueError(f"{folder} has two names for {module}: {theirs[module]} and {match['module']}.")
            tensor = file.read(stored)
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{folder}: tensor {stored!r} holds NaN or an infinity.")
            found.setdefault(module, {})[match["side"]] = tensor
            _check_shape(folder, stored, tensor, anchor, f"{module}.weight", match["side"])
    if unsupported or not found:
        raise ValueError(
            f"{folder} changes more than feed-forward matrices of {anchor.folder}, in {len(unsupported)} tensors: "
            f"{listed(unsupported, LISTED) or 'it is empty'}. An expert has only these. {ALTERNATIVE}."
        )
    for path, sides in found.items():
        if sides.keys() != {"A", "B"} or len(sides["A"]) != sides["B"].shape[1]:
            raise ValueError(f"{folder}: the factors of {path} do not match each other.")
    return {path: (sides["A"], sides["B"]) for path, sides in found.items()}, theirs


def _module_names(anchor: DenseCheckpoint) -> dict[str, str]:
    """The names that an adapter may have for each matrix of the FFNs -> its module's name in the dense model.

    An adapter has the names of the class that it was trained with: the anchor's, another of its family (for text and
    images, for text alone), or those of the checkpoint.
    """
    is_ffn = NameMap(anchor.sites).is_ffn
    stored = {ours: theirs for ours, theirs in anchor.stored.items() if ours.endswith(".weight") and is_ffn(ours)}
    *parts, _, _ = anchor.sites[0].layer.split(".")
    top = "".join(f"{part}." for part in parts)
    names: dict[str, str] = {}
    for ours, theirs in stored.items():
        inside = (f"{text_model}{ours.removeprefix(top)}" for text_model in TEXT_MODELS)
        for name in (ours, theirs, *inside):
            names.setdefault(name.removesuffix(".weight"), ours.removesuffix(".weight"))
    return names


def _check_shape(folder: Path, stored: str, tensor: Tensor, anchor: DenseCheckpoint, weight: str, side: str) -> None:
    part = anchor.model.get_submodule(weight.removesuffix(".weight"))
    out_in = as_out_in(part, anchor.model.get_parameter(weight)).shape
    ours, theirs = (out_in[1], tensor.shape[-1]) if side == "A" else (out_in[0], tensor.shape[0])
    if tensor.dim() != 2 or ours != theirs:
        raise ValueError(
            f"{folder}: tensor {stored!r} has shape {list(tensor.shape)}, but the matrix has {list(out_in)} in "
            f"{anchor.folder}: the adapter was made for another model."
        )


def _scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    """The scale of B A in PEFT: alpha / rank, or alpha / sqrt(rank) if rank-stabilised; alpha may differ by module."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            alpha = value
            break
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


__all__ = ["LoraAdapter", "is_adapter"]
