"""Import: a `flex_olmo` checkpoint becomes a grafted OLMo-2 anchor and one package per expert.

Both layouts are read: one matrix per expert (as published) and all experts stacked (as transformers 5 holds them), in
one file or several. Matrices are copied byte for byte; rows become float32. Expert 0 is the public one. Does not cover
other mixture-of-experts architectures, or composing the experts again (`compose`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import CONFIG_MAPPING

from flexmoe.companions import copy_companions
from flexmoe.conversion.graft import write_config
from flexmoe.conversion.native_formats import FORMATS, carried_fields
from flexmoe.hub.client import resolve_folder
from flexmoe.hub.stored_model import CONFIG_FILE
from flexmoe.io.dense import FLOATING
from flexmoe.io.finite import all_finite
from flexmoe.io.folders import atomic_folder, check_apart, check_new_folder
from flexmoe.io.strict_json import read_json_object
from flexmoe.io.tensors import CheckpointFolder, TensorInfo
from flexmoe.io.writer import (
    MAX_SHARD_SIZE,
    TensorSource,
    finite_source,
    source_from_file,
    source_from_part,
    source_from_tensor,
    write_checkpoint,
)
from flexmoe.meta import build_on_meta
from flexmoe.modeling.anchors_flexmoe import ANCHOR_PREFIX, FfnSite, NameMap
from flexmoe.modeling.configuration_flexmoe import PUBLIC, FlexMoeConfig, check_expert_name, expert_record
from flexmoe.modeling.fingerprint_flexmoe import TORCH_DTYPES, fingerprint
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM
from flexmoe.packages.export import expert_manifest
from flexmoe.packages.package import stream_package
from flexmoe.packages.quantization import check_unquantized

FLEX_OLMO = FORMATS["flex_olmo"]
MODEL_FOLDER = "model"
"""The grafted anchor's folder in the output; the packages lie beside it under the experts' names."""

# For each tensor of an FFN: the stacked tensor that holds it, its position in an expert's part, how many there are.
STACKED = {
    "gate_proj.weight": ("gate_up_proj", 0, 2),
    "up_proj.weight": ("gate_up_proj", 1, 2),
    "down_proj.weight": ("down_proj", 0, 1),
}


def import_flex_olmo(
    checkpoint: str | Path,
    out: str | Path,
    *,
    names: Sequence[str],
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Splits the FlexOlmo `checkpoint` into `out/model`, a grafted OLMo-2 anchor, and `out/<name>`, packages.

    The anchor is made from expert 0 and keeps that expert's router row, which is part of its fingerprint. k, the
    normalisation of weights and the loss coefficients are kept. `compose(out/model, packages)` in the order of `names`
    computes what the checkpoint computes, and `export(..., to="flex_olmo")` of that has its bytes. Returns `out`.

    A bias of the gate (`mlp.gate.bias`, [E]), if stored, becomes min(bias, 0), as FlexOlmo's own code applies it;
    transformers' class has none.

    Args:
        checkpoint: folder or Hub id of a `flex_olmo` model.
        names: names for the experts, in the checkpoint's order; the first is "public".
        max_shard_size: bytes per weight file of the model.
        overwrite: replace an existing `out`.
        progress: called with the number of bytes just written.

    Raises:
        FileExistsError: `out` exists and `overwrite` is False.
        FileNotFoundError: no such checkpoint.
        TypeError: `names` is a string instead of a list.
        ValueError: the checkpoint is not a FlexOlmo model, is quantised, holds other tensors than its config implies,
            or an expert is not finite; or names are missing, superfluous, equal or invalid, or "public" is not first.

    Example:
        ```pycon
        >>> import flexmoe
        >>> folder = flexmoe.import_flex_olmo("flex-olmo", "imported", names=["public", "math", "code"])
        >>> sorted(path.name for path in folder.iterdir())
        ['code', 'math', 'model']
        ```
    """
    target = check_new_folder(out, overwrite)
    source = resolve_folder(checkpoint).path
    check_apart(target, source)
    stored = FlexOlmoCheckpoint.open(source)
    _check_names(names, stored.experts, source)
    with torch.device("meta"):
        model = FlexMoeForCausalLM(stored.flexmoe_config())
    with atomic_folder(target, overwrite, durable=overwrite) as folder:
        _write_model(folder / MODEL_FOLDER, model, stored, max_shard_size, progress)
        for expert, name in enumerate(names[1:], 1):
            sources = list(_package_sources(stored, expert))
            networks = [block.experts[PUBLIC] for block in model.flexmoe_blocks()]
            manifest = expert_manifest(model.config, networks, expert_record(name), _on_meta(sources))
            stream_package(folder / name, manifest, sources, progress=progress)
    return target


