"""A forward pass that is compiled or captured as a CUDA graph does not synchronize with the device.

On a CPU, where nothing synchronizes: the test looks for operations that would.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from flexmoe.kernels.graphs import warmup
from flexmoe.modeling.masking_flexmoe import is_capturing, select_experts
from flexmoe.testing import random_tokens, tiny_flexmoe

OWNERS = ("math", "code", "legal")
LOW_RANK = {"name": "thin", "kind": "low_rank", "rank": [2, 2]}
aten = torch.ops.aten
SYNCHRONIZING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.lift_fresh,
    aten.masked_select,
    aten.bincount,
    aten.equal,
}


class Synchronizations(TorchDispatchMode):
    """Lists operations that would wait for the device, or for a copy of numbers from the host."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in SYNCHRONIZING or (func.overloadpacket is aten.index and from_host(args[1])):
            self.operations.append(str(func))
        return func(*args, **kwargs or {})


def from_host(indices):
    """Masks give data-dependent shapes; a list becomes a new tensor [N]; ids are [T, K]."""
    return any(index is not None and (index.dtype == torch.bool or index.dim() < 2) for index in indices)


def synchronizations(run):
    with torch.no_grad(), Synchronizations() as mode:
        run()
    return mode.operations


def test_synchronizations_are_found():
    x = torch.rand(3, 4)
    for synchronize in (lambda: x[:, [0, 2]], lambda: x[x > 2], lambda: x[0, 0].item(), lambda: torch.tensor([1])):
        assert synchronizations(synchronize)


@pytest.mark.parametrize(
    "experts", [OWNERS, ("math", LOW_RANK, "code"), (LOW_RANK,)], ids=["full", "full and low-rank", "low-rank"]
)
@pytest.mark.parametrize("implementation", ["flexmoe_triton", "eager"])
def test_forward_pass_does_not_synchronize(experts, implementation, monkeypatch):
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)  # otherwise transformers queries CUDA
    model = tiny_flexmoe("olmo2", experts, num_experts_per_tok=2)
    model.set_experts_implementation(implementation)
    tokens = random_tokens(2, 5)
    mask = model.expert_mask([["public", "math"] if "math" in experts else ["public"], model.expert_names])
    with warmup():
        assert synchronizations(lambda: model(tokens, expert_mask=mask, use_cache=False)) == []
    assert synchronizations(lambda: model(tokens, expert_mask=mask, use_cache=False)) != []


def test_warmup_selects_all_experts():
    """As a capture does: an expert that this mask excludes may be allowed by the next."""
    model = tiny_flexmoe("olmo2", OWNERS)
    mask = model.expert_mask([["public"], ["public", "code"]])
    with warmup():
        assert is_capturing()
        selection = select_experts(model, 2, mask)
    assert not is_capturing()
    assert selection.names == ("public", *OWNERS)
    assert torch.equal(selection.row_mask, mask)
    assert select_experts(model, 2, mask).names == ("public", "code")
