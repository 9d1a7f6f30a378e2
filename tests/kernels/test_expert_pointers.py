"""The pointer tables of captured CUDA graphs when a model's experts change: new addresses, or none."""

import gc
import weakref

import pytest
import torch

pytest.importorskip("triton")

from flexmoe.kernels.expert_pointers import ExpertPointers
from flexmoe.kernels.plans import expert_plan, low_rank_plan
from flexmoe.kernels.pointers import TABLES, update_pointers
from flexmoe.kernels.triton_common import PUBLIC_RANK, SCALE, expert_table, low_rank_table, row_table
from flexmoe.testing import perturb_expert, tiny_flexmoe

OWNERS = ("math", "code")
NAMES = ["public", *OWNERS]


@pytest.fixture
def model():
    return tiny_flexmoe("olmo2", OWNERS)


@pytest.fixture
def pointers(model):
    return ExpertPointers(model)


def tables(model, names=NAMES) -> list[torch.Tensor]:
    """Those of the first block, as its kernels read them."""
    block = model.flexmoe_blocks()[0]
    networks = [block.experts[name] for name in names]
    rows = [block.router[name] for name in names]
    return [
        expert_table(expert_plan(names, networks).tensors(networks)),
        row_table([row.weight for row in rows], [row.bias for row in rows]),
    ]


def addresses_of(model, name: str) -> set[int]:
    block = model.flexmoe_blocks()[0]
    return {p.data_ptr() for part in (block.experts[name], block.router[name]) for p in part.parameters()}


def column(held: list[torch.Tensor], index: int) -> set[int]:
    return {*held[0][:3, index].tolist(), *held[1][:, index].tolist()}  # gate, up, down; row, bias


def test_the_addresses_of_a_removed_expert_become_0(model, pointers):
    held = tables(model)
    others = addresses_of(model, "public") | addresses_of(model, "math")
    assert column(held, 2) == addresses_of(model, "code")
    model.remove_expert("code")
    assert column(held, 2) == {0}
    assert column(held, 0) | column(held, 1) == others
    assert not pointers.intact


def test_a_removed_experts_memory_is_freed(model, pointers):
    parameter = model.flexmoe_blocks()[0].experts["code"].up_proj.weight
    alive = weakref.ref(parameter)
    held = [entry.tensor for (_, serial, _), entry in pointers._tensors.items() if serial == model.serial_of("code")]
    assert parameter.data_ptr() in [tensor.data_ptr() for tensor in held]
    held = [weakref.ref(tensor) for tensor in held]
    del parameter
    model.remove_expert("code")
    gc.collect()
    assert alive() is None
    assert not any(tensor() is not None for tensor in held)


def test_a_replaced_expert_is_found_in_the_old_column(model, pointers, tmp_path):
    held = tables(model)
    perturb_expert(model, "math", seed=3)
    model.save_expert("math", tmp_path / "math")
    old = addresses_of(model, "code")
    model.replace_expert("code", tmp_path / "math", verify=False)
    assert column(held, 2) == addresses_of(model, "code")
    assert column(held, 2).isdisjoint(old)
    assert [a is b for a, b in zip(held, tables(model), strict=True)] == [True, True]
    assert pointers.intact
    assert pointers.serials == tuple(map(model.serial_of, NAMES))


def test_a_replaced_expert_keeps_the_old_memory_until_the_update(model, tmp_path, monkeypatch):
    """Without the callback, as where another thread replays the graph while an expert is replaced."""
    monkeypatch.setattr(model, "on_experts_changed", lambda callback: None)
    pointers, held = ExpertPointers(model), tables(model)
    model.save_expert("math", tmp_path / "math")
    old = addresses_of(model, "code")
    model.replace_expert("code", tmp_path / "math", verify=False)
    assert column(held, 2) == old
    assert old.isdisjoint(addresses_of(model, "code"))  # so the old memory was not reused
    assert pointers.update()
    assert column(held, 2) == addresses_of(model, "code")


def test_after_another_dtype_the_addresses_become_0(model, pointers):
    held = tables(model)
    model.to(torch.bfloat16)
    assert not pointers.update()
    assert column(held, 0) | column(held, 1) | column(held, 2) == {0}
    assert tables(model)[0] is not held[0]


def test_a_move_is_followed(model, pointers):
    held = tables(model)
    before = column(held, 1)
    for block in model.flexmoe_blocks():
        for part in (block.experts["math"], block.router["math"]):
            for parameter in part.parameters():
                parameter.data = parameter.detach().clone()
    assert pointers.update()
    assert column(held, 1) == addresses_of(model, "math")
    assert column(held, 1).isdisjoint(before)


def test_a_change_that_fails_half_way_is_noticed(model, pointers):
    held = tables(model)
    block = model.flexmoe_blocks()[0]
    block.experts["code"].to(torch.bfloat16)  # and then an error, before the row and the other layers
    assert not pointers.update()
    assert held[0][:3, 2].tolist() == [0] * 3
    assert held[1][:, 2].tolist() == [block.router["code"].weight.data_ptr(), block.router["code"].bias.data_ptr()]


def test_a_network_that_is_replaced_by_hand_is_followed(model, pointers):
    held = tables(model)
    other = tiny_flexmoe("olmo2", OWNERS).flexmoe_blocks()[0]
    block = model.flexmoe_blocks()[0]
    block.experts["code"], block.router["code"] = other.experts["code"], other.router["code"]
    assert pointers.update()
    assert column(held, 2) == addresses_of(model, "code")


