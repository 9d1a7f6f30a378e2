"""Rows of newcomers held against those of a stored model, before they are part of it.

Not here: the checks themselves (`flexmoe.modeling.admission_flexmoe`), and networks, which nobody judges on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from flexmoe.conversion.newcomers import Newcomer
from flexmoe.conversion.stored import StoredModel
from flexmoe.modeling.admission_flexmoe import (
    input_matrix_name,
    judge_row_tensors,
    refuse_unless_admitted,
    sample_step,
)
from flexmoe.modeling.configuration_flexmoe import PUBLIC
from flexmoe.modeling.dense_flexmoe import DenseCheckpoint
from flexmoe.modeling.experts_flexmoe import FlexMoeBlock
from flexmoe.modeling.finite_flexmoe import all_finite
from flexmoe.modeling.fitting_flexmoe import name_in_package
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM
from flexmoe.modeling.packages_flexmoe import PackageError
from flexmoe.modeling.tensors_flexmoe import TORCH_DTYPES, CheckpointFolder

RowsThere = Mapping[str, Mapping[str, torch.Tensor]]
"""Router rows and biases in a model, by expert, "public" among them, called as in a package."""


def judge_rows_of(
    newcomers: Sequence[Newcomer], there: RowsThere, input_matrices: Sequence[torch.Tensor | None] | None = None
) -> None:
    """Holds each newcomer's rows and biases against public's and theirs who are there.

    Where nobody is there, the shortest row of the other newcomers is the measure of length; of a bias they are none.

    Args:
        input_matrices: as `judge_rows` takes them.

    Raises:
        PackageError: a row or a bias is not finite.
        AdmissionError: a row or a bias would take over the model.
    """
    for newcomer in newcomers:
        for name, row in newcomer.rows.items():
            if not all_finite(row):
                raise PackageError(f"{newcomer.package.folder}: tensor {name!r} holds NaN or an infinity.")
    owners = {name: rows for name, rows in there.items() if name != PUBLIC}
    for newcomer in newcomers:
        findings = judge_row_tensors(
            newcomer.rows,
            public=there[PUBLIC],
            others=owners,
            newcomers={other.name: other.rows for other in newcomers if other is not newcomer},
            input_matrices=input_matrices,
        )
        refuse_unless_admitted(newcomer.name, findings)


def places(model: FlexMoeForCausalLM) -> dict[str, tuple[str, str]]:
    """For each tensor of an expert of a model: whose it is, and what a package calls it."""
    found: dict[str, tuple[str, str]] = {}
    for path, block in model.named_modules():
        if not isinstance(block, FlexMoeBlock):
            continue
        for part, modules in (("experts", block.experts), ("router", block.router)):
            inside = f"layers.{block.layer_index}.{'ffn' if part == 'experts' else part}"
            for name, module in modules.items():
                for key in module.state_dict():
                    found[f"{path}.{part}.{name}.{key}"] = (name, f"{inside}.{name_in_package(module, key)}")
    return found


def public_matrices(stored: StoredModel, model: FlexMoeForCausalLM) -> list[torch.Tensor | None]:
    """For each layer the matrix of public's network that reads what the router reads, a sample of its rows.

    Args:
        model: the stored one on the meta device, perhaps with newcomers.
    """
    blocks = [(path, block) for path, block in model.named_modules() if isinstance(block, FlexMoeBlock)]
    return [
        _sampled(
            stored.tensors, f"{path}.experts.{PUBLIC}.", input_matrix_name(block.experts[PUBLIC], block.hidden_size)
        )
        for path, block in blocks
    ]


def anchor_matrices(folder: Path, hidden_size: int) -> list[torch.Tensor | None]:
    """As `public_matrices`, of the dense checkpoint in a folder. Raises: as `DenseCheckpoint`."""
    dense, matrices = DenseCheckpoint(folder), []
    for site in dense.sites:
        name = input_matrix_name(site.ffn(dense.model), hidden_size)
        prefix = f"{site.block}." if len(site.attributes) == 1 else f"{site.layer}."
        matrices.append(_sampled(dense.files, "", dense.stored.get(f"{prefix}{name}")))
    return matrices


def _sampled(tensors: CheckpointFolder, prefix: str, name: str | None) -> torch.Tensor | None:
    """The rows of a matrix that are looked at; None if there is no such matrix."""
    info = tensors.infos.get(f"{prefix}{name}")
    if name is None or info is None or len(info.shape) != 2 or not info.nbytes:
        return None
    width, step, data = info.nbytes // info.shape[0], sample_step(info.shape[0]), bytearray()
    for row in range(0, info.shape[0], step):
        for chunk in tensors.file_of(info.name).chunks(info.name, start=row * width, stop=(row + 1) * width):
            data += chunk
    return torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype]).view(-1, info.shape[1])


__all__ = ["RowsThere", "anchor_matrices", "judge_rows_of", "places", "public_matrices"]
