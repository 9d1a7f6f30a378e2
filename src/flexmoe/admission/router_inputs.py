"""What is known of the router's input in each layer of a model: its scale, and public's matrix that reads it too.

A row's effect is `<row, u>`, and the units of the input u may differ by orders of magnitude: pretrained RMSNorms have
weights near zero, and a row fitted on such an input has a huge coordinate there that changes nothing. Lengths of rows
are therefore compared in the scale of their input. Where a norm computes it, the scale is known without any text; in
families whose networks read the residual stream (OLMo-2) it is not, and lengths are those of the rows themselves.

Shapes: H hidden size. Does not cover the comparison (`flexmoe.admission.rows`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexmoe.admission.measures import input_matrix, input_matrix_name, rms, sample_step, unreadable_reason
from flexmoe.admission.outputs import filled
from flexmoe.hub.stored_model import StoredModel
from flexmoe.io.dense import DenseCheckpoint
from flexmoe.io.tensors import CheckpointFolder
from flexmoe.modeling.configuration_flexmoe import PUBLIC
from flexmoe.modeling.experts_flexmoe import FlexMoeBlock
from flexmoe.modeling.fingerprint_flexmoe import TORCH_DTYPES
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM
from flexmoe.norms import input_norm


@dataclass(frozen=True, eq=False)
class RouterInput:
    """The router's input in one layer.

    Attributes:
        matrix: public's matrix with the same input, or a sample of its rows; None if there is none.
        scale: the size of each unit, float32 [H]; None if it is not known.
    """

    matrix: Tensor | None = None
    scale: Tensor | None = None

    def scaled(self, row: Tensor) -> Tensor:
        """A row [1, H] as it acts on an input whose units are all of size 1."""
        return row if self.scale is None else row.float() * self.scale.to(row.device)

    def typical_length(self, hidden_size: int) -> float:
        """The length of a typical row of the matrix, scaled as router rows are."""
        assert self.matrix is not None
        matrix = self.matrix[:: sample_step(len(self.matrix))]
        if self.scale is not None:
            is_transposed = matrix.shape[-1] != hidden_size  # in GPT-2; then it is a sample of units
            scale = self.scale[:: sample_step(hidden_size), None] if is_transposed else self.scale
            matrix = matrix.float() * scale.to(matrix.device)
        return rms(matrix) * hidden_size**0.5


def inputs_of_live(model: Any) -> list[RouterInput]:
    """Those of a live model, in layer order."""
    name = input_norm(model.config.anchor_config)
    inputs = []
    for path, block in model.named_blocks().items():
        norm = _submodule(model, f"{path.rpartition('.')[0]}.{name}")
        inputs.append(
            RouterInput(input_matrix(block.experts[PUBLIC], block.hidden_size), scale_of(norm, block.hidden_size))
        )
    return inputs


def inputs_of_stored(stored: StoredModel, model: FlexMoeForCausalLM) -> list[RouterInput]:
    """Those of a stored model; of the matrix, a sample of the rows is read.

    Args:
        model: the stored model on the meta device, possibly with incoming experts.
    """
    norm_name = input_norm(stored.config.anchor_config)
    inputs = []
    for path, block in [(path, module) for path, module in model.named_modules() if isinstance(module, FlexMoeBlock)]:
        name = input_matrix_name(block.experts[PUBLIC], block.hidden_size)
        matrix = _read_sample(stored.tensors, f"{path}.experts.{PUBLIC}.", name)
        norm = f"{path.rpartition('.')[0]}.{norm_name}"
        inputs.append(RouterInput(matrix, _stored_scale(model, norm, block.hidden_size, stored.tensors.read)))
    return inputs


def inputs_of_anchor(dense: DenseCheckpoint, hidden_size: int) -> list[RouterInput]:
    """As `inputs_of_stored`, for a dense checkpoint."""

    def read(name: str) -> Tensor:
        return dense.files.read(dense.stored[name])

    norm_name = input_norm(dense.config)
    inputs = []
    for site in dense.sites:
        name = input_matrix_name(site.ffn(dense.model), hidden_size)
        prefix = f"{site.block}." if len(site.attributes) == 1 else f"{site.layer}."
        matrix = _read_sample(dense.files, "", dense.stored.get(f"{prefix}{name}"))
        scale = _stored_scale(dense.model, f"{site.layer}.{norm_name}", hidden_size, read)
        inputs.append(RouterInput(matrix, scale))
    return inputs


def scale_of(norm: nn.Module | None, hidden_size: int) -> Tensor | None:
    """The size of each unit of a norm's output, float32 [H] on the CPU, for input whose units are of size 1.

    None if there is no norm, or if it cannot be called here.
    """
    if norm is None or any(unreadable_reason(tensor) for tensor in norm.parameters()):
        return None
    like = next(norm.parameters(), torch.empty(0))
    signs_H = 1.0 - 2.0 * (torch.arange(hidden_size, device=like.device) % 2)
    try:
        with torch.no_grad():
            y_2H = norm(torch.stack([signs_H, -signs_H]).to(like.dtype))  # of both signs: so a bias counts, too
    except (TypeError, RuntimeError, ValueError):  # a norm with further inputs
        return None
    return y_2H.float().square().mean(0).sqrt().cpu() if isinstance(y_2H, Tensor) else None


def _stored_scale(model: nn.Module, path: str, hidden_size: int, read: Callable[[str], Tensor]) -> Tensor | None:
    """`scale_of` the norm at this path in a model on the meta device, whose tensors are read by their names there."""
    if (norm := _submodule(model, path)) is None:
        return None
    try:
        tensors = {key: read(f"{path}.{key}") for key in norm.state_dict()}
    except KeyError:
        return None
    return scale_of(filled(copy.deepcopy(norm), tensors), hidden_size)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    """The module at this path; None if there is none, as in layers of other kinds."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


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


__all__ = ["RouterInput", "inputs_of_anchor", "inputs_of_live", "inputs_of_stored", "scale_of"]
