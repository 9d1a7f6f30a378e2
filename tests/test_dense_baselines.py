"""The dense models that the results compare with: their ensemble, and the text of all owners."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
try:
    from dense_baselines import OwnersTokens, ensemble_losses, everybodys
finally:
    sys.path.pop(0)


def test_an_ensemble_is_the_mixture_of_the_probabilities_of_whole_texts():
    losses_MNL = torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(0)) * 4
    found = ensemble_losses(losses_MNL)
    whole = -(-losses_MNL.double().sum(-1)).exp().mean(0).log()
    assert found.sum(-1) == pytest.approx(whole, rel=1e-6), "a posterior over models is a mixture of their texts"
    assert found[:, 0] == pytest.approx(-(-losses_MNL[:, :, 0]).exp().mean(0).log(), rel=1e-6)


def test_everybodys_text_is_all_of_it_in_steps_as_large():
    config = {"batch_size": 2, "gradient_accumulation_steps": 1}
    one = OwnersTokens(torch.arange(64).view(4, 16), config)
    other = OwnersTokens(torch.arange(64, 128).view(8, 8), {**config, "batch_size": 4})
    joint = everybodys([one, other], seed=0)
    assert joint.sequences_NL.shape == (16, 8)
    assert sorted(joint.sequences_NL.flatten().tolist()) == list(range(128))
    assert joint.per_step == 4
