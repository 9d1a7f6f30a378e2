"""Routers of other work, as functions of tensors, to compare with on the same experts.

Shapes: T tokens, H hidden size, E owners' experts, M = E + 1 models or classes (public first), N sequences, L tokens.

A function that makes logits for a layer is registered with the experts that it chooses from and how many of them:

    fit(LayerInputs) -> LayerRouter: logits [T, E or M] of x [T, H]

Each is held against its source in tests/test_router_baselines.py. Does not cover how the models are run (`routers`),
FlexMoE's own rows and evidence, or ensembles (`dense_baselines`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LayerRouter = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LayerInputs:
    """What routers of a layer are made of.

    Attributes:
        states: FFN inputs [T, H] on the text of public and of each owner, by name, public first; each was read with
            that owner's expert alone.
        differences: by owner, the difference [O, H] of the matrices that read the FFN's input from those of public.
    """

    states: Mapping[str, Tensor]
    differences: Mapping[str, Tensor]


@dataclass(frozen=True)
class Baseline:
    """A router: its name, how a layer's is made, how many experts it takes, and whether public is one of them."""

    name: str
    fit: Callable[[LayerInputs], LayerRouter]
    top_k: int
    with_public: bool


BASELINES: dict[str, Baseline] = {}


def baseline(
    name: str, *, top_k: int, with_public: bool
) -> Callable[[Callable[[LayerInputs], LayerRouter]], Callable[[LayerInputs], LayerRouter]]:
    """Registers a function as a baseline."""

    def register(fit: Callable[[LayerInputs], LayerRouter]) -> Callable[[LayerInputs], LayerRouter]:
        BASELINES[name] = Baseline(name, fit, top_k, with_public)
        return fit

    return register


@baseline("DUME", top_k=1, with_public=True)
def dume(inputs: LayerInputs) -> LayerRouter:
    """Ridge regression of the domain, one-hot, on the states of all domains together; columns of length 1.

    Source: arXiv 2603.29765 and its code (lambda 0.01, one expert per token).
    """
    weight_HM, bias_M = ridge_gate(list(inputs.states.values()), penalty=1e-2)
    return lambda x_TH: x_TH.float() @ weight_HM + bias_M


@baseline("Arrow", top_k=3, with_public=False)
def arrow(inputs: LayerInputs) -> LayerRouter:
    """The absolute product with the direction that an expert changes most.

    Source: arXiv 2405.11157, section 4.2, as PEFT computes it for one matrix (`ArrowConfig`, three experts,
    temperature 1); here it chooses once for the matrices that read an FFN's input, and for the FFN.
    """
    prototypes_EH = torch.stack([arrow_prototype(matrix_OH) for matrix_OH in inputs.differences.values()])
    return lambda x_TH: (x_TH.float() @ prototypes_EH.T).abs()


@baseline("SpectR", top_k=3, with_public=False)
def spectr(inputs: LayerInputs) -> LayerRouter:
    """The length of the change that an expert makes. Source: arXiv 2504.03454."""
    factors = [triangle(matrix_OH) for matrix_OH in inputs.differences.values()]
    return lambda x_TH: changes(x_TH, factors)


@baseline("SEQR", top_k=1, with_public=False)
def seqr(inputs: LayerInputs) -> LayerRouter:
    """As SpectR, standardised by the mean and the deviation of that length on the owner's own text.

    Source: arXiv 2509.18093, with its QR factors.
    """
    factors = {owner: triangle(matrix_OH) for owner, matrix_OH in inputs.differences.items()}
    own = [changes(inputs.states[owner], [factor])[:, 0] for owner, factor in factors.items()]
    mean_E, deviation_E = (torch.stack([f(lengths_T) for lengths_T in own]) for f in (torch.mean, torch.std))
    return lambda x_TH: (changes(x_TH, factors.values()) - mean_E) / deviation_E


def ridge_gate(states: Sequence[Tensor], penalty: float) -> tuple[Tensor, Tensor]:
    """Weight [H, M] with columns of length 1 and bias [M]: ridge regression of one-hot classes on states [T, H]."""
    size = states[0].shape[1] + 1
    gram, moments = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, len(states), dtype=torch.float64)
    for m, x_TH in enumerate(states):
        z = torch.nn.functional.pad(x_TH.double(), (0, 1), value=1.0)
        gram += z.T @ z
        moments[:, m] += z.sum(0)
    solution = torch.linalg.solve(gram + penalty * torch.eye(size, dtype=torch.float64), moments)
    length_M = solution[:-1].norm(dim=0)
    return (solution[:-1] / length_M).float(), (solution[-1] / length_M).float()


def arrow_prototype(matrix_OH: Tensor) -> Tensor:
    """The right singular vector [H] of the largest singular value; its sign says nothing."""
    return torch.linalg.eigh(matrix_OH.double().T @ matrix_OH.double()).eigenvectors[:, -1].float()


def triangle(matrix_OH: Tensor) -> Tensor:
    """R [min(O, H), H] of the QR decomposition: products with it have the length of those with the matrix."""
    return torch.linalg.qr(matrix_OH.float(), mode="r").R


def changes(x_TH: Tensor, matrices: Iterable[Tensor]) -> Tensor:
    """The lengths [T, E] of the products of `x` with each matrix [O, H]."""
    return torch.stack([(x_TH.float() @ matrix_OH.float().T).norm(dim=1) for matrix_OH in matrices], 1)


def top_k_logits(logits_TE: Tensor, k: int) -> Tensor:
    """The k largest logits of each token; the others are -inf."""
    kept = logits_TE.topk(min(k, logits_TE.shape[1]), dim=1)
    return torch.full_like(logits_TE, float("-inf")).scatter(1, kept.indices, kept.values)


def chosen_losses(losses_MNL: Tensor, choices_N: Tensor, read: int) -> Tensor:
    """The losses [N, L - 1] of the model that is chosen for each sequence once `read` tokens are read; before, of
    the first."""
    chosen_NL = losses_MNL[choices_N, torch.arange(len(choices_N))]
    return torch.cat([losses_MNL[0, :, : read - 1], chosen_NL[:, read - 1 :]], 1)
