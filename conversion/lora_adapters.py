"""LoRA adapters of an anchor as its low-rank experts: PEFT's folder in, factors under the names of a FlexMoE out.

An adapter that changes nothing but feed-forward matrices is a low-rank expert already: `W + scale * B A`, with the
anchor's W. Source: LoRA, arXiv 2106.09685; rank-stabilised LoRA, arXiv 2312.03732; PEFT's adapter folders.

Not here: adapters of other kinds, or whose training changed the anchor's own weights (PiSSA and its kin); whether the
adapter was trained on this very anchor, which its folder does not say.
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

from flexmoe.modeling.anchors_flexmoe import ANCHOR_PREFIX, NameMap
from flexmoe.modeling.configuration_flexmoe import PUBLIC, expert_record
from flexmoe.modeling.dense_flexmoe import DenseCheckpoint
from flexmoe.modeling.experts_flexmoe import make_expert
from flexmoe.modeling.finite_flexmoe import all_finite
from flexmoe.modeling.folders_flexmoe import file_inside
from flexmoe.modeling.hub_flexmoe import ResolvedFolder
from flexmoe.modeling.json_flexmoe import read_json_object
from flexmoe.modeling.low_rank_flexmoe import as_out_in
from flexmoe.modeling.tensor_writer_flexmoe import TensorSource, source_from_tensor
from flexmoe.modeling.tensors_flexmoe import TORCH_DTYPES, TensorFile, listed

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
LISTED = 6  # of what does not fit, in a message

WAY_OUT = (
    "Merge it into the model (PEFT: merge_and_unload), save that, and give the folder instead; where it differs from "
    "the anchor outside of its feed-forward networks, --shared decides"
)

# What of PEFT's LoraConfig changes what an adapter computes in a way that no low-rank expert has, if it is set.
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

_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

Factors = tuple[Tensor, Tensor]
"""A [rank, in] and B [out, rank] of one matrix."""


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter on the anchor's feed-forward matrices that becomes the low-rank expert `name`.

    Attributes:
        name: of the expert.
        source: the adapter's folder.
        rank: of the expert, per layer.
        alpha: its scale is `alpha / rank`; None is 1.
        tensors: its tensors, by their names in the FlexMoE.
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
            FileNotFoundError: its weights are not there, or not as safetensors.
            ValueError: it is no LoRA adapter on feed-forward matrices of this anchor alone; says what else it is.
        """
        config = read_json_object(file_inside(source.path, CONFIG_FILE))
        _check_config(source.path, config)
        factors = _read_factors(source.path, anchor)
        layers = [f"{site.layer}." for site in anchor.sites]
        rank = [max([len(a) for path, (a, _) in factors.items() if path.startswith(at)], default=1) for at in layers]
        scales = {path: _scale(config, path, len(a_RI)) for path, (a_RI, _) in factors.items()}
        # one scale and one rank, as adapters have by default: alpha says the scale; else it goes into the factors
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
        """The expert's tensors to be written, by their names in the FlexMoE."""
        return {path: source_from_tensor(path, tensor) for path, tensor in self.tensors.items()}

    def _fill(
        self, factors: Mapping[str, Factors], scales: Mapping[str, float], anchor: DenseCheckpoint
    ) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the expert, in the anchor's dtypes: the factors, filled up with zeros to the layer's rank."""
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
                        f"{self.source.path}: a factor of {module} holds numbers too large for {made.dtype}, the "
                        "dtype of this anchor. Graft an anchor that is stored in bfloat16 or float32."
                    )
                yield start + key, made


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of PEFT and no weights of a model; some trainers save the model's config."""
    return (folder / CONFIG_FILE).is_file() and not any(folder.glob("model*.safetensors*"))


def _check_config(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} is an adapter of type {config.get('peft_type')!r}; only LORA is read. {WAY_OUT}.")
    settings = [key for key in _UNSUPPORTED if config.get(key)]
    settings += ["bias"] if config.get("bias", "none") != "none" else []
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_ANCHOR):
        settings.append("init_lora_weights")
    if settings:
        which = ", ".join(f"{key}={config[key]!r}" for key in settings)
        raise ValueError(f"{folder}: {which}: a low-rank expert is W + scale * B A, and cannot say that. {WAY_OUT}.")


def _read_factors(folder: Path, anchor: DenseCheckpoint) -> dict[str, Factors]:
    """The factors of each matrix, by the name of its module in the dense model."""
    if not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS_FILE}, and nothing else is read (pickles run code). Load the adapter with PEFT "
            "and save it again: save_pretrained(folder, safe_serialization=True)."
        )
    names = NameMap(anchor.sites)
    found: dict[str, dict[str, Tensor]] = {}
    strangers = []
    with TensorFile(file_inside(folder, WEIGHTS_FILE)) as file:
        for stored in file.infos:
            match = _TENSOR.fullmatch(stored)
            weight = f"{match['module']}.weight" if match else ""
            if match is None or weight not in anchor.infos or not names.is_ffn(weight):
                strangers.append(stored)
                continue
            tensor = file.read(stored)
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{folder}: tensor {stored!r} holds NaN or an infinity.")
            found.setdefault(match["module"], {})[match["side"]] = tensor
            _check_shape(folder, stored, tensor, anchor, weight, match["side"])
    if strangers or not found:
        raise ValueError(
            f"{folder} changes what is no feed-forward matrix of {anchor.folder}, in {len(strangers)} tensors: "
            f"{listed(strangers, LISTED) or 'it is empty'}. An expert has these alone. {WAY_OUT}."
        )
    for path, sides in found.items():
        if sides.keys() != {"A", "B"} or len(sides["A"]) != sides["B"].shape[1]:
            raise ValueError(f"{folder}: the factors of {path} do not belong together.")
    return {path: (sides["A"], sides["B"]) for path, sides in found.items()}


def _check_shape(folder: Path, stored: str, tensor: Tensor, anchor: DenseCheckpoint, weight: str, side: str) -> None:
    part = anchor.model.get_submodule(weight.removesuffix(".weight"))
    out_in = as_out_in(part, anchor.model.get_parameter(weight)).shape
    ours, theirs = (out_in[1], tensor.shape[-1]) if side == "A" else (out_in[0], tensor.shape[0])
    if tensor.dim() != 2 or ours != theirs:
        raise ValueError(
            f"{folder}: tensor {stored!r} has shape {list(tensor.shape)}, and the matrix is {list(out_in)} in "
            f"{anchor.folder}: the adapter was made for another model."
        )


def _scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    """What PEFT multiplies B A by: alpha / rank, or alpha / sqrt(rank) if rank-stabilised; patterns name modules."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", path):
            alpha = value
            break
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


__all__ = ["LoraAdapter", "is_adapter"]
