"""Router rows of grafted experts: the interface of row makers, and the checked tensors of a checkpoint.

Shapes: N layers, H hidden size.

Does not cover how rows are made (`flexmoe.routers`): conversions read no text and run no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from flexmoe.io.dense import DenseCheckpoint
from flexmoe.modeling.anchors_flexmoe import ANCHOR_PREFIX
from flexmoe.modeling.configuration_flexmoe import PUBLIC


@dataclass(frozen=True)
class StackedRows:
    """One expert's rows in all layers: weight float [N, H], bias float [N]."""

    weight: torch.Tensor
    bias: torch.Tensor


class RowMaker(Protocol):
    """Makes the router rows of a graft's experts, by name; experts without an entry keep rows of zero."""

    def __call__(self, anchor: DenseCheckpoint, public: Sequence[str] | None) -> Mapping[str, StackedRows]:
        """Called after all other checks and before anything is written.

        Args:
            anchor: the dense checkpoint that is grafted.
            public: the documents of the public sample, if there is one.
        """


def router_tensors(
    rows: Mapping[str, StackedRows], experts: Sequence[str], anchor: DenseCheckpoint
) -> dict[str, torch.Tensor]:
    """The tensors of `rows` by their names in the FlexMoE model: weights float32 [1, H] and biases float32 [1].

    Raises:
        ValueError: rows for an unknown expert or for public, of another shape, or not finite.
    """
    depth, hidden = len(anchor.sites), anchor.config.get_text_config().hidden_size
    tensors = {}
    for name, row in rows.items():
        if name == PUBLIC:
            raise ValueError(f"The router row of {PUBLIC!r} is zero; rows of other experts are relative to it.")
        if name not in experts:
            raise ValueError(f"A router row for {name!r}, which is not grafted; experts are {', '.join(experts)}.")
        shapes = (tuple(row.weight.shape), tuple(row.bias.shape))
        if shapes != ((depth, hidden), (depth,)):
            raise ValueError(
                f"The router rows of {name!r} have shapes {shapes[0]} and {shapes[1]}; this anchor has {depth} layers "
                f"of {hidden}: ({depth}, {hidden}) and ({depth},)."
            )
        if not (row.weight.isfinite().all() and row.bias.isfinite().all()):
            raise ValueError(f"The router rows of {name!r} are not finite.")
        for layer, site in enumerate(anchor.sites):
            row_name = f"{ANCHOR_PREFIX}{site.block}.router.{name}"
            tensors[f"{row_name}.weight"] = row.weight[layer, None].float()
            tensors[f"{row_name}.bias"] = row.bias[layer, None].float()
    return tensors


__all__ = ["RowMaker", "StackedRows", "router_tensors"]