@dataclass(frozen=True)
class FlexOlmoCheckpoint:
    """An opened `flex_olmo` checkpoint with checked shapes.

    Attributes:
        folder: where it is.
        config: FlexOlmo's own.
        files: its tensors.
        sites: the FFNs of the OLMo-2 model that corresponds to one of its experts.
        shapes: of one FFN's tensors, by their names in it.
        rows: each layer's router rows, float32 [E, H].
        biases: each layer's effective biases, float32 [E].
    """

    folder: Path
    config: Any
    files: CheckpointFolder
    sites: Sequence[FfnSite]
    shapes: Mapping[str, tuple[int, ...]]
    rows: Sequence[Tensor]
    biases: Sequence[Tensor]

    @classmethod
    def open(cls, folder: Path) -> FlexOlmoCheckpoint:
        """Opens a checkpoint; of the weights only the rows are read.

        Raises:
            FileNotFoundError: no config or no safetensors.
            ValueError: it is another model or quantised, or its tensors do not match its config.
        """
        config = _read_config(folder)
        dense, sites = build_on_meta(_anchor_config(config))
        files = CheckpointFolder(folder)
        _check_tensors(files, _expected_shapes(files, dense, sites, config.num_experts))
        return cls(
            folder=folder,
            config=config,
            files=files,
            sites=sites,
            shapes=_network_shapes(dense, sites[0]),
            rows=[_finite_rows(files, site) for site in sites],
            biases=[_effective_bias(files, site, config.num_experts) for site in sites],
        )

    @property
    def experts(self) -> int:
        """The number of experts."""
        return int(self.config.num_experts)

    def flexmoe_config(self) -> FlexMoeConfig:
        """The config of the grafted anchor: "public" only, everything else as in the checkpoint."""
        return FlexMoeConfig(
            anchor_config=_anchor_config(self.config),
            num_experts_per_tok=self.config.num_experts_per_tok,
            norm_topk_prob=self.config.norm_topk_prob,
            output_router_logits=self.config.output_router_logits,
            router_aux_loss_coef=self.config.router_aux_loss_coef,
        )

    def matrix(self, layer: int, expert: int, name: str, new_name: str) -> TensorSource:
        """A tensor of an expert's FFN, in either layout."""
        alone = FLEX_OLMO.matrix_name(self.sites[layer], expert, name)
        if alone in self.files.infos:
            return source_from_file(self.files, alone, new_name)
        _, part, parts = STACKED[name]
        return source_from_part(
            self.files, _stacked_name(self.sites[layer], name), new_name, self.shapes[name], expert * parts + part
        )

    def row(self, layer: int, expert: int) -> dict[str, Tensor]:
        """An expert's "weight" [1, H] and "bias" [1]."""
        return {"weight": self.rows[layer][expert : expert + 1], "bias": self.biases[layer][expert : expert + 1]}


def _read_config(folder: Path) -> Any:
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}, so it is not a transformers checkpoint.")
    model_type = read_json_object(folder / CONFIG_FILE).get("model_type")
    if model_type != FLEX_OLMO.model_type:
        raise ValueError(
            f"{folder} is a {model_type!r} model; only {FLEX_OLMO.model_type!r} models can be imported. Graft dense "
            "models instead (`flexmoe graft`)."
        )
    config = CONFIG_MAPPING[FLEX_OLMO.model_type].from_pretrained(folder)
    check_unquantized(config, folder, "imported")
    return config


