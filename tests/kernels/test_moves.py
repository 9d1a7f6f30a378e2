"""Tables that a captured CUDA graph still reads, when the model's experts change: new addresses, or none."""

import gc
import weakref

import pytest
import torch

from flexmoe.modeling.fused_flexmoe import redirecting
from flexmoe.modeling.implementations_flexmoe import low_rank_plan, plan
from flexmoe.modeling.kernels_flexmoe import PUBLIC_RANK, SCALE, TABLES, expert_table, low_rank_table, row_table
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


def test_a_change_that_fails_half_way_is_told(model):
    held = tables(model)
    block = model.flexmoe_blocks()[0]

    def fail():
        with redirecting(block):
            block.experts["code"].to(torch.bfloat16)
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert held[0][:3, 2].tolist() == [0] * 3


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


@pytest.fixture
def low_rank_model():
    experts = [{"name": name, "kind": "low_rank", "rank": [2, 2], "alpha": 3} for name in OWNERS]
    return tiny_flexmoe("olmo2", experts)


def low_rank_tables(model) -> list[torch.Tensor]:
    """Those of the first block: of the low-rank experts, and of their public network."""
    experts = model.flexmoe_blocks()[0].experts
    tensors = low_rank_plan(NAMES, experts).tensors(experts["public"], [None, *(experts[name] for name in OWNERS)])
    return [low_rank_table(tensors), expert_table(tensors.public)]


def matrices_of(model, name: str) -> set[int]:
    return {p.data_ptr() for p in model.flexmoe_blocks()[0].experts[name].parameters()}


def test_low_rank_experts_stand_in_a_table_with_ranks_and_scales(low_rank_model):
    table, public = low_rank_tables(low_rank_model)
    assert set(table[:, 0].tolist()) == {PUBLIC_RANK}
    for column, name in enumerate(OWNERS, 1):
        assert set(table[:6, column].tolist()) == matrices_of(low_rank_model, name)
    assert table[9].tolist() == [PUBLIC_RANK, 2, 2]
    bits = table[SCALE.value, 1:].to(torch.int32)  # the lower half
    assert bits.view(torch.float32).tolist() == [1.5, 1.5]
    assert set(public[:3, 0].tolist()) == matrices_of(low_rank_model, "public")


def test_a_removed_low_rank_expert_is_found_no_more(low_rank_model):
    held, _ = low_rank_tables(low_rank_model)
    before = held.clone()
    low_rank_model.remove_expert("code")
    assert held[:6, 2].tolist() == [0] * 6
    assert torch.equal(held[:, :2], before[:, :2])
    assert torch.equal(held[9:], before[9:])


@pytest.mark.parametrize("alpha", [3, 4])
def test_a_replaced_low_rank_expert_is_found_if_its_scale_is_the_same(low_rank_model, alpha, tmp_path):
    held, _ = low_rank_tables(low_rank_model)
    other = tiny_flexmoe("olmo2", [{"name": "math", "kind": "low_rank", "rank": [2, 2], "alpha": alpha}])
    other.save_expert("math", tmp_path / "math")
    changes = low_rank_model.flexmoe_blocks()[0].changes
    low_rank_model.replace_expert("code", tmp_path / "math", verify=False)
    is_same = alpha == 3
    assert set(held[:6, 2].tolist()) == (matrices_of(low_rank_model, "code") if is_same else {0})
    assert (low_rank_model.flexmoe_blocks()[0].changes == changes) == is_same
    assert (low_rank_tables(low_rank_model)[0] is held) == is_same
