"""The start of low-rank training: A spans the leading inputs of the gradient, and the expert equals public."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from flexmoe.modeling import PUBLIC, FlexMoeForCausalLM
from flexmoe.modeling.low_rank_flexmoe import LowRankDelta
from flexmoe.testing import random_tokens, tiny_flexmoe
from flexmoe.training.low_rank import _orthonormal, initialize_from_gradient

RANK = 4
FAMILIES = ("olmo2", "gpt2")  # Linear with a gate; Conv1D with biases


class Trainer:
    """The parts of an ExpertTrainer that the start uses."""

    def __init__(self, family: str, rank: int = RANK, at_a_time: int = 2) -> None:
        self.model: FlexMoeForCausalLM = tiny_flexmoe(family)
        torch.manual_seed(1)
        self.model.add_expert_copy("math", rank=rank)
        self.model.freeze_except("math", rows=False)
        for part in self.model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        self.args = SimpleNamespace(seed=0, device=torch.device("cpu"), per_device_train_batch_size=at_a_time)
        self.accelerator = SimpleNamespace(autocast=lambda: torch.autocast("cpu", enabled=False))
        self.train_dataset = [{"input_ids": ids} for ids in random_tokens(5, 16)]

    def _next_token_loss(self, model: FlexMoeForCausalLM, ids_BL: Tensor, z_loss: float) -> tuple[Tensor, None]:
        return model(input_ids=ids_BL, labels=ids_BL, num_experts_per_tok=2).loss, None

    def deltas(self) -> dict[str, LowRankDelta]:
        return {name: part for name, part in self.model.named_modules() if isinstance(part, LowRankDelta)}


def full_gradients(family: str) -> dict[str, Tensor]:
    """The gradient [O, I] of each difference: that of B where A is the identity."""
    trainer = Trainer(family)
    found = {}
    for name, delta in trainer.deltas().items():

        def add(_: LowRankDelta, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            x_TI = args[0].detach().flatten(0, -2)
            output.register_hook(lambda g: found.update({name: found.get(name, 0) + g.flatten(0, -2).T @ x_TI}))

        delta.register_forward_hook(add)
    for sequence in trainer.train_dataset:
        trainer._next_token_loss(trainer.model.train(), sequence["input_ids"][None], 0.0)[0].backward()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_spans_the_leading_inputs_of_the_gradient(family):
    trainer = Trainer(family)
    initialize_from_gradient(trainer)
    gradients = full_gradients(family)
    assert gradients.keys() == trainer.deltas().keys()
    for name, delta in trainer.deltas().items():
        a_RI = delta.A.weight.detach()
        torch.testing.assert_close(a_RI @ a_RI.T, torch.eye(RANK), rtol=0, atol=1e-5)
        best = torch.linalg.svdvals(gradients[name])[:RANK].square().sum()
        kept = (gradients[name] @ a_RI.T).square().sum()
        assert kept > 0.8 * best, (name, kept / best)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_expert_equals_public(family):
    trainer = Trainer(family)
    initialize_from_gradient(trainer)
    ids = random_tokens(2, 9)
    with torch.no_grad():
        both = trainer.model.eval()(ids, num_experts_per_tok=2).logits
        with trainer.model.only_experts(PUBLIC):
            public = trainer.model(ids).logits
    torch.testing.assert_close(both, public, rtol=0, atol=1e-5)
    assert all(not delta.B.weight.any() for delta in trainer.deltas().values())
    assert all(value.grad is None for value in trainer.model.parameters())


def test_it_depends_on_the_seed_and_the_text_only():
    """Not on the state of the random numbers, which it leaves alone, or on the sequences of a pass."""
    one, other = Trainer("olmo2"), Trainer("olmo2", at_a_time=5)
    state = torch.get_rng_state()
    initialize_from_gradient(one)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    initialize_from_gradient(other)
    for (name, delta), again in zip(one.deltas().items(), other.deltas().values(), strict=True):
        projections = [part.A.weight.detach().T @ part.A.weight.detach() for part in (delta, again)]
        torch.testing.assert_close(*projections, rtol=0, atol=1e-3, msg=name)


def test_a_rank_above_a_matrix_size_is_padded_with_zeros():
    basis = _orthonormal(torch.randn(3, 5, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(basis[:, :3].T @ basis[:, :3], torch.eye(3))
    assert basis.shape == (3, 5)
    assert not basis[:, 3:].any()


def test_a_gradient_that_is_not_finite_changes_nothing():
    trainer = Trainer("olmo2")
    before = {name: delta.A.weight.detach().clone() for name, delta in trainer.deltas().items()}
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight[0, 0] = float("nan")
    initialize_from_gradient(trainer)
    for name, delta in trainer.deltas().items():
        assert torch.equal(delta.A.weight, before[name])
        assert not delta.B.weight.any()
