"""What `bench_routing.py` lets run against each other: FlexMoE's block, FlexOlmo's on the very same weights, a loop.

Also what is right: the router and the experts in float64, in pieces that fit. Does not cover how long anything takes.

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
from transformers import FlexOlmoForCausalLM

from flexmoe.modeling import FlexMoeForCausalLM, ops_flexmoe
from flexmoe.modeling.context_flexmoe import forward_scope
from flexmoe.modeling.routing_flexmoe import ExpertTensors, Routing

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
"""To run the program where no GPU is."""

CLOSE = 1e-4  # of two logits: which of them is larger is up to roundings


@contextlib.contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """What is made within it lies on `device`, in `dtype` unless it asks for another."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def models(sizes: Mapping[str, Any], device: torch.device) -> tuple[FlexMoeForCausalLM, FlexOlmoForCausalLM]:
    """Both, in bfloat16, with the same tensors."""
    with made_on(device, torch.bfloat16):
        theirs = flex_olmo(sizes)
        ours = with_its_tensors(theirs, sizes)
    return ours, theirs


def our_layer(block: nn.Module, implementation: str) -> Layer:
    """FlexMoE's block as a forward pass calls it; `implementation`: "torch" or "triton"."""
    values = {"allowed": tuple(NAMES), "top_k": K, "renormalize": True, "implementation": implementation}

    def run(x_TH: Tensor) -> Tensor:
        with forward_scope(values):
            return block(x_TH[None])[0]

    return run


def their_layer(model: FlexOlmoForCausalLM, implementation: str) -> Layer:
    """FlexOlmo's block, router included; `implementation`: "eager", "grouped_mm" or "batched_mm"."""

    def run(x_TH: Tensor) -> Tensor:
        run_experts_as(model, implementation)
        return model.model.layers[0].mlp(x_TH[None])[0]

    return run


def loop_layer(block: nn.Module) -> Layer:
    """The fused router, then cuBLAS, expert after expert. The host reads the counts, so no graph can hold it."""
    (rows, biases), experts = router_of(block), experts_of(block)

    def run(x_TH: Tensor) -> Tensor:
        routing = ops_flexmoe.route(x_TH, rows, biases, None, K, True)
        experts_TK, order = routing.top_ids_TK.flatten().sort(stable=True)
        counts = experts_TK.bincount(minlength=len(rows) + 1).tolist()
        tokens = order // routing.top_ids_TK.shape[1]
        weights = routing.top_weights_TK.flatten()[order].to(x_TH.dtype)
        gathered = (x_TH[tokens], weights[:, None])
        y_TH = torch.zeros_like(x_TH)
        parts = zip(tokens.split(counts), *(part.split(counts) for part in gathered), strict=True)
        for e, (at_N, x_NH, weight_N1) in enumerate(parts):
            if e < len(rows) and len(at_N):
                h_NI = F.silu(x_NH @ experts.gate[e].t()).mul_(x_NH @ experts.up[e].t())
                y_TH.index_add_(0, at_N, (h_NI @ experts.down[e].t()).mul_(weight_N1))
        return y_TH

    return run


def router_of(block: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Rows [1, H] and biases [1] of a block of FlexMoE."""
    rows = [block.router[name] for name in NAMES]
    return [row.weight for row in rows], [row.bias for row in rows]


def experts_of(block: Any) -> ExpertTensors:
    """The matrices of a block of FlexMoE."""
    networks = [block.experts[name] for name in NAMES]
    return ExpertTensors(
        gate=[network.gate_proj.weight for network in networks],
        up=[network.up_proj.weight for network in networks],
        down=[network.down_proj.weight for network in networks],
    )


@dataclass(frozen=True)
class Shapes:
    """What a case reads and computes."""

    hidden: int
    intermediate: int
    experts: int
    k: int

    def route_bytes(self, tokens: int, itemsize: int = 2) -> int:
        """x and the rows once, the four results once."""
        results = tokens * (2 * self.experts + 2 * min(self.k, self.experts)) * 4
        return tokens * self.hidden * itemsize + self.experts * (self.hidden + 1) * 4 + results

    def block_bytes(self, tokens: int, chosen: int, itemsize: int = 2) -> int:
        """The matrices of `chosen` experts once, x twice (for the router, too), the output once."""
        weights = chosen * 3 * self.hidden * self.intermediate * itemsize
        return weights + 2 * tokens * self.hidden * itemsize + self.route_bytes(tokens, itemsize)

    def block_flops(self, tokens: int) -> int:
        return tokens * min(self.k, self.experts) * 6 * self.hidden * self.intermediate


def route_in_float64(x_TH: Tensor, rows: Sequence[Tensor], biases: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Logits and renormalised weights [T, E]."""
    logits_TE = x_TH.double() @ torch.cat(list(rows)).double().t() + torch.cat(list(biases)).double()
    kept_TK = logits_TE.topk(k, -1)
    weights_TE = torch.zeros_like(logits_TE).scatter(1, kept_TK.indices, kept_TK.values.softmax(-1))
    return logits_TE, weights_TE


def mix_in_float64(x_TH: Tensor, weights_TE: Tensor, experts: ExpertTensors) -> Tensor:
    """The weighted sum [T, H], one expert at a time."""
    x64_TH, y_TH = x_TH.double(), torch.zeros(x_TH.shape, dtype=torch.float64, device=x_TH.device)
    for e in range(len(experts.up)):
        at_N = weights_TE[:, e].nonzero().squeeze(-1)
        h_NI = F.silu(x64_TH[at_N] @ experts.gate[e].double().t()) * (x64_TH[at_N] @ experts.up[e].double().t())
        y_TH.index_add_(0, at_N, h_NI @ experts.down[e].double().t() * weights_TE[at_N, e, None].double())
    return y_TH


def distance(ours: Tensor, exact: Tensor) -> float:
    """`||ours - exact|| / ||exact||`; NaN anywhere is NaN."""
    return ((ours.double() - exact).norm() / exact.norm()).item()


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody has written holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what `empty` gives
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def distances(x_TH: Tensor, block: nn.Module) -> dict[str, float | bool]:
    """How far the operators are from float64 for fresh inputs, and whether a second run has the same bits.

    The experts are held against the weights that the operator gave, which are held against float64 beside them; of two
    logits that are nearly equal, either may be the larger.
    """
    (rows, biases), experts = router_of(block), experts_of(block)
    with poisoned():
        runs: list[tuple[Routing, Tensor]] = []
        for _ in range(2):
            routing = ops_flexmoe.route(x_TH, rows, biases, None, K, True)
            runs.append((routing, ops_flexmoe.mix(x_TH, routing, experts)))
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
    "Layer",
    "Shapes",
    "distance",
    "distances",
    "experts_of",
    "loop_layer",
    "models",
    "our_layer",
    "router_of",
    "their_layer",
]
