"""Tables that a captured CUDA graph still reads, when the model's experts change: new addresses, or none."""

import gc
import weakref

import pytest
import torch

from flexmoe.modeling.implementations_flexmoe import plan
from flexmoe.modeling.kernels_flexmoe import TABLES, expert_table, row_table
from flexmoe.testing import perturb_expert, tiny_flexmoe

OWNERS = ("math", "code")
NAMES = ["public", *OWNERS]


@pytest.fixture
def model():
    return tiny_flexmoe("olmo2", OWNERS)


def tables(model) -> list[torch.Tensor]:
    """Those of the first block, as its kernels find them."""
    block = model.flexmoe_blocks()[0]
    networks = [block.experts[name] for name in NAMES]
    rows = [block.router[name] for name in NAMES]
    return [
        expert_table(plan(NAMES, networks).tensors(networks)),
        row_table([row.weight for row in rows], [row.bias for row in rows]),
    ]


def addresses_of(model, name: str) -> set[int]:
    block = model.flexmoe_blocks()[0]
    return {p.data_ptr() for part in (block.experts[name], block.router[name]) for p in part.parameters()}


def columns(held: list[torch.Tensor], index: int) -> set[int]:
    rows = [*held[0][:3, index].tolist(), *held[1][:, index].tolist()]  # gate, up, down; row, bias
    return set(rows)


def test_a_removed_expert_is_found_no_more(model):
    held = tables(model)
    others = addresses_of(model, "public") | addresses_of(model, "math")
    assert columns(held, 2) == addresses_of(model, "code")
    model.remove_expert("code")
    assert columns(held, 2) == {0}
    assert columns(held, 0) | columns(held, 1) == others


def test_a_replaced_expert_is_found_in_its_slot(model, tmp_path):
    held = tables(model)
    perturb_expert(model, "math", seed=3)
    model.save_expert("math", tmp_path / "math")
    old = addresses_of(model, "code")
    model.replace_expert("code", tmp_path / "math", verify=False)
    assert columns(held, 2) == addresses_of(model, "code")
    assert columns(held, 2).isdisjoint(old)
    assert [a is b for a, b in zip(held, tables(model), strict=True)] == [True, True]


def test_what_moves_or_changes_its_dtype_is_found_no_more(model):
    held = tables(model)
    model.to(torch.bfloat16)
    assert columns(held, 0) | columns(held, 1) | columns(held, 2) == {0}
    assert tables(model)[0] is not held[0]


def test_what_stays_is_found_on(model):
    held = tables(model)
    before = [table.clone() for table in held]
    model.to(torch.float32).eval()
    model.rename_expert("code", "law")
    model.add_expert_copy("new")
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


def test_an_address_that_is_gone_is_not_remembered(model):
    rows = ((1 << 40, 2 << 40),)
    table = TABLES.of(rows, torch.device("cpu"))
    TABLES.redirect({1 << 40: 0})
    assert table.tolist() == [[0, 2 << 40]]
    assert TABLES.of(rows, torch.device("cpu")) is not table


def test_a_table_stays_where_a_graph_reads_it():
    """A graph has its address and no reference to it: it may not be freed, and hears of later moves, too."""
    device = torch.device("cpu")
    gone, taken = TABLES.of(((3 << 40, 4 << 40),), device), TABLES.of(((5 << 40, 6 << 40),), device)
    TABLES.of(((7 << 40, 6 << 40),), device)
    held = [weakref.ref(gone), weakref.ref(taken)]
    del gone, taken
    TABLES.redirect({3 << 40: 0, 5 << 40: 7 << 40})
    TABLES.redirect({4 << 40: 8 << 40, 6 << 40: 9 << 40})
    gc.collect()
    assert [table().tolist() for table in held] == [[[0, 8 << 40]], [[7 << 40, 9 << 40]]]
