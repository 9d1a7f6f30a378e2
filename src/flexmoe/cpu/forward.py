"""`experts_implementation="flexmoe_cpu"`: the block on a CPU, with faster products and a short path for one token.

FFNs of a known structure run on their weights without calling their modules, others as modules with their linear
layers replaced (`flexmoe.cpu.linear`). A single token, as when decoding, is limited by reading weights and by the
start of each operation: there, routing is done on Python floats.

Training, compiled code, autocast, a mask that differs per sequence, and other devices use the reference.

Shapes: T tokens, H hidden, A allowed experts.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flexmoe.cpu.linear import HALVES, faster_linears, has_instructions, linear, may_be_faster
from flexmoe.cpu.prepack import Prepacked, prepacked_of
from flexmoe.modeling.distributed_flexmoe import must_run_on_all_ranks
from flexmoe.modeling.experts_flexmoe import FlexMoeBlock, eager_experts_forward, mix_modules, names_sharing_public
from flexmoe.modeling.low_rank_flexmoe import FfnStructure, is_plain_linear
from flexmoe.modeling.masking_flexmoe import ForwardContext
from flexmoe.structures import is_plain_row, structure_of

Run = Callable[[Tensor], Tensor]


def cpu_experts_forward(
    block: FlexMoeBlock, x_TH: Tensor, names: Sequence[str], context: ForwardContext, zeros: Sequence[Tensor] = ()
) -> Tensor:
    """Arguments and result as those of `eager_experts_forward`."""
    if zeros or len(names) == 1 or not may_be_faster(x_TH):  # one expert has the bits of the dense anchor
        return eager_experts_forward(block, x_TH, names, context, zeros)
    packs = prepacked_of(block)
    if names_sharing_public(block.experts, names):
        with faster_linears(x_TH, packs):
            return eager_experts_forward(block, x_TH, names, context)
    if x_TH.shape[0] == 1 and context.row_mask is None:
        return _one_token(block, x_TH, names, context, packs)
    weights_TA = block.route(x_TH, names, context).to(x_TH.dtype)
    call = functools.partial(_call_expert, block, packs)
    return mix_modules(block, x_TH, names, weights_TA, context, call=call)


def _one_token(
    block: FlexMoeBlock, x_1H: Tensor, names: Sequence[str], context: ForwardContext, packs: Prepacked | None
) -> Tensor:
    logits_A = _router_logits(block.router, x_1H[0], names, context.evidence or {})
    weights = route_one(logits_A.tolist(), block.num_chosen(context), block.renormalizes(context))
    if context.router_logits is not None or context.usage:
        block.record(context, names, logits_A[None], torch.tensor([weights]))
    x = _as_row(x_1H)
    for name, weight in zip(names, weights, strict=True):
        if not weight and must_run_on_all_ranks(block.experts[name]):
            block.call_expert(name, x_1H[:0])
    # experts are looked up before any product: reading weights evicts from the caches what a look-up needs
    chosen = [(_bind(block, n, x, packs), w) for n, w in zip(names, weights, strict=True) if w]
    if not chosen:
        return torch.zeros_like(x_1H)
    (run, weight), *others = chosen
    mixed = run(x) * weight
    for run, weight in others:
        mixed.add_(run(x), alpha=weight)
    return mixed.to(x_1H.dtype).view(x_1H.shape)


def _call_expert(block: FlexMoeBlock, packs: Prepacked | None, name: str, x_NH: Tensor) -> Tensor:
    network: Any = block.experts._modules[name]
    structure = structure_of(network) if len(x_NH) else None
    if structure is None:
        return _call_module(block, packs, name, x_NH)
    return bind_structure(network, structure, x_NH, packs)(x_NH)


def _call_module(block: FlexMoeBlock, packs: Prepacked | None, name: str, x_NH: Tensor) -> Tensor:
    with faster_linears(x_NH, packs):
        return block.call_expert(name, x_NH)


def _as_row(x_1H: Tensor) -> Tensor:
    """The token in the shape that has the faster products: [1, H] with half-precision instructions, else [H]."""
    return x_1H if x_1H.dtype in HALVES and has_instructions(x_1H.dtype) else x_1H[0]


def _router_logits(router: nn.ModuleDict, x_H: Tensor, names: Sequence[str], evidence: Mapping[str, Tensor]) -> Tensor:
    """The logits [A] of one token; plain float32 rows are multiplied without calling their modules."""
    rows: list[Any] = [router._modules[name] for name in names]
    if all(is_plain_row(row) and _is_parameter(row.weight) for row in rows) and all(
        row.weight.dtype == torch.float32 for row in rows
    ):
        x32_H = x_H.float()
        logits_A = torch.cat([torch.addmv(row.bias, row.weight, x32_H) for row in rows])
        return _calibrated(logits_A, dict(zip(names, rows, strict=True)), evidence) if evidence else logits_A
    return router(x_H[None], names, evidence)[0]


def _calibrated(logits_A: Tensor, rows: Mapping[str, Any], evidence: Mapping[str, Tensor]) -> Tensor:
    """The logits with the evidence of the experts that have it, on Python floats, as in `route_one`."""
    logits = logits_A.tolist()
    for column, (name, row) in enumerate(rows.items()):
        if name in evidence:
            factor, *factors, bias = row.calibration.tolist()
            added = sum(map(operator.mul, factors, evidence[name][0].tolist()))
            logits[column] = factor * logits[column] + added + bias
    return torch.tensor(logits)


def _bind(block: FlexMoeBlock, name: str, like: Tensor, packs: Prepacked | None) -> Run:
    """The expert as a function of one token like `like`; a compiled network returns float32."""
    network = block.experts._modules[name]
    assert network is not None
    if packs is not None and (compiled := packs.one_token(network)) is not None:
        return compiled
    if (structure := structure_of(network)) is not None:
        return bind_structure(network, structure, like, packs)

    return lambda x: _call_module(block, packs, name, x.view(1, -1)).view(x.shape)


def bind_structure(network: nn.Module, structure: FfnStructure, like: Tensor, packs: Prepacked | None = None) -> Run:
    """A network of this structure as a function of inputs like `like`; parts that are no plain Linear are called."""
    parts: dict[str, Any] = network._modules
    up, down = (_product_of(parts[name], like, packs) for name in (structure.up, structure.down))
    activation = parts[structure.activation]
    if structure.gate is None:
        return lambda x: down(activation(up(x)))
    gate = _product_of(parts[structure.gate], like, packs)
    return lambda x: down(activation(gate(x)) * up(x))


def _product_of(part: Any, like: Tensor, packs: Prepacked | None) -> Run:
    if is_plain_linear(part):
        weight, bias = part._parameters["weight"], part._parameters["bias"]
        if packs is None and like.dim() == 1 and like.dtype in HALVES and bias is None and _is_parameter(weight):
            return functools.partial(torch.mv, weight)  # what F.linear does for one row, without its changes of shape
        return functools.partial(linear, weight=weight, bias=bias, packs=packs)

    def call(x: Tensor) -> Tensor:
        with faster_linears(x, packs):
            return part(x)

    return call


def _is_parameter(tensor: Tensor) -> bool:
    return type(tensor) is nn.Parameter


def route_one(logits: Sequence[float], k: int, renormalize: bool) -> list[float]:
    """`route_logits` of one token on Python floats: with so few values, starting a kernel takes longer."""
    largest = max(logits)
    if largest == math.inf or any(map(math.isnan, logits)):
        return [math.nan] * len(logits)
    if largest == -math.inf:
        return [0.0] * len(logits)
    exp = [math.exp(logit - largest) for logit in logits]
    surplus = sorted(range(len(exp)), key=logits.__getitem__, reverse=True)[k:]  # stable: the lowest index wins a tie
    total = sum(exp)
    for i in surplus:
        exp[i] = 0.0
    if renormalize:
        total = sum(exp)
    return [value / total for value in exp]


__all__ = ["bind_structure", "cpu_experts_forward", "route_one"]
