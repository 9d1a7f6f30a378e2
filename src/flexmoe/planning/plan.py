"""Cost estimates for a FlexMoE model before training: parameters, memory, FLOPs, GPU hours, decode speed.

Reads the anchor's configuration and builds the model on the meta device; `docs/planning.md` has the formulas. Experts
are full (the size of the anchor's FFNs) or low-rank (a product B A of rank R for each of their matrices).

Does not cover activations, KV caches, attention scores (which grow with the sequence length) or communication between
GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from flexmoe.hub.client import resolve_folder
from flexmoe.io.dense import read_dense_config
from flexmoe.io.strict_json import read_json_object
from flexmoe.meta import build_on_meta
from flexmoe.modeling.anchors_flexmoe import FfnSite
from flexmoe.modeling.configuration_flexmoe import PUBLIC, FlexMoeConfig
from flexmoe.planning.gpus import Gpu, find_gpu

EXPERTS = 7
"""Default number of experts, including public: FlexOlmo's released 7x7B."""

ACTIVE_EXPERTS = 5
"""Default k: that of the released FlexOlmo-7x7B-1T."""

TOKENS_PER_PARAMETER = 20
"""Compute-optimal tokens per parameter: Chinchilla (arXiv 2203.15556), Cerebras-GPT (arXiv 2304.03208)."""

MFU = 0.4
"""Default model FLOPs utilisation: the fraction of a GPU's peak that training reaches."""

USABLE_MEMORY = 0.9
"""The fraction of a GPU's memory available to weights, the default of vLLM's `gpu_memory_utilization`."""

TRAINED_BYTES = 4 + 4 + 8
"""Bytes per trained parameter, all in float32: the weight, its gradient, and Adam's two moments."""

_ROW_BYTES = 4  # router rows stay in float32
_OTHER_BYTES = {"float32": 4, "bfloat16": 2, "int8": 2}
_MATRIX_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
_TRAINING_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Parameters:
    """Parameter counts; tied parameters count once.

    Attributes:
        anchor: of the dense model, including public's FFNs.
        per_expert: of one owner's expert: FFNs, router rows and biases.
        total: of the complete model.
        active: used for one token: shared parameters (input embeddings and head in full), all router rows, and k
            experts. Low-rank experts use public's FFNs, which then count even if public is not chosen.
    """

    anchor: int
    per_expert: int
    total: int
    active: int


@dataclass(frozen=True)
class Training:
    """One owner's training of the anchor with the own expert; every token is processed by both.

    Attributes:
        trained_parameters: of the expert; all others are frozen.
        tokens: number of training tokens.
        compute_optimal_tokens: `TOKENS_PER_PARAMETER` for each trained parameter.
        forward_flops, activation_gradient_flops, weight_gradient_flops: per token.
        flops: of the complete training.
        mfu: the assumed fraction of the GPU's peak.
        gpu_hours: at that fraction.
        frozen_bytes: of the frozen parameters.
        trained_bytes: of the expert with its gradient and optimiser state.
        memory_bytes: the sum of both, without activations.
        gpus: the number that holds this if it is split evenly.
    """

    trained_parameters: int
    tokens: int
    compute_optimal_tokens: int
    forward_flops: int
    activation_gradient_flops: int
    weight_gradient_flops: int
    flops: float
    mfu: float
    gpu_hours: float
    frozen_bytes: int
    trained_bytes: int
    memory_bytes: int
    gpus: int


@dataclass(frozen=True)
class Serving:
    """The complete model in one dtype. With int8, the matrices of decoder layers are int8, all others bfloat16.

    Attributes:
        model_bytes: of all weights.
        bytes_per_token: of the weights that the GPU reads for one token at batch size 1.
        seconds_per_token: lower bound: the time to read them on one GPU.
        tokens_per_second: the corresponding upper bound.
        gpus: the number that holds the weights.
    """

    model_bytes: int
    bytes_per_token: int
    seconds_per_token: float
    tokens_per_second: float
    gpus: int


