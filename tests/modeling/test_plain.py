"""Networks that are looked up once: what is done to them counts at once, and nothing of them is kept alive."""

import gc
import weakref

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from flexmoe import FlexMoeForCausalLM
from flexmoe.modeling import experts_flexmoe, linear_flexmoe, plain_flexmoe
from flexmoe.modeling.plain_flexmoe import Matrices, plain_network, plain_rows, side_by_side
from flexmoe.testing import random_tokens, tiny_flexmoe
from tests.ffn import CHANGES, HIDDEN, INNER, Ffn, other_activation, other_weight

OWNERS = ("math", "code", "legal")


@pytest.fixture(autouse=True)
def small_weights_count(monkeypatch):
    """On any CPU, small matrices in half precision are multiplied as large ones are where there are instructions."""
    monkeypatch.setattr(linear_flexmoe, "has_instructions", lambda dtype: True)
    monkeypatch.setattr(plain_flexmoe, "SMALLEST_WEIGHT", 1)


@pytest.fixture
def ffn() -> Ffn:
    return new_ffn()


def new_ffn(seed: int = 0) -> Ffn:
    torch.manual_seed(seed)
    return Ffn().bfloat16().eval()


def lay_behind(ffn: Ffn) -> None:
    """Gate and up lie as they do in a file."""
    both = torch.cat([ffn.first.weight.data, ffn.second.weight.data])
    ffn.first.weight.data, ffn.second.weight.data = both[:INNER], both[INNER:]


def matrices(ffn: nn.Module) -> Matrices | None:
    found = plain_network(ffn)
    return found.matrices if found else None


X = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize("are_behind", [False, True])
@torch.no_grad()
def test_the_bits_are_those_of_the_network(ffn, are_behind):
    if are_behind:
        lay_behind(ffn)
    found = matrices(ffn)
    assert len(found.before) == (1 if are_behind else 2)
    assert torch.equal(found(X), ffn(X))
    assert matrices(ffn) is found


def hooked_as_a_whole(ffn: Ffn) -> None:
    ffn.register_forward_hook(lambda module, args, output: output + 1)


def overridden_as_a_whole(ffn: Ffn) -> None:
    own = ffn.forward
    ffn.forward = lambda x: own(x) + 1


def of_another_class(ffn: Ffn) -> None:
    class Loud(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + 1

    ffn.second.__class__ = Loud


def other_layer(ffn: Ffn) -> None:
    ffn.second = nn.Linear(HIDDEN, INNER, bias=False).bfloat16()


def other_parameter(ffn: Ffn) -> None:
    ffn.second.weight = nn.Parameter(ffn.second.weight * 3)


def other_data(ffn: Ffn) -> None:
    ffn.first.weight.data = ffn.first.weight.data * 3


def both_elsewhere(ffn: Ffn) -> None:
    ffn.first.weight.data = ffn.first.weight.data * 3
    lay_behind(ffn)


def exchanged(ffn: Ffn) -> None:
    ffn.first.weight.data, ffn.second.weight.data = ffn.second.weight.data, ffn.first.weight.data


def given_a_bias(ffn: Ffn) -> None:
    ffn.last.bias = nn.Parameter(torch.ones(HIDDEN).bfloat16())


STILL_PLAIN = [other_activation, other_weight, other_layer, other_parameter, other_data, both_elsewhere, exchanged]
NO_LONGER = [hooked_as_a_whole, overridden_as_a_whole, of_another_class, given_a_bias]


@pytest.mark.parametrize("are_behind", [False, True])
@pytest.mark.parametrize("change", dict.fromkeys([*CHANGES, *STILL_PLAIN, *NO_LONGER]))
@torch.no_grad()
def test_what_is_done_to_it_counts_at_once(ffn, change, are_behind):
    if are_behind:
        lay_behind(ffn)
    before = matrices(ffn)(X)
    change(ffn)
    found = matrices(ffn)
    assert (found is not None) == (change in STILL_PLAIN)
    assert not torch.equal(ffn(X), before)
    if found is not None:
        assert torch.equal(found(X), ffn(X))


@torch.no_grad()
def test_side_by_side_each_has_its_own_bits():
    networks = []
    for seed, are_behind in enumerate([False, True, True]):
        networks.append(new_ffn(seed))
        if are_behind:
            lay_behind(networks[-1])
    for chosen, counts in [(networks[:1], [5]), (networks[1:], [2, 3])]:
        said = side_by_side([matrices(ffn) for ffn in chosen], X, counts)
        expected = [ffn(x) for ffn, x in zip(chosen, X.split(counts), strict=True)]
        assert torch.equal(said, torch.cat(expected))


def test_what_differs_in_more_than_values_is_of_another_kind(ffn):
    others = [new_ffn() for _ in range(5)]
    others[0].act = nn.GELU()
    others[1].act = nn.GELU("tanh")
    others[2].act = ACT2FN["gelu_new"]
    others[3].first, others[3].second = (nn.Linear(HIDDEN, 32, bias=False).bfloat16() for _ in range(2))
    others[3].last = nn.Linear(32, HIDDEN, bias=False).bfloat16()
    lay_behind(others[4])
    kinds = [matrices(network).kind for network in (ffn, *others)]
    assert all(kind not in kinds[:i] for i, kind in enumerate(kinds))
    assert matrices(new_ffn()).kind == kinds[0]
    others[0].act.approximate = "tanh"
    assert matrices(others[0]).kind == kinds[2]


def test_whoever_trains_or_is_of_another_precision_is_no_matrices(ffn):
    assert matrices(ffn)
    assert plain_network(ffn.train()) is None
    assert matrices(ffn.eval())
    assert matrices(ffn.float()) is None
    assert matrices(ffn.bfloat16())
    assert matrices(ffn.to("meta")) is None


def test_patches_of_classes_count(ffn, monkeypatch):
    assert matrices(ffn)
    with monkeypatch.context() as patching:
        patching.setattr(nn.Linear, "forward", lambda self, x: x)
        assert matrices(ffn) is None
    assert matrices(ffn)
    monkeypatch.setattr(Ffn, "forward", lambda self, x: x)
    assert matrices(ffn) is None


def test_hooks_elsewhere_change_nothing_and_those_everywhere_do(ffn):
    known = plain_network(ffn)
    nn.Linear(2, 2).register_forward_hook(lambda module, args, output: None)
    assert plain_network(ffn) is known
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: None)
    assert plain_network(ffn) is None
    handle.remove()
    assert plain_network(ffn).has_the_parts_of(known)


