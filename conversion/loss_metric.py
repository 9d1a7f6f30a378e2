"""The metric in which an expert is compressed: how much an error in each of its matrices changes the loss.

An error E [O, I] of a matrix changes its output on a token by `E x`, and the loss by `g . E x`, where x is the input
of the matrix and g the gradient of the loss with respect to its output. With x and g taken as independent, the
expected square of that change is

    || G^(1/2) E X^(1/2) ||^2       X = mean of x x^T [I, I],  G = mean of g g^T [O, O]

which is comparable over all matrices and layers of an expert, unlike the norm of E. Both moments are collected on the
owner's text, with the expert in the model that it was trained in. Moments of a large intermediate size are kept as
diagonals: complete ones would take several times the memory of the expert itself.

Does not cover the approximation itself (`low_rank`), or the choice of ranks.

Shapes: N sequences, L tokens of each, T tokens, O out, I in.

Source: K-FAC, arXiv 1503.05671, for the product of the two moments; ASVD, arXiv 2312.05821, and SVD-LLM, arXiv
2403.07378, for compression weighted by the inputs alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexmoe.data import LONGEST_SEQUENCE, Documents, cut_sequences, tokenize
from flexmoe.hub.stored_model import CONFIG_FILE
from flexmoe.io.dense import load_causal_lm
from flexmoe.io.strict_json import read_json_object
from flexmoe.modeling import PUBLIC, FlexMoeConfig, FlexMoeForCausalLM
from flexmoe.modeling.low_rank_flexmoe import matrices
from flexmoe.packages.package import ExpertPackage
from flexmoe.tokenization import load_tokenizer

TOKENS = 16_384  # of the owner's text; more changed nothing in the third digit
COMPLETE = 2048  # intermediate size up to which its moments are complete
DAMPING = 1e-4  # added to a moment's eigenvalues, relative to their mean: no direction is free

Key = tuple[int, str]  # a layer, and the path of a matrix in its network


@dataclass(frozen=True)
class Root:
    """The square root of a moment and its inverse: matrices [N, N], or vectors [N] of a diagonal moment."""

    value: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, moment: Tensor) -> Root:
        """Of a moment [N, N] or [N], with `DAMPING`; of a moment that is zero, the identity's."""
        moment = moment.double()
        values_N, vectors_NN = (moment, None) if moment.dim() == 1 else torch.linalg.eigh(moment)
        values_N = values_N.clamp_min(0.0)
        values_N = values_N + DAMPING * values_N.mean() if values_N.any() else torch.ones_like(values_N)
        roots = [values_N.sqrt(), values_N.rsqrt()]
        if vectors_NN is not None:
            roots = [(vectors_NN * root_N) @ vectors_NN.T for root_N in roots]
        return cls(*(root.float() for root in roots))


@dataclass(frozen=True)
class Metric:
    """The metric of a matrix [O, I]: the roots of the moments of its output's gradient and of its input."""

    output: Root
    input: Root

    def weigh(self, delta_OI: Tensor) -> Tensor:
        """`G^(1/2) delta X^(1/2)`, whose truncated SVD is the best approximation in this metric."""
        return _product(self.output.value, _product(self.input.value, delta_OI.T).T)

    def unweigh(self, left_OR: Tensor, right_RI: Tensor) -> tuple[Tensor, Tensor]:
        """`G^(-1/2) left` and `right X^(-1/2)`: factors of the difference from those of the weighed one."""
        return _product(self.output.inverse, left_OR), _product(self.input.inverse, right_RI.T).T


def loss_metrics(
    grafted: Path, package: ExpertPackage, documents: Documents, *, device: str | torch.device = "cpu"
) -> dict[Key, Metric]:
    """The metric of each matrix of the expert in `package`, on the first `TOKENS` tokens of the owner's text.

    Args:
        grafted: folder of the FlexMoE model that the expert was trained in.

    Raises:
        ValueError: `grafted` is not a FlexMoE model, the text is shorter than a sequence or has tokens without an
            embedding, or a loss is not finite.
    """
    if read_json_object(grafted / CONFIG_FILE).get("model_type") != FlexMoeConfig.model_type:
        raise ValueError(
            f"{grafted} is a dense model. With data, give the FlexMoE model that the expert was trained in (anchor=)."
        )
    config = FlexMoeConfig.from_pretrained(grafted)
    model = load_causal_lm(grafted, FlexMoeForCausalLM, dtype=torch.float32)
    model.add_expert(package)
    model.to(device).eval()
    name = package.manifest.name
    sequences_NL = _sequences(documents, grafted, config)
    model.requires_grad_(False)
    model.enable_input_require_grads()  # gradients of outputs, but of no parameter
    model.set_experts_implementation("eager")  # calls the matrices as modules
    moments: dict[Key, _Moments] = {}
    for layer, block in enumerate(model.flexmoe_blocks()):
        block.router[PUBLIC].bias.data.zero_()  # as in training
        for path, _ in matrices(block.experts[PUBLIC]):
            part = block.experts[name].get_submodule(path)
            moments[layer, path] = _Moments(block.hidden_size)
            part.register_forward_hook(moments[layer, path].add)
    with model.only_experts(PUBLIC, name):
        for ids_1L in sequences_NL.long().to(device).split(1):
            logits_LV = model(input_ids=ids_1L, use_cache=False, num_experts_per_tok=2).logits[0]
            loss = F.cross_entropy(logits_LV[:-1].float(), ids_1L[0, 1:], reduction="sum")
            if not torch.isfinite(loss):
                raise ValueError(
                    f"The loss of {package.folder} on the text is {loss.item()}: its weights are at fault."
                )
            loss.backward()
    return {key: Metric(Root.of(found.output), Root.of(found.input)) for key, found in moments.items()}


class _Moments:
    """Sums of `x x^T` and `g g^T` of a matrix; above the larger of hidden size and `COMPLETE`, only the diagonal."""

    def __init__(self, hidden_size: int) -> None:
        self._largest = max(hidden_size, COMPLETE)
        self.input = self.output = torch.zeros(())

    def add(self, part: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """A forward hook; the gradient is added in the backward pass."""
        self.input = self.input + self._moment(args[0].detach())
        output.register_hook(self._add_gradient)

    def _add_gradient(self, gradient: Tensor) -> None:
        self.output = self.output + self._moment(gradient)

    def _moment(self, values: Tensor) -> Tensor:
        values_TN = values.reshape(-1, values.shape[-1])
        if values_TN.shape[-1] <= self._largest:
            return (values_TN.T @ values_TN).cpu()
        return values_TN.square().sum(0).cpu()


def _sequences(documents: Documents, grafted: Path, config: FlexMoeConfig) -> Tensor:
    """The first `TOKENS` tokens as sequences [N, L]."""
    text_config = config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None) or LONGEST_SEQUENCE
    text = tokenize(documents, load_tokenizer(grafted), vocab_size=text_config.vocab_size)
    length = min(LONGEST_SEQUENCE, limit, max(2, len(text.tokens)))
    return cut_sequences(text.tokens[: max(TOKENS, length)], length, len(text))


def _product(root: Tensor, matrix_NM: Tensor) -> Tensor:
    return root[:, None] * matrix_NM if root.dim() == 1 else root @ matrix_NM


__all__ = ["Metric", "Root", "loss_metrics"]
