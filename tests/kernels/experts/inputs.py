"""Random experts for the tests of both kernels, and their mix in float64, which shares nothing with the kernels.

The float64 reference computes one token and one of its experts at a time, so experts to which a token is not routed
cannot affect it. Does not cover tolerances (`flexmoe.testing`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from flexmoe.kernels.experts.reference import ExpertTensors
from flexmoe.kernels.pointers import update_pointers
from flexmoe.kernels.triton_common import INTERPRETED, expert_table

DEVICE = "cpu" if INTERPRETED else "cuda"
BIASES = ("gate_bias", "up_bias", "down_bias")
WILD = -(10**6)  # the poison of integers: an index far outside of any tensor

ACTIVATIONS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * torch.special.ndtr(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x * (x > 0),
}


@dataclass(frozen=True)
class Experts:
    """A distribution of random experts, one for each width."""

    widths: Sequence[int]
    hidden: int
    dtype: torch.dtype = torch.float32
    gated: bool = True
    biases: Sequence[str] = ()
    activation: str = "silu"

    def draw(self, generator: torch.Generator) -> ExpertTensors:
        """Weights and biases that roughly preserve the norm of their input."""

        def tensors(*shape: int | None) -> list[Tensor]:
            shapes = [[width if size is None else size for size in shape] for width in self.widths]
            drawn = [torch.randn(sizes, generator=generator) / math.sqrt(sizes[-1]) for sizes in shapes]
            return [tensor.to(DEVICE, self.dtype) for tensor in drawn]

        return ExpertTensors(
            gate=tensors(None, self.hidden) if self.gated else (),
            up=tensors(None, self.hidden),
            down=tensors(self.hidden, None),
            gate_bias=tensors(None) if "gate_bias" in self.biases else (),
            up_bias=tensors(None) if "up_bias" in self.biases else (),
            down_bias=tensors(self.hidden) if "down_bias" in self.biases else (),
            activation=self.activation,
        )


def case_name(value: object) -> str:
    """The id of a parametrised test for this value."""
    if not isinstance(value, Experts):
        return str(value)
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{len(value.widths)}x{max(value.widths)}-{value.hidden}-{dtype}-{value.activation}"


def seeded(*key: object) -> torch.Generator:
    """A generator seeded by `key`, equally in every process."""
    return torch.Generator().manual_seed(sum(ord(letter) << (7 * i % 56) for i, letter in enumerate(repr(key))))


def draw_tokens(tokens: int, hidden: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """x [tokens, hidden] with padded rows: the padding is NaN."""
    apart = torch.full([tokens, hidden + 16], math.nan)
    apart[:, :hidden] = torch.randn(tokens, hidden, generator=generator)
    return apart.to(DEVICE, dtype)[:, :hidden]


def draw_weights(tokens: int, experts: int, k: int, generator: torch.Generator) -> Tensor:
    """float32 [tokens, experts]: k experts per token; every fifth token has fewer, every tenth none."""
    weights_TE = torch.zeros(tokens, experts)
    for t in range(tokens):
        count = 0 if t % 10 == 9 else max(1, min(k, experts) // (2 if t % 5 == 4 else 1))
        chosen = torch.randperm(experts, generator=generator)[:count]
        weights_TE[t, chosen] = 0.1 + torch.rand(count, generator=generator)
    return weights_TE.to(DEVICE)


def slots(weights_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same weights as slots, float32 [T, k] and int32 [T, k]: largest first; surplus slots have 0 and the id E."""
    experts = weights_TE.shape[1]
    padded_TE = torch.nn.functional.pad(weights_TE, (0, max(0, k - experts)))
    order_TE = torch.where(padded_TE.isnan(), math.inf, padded_TE).sort(dim=-1, descending=True, stable=True).indices
    top_weights_TK = padded_TE.gather(1, order_TE[:, :k])
    top_ids_TK = torch.where(top_weights_TK == 0, experts, order_TE[:, :k])
    return top_weights_TK, top_ids_TK.to(torch.int32)


def mix_in_float64(x_TH: Tensor, weights_TE: Tensor, experts: ExpertTensors) -> Tensor:
    """The expected result, float64 [tokens, hidden], on the CPU."""
    y_TH = torch.zeros(x_TH.shape, dtype=torch.float64)
    for t, e in (weights_TE != 0).nonzero().tolist():
        x_H = x_TH[t].double().cpu()

        def linear(name: str, values: Tensor, e: int = e) -> Tensor:
            bias = getattr(experts, f"{name}_bias")
            values = (getattr(experts, name)[e].double().cpu() * values).sum(-1)
            return values + bias[e].double().cpu() if bias else values

        activation = ACTIVATIONS[experts.activation]
        up_I = linear("up", x_H)
        h_I = activation(linear("gate", x_H)) * up_I if experts.gate else activation(up_I)
        y_TH[t] += weights_TE[t, e].double().cpu() * linear("down", h_I)
    return y_TH


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills the results of `torch.empty` with NaN or a wild index, so that reading an unwritten element shows."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(math.nan if tensor.is_floating_point() else WILD)

    monkeypatch.setattr(torch, "empty", poisoned)


def order_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the interpreter add the terms of a matrix product in a fixed order, as a GPU does.

    It multiplies with NumPy, whose BLAS may add them in another order for another number of columns.
    """

    def matmul(a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> np.ndarray:
        a_K, b_K = np.moveaxis(a, -1, 0)[..., None], np.moveaxis(b, -2, 0)[..., None, :]
        # NumPy adds along the first dimension one by one, and along the last one in pairs
        return np.multiply(a_K.astype(dtype), b_K.astype(dtype), order="C").sum(0)

    if INTERPRETED:
        monkeypatch.setattr(np, "matmul", matmul)


def table_without(experts: ExpertTensors, tensor: Tensor) -> Tensor:
    """The table of `experts` as a CUDA graph reads it after `tensor` was removed."""
    table = expert_table(experts)
    update_pointers({tensor.data_ptr(): 0})
    return table


def table_with_invalid_addresses(experts: ExpertTensors, e: int) -> Tensor:
    """The table of `experts` with unmapped addresses for expert `e`: reading from them crashes."""
    table = expert_table(experts).clone()
    table[:-1, e] = 4096  # all rows except the widths
    return table
