"""Router rows of other methods for the same experts, to compare the rows alone.

The rows of each owner are fitted again by another registered method, on that owner's text and the public sample; the
experts are not changed. Rows that a method would train with the loss keep their initial values.

Does not cover experts that are trained with those rows (`OwnerSettings.router`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import nn

from flexmoe.data import pack, read_documents, read_public_sample
from flexmoe.demo.corpus import PUBLIC
from flexmoe.demo.scoring import load
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.modeling.evidence_flexmoe import EvidenceRow
from flexmoe.routers.hidden_states import RowText, fit_rows
from flexmoe.routers.rows import RouterRow, row_method
from flexmoe.tokenization import load_tokenizer


def owner_rows(
    grafted: Path, data: Mapping[str, Path], method: str, *, bias: bool, tokens: int, sequence_length: int, seed: int
) -> dict[str, list[RouterRow]]:
    """The rows of each owner, one per layer, fitted on `data[owner]` and the public sample of the graft only."""
    model, tokenizer = load(grafted), load_tokenizer(grafted)

    def row_text(documents: Sequence[str]) -> RowText:
        return RowText(documents, pack(documents, tokenizer, sequence_length, vocab_size=model.config.vocab_size))

    public = row_text(read_public_sample(grafted, model.config.public_sample))
    own = {owner: row_text(read_documents([file])) for owner, file in data.items()}
    return {
        owner: fit_rows(model, row_method(method), text, public, tokens=tokens, bias=bias, seed=seed + i)
        for i, (owner, text) in enumerate(own.items())
    }


@torch.no_grad()
def put_rows(model: FlexMoeForCausalLM, rows: Mapping[str, Sequence[RouterRow]], public_prior: float) -> None:
    """Sets the rows, biases and the public prior of a composed model, in place; it is then without evidence."""
    drop_evidence(model)
    for block in model.flexmoe_blocks():
        cast(nn.Linear, block.router[PUBLIC]).bias.fill_(public_prior)
        for owner, layers in rows.items():
            row, target = layers[block.layer_index], cast(nn.Linear, block.router[owner])
            target.weight.copy_(row.weight[None])
            target.bias.fill_(row.bias)


@torch.no_grad()
def drop_evidence(model: FlexMoeForCausalLM) -> FlexMoeForCausalLM:
    """Routes a model by its rows alone, in place; returns it."""
    for block in model.flexmoe_blocks():
        for row in block.router.values():
            if isinstance(row, EvidenceRow):
                row.calibration.zero_()[0] = 1.0
    return model
