"""What is known of the router's input in each layer of a model: its scale, and public's matrix that reads it too.

A row's effect is `<row, u>`, and the units of the input u may differ by orders of magnitude: pretrained RMSNorms have
weights near zero, and a row fitted on such an input has a huge coordinate there that changes nothing. Lengths of rows
are therefore compared in the scale of their input. Where a norm computes it, the scale is known without any text; in
families whose networks read the residual stream (OLMo-2) it is not, and lengths are those of the rows themselves.

Shapes: H hidden size. Does not cover the comparison (`flexmoe.admission.rows`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexmoe.admission.measures import input_matrix, input_matrix_name, rms, sample_step
from flexmoe.admission.outputs import filled
from flexmoe.hub.stored_model import StoredModel
from flexmoe.io.dense import DenseCheckpoint
from flexmoe.io.tensors import CheckpointFolder
from flexmoe.modeling.anchors_flexmoe import ANCHOR_PREFIX
from flexmoe.modeling.configuration_flexmoe import PUBLIC
from flexmoe.modeling.fingerprint_flexmoe import TORCH_DTYPES
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM
from flexmoe.norms import input_norms
from flexmoe.packages.modules import read_tensor


@dataclass(frozen=True, eq=False)
class RouterInput:
    """The router's input in one layer.

    Attributes:
        matrix: public's matrix with the same input, or a sample of its rows; None if there is none.
        scale: the size of each unit for a normalised input of size 1, float64 [H]; None if it is not known.
    """

    matrix: Tensor | None = None
    scale: Tensor | None = None

    def scaled(self, row: Tensor) -> Tensor:
        """A row [1, H] as it acts on the normalised input, before the norm's weights."""
        return row if self.scale is None else row.double().cpu() * self.scale

    def typical_length(self, hidden_size: int) -> float:
        """The length of a typical row of the matrix, scaled as router rows are."""
        assert self.matrix is not None
        matrix = self.matrix[:: sample_step(len(self.matrix))]
        if self.scale is not None:
            is_transposed = matrix.shape[-1] != hidden_size  # in GPT-2; then it is a sample of units
            scale = self.scale[:: sample_step(hidden_size), None] if is_transposed else self.scale
            matrix = matrix.double().cpu() * scale
        return rms(matrix) * hidden_size**0.5


def inputs_of_live(model: Any) -> list[RouterInput]:
    """Those of a live model, in layer order."""
    inputs = []
    for path, block in zip(input_norms(model.config.anchor_config), model.flexmoe_blocks(), strict=True):
        norm = None if path is None else model.get_submodule(f"{ANCHOR_PREFIX}{path}")
        scale = None if norm is None else _scale(norm, block.hidden_size, functools.partial(read_tensor, norm))
        inputs.append(RouterInput(input_matrix(block.experts[PUBLIC], block.hidden_size), scale))
    return inputs


def inputs_of_stored(stored: StoredModel, model: FlexMoeForCausalLM) -> list[RouterInput]:
    """Those of a stored model; of the matrix, a sample of the rows is read.

    Args:
        model: the stored model on the meta device, possibly with incoming experts.
    """
    inputs = []
    norms = input_norms(stored.config.anchor_config)
    for norm, (path, block) in zip(norms, model.named_blocks().items(), strict=True):
        name = input_matrix_name(block.experts[PUBLIC], block.hidden_size)
        matrix = _read_sample(stored.tensors, f"{path}.experts.{PUBLIC}.", name)
        at = None if norm is None else f"{ANCHOR_PREFIX}{norm}"
        inputs.append(RouterInput(matrix, _stored_scale(model, at, block.hidden_size, stored.tensors.read)))
    return inputs


def inputs_of_anchor(dense: DenseCheckpoint, hidden_size: int) -> list[RouterInput]:
    """As `inputs_of_stored`, for a dense checkpoint."""

    def read(name: str) -> Tensor:
        return dense.files.read(dense.stored[name])

    inputs = []
    for norm, site in zip(input_norms(dense.config), dense.sites, strict=True):
        name = input_matrix_name(site.ffn(dense.model), hidden_size)
        prefix = f"{site.block}." if len(site.attributes) == 1 else f"{site.layer}."
        matrix = _read_sample(dense.files, "", dense.stored.get(f"{prefix}{name}"))
        inputs.append(RouterInput(matrix, _stored_scale(dense.model, norm, hidden_size, read)))
    return inputs


def _stored_scale(
    model: nn.Module, path: str | None, hidden_size: int, read: Callable[[str], Tensor]
) -> Tensor | None:
    """`_scale` of the norm at this path in a model on the meta device, whose tensors are read by their names there."""
    if path is None:
        return None
    return _scale(model.get_submodule(path), hidden_size, lambda key: read(f"{path}.{key}"))


def _scale(norm: nn.Module, hidden_size: int, read: Callable[[str], Tensor]) -> Tensor | None:
    """The size of each unit of a norm's output for a normalised input of which each unit is of size 1, float64 [H].

    Real units may be larger: near-constant ones of SmolLM2-135M are up to 24 times as large. None if the norm cannot
    be called on its own.

    Args:
        read: reads a tensor of it by its name.
    """
    try:
        tensors = {key: read(key).detach().double().cpu() for key in norm.state_dict()}
        fresh = filled(copy.deepcopy(norm).to("meta"), tensors)  # without users' hooks
        fresh._forward_hooks.clear()
        fresh._forward_pre_hooks.clear()
        fresh.__dict__.pop("forward", None)  # accelerate's
        signs_H = 1.0 - 2.0 * (torch.arange(hidden_size, dtype=torch.float64) % 2)
        with torch.no_grad():
            y_2H = fresh(torch.stack([signs_H, -signs_H]))  # of both signs: so a bias counts, too
    except (KeyError, TypeError, RuntimeError, ValueError):  # unreadable, or a norm with further inputs
        return None
    return y_2H.double().square().mean(0).sqrt() if isinstance(y_2H, Tensor) else None


def _read_sample(tensors: CheckpointFolder, prefix: str, name: str | None) -> torch.Tensor | None:
    """The sampled rows of a stored matrix; None if there is no such matrix."""
    info = tensors.infos.get(f"{prefix}{name}")
    if name is None or info is None or len(info.shape) != 2 or not info.nbytes:
        return None
    width, step, data = info.nbytes // info.shape[0], sample_step(info.shape[0]), bytearray()
    for row in range(0, info.shape[0], step):
        for chunk in tensors.file_of(info.name).chunks(info.name, start=row * width, stop=(row + 1) * width):
            data += chunk
    return torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype]).view(-1, info.shape[1])


__all__ = ["RouterInput", "inputs_of_anchor", "inputs_of_live", "inputs_of_stored"]
