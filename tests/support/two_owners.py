"""A graft of a tiny anchor with the packages of two owners, for tests of what is made from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flexmoe.conversion.graft import graft
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM
from flexmoe.testing import perturb_expert, tiny_anchor

OWNERS = ("math", "code")


def write_two_owners(folder: Path, **options: Any) -> Path:
    """Writes anchor/, grafted/, math/ and code/ into `folder` and returns it; `options` are those of `save_expert`."""
    tiny_anchor("llama").save_pretrained(folder / "anchor")
    graft(folder / "anchor", folder / "grafted")
    for name in OWNERS:
        model = FlexMoeForCausalLM.from_pretrained(folder / "grafted")
        model.add_expert_copy(name)
        perturb_expert(model, name)
        model.save_expert(name, folder / name, **options)
    return folder