def test_nothing_is_kept_alive():
    ffn = new_ffn()
    lay_behind(ffn)
    assert matrices(ffn)
    weight = weakref.ref(ffn.second.weight)
    del ffn
    gc.collect()
    assert weight() is None


def test_rows_are_plain_or_none():
    router = tiny_flexmoe("olmo2", OWNERS).flexmoe_blocks()[0].router
    assert plain_rows(router, ["public", "legal"]) == [router["public"]._parameters, router["legal"]._parameters]
    handle = router["math"].register_forward_hook(lambda module, args, output: output)
    assert plain_rows(router, ["public"]) is None
    handle.remove()
    assert plain_rows(router, ["public"])
    router["math"].bfloat16()
    assert plain_rows(router, ["math"]) is None
    router["math"] = nn.Linear(32, 1)
    assert plain_rows(router, ["math"]) == [router["math"]._parameters]
    del router["math"]
    assert plain_rows(router, ["code"])


# In a model


@pytest.fixture
def model(tmp_path) -> FlexMoeForCausalLM:
    tiny_flexmoe("olmo2", OWNERS, num_experts_per_tok=2).bfloat16().save_pretrained(tmp_path)
    return FlexMoeForCausalLM.from_pretrained(tmp_path)


@pytest.fixture
def taken(monkeypatch) -> list[int]:
    """How many rows the matrices of some networks were called with."""
    rows: list[int] = []
    own, together = Matrices.__call__, experts_flexmoe.side_by_side
    monkeypatch.setattr(Matrices, "__call__", lambda self, x: rows.append(len(x)) or own(self, x))
    monkeypatch.setattr(experts_flexmoe, "side_by_side", lambda *args: rows.append(len(args[1])) or together(*args))
    return rows


def test_gate_and_up_of_a_file_are_one_matrix(model):
    for block in model.flexmoe_blocks():
        for network in block.experts.values():
            assert len(matrices(network).before) == 1


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("tokens", [1, 2, 8])
@torch.no_grad()
def test_few_tokens_have_the_same_bits_either_way(model, taken, monkeypatch, tokens, k):
    inputs = {"input_ids": random_tokens(tokens, 1), "num_experts_per_tok": k}
    masks = [None, model.expert_mask([("public", "math", "legal")] * (tokens - 1) + [("public", "code")])]
    with_matrices = [model(**inputs, expert_mask=mask).logits for mask in masks]
    assert taken
    taken.clear()
    monkeypatch.setattr(experts_flexmoe, "is_best_as_it_is", lambda dtype, rows: False)
    for mask, logits in zip(masks, with_matrices, strict=True):
        assert torch.equal(model(**inputs, expert_mask=mask).logits, logits)
    assert not taken


@torch.no_grad()
def test_of_many_rows_and_for_gradients_modules_take_over(model, taken):
    model(random_tokens(1, 64))
    assert not taken
    with torch.enable_grad():
        model(random_tokens(1, 4))
    assert not taken


@torch.no_grad()
def test_one_that_is_watched_is_called(model, taken):
    calls = []
    for block in model.flexmoe_blocks():
        block.experts["math"].down_proj.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    model(random_tokens(4, 1), num_experts_per_tok=4)
    assert calls
