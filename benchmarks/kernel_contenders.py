"""The contenders of `bench_kernels.py`: the block of FlexMoE, that of FlexOlmo with the same weights, and a loop.

Also the float64 references of the router and the experts, computed in parts that fit into memory. Does not cover
timing.

Shapes: T tokens, H hidden, I intermediate, E experts, K slots.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from bench_forward import NAMES, SIZES, K, flex_olmo, run_experts_as, with_its_tensors
from torch import Tensor, nn
from transformers import FlexOlmoForCausalLM, Olmo2Config

from flexmoe.kernels.experts.op import mix
from flexmoe.kernels.experts.reference import ExpertTensors
from flexmoe.kernels.route.op import route
from flexmoe.kernels.route.reference import Routing
from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM
from flexmoe.modeling.masking_flexmoe import ForwardContext, forward_scope

Layer = Callable[[Tensor], Tensor]

FULL = {
    **SIZES,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
TINY = {**FULL, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}
"""For a run without a GPU."""

RANK = 16  # of low-rank experts
CLOSE = 1e-4  # rounding may reverse the order of logits that are closer than this


@contextlib.contextmanager
def default_device(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Sets the default device and dtype of new tensors in the context."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(default)


def models(sizes: Mapping[str, Any], device: torch.device) -> tuple[FlexMoeForCausalLM, FlexOlmoForCausalLM]:
    """Both models in bfloat16, with the same tensors."""
    with default_device(device, torch.bfloat16):
        theirs = flex_olmo(sizes)
        ours = with_its_tensors(theirs, sizes)
    return ours, theirs


@torch.no_grad()
def low_rank_block(sizes: Mapping[str, Any], device: torch.device) -> Any:
    """A block of FlexMoE in bfloat16 with public and low-rank experts."""
    experts = [NAMES[0], *({"name": name, "kind": "low_rank", "rank": [RANK]} for name in NAMES[1:])]
    with default_device(device, torch.bfloat16):
        anchor = Olmo2Config(**{**sizes, "num_hidden_layers": 1})
        model = FlexMoeForCausalLM(FlexMoeConfig(anchor_config=anchor, experts=experts, num_experts_per_tok=K)).eval()
    block = model.flexmoe_blocks()[0]
    for name, parameter in block.named_parameters():
        if ".B." in name or "router" in name:  # both start at zero
            parameter.normal_(std=0.02)
    return block


def our_layer(block: Any, implementation: str) -> Layer:
    """The block of FlexMoE; `implementation`: "eager" or "flexmoe_triton"."""
    context = ForwardContext(names=tuple(block.experts), top_k=K, renormalize=True, implementation=implementation)

    def run(x_TH: Tensor) -> Tensor:
        with forward_scope(context):
            return block(x_TH[None])[0]

    return run


def their_layer(model: FlexOlmoForCausalLM, implementation: str) -> Layer:
    """The block of FlexOlmo with its router; `implementation`: "eager", "grouped_mm" or "batched_mm"."""

    def run(x_TH: Tensor) -> Tensor:
        run_experts_as(model, implementation)
        return model.model.layers[0].mlp(x_TH[None])[0]

    return run


def loop_layer(block: nn.Module) -> Layer:
    """The fused router, then cuBLAS for each expert; not capturable, because the host reads the counts."""
    (rows, biases), experts = router_of(block), experts_of(block)

    def run(x_TH: Tensor) -> Tensor:
        routing = route(x_TH, rows, biases, None, K, True)
        experts_TK, order = routing.top_ids_TK.flatten().sort(stable=True)
        counts = experts_TK.bincount(minlength=len(rows) + 1).tolist()
        tokens = order // routing.top_ids_TK.shape[1]
        weights = routing.top_weights_TK.flatten()[order].to(x_TH.dtype)
        gathered = (x_TH[tokens], weights[:, None])
        y_TH = torch.zeros_like(x_TH)
        parts = zip(tokens.split(counts), *(part.split(counts) for part in gathered), strict=True)
        for e, (tokens_N, x_NH, weight_N1) in enumerate(parts):
            if e < len(rows) and len(tokens_N):
                h_NI = F.silu(x_NH @ experts.gate[e].t()).mul_(x_NH @ experts.up[e].t())
                y_TH.index_add_(0, tokens_N, (h_NI @ experts.down[e].t()).mul_(weight_N1))
        return y_TH

    return run


def router_of(block: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Rows [1, H] and biases [1] of a block of FlexMoE."""
    rows = list(block.router.values())
    return [row.weight for row in rows], [row.bias for row in rows]


def experts_of(block: Any) -> ExpertTensors:
    """The matrices of a block of FlexMoE with full experts."""
    networks = list(block.experts.values())
    return ExpertTensors(
        gate=[network.gate_proj.weight for network in networks],
        up=[network.up_proj.weight for network in networks],
        down=[network.down_proj.weight for network in networks],
    )


