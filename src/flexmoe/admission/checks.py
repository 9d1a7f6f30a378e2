"""All checks of an expert that need no text, on a live model: router rows, biases and weights.

Does not cover stored models (`flexmoe.admission.stored_rows`), text (`flexmoe.admission.verification`), files
(`flexmoe.packages.package`) or signatures (`flexmoe.packages.trust`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from flexmoe.admission.findings import Finding
from flexmoe.admission.measures import input_matrix
from flexmoe.admission.rows import Row, check_rows
from flexmoe.admission.weights import check_weights
from flexmoe.modeling.adapters_flexmoe import beneath_adapter
from flexmoe.modeling.configuration_flexmoe import PUBLIC
from flexmoe.modeling.experts_flexmoe import FlexMoeBlock


def check_expert(
    blocks: Sequence[FlexMoeBlock], parts: Sequence[tuple[nn.Module, nn.Module]], *, replaced: str | None = None
) -> list[Finding]:
    """Checks an expert before it is added to a model; changes nothing.

    Args:
        blocks: the model's, in layer order.
        parts: the expert's network and router row in each of them.
        replaced: the expert that it replaces, which is no reference for it.
    """
    names = [name for name in blocks[0].router if name not in (PUBLIC, replaced)]
    publics = [block.experts[PUBLIC] for block in blocks]
    return [
        *check_rows(
            [_live_row(row) for _, row in parts],
            public=[_live_row(block.router[PUBLIC]) for block in blocks],
            others={name: [_live_row(block.router[name]) for block in blocks] for name in names},
            input_matrices=[
                input_matrix(public, block.hidden_size) for public, block in zip(publics, blocks, strict=True)
            ],
        ),
        *check_weights([network for network, _ in parts], publics),
    ]


def _live_row(row: nn.Module) -> Row:
    unwrapped: Any = beneath_adapter(row)
    return unwrapped.weight.detach(), unwrapped.bias.detach()


__all__ = ["check_expert"]