def test_unrelated_changes_leave_the_tables_alone(model, pointers):
    held = tables(model)
    before = [table.clone() for table in held]
    model.to(torch.float32).eval()
    model.rename_expert("code", "law")
    model.add_expert_copy("new")
    assert pointers.update()
    assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))


def test_names_that_change_hands_are_told_apart(model, pointers):
    """The expert that is called "code" at the end is the captured "math", not a replacement of "code"."""
    held = tables(model)
    math = addresses_of(model, "math")
    model.remove_expert("code")
    model.rename_expert("math", "code")
    assert column(held, 1) == math == addresses_of(model, "code")
    assert column(held, 2) == {0}


def test_a_removed_expert_stays_removed(model, pointers):
    """Another one of the same name and shapes would be in another place of the tables that follow."""
    held = tables(model)
    model.remove_expert("math")
    model.add_expert_copy("math")
    assert column(held, 1) == {0}
    assert not pointers.update()


def test_a_tensor_that_two_experts_share_is_given_up_when_one_moves(model):
    block = model.flexmoe_blocks()[0]
    block.experts["code"].up_proj.weight = block.experts["math"].up_proj.weight
    pointers, held = ExpertPointers(model), tables(model)
    block.experts["code"].up_proj.weight = torch.nn.Parameter(block.experts["math"].up_proj.weight.detach().clone())
    assert not pointers.update()
    assert held[0][1, 1:].tolist() == [0, 0]


def test_captures_of_one_model_are_updated_once(model, tmp_path):
    first, second = ExpertPointers(model), ExpertPointers(model)
    held = tables(model)
    model.save_expert("math", tmp_path / "math")
    model.replace_expert("code", tmp_path / "math", verify=False)
    assert first.update()
    assert second.update()
    assert column(held, 2) == addresses_of(model, "code")


def test_a_model_does_not_keep_the_pointers_alive(model):
    pointers = weakref.ref(ExpertPointers(model))
    gc.collect()
    assert pointers() is None
    model.remove_expert("code")


def test_a_table_without_an_address_is_not_found_again(model):
    rows = ((1 << 40, 2 << 40),)
    table = TABLES.get(rows, torch.device("cpu"))
    update_pointers({1 << 40: 0})
    assert table.tolist() == [[0, 2 << 40]]
    assert TABLES.get(rows, torch.device("cpu")) is not table


def test_a_table_stays_where_a_graph_reads_it():
    """A graph has its address and no reference to it: it must not be freed, and later moves must reach it."""
    device = torch.device("cpu")
    removed, taken = TABLES.get(((3 << 40, 4 << 40),), device), TABLES.get(((5 << 40, 6 << 40),), device)
    TABLES.get(((7 << 40, 6 << 40),), device)
    held = [weakref.ref(removed), weakref.ref(taken)]
    del removed, taken
    update_pointers({3 << 40: 0, 5 << 40: 7 << 40})
    update_pointers({4 << 40: 8 << 40, 6 << 40: 9 << 40})
    gc.collect()
    assert [table().tolist() for table in held] == [[[0, 8 << 40]], [[7 << 40, 9 << 40]]]


# Low-rank experts


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


def test_a_table_of_low_rank_experts_has_ranks_and_scales(low_rank_model):
    table, public = low_rank_tables(low_rank_model)
    assert set(table[:, 0].tolist()) == {PUBLIC_RANK}
    for index, name in enumerate(OWNERS, 1):
        assert set(table[:6, index].tolist()) == matrices_of(low_rank_model, name)
    assert table[9].tolist() == [PUBLIC_RANK, 2, 2]
    bits = table[SCALE.value, 1:].to(torch.int32)  # the lower half
    assert bits.view(torch.float32).tolist() == [1.5, 1.5]
    assert set(public[:3, 0].tolist()) == matrices_of(low_rank_model, "public")


def test_the_addresses_of_a_removed_low_rank_expert_become_0(low_rank_model):
    pointers = ExpertPointers(low_rank_model)
    held, _ = low_rank_tables(low_rank_model)
    before = held.clone()
    low_rank_model.remove_expert("code")
    assert held[:6, 2].tolist() == [0] * 6
    assert torch.equal(held[:, :2], before[:, :2])
    assert torch.equal(held[9:], before[9:])
    assert not pointers.intact


@pytest.mark.parametrize("alpha", [3, 4])
def test_a_replaced_low_rank_expert_is_followed_if_its_scale_is_the_same(low_rank_model, alpha, tmp_path):
    pointers = ExpertPointers(low_rank_model)
    held, _ = low_rank_tables(low_rank_model)
    other = tiny_flexmoe("olmo2", [{"name": "math", "kind": "low_rank", "rank": [2, 2], "alpha": alpha}])
    other.save_expert("math", tmp_path / "math")
    low_rank_model.replace_expert("code", tmp_path / "math", verify=False)
    is_same = alpha == 3
    assert set(held[:6, 2].tolist()) == (matrices_of(low_rank_model, "code") if is_same else {0})
    assert pointers.intact == is_same
    assert (low_rank_tables(low_rank_model)[0] is held) == is_same
