"""Router rows given to a graft: their tensors, when they are made, and invalid ones."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from flexmoe.conversion.graft import graft
from flexmoe.conversion.router_tensors import StackedRows
from flexmoe.io.dense import DenseCheckpoint
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.testing import tiny_anchor

ONES = StackedRows(torch.ones(2, 32), torch.ones(2))


@pytest.fixture
def anchor(tmp_path: Path) -> Path:
    tiny_anchor("gpt2").save_pretrained(tmp_path / "anchor")
    return tmp_path / "anchor"


def test_rows_by_layer_and_zeros_for_others(anchor: Path, tmp_path: Path) -> None:
    rows = StackedRows(torch.arange(64.0).view(2, 32).bfloat16(), torch.tensor([0.5, -1.5]))
    out = graft(anchor, tmp_path / "out", {"math": anchor, "code": anchor}, make_rows=lambda *_: {"code": rows})
    model = FlexMoeForCausalLM.from_pretrained(out)
    for layer, block in enumerate(model.flexmoe_blocks()):
        assert block.router["code"].weight.tolist() == [[32.0 * layer + i for i in range(32)]]
        assert block.router["code"].bias.tolist() == [(0.5, -1.5)[layer]]
        assert block.router["code"].weight.dtype == torch.float32
        for name in ("public", "math"):
            assert not block.router[name].weight.any()
            assert not block.router[name].bias.any()


def test_rows_of_zero_are_the_default(anchor: Path, tmp_path: Path) -> None:
    nothing = StackedRows(torch.zeros(2, 32), torch.zeros(2))
    plain = graft(anchor, tmp_path / "plain", {"math": anchor})
    told = graft(anchor, tmp_path / "told", {"math": anchor}, make_rows=lambda *_: {"math": nothing})
    for file in plain.iterdir():
        assert file.read_bytes() == (told / file.name).read_bytes(), file.name


def test_rows_are_made_of_anchor_and_sample_before_anything_is_written(anchor: Path, tmp_path: Path) -> None:
    (tmp_path / "public.txt").write_text("of all")
    asked = []

    def make(dense: DenseCheckpoint, public: Sequence[str] | None) -> dict[str, StackedRows]:
        asked.append((dense.folder, public, sorted(path.name for path in tmp_path.iterdir())))
        return {}

    graft(anchor, tmp_path / "out", make_rows=make, public_data=[tmp_path / "public.txt"])
    assert asked == [(anchor, ["of all"], ["anchor", "public.txt"])]


@pytest.mark.parametrize(
    ("name", "row", "error"),
    [
        ("code", ONES, "A router row for 'code', which is not grafted; experts are public, math"),
        ("public", ONES, "router row of 'public' is zero"),
        (
            "math",
            StackedRows(torch.ones(32), torch.ones(2)),
            r"shapes \(32,\) and \(2,\); this anchor has 2 layers of 32",
        ),
        ("math", StackedRows(torch.ones(2, 32), torch.ones(2, 1)), r"shapes \(2, 32\) and \(2, 1\)"),
        ("math", StackedRows(torch.full((2, 32), torch.nan), torch.ones(2)), "not finite"),
        ("math", StackedRows(torch.ones(2, 32), torch.tensor([0.0, torch.inf])), "not finite"),
    ],
)
def test_invalid_rows(anchor: Path, tmp_path: Path, name: str, row: StackedRows, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        graft(anchor, tmp_path / "out", {"math": anchor}, make_rows=lambda *_: {name: row})
    assert [path.name for path in tmp_path.iterdir()] == ["anchor"]


def test_a_choice_of_active_experts_is_kept(anchor: Path, tmp_path: Path) -> None:
    out = graft(anchor, tmp_path / "out", {"math": anchor, "code": anchor}, active_experts=("math", "code"))
    model = FlexMoeForCausalLM.from_pretrained(out)
    assert model.active_experts == ["math", "code"]