def _anchor_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the OLMo-2 model that corresponds to one expert."""
    (family,) = FLEX_OLMO.families
    kind = CONFIG_MAPPING[family]
    return kind(**carried_fields(config, kind))


def _check_names(names: Sequence[str], experts: int, source: Path) -> None:
    if isinstance(names, str):
        raise TypeError(f"names: one string ({names!r}), expected a list of names. Write {names.split(',')!r}.")
    for name in names:
        check_expert_name(name)
    given = f"given are {len(names)}: {', '.join(names)}"
    if len(names) != experts:
        raise ValueError(f"{source} has {experts} experts, and {given}. Name each, in order, 'public' first.")
    if len(set(names)) != len(names):
        raise ValueError(f"Expert names must differ; {given}.")
    if names[0] != PUBLIC:
        raise ValueError(f"The first expert is the anchor's own and must be named {PUBLIC!r}; {given}.")
    if MODEL_FOLDER in names:
        raise ValueError(
            f"No expert can be named {MODEL_FOLDER!r} here: the grafted anchor is written to that folder."
        )


def _network_shapes(dense: PreTrainedModel, site: FfnSite) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in site.ffn(dense).state_dict().items()}


def _stacked_name(site: FfnSite, name: str) -> str:
    return f"{FLEX_OLMO.block_name(site)}.experts.{STACKED[name][0]}"


def _bias_name(site: FfnSite) -> str:
    return f"{FLEX_OLMO.block_name(site)}.gate.bias"


def _expected_shapes(
    files: CheckpointFolder, dense: PreTrainedModel, sites: Sequence[FfnSite], experts: int
) -> dict[str, tuple[int, ...]]:
    """The tensors that the checkpoint must hold, each layer in its own layout."""
    blocks = tuple(f"{site.block}." for site in sites)
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in dense.state_dict().items()
        if not name.startswith(blocks) and name not in dense.all_tied_weights_keys
    }
    for site in sites:
        expected[FLEX_OLMO.gate_name(site)] = (experts, dense.config.hidden_size)
        if _bias_name(site) in files.infos:
            expected[_bias_name(site)] = (experts,)
        for name, (rows, columns) in _network_shapes(dense, site).items():
            if (stacked := _stacked_name(site, name)) in files.infos:
                expected[stacked] = (experts, STACKED[name][2] * rows, columns)
            else:
                matrices = (FLEX_OLMO.matrix_name(site, expert, name) for expert in range(experts))
                expected |= dict.fromkeys(matrices, (rows, columns))
    return expected


def _check_tensors(files: CheckpointFolder, expected: Mapping[str, tuple[int, ...]]) -> None:
    found = {name: info.shape for name, info in files.infos.items() if not name.endswith("rotary_emb.inv_freq")}
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{files.folder}: {len(wrong)} tensor(s) do not match the config, such as {name!r}: its shape is "
            f"{_shape(found.get(name))}, expected {_shape(expected.get(name))}. Download the checkpoint again."
        )


def _shape(shape: Sequence[int] | None) -> str:
    return "none (no such tensor)" if shape is None else str(list(shape))


def _finite_rows(files: CheckpointFolder, site: FfnSite) -> Tensor:
    """A layer's rows, float32 [E, H]. ValueError: a row is not finite, so it would attract every token or none."""
    rows_EH = files.read(FLEX_OLMO.gate_name(site)).float()
    if not all_finite(rows_EH):
        raise ValueError(f"{files.folder}: tensor {FLEX_OLMO.gate_name(site)!r} holds NaN or an infinity.")
    return rows_EH


def _effective_bias(files: CheckpointFolder, site: FfnSite, experts: int) -> Tensor:
    """min(bias, 0) of a layer's gate, float32 [E]; zeros where none is stored."""
    if _bias_name(site) not in files.infos:
        return torch.zeros(experts)
    return files.read(_bias_name(site)).float().clamp(max=0.0)


