"""Inspection of a folder with a FlexMoE model, a composition or an expert package, without loading the weights.

Reads the configuration, the headers of the weight files and the router rows: kilobytes, whatever the model's size.
Does not verify hashes (a package is verified when it is added, by `flexmoe.packages.package`), and does not access the
Hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from flexmoe.composition.format import Composition
from flexmoe.io.strict_json import read_json_object
from flexmoe.io.tensors import CheckpointFolder, TensorInfo
from flexmoe.modeling.configuration_flexmoe import FlexMoeConfig
from flexmoe.packages.checks import check_row_shape
from flexmoe.packages.manifest import MANIFEST_FILE
from flexmoe.packages.package import ExpertPackage

MODEL_FILE = "config.json"

# A model's tensors name their expert, "anchor.model.layers.3.mlp.router.math.weight"; those of a package, which has
# one expert, do not: "layers.3.router.weight". Expert names contain no dot.
_EXPERT_TENSOR = re.compile(r"(?P<block>.+)\.(?:experts|router)\.(?P<expert>[a-z][a-z0-9_-]*)\..+")
_ROW_TENSOR = re.compile(r"(?P<block>.+)\.router\.(?:(?P<expert>[a-z][a-z0-9_-]*)\.)?(?P<part>weight|bias)")


def inspect(path: str | Path, device: str | None = None, experts_implementation: str | None = None) -> dict[str, Any]:
    """Describes the contents of a folder.

    Args:
        path: the folder.
        device: "cpu" or "cuda", to include the implementation of each layer on that device; None leaves it out.
        experts_implementation: as in `from_pretrained`; None: the default, "auto".

    Returns:
        A dictionary with `kind` ("model", "composition" or "package"), `path`, `anchor` (its record), `layers` (the
        number with experts), `parameters`, `bytes`, and `experts`, a list in the model's order (one entry for a
        package) with `name`, `kind`, `active`, `parameters`, `bytes`, `row_norms` and `biases` (one per layer),
        `rank`, `alpha`, `version`, `license`, `data_statement`, `training`, `source`; None if nothing is recorded. A
        model also has `model_type`, `num_experts_per_tok`, `norm_topk_prob`, `public_prior` (None if layers differ),
        `public_sample`, and with a `device`, `paths`: for each layer `layer`, `implementation` ("torch", "triton") and
        `reason`. For a composition, which holds no weights, figures of weights are None, and `source` is the reference
        to a part.

    Raises:
        FileNotFoundError: no such folder, or neither a model nor a package in it.
        ValueError: a dense model, or files that contradict each other.

    Example:
        ```pycon
        >>> import flexmoe
        >>> found = flexmoe.inspect("math-expert")
        >>> found["kind"], found["experts"][0]["license"]
        ('package', 'cc-by-4.0')
        ```
    """
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder. Give the folder of a model or of an expert package.")
    if (folder / MANIFEST_FILE).is_file():
        return _inspect_package(folder)
    if (folder / MODEL_FILE).is_file():
        found = _inspect_model(folder)
        return found if device is None else {**found, "paths": _paths(folder, device, experts_implementation)}
    raise FileNotFoundError(
        f"{folder} contains neither {MODEL_FILE} (a model) nor {MANIFEST_FILE} (an expert package)."
    )


def _inspect_model(folder: Path) -> dict[str, Any]:
    model_type = read_json_object(folder / MODEL_FILE).get("model_type")
    if model_type != FlexMoeConfig.model_type:
        raise ValueError(
            f"{folder} is a {model_type} model, not a FlexMoE model. Graft it: flexmoe graft {folder} --out FOLDER"
        )
    config = FlexMoeConfig.from_pretrained(folder)
    if config.composition is not None:
        return _inspect_composition(folder, config)
    with CheckpointFolder(folder) as checkpoint:
        rows = _rows(_read_rows(checkpoint, config.get_text_config().hidden_size))
        tensors = _by_expert(checkpoint.infos.values())
        experts = [
            _expert(record, tensors.get(record["name"], []), rows.get(record["name"], {})) for record in config.experts
        ]
        totals = _totals(checkpoint.infos.values())
    active = set(config.expert_names if config.active_experts is None else config.active_experts)
    for expert in experts:
        expert["active"] = expert["name"] in active
    priors = set(experts[0]["biases"])
    return {
        "kind": "model",
        "path": str(folder),
        "model_type": config.model_type,
        "anchor": config.anchor or {"model_type": config.anchor_config.model_type},
        "layers": len(experts[0]["row_norms"]),
        **totals,
        "num_experts_per_tok": config.num_experts_per_tok,
        "norm_topk_prob": config.norm_topk_prob,
        "public_prior": priors.pop() if len(priors) == 1 else None,
        "public_sample": config.public_sample,
        "experts": experts,
    }


def _paths(folder: Path, device: str, experts_implementation: str | None) -> list[dict[str, Any]]:
    """The implementation of each layer, found with a model on the meta device."""
    from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM

    config: Any = FlexMoeConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = FlexMoeForCausalLM(config).eval().to(config.dtype or torch.get_default_dtype())
    if experts_implementation is not None:
        model.set_experts_implementation(experts_implementation)
    capability = torch.cuda.get_device_capability() if device == "cuda" and torch.cuda.is_available() else None
    paths = model.implementation_paths(device=device, capability=capability)
    quantized = bool(getattr(config, "quantization_config", None))  # the model on the meta device is not
    return [
        {
            "layer": block.layer_index,
            "implementation": "triton" if path.fuses_experts and not quantized else "torch",
            "reason": "the model is quantised" if quantized else path.reason,
        }
        for block, path in zip(model.flexmoe_blocks(), paths, strict=True)
    ]


def _inspect_composition(folder: Path, config: FlexMoeConfig) -> dict[str, Any]:
    composition = Composition.from_config(config)
    anchor_config: Any = config.anchor_config
    active = set(config.expert_names if config.active_experts is None else config.active_experts)
    references = composition.references
    experts = [
        _expert(record, [], {}) | {"parameters": None, "bytes": None, "active": record["name"] in active}
        for record in config.expert_records
    ]
    for expert in experts:
        expert["source"] = references[expert["name"]].to_dict()
    return {
        "kind": "composition",
        "path": str(folder),
        "model_type": config.model_type,
        "anchor": {"model_type": anchor_config.model_type, **(config.anchor or {}), **composition.anchor.to_dict()},
        "layers": None,
        "parameters": None,
        "bytes": None,
        "num_experts_per_tok": config.num_experts_per_tok,
        "norm_topk_prob": config.norm_topk_prob,
        "public_prior": None,
        "public_sample": config.public_sample,
        "experts": experts,
    }


def _inspect_package(folder: Path) -> dict[str, Any]:
    package = ExpertPackage.open(folder)
    infos = package.infos.values()
    expert = _expert(package.manifest.record(), infos, _rows(package.read_rows()).get(None, {}))
    return {
        "kind": "package",
        "path": str(folder),
        "anchor": dict(package.manifest.anchor),
        "layers": len(package.manifest.layers),
        **_totals(infos),
        "experts": [expert | {"active": True}],
    }


def _expert(
    record: Mapping[str, Any], tensors: Iterable[TensorInfo], rows: Mapping[str, list[float]]
) -> dict[str, Any]:
    recorded = ("rank", "alpha", "version", "license", "data_statement", "training", "source")
    return {
        "name": record["name"],
        "kind": record.get("kind", "full"),
        **_totals(tensors),
        "row_norms": rows.get("weight", []),
        "biases": rows.get("bias", []),
        **{key: record.get(key) for key in recorded},
    }


def _totals(tensors: Iterable[TensorInfo]) -> dict[str, int]:
    tensors = list(tensors)
    return {"parameters": sum(prod(info.shape) for info in tensors), "bytes": sum(info.nbytes for info in tensors)}


def _by_expert(tensors: Iterable[TensorInfo]) -> dict[str, list[TensorInfo]]:
    """A model's tensors by expert; shared tensors of the anchor are left out."""
    found: dict[str, list[TensorInfo]] = {}
    for info in tensors:
        if match := _EXPERT_TENSOR.fullmatch(info.name):
            found.setdefault(match["expert"], []).append(info)
    return found


def _read_rows(checkpoint: CheckpointFolder, hidden_size: int) -> dict[str, torch.Tensor]:
    """The router rows and biases of a model; errors as `check_row_shape`, before any is read."""
    infos = [info for info in checkpoint.infos.values() if _ROW_TENSOR.fullmatch(info.name)]
    for info in infos:
        check_row_shape(info, hidden_size, checkpoint.folder)
    return {info.name: checkpoint.read(info.name) for info in infos}


def _rows(tensors: Mapping[str, torch.Tensor]) -> dict[str | None, dict[str, list[float]]]:
    """Row norms and biases by layer: {expert: {"weight": [...], "bias": [...]}}; the expert of a package is None."""
    found: dict[str | None, dict[str, list[float]]] = {}
    for name in sorted(tensors, key=_natural):
        if match := _ROW_TENSOR.fullmatch(name):
            value = tensors[name].float().norm() if match["part"] == "weight" else tensors[name].float().sum()
            found.setdefault(match["expert"], {}).setdefault(match["part"], []).append(value.item())
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts "layers.10" after "layers.9"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


__all__ = ["inspect"]
