"""What is recorded, compiled or as a CUDA graph, waits for nothing on the device and copies nothing to it.

On a CPU: nobody waits there, so it is told by the operations that would make one wait.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

from flexmoe.modeling.context_flexmoe import is_recording, rehearsal
from flexmoe.modeling.selection_flexmoe import select_experts
from flexmoe.testing import random_tokens, tiny_flexmoe

OWNERS = ("math", "code", "legal")
LOW_RANK = {"name": "thin", "kind": "low_rank", "rank": [2, 2]}
aten = torch.ops.aten
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.lift_fresh, aten.masked_select, aten.bincount, aten.equal}


class Watch(TorchDispatchMode):
    """Lists which operations would wait for the device, or for a copy of numbers that the host has made."""

    def __init__(self):
        super().__init__()
        self.waited = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in WAITING or (func.overloadpacket is aten.index and made_by_host(args[1])):
            self.waited.append(str(func))
        return func(*args, **kwargs or {})


def made_by_host(indices):
    """Masks have as many rows as they find ones; a list becomes a tensor of its own, [N]; ids are [T, K]."""
    return any(index is not None and (index.dtype == torch.bool or index.dim() < 2) for index in indices)


def waited(run):
    with torch.no_grad(), Watch() as watch:
        run()
    return watch.waited


def test_the_watch_sees_what_waits():
    x = torch.rand(3, 4)
    for wait in (lambda: x[:, [0, 2]], lambda: x[x > 2], lambda: x[0, 0].item(), lambda: torch.tensor([1])):
        assert waited(wait)


@pytest.mark.parametrize(
    "experts", [OWNERS, ("math", LOW_RANK, "code"), (LOW_RANK,)], ids=["full", "both", "low rank"]
)
@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_a_pass_waits_for_nothing(experts, implementation, monkeypatch):
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)  # transformers asks CUDA itself
    model = tiny_flexmoe("olmo2", experts, num_experts_per_tok=2)
    model.config._flexmoe_implementation = implementation
    tokens = random_tokens(2, 5)
    mask = model.expert_mask([["public", "math"] if "math" in experts else ["public"], model.expert_names])
    with rehearsal():
        assert waited(lambda: model(tokens, expert_mask=mask, use_cache=False)) == []
    assert waited(lambda: model(tokens, expert_mask=mask, use_cache=False)) != []


def test_a_rehearsal_leaves_out_nobody():
    """As a recording: who is idle under this mask may take part under the next."""
    model = tiny_flexmoe("olmo2", OWNERS)
    mask = model.expert_mask([["public"], ["public", "code"]])
    with rehearsal():
        assert is_recording()
        selection = select_experts(model, 2, mask)
    assert not is_recording()
    assert selection.names == ("public", *OWNERS)
    assert torch.equal(selection.row_mask, mask)
    assert select_experts(model, 2, mask).names == ("public", "code")