@dataclass(frozen=True)
class Shapes:
    """Sizes of a layer, and the bytes and operations that follow from them."""

    hidden: int
    intermediate: int
    experts: int
    k: int

    def route_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """x, the rows and the four results, once each."""
        results = tokens * (2 * self.experts + 2 * min(self.k, self.experts)) * 4
        return tokens * self.hidden * itemsize + self.experts * (self.hidden + 1) * 4 + results

    def block_bytes(self, tokens: int, selected: int, itemsize: int = 2) -> int:
        """The matrices of `selected` experts once, x twice (also for the router), the output once."""
        weights = selected * 3 * self.hidden * self.intermediate * itemsize
        return weights + 2 * tokens * self.hidden * itemsize + self.route_bytes(tokens, itemsize)

    def low_rank_bytes(self, tokens: int, selected: int, itemsize: int = 2) -> int:
        """As `block_bytes`, with the matrices of public, and the factors of `selected` low-rank experts."""
        factors = selected * 3 * RANK * (self.hidden + self.intermediate) * itemsize
        return self.block_bytes(tokens, 1, itemsize) + factors

    def block_flops(self, tokens: int) -> int:
        """Operations of the matrix products."""
        return tokens * min(self.k, self.experts) * 6 * self.hidden * self.intermediate


def route_in_float64(x_TH: Tensor, rows: Sequence[Tensor], biases: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Logits and renormalized weights [T, E]."""
    logits_TE = x_TH.double() @ torch.cat(list(rows)).double().t() + torch.cat(list(biases)).double()
    kept_TK = logits_TE.topk(k, -1)
    weights_TE = torch.zeros_like(logits_TE).scatter(1, kept_TK.indices, kept_TK.values.softmax(-1))
    return logits_TE, weights_TE


def mix_in_float64(x_TH: Tensor, weights_TE: Tensor, experts: ExpertTensors) -> Tensor:
    """The weighted sum of the experts [T, H], one expert at a time."""
    x64_TH, y_TH = x_TH.double(), torch.zeros(x_TH.shape, dtype=torch.float64, device=x_TH.device)
    for e in range(len(experts.up)):
        tokens_N = weights_TE[:, e].nonzero().squeeze(-1)
        x_NH = x64_TH[tokens_N]
        h_NI = F.silu(x_NH @ experts.gate[e].double().t()) * (x_NH @ experts.up[e].double().t())
        y_TH.index_add_(0, tokens_N, h_NI @ experts.down[e].double().t() * weights_TE[tokens_N, e, None].double())
    return y_TH


def distance(ours: Tensor, exact: Tensor) -> float:
    """`||ours - exact|| / ||exact||`; NaN if there is a NaN."""
    return ((ours.double() - exact).norm() / exact.norm()).item()


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fills uninitialized memory with NaN or the largest integer in the context."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def distances(x_TH: Tensor, block: nn.Module) -> dict[str, float | bool]:
    """The errors of the operators relative to float64, and whether a second run gives the same bits.

    The experts are compared with the weights that the operator computed. Those weights are compared with float64
    separately, except for tokens whose k-th and next logit are nearly equal, because either order is correct.
    """
    (rows, biases), experts = router_of(block), experts_of(block)
    with poisoned():
        runs: list[tuple[Routing, Tensor]] = []
        for _ in range(2):
            routing = route(x_TH, rows, biases, None, K, True)
            runs.append((routing, mix(x_TH, routing, experts)))
    (routing, y_TH), (again, y_again_TH) = runs
    logits_TE, weights_TE = route_in_float64(x_TH, rows, biases, K)
    ordered_TE = logits_TE.sort(-1, descending=True).values
    clear_T = torch.ones(len(x_TH), dtype=torch.bool, device=x_TH.device)
    if len(rows) > K:
        clear_T = (ordered_TE[:, K - 1] - ordered_TE[:, K]) > CLOSE
    return {
        "logits": distance(routing.logits_TE, logits_TE),
        "weights": distance(routing.weights_TE[clear_T], weights_TE[clear_T]),
        "slots": distance(routing.top_weights_TK.sum(-1), weights_TE.sum(-1)),
        "experts": distance(y_TH, mix_in_float64(x_TH, routing.weights_TE, experts)),
        "same_bits_again": all(map(torch.equal, routing, again)) and torch.equal(y_TH, y_again_TH),
    }


__all__ = [
    "FULL",
    "TINY",
    "K",
    "Layer",
    "Shapes",
    "distance",
    "distances",
    "experts_of",
    "loop_layer",
    "low_rank_block",
    "models",
    "our_layer",
    "router_of",
    "their_layer",
]