def _write_model(
    folder: Path,
    model: FlexMoeForCausalLM,
    stored: FlexOlmoCheckpoint,
    max_shard_size: int,
    progress: Callable[[int], None] | None,
) -> None:
    """Writes the grafted anchor: expert 0's FFNs as those of the dense model, and its router row as public's."""
    folder.mkdir()
    names = NameMap(list(stored.sites))
    sources = list(_model_sources(model, stored, names))
    hashed = {source.info.name for source in sources}
    written = write_checkpoint(
        folder,
        sources,
        max_shard_size=max_shard_size,
        hash_tensors=hashed,
        concurrent=True,
        flush=False,
        progress=progress,
    )
    config = model.config
    config.anchor = _anchor_record(stored, names, [source.info for source in sources], written.tensor_sha256)
    copy_companions(stored.folder, folder, config)
    dtype = config.anchor["dtype"] if config.anchor["dtype"] != "mixed" else "float32"
    write_config(folder, model, stored.config.dtype or dtype)  # last: a folder without it does not load


def _model_sources(model: FlexMoeForCausalLM, stored: FlexOlmoCheckpoint, names: NameMap) -> Iterator[TensorSource]:
    """The tensors to write, in the order of the model's state dict; those tied to another are not stored."""
    expert_0: dict[str, Callable[[str], TensorSource]] = {}
    for layer, site in enumerate(stored.sites):
        block = f"{ANCHOR_PREFIX}{site.block}"
        for name in stored.shapes:
            expert_0[f"{block}.experts.{PUBLIC}.{name}"] = functools.partial(stored.matrix, layer, 0, name)
        for name, value in stored.row(layer, 0).items():
            expert_0[f"{block}.router.{PUBLIC}.{name}"] = functools.partial(source_from_tensor, tensor=value)
    for path in model.state_dict():
        if path in expert_0:
            yield expert_0[path](path)
        elif (dense_name := names.to_dense(path)) and dense_name in stored.files.infos:
            yield source_from_file(stored.files, dense_name, path)


def _package_sources(stored: FlexOlmoCheckpoint, expert: int) -> Iterator[TensorSource]:
    """The expert's tensors under their names in a package, in the order of `save_expert`."""
    for layer, site in enumerate(stored.sites):
        at = f"layers.{site.index}"
        for name in stored.shapes:
            yield finite_source(
                stored.matrix(layer, expert, name, f"{at}.ffn.{name}"),
                ValueError(
                    f"{stored.folder}: expert {expert} holds NaN or an infinity, in {name} of layer {site.index}. "
                    "Download the checkpoint again; if it was published like this, that expert is unusable."
                ),
            )
        for name, value in stored.row(layer, expert).items():
            yield source_from_tensor(f"{at}.router.{name}", value)


def _on_meta(sources: Sequence[TensorSource]) -> dict[str, Tensor]:
    infos = [source.info for source in sources]
    return {info.name: torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype], device="meta") for info in infos}


def _anchor_record(
    stored: FlexOlmoCheckpoint, names: NameMap, infos: Sequence[TensorInfo], digests: Mapping[str, str]
) -> dict[str, str | None]:
    """The record that identifies the anchor; it has no repository of its own."""
    rows = {
        f"{ANCHOR_PREFIX}{site.block}.router.{PUBLIC}.weight": stored.rows[i][0] for i, site in enumerate(stored.sites)
    }
    lines, dtypes = [], set()
    for info in infos:
        name = names.to_dense(info.name)
        if name is not None:
            dtypes.add(FLOATING.get(info.dtype, "mixed"))
        if name is not None or (info.name in rows and rows[info.name].any()):
            lines.append((name or info.name, info.dtype, info.shape, digests[info.name]))
    return {
        "repo": None,
        "revision": None,
        "fingerprint": fingerprint(lines),
        "model_type": _anchor_config(stored.config).model_type,
        "dtype": dtypes.pop() if len(dtypes) == 1 else "mixed",
    }


__all__ = ["MODEL_FOLDER", "FlexOlmoCheckpoint", "import_flex_olmo"]