@dataclass(frozen=True)
class Plan:
    """The costs of a FlexMoE model. FLOPs count a multiplication and an addition as two.

    Attributes:
        anchor: as given to `plan`.
        model_type: the anchor's.
        layers: number of decoder layers.
        experts: number of experts, including public.
        k: experts per token.
        rank: of each owner's expert; None for full experts.
        dtype: of the frozen model in training, and of packages.
        gpu: the GPU of the estimates.
        parameters: parameter counts.
        package_bytes: size of one expert package's weights.
        training: one owner's training.
        serving: by dtype: float32, bfloat16, int8.

    Example:
        ```pycon
        >>> import flexmoe
        >>> plan = flexmoe.plan("anchor", experts=3, k=2)
        >>> plan.experts, plan.k, plan.rank
        (3, 2, None)
        >>> plan.serving["bfloat16"].tokens_per_second > 0
        True
        ```
    """

    anchor: str
    model_type: str
    layers: int
    experts: int
    k: int
    rank: int | None
    dtype: str
    gpu: Gpu
    parameters: Parameters
    package_bytes: int
    training: Training
    serving: dict[str, Serving]

    def to_dict(self) -> dict[str, Any]:
        """The plan as a nested dictionary, ready for JSON."""
        return asdict(self)


def plan(
    anchor: str | Path | PreTrainedConfig,
    *,
    experts: int | None = None,
    k: int | None = None,
    rank: int | None = None,
    tokens_per_expert: float | None = None,
    gpu: str = "h200",
    dtype: str = "bfloat16",
    mfu: float = MFU,
    gpu_tflops: float | None = None,
    gpu_memory_gb: float | None = None,
    gpu_bandwidth_tb: float | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Plan:
    """Estimates the costs of a FlexMoE model on `anchor`. No weights are read.

    Args:
        anchor: a folder or Hub id with the config.json of a dense causal LM or of a FlexMoE model, or a configuration.
        experts: number of experts including public, as in "7x7B"; None: those of a FlexMoE model with owners, else 7.
        k: experts per token; None: the FlexMoE model's, else 5, at most the number of experts.
        rank: of low-rank experts; None: as in the FlexMoE model, else full experts.
        tokens_per_expert: training tokens of each owner; None: the compute-optimal number.
        gpu: a name in `flexmoe.planning.gpus.GPUS`, or any other name with all figures.
        dtype: of the frozen model in training, and of packages: "float32" or "bfloat16".
        mfu: the assumed fraction of the GPU's peak in training.
        gpu_tflops, gpu_memory_gb, gpu_bandwidth_tb: figures instead of the table's, in the units of `Gpu`.
        revision, token: of a Hub repository.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: no such anchor, or no config.json.
        TypeError: a count is not an integer.
        ValueError: a count is out of range, the rank too large for a matrix, the GPU or the dtype unknown, or the
            model cannot be an anchor.

    Example:
        ```pycon
        >>> import flexmoe
        >>> plan = flexmoe.plan("anchor", experts=7, k=5, gpu="h200")
        >>> plan.parameters.total > plan.parameters.active
        True
        ```
    """
    chosen_gpu = find_gpu(gpu, tflops=gpu_tflops, memory_gb=gpu_memory_gb, bandwidth_tb=gpu_bandwidth_tb)
    if dtype not in _TRAINING_DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be 'float32' or 'bfloat16', the dtypes for training.")
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu={mfu!r}: must be above 0 and at most 1; {MFU} is common.")
    source = type(anchor).__name__ if isinstance(anchor, PreTrainedConfig) else str(anchor)
    config: Any = anchor if isinstance(anchor, PreTrainedConfig) else _read_config(anchor, revision, token)
    if config.model_type == FlexMoeConfig.model_type:
        if config.expert_names != [PUBLIC]:  # a grafted anchor is planned for as a dense one
            experts = len(config.expert_names) if experts is None else experts
            k = min(config.num_experts_per_tok, experts) if k is None else k
            rank = _recorded_rank(config) if rank is None else rank
        config = config.anchor_config
    experts = _count("experts", EXPERTS if experts is None else experts)
    k = _count("k", min(ACTIVE_EXPERTS, experts) if k is None else k)
    if k > experts:
        raise ValueError(f"k={k} experts per token, but there are {experts} experts (public included): lower k.")
    costs = _Costs(*build_on_meta(config), experts, k, None if rank is None else _count("rank", rank))
    return Plan(
        anchor=source,
        model_type=config.model_type,
        layers=costs.layers,
        experts=experts,
        k=k,
        rank=rank,
        dtype=dtype,
        gpu=chosen_gpu,
        parameters=Parameters(
            anchor=costs.anchor.count,
            per_expert=costs.expert.count,
            total=costs.total.count,
            active=costs.active.count,
        ),
        package_bytes=costs.expert.nbytes(dtype),
        training=_training(costs, tokens_per_expert, chosen_gpu, dtype, mfu),
        serving={name: _serving(costs, chosen_gpu, name) for name in _MATRIX_BYTES},
    )


@dataclass(frozen=True)
class _Weights:
    """Parameter counts by storage: matrices of decoder layers, router rows with biases, all others."""

    matrices: int = 0
    rows: int = 0
    other: int = 0

    def __add__(self, more: _Weights) -> _Weights:
        return _Weights(self.matrices + more.matrices, self.rows + more.rows, self.other + more.other)

    def __mul__(self, times: int) -> _Weights:
        return _Weights(self.matrices * times, self.rows * times, self.other * times)

    @property
    def count(self) -> int:
        return self.matrices + self.rows + self.other

    def nbytes(self, dtype: str) -> int:
        return self.matrices * _MATRIX_BYTES[dtype] + self.rows * _ROW_BYTES + self.other * _OTHER_BYTES[dtype]


class _Costs:
    """The weights of a FlexMoE model: all of them, those used for one token, those multiplied with its activations."""

    def __init__(self, dense: PreTrainedModel, sites: list[FfnSite], experts: int, k: int, rank: int | None) -> None:
        self.layers = len(sites)
        hidden = dense.config.get_text_config().hidden_size
        in_layers = {id(p) for site in sites for p in dense.get_submodule(site.layer).parameters()}
        lookups = _lookups(dense)
        shared = list(dense.parameters())  # tied ones come once
        matrices = [p for p in shared if p.dim() > 1 and id(p) not in lookups]
        quantizable = sum(p.numel() for p in matrices if id(p) in in_layers)

        self.anchor = _Weights(quantizable, other=sum(p.numel() for p in shared) - quantizable)
        row = _Weights(rows=self.layers * (hidden + 1))
        full = sum((_full_network(site.ffn(dense)) for site in sites), _Weights())
        own = full if rank is None else sum((_low_rank(site, site.ffn(dense), rank) for site in sites), _Weights())
        self.expert = own + row
        self.total = self.anchor + row + self.expert * (experts - 1)
        # the anchor includes public's FFNs: one of the k full experts; low-rank experts always use them
        besides_public = k - 1 if rank is None else min(k, experts - 1)
        self.active = self.anchor + row * experts + own * besides_public
        self.read = self.active + _Weights(other=-sum(lookups.values()))

        first_layer = dense.get_submodule(sites[0].layer)
        rows_of_two = 2 * hidden
        self.multiplied = sum(p.numel() for p in matrices) + full.matrices + self.layers * rows_of_two
        self.multiplied += 0 if rank is None else own.matrices
        self.before_trained = sum(p.numel() for p in first_layer.parameters() if p.dim() > 1) + rows_of_two
        self.trained_matrices = own.matrices + self.layers * hidden


def _training(costs: _Costs, tokens: float | None, gpu: Gpu, dtype: str, mfu: float) -> Training:
    trained = costs.expert.count
    optimal = TOKENS_PER_PARAMETER * trained
    if tokens is not None and not (math.isfinite(tokens) and tokens >= 1):
        raise ValueError(f"tokens_per_expert={tokens!r}: must be a number of tokens, such as 50e9.")
    planned = optimal if tokens is None else int(tokens)
    forward = 2 * costs.multiplied
    activation_gradient = 2 * (costs.multiplied - costs.before_trained)
    weight_gradient = 2 * costs.trained_matrices
    flops = float(planned) * (forward + activation_gradient + weight_gradient)
    row_of_public = _Weights(rows=costs.expert.rows)
    frozen_bytes = (costs.anchor + row_of_public).nbytes(dtype)
    trained_bytes = TRAINED_BYTES * trained
    return Training(
        trained_parameters=trained,
        tokens=planned,
        compute_optimal_tokens=optimal,
        forward_flops=forward,
        activation_gradient_flops=activation_gradient,
        weight_gradient_flops=weight_gradient,
        flops=flops,
        mfu=mfu,
        gpu_hours=flops / (gpu.tflops * 1e12 * mfu) / 3600,
        frozen_bytes=frozen_bytes,
        trained_bytes=trained_bytes,
        memory_bytes=frozen_bytes + trained_bytes,
        gpus=_gpus(frozen_bytes + trained_bytes, gpu),
    )


def _serving(costs: _Costs, gpu: Gpu, dtype: str) -> Serving:
    model_bytes = costs.total.nbytes(dtype)
    bytes_per_token = costs.read.nbytes(dtype)
    seconds = bytes_per_token / (gpu.bandwidth_tb * 1e12)
    return Serving(model_bytes, bytes_per_token, seconds, 1 / seconds, _gpus(model_bytes, gpu))


def _gpus(nbytes: int, gpu: Gpu) -> int:
    return math.ceil(nbytes / (USABLE_MEMORY * gpu.memory_gb * 1e9))


def _lookups(dense: PreTrainedModel) -> dict[int, int]:
    """Sizes, by id, of tables that are only indexed: embeddings that are not tied to the head."""
    head = dense.get_output_embeddings()
    head_weight = None if head is None else getattr(head, "weight", None)
    tables = (module.weight for module in dense.modules() if isinstance(module, nn.Embedding))
    return {id(table): table.numel() for table in tables if table is not head_weight}


def _full_network(network: nn.Module) -> _Weights:
    matrices = sum(p.numel() for p in network.parameters() if p.dim() > 1)
    return _Weights(matrices, other=sum(p.numel() for p in network.parameters()) - matrices)


def _low_rank(site: FfnSite, network: nn.Module, rank: int) -> _Weights:
    """R (O + I) for each matrix [O, I] of the network and a delta for each bias; norms are public's."""
    matrices = 0
    for name, (rows, columns) in _matrix_shapes(network):
        if rank > min(rows, columns):
            raise ValueError(
                f"rank={rank} is too large for {site.layer}: {name} is [{rows}, {columns}]. Give a rank of at most "
                f"{min(rows, columns)}, or none for full experts."
            )
        matrices += rank * (rows + columns)
    biases = sum(p.numel() for name, p in network.named_parameters() if name.split(".")[-1] == "bias")
    return _Weights(matrices, other=biases)


def _matrix_shapes(network: nn.Module) -> Iterator[tuple[str, torch.Size]]:
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            yield name, parameter.flatten(1).shape


def _read_config(anchor: str | Path, revision: str | None, token: str | bool | None) -> PreTrainedConfig:
    folder = resolve_folder(anchor, revision=revision, token=token, allow_patterns=["config.json"]).path
    path = folder / "config.json"
    if path.is_file() and read_json_object(path).get("model_type") == FlexMoeConfig.model_type:
        return FlexMoeConfig.from_pretrained(folder)
    return read_dense_config(folder)


def _recorded_rank(config: FlexMoeConfig) -> int | None:
    """The rank of all owners' experts of a FlexMoE model; None for full experts, or if there are none."""
    ranks: set[int | None] = set()
    for record in config.expert_records[1:]:  # the first is public
        if "intermediate" in record:
            raise ValueError(
                f"The expert {record['name']!r} has another width than public, but a plan assumes experts of one "
                "size: plan from the dense anchor."
            )
        ranks.update(record.get("rank") or [None])
    if len(ranks) > 1:
        raise ValueError(
            "The experts of this model have several sizes, but a plan assumes one: give the rank of future experts, "
            "or plan full experts from its dense anchor."
        )
    return next(iter(ranks), None)


def _count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer of at least 1; got {value!r} ({type(value).__name__}).")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}.")
    return value


__all__ = ["Parameters", "Plan", "Serving", "Training", "plan"]
