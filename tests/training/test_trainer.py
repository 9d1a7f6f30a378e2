"""The order of training sequences."""

import torch

from flexmoe.training.trainer import Mixture


def test_mixture_keeps_its_quota_and_uses_all_sequences():
    own, public = torch.arange(7)[:, None], 100 + torch.arange(5)[:, None]
    mixture = Mixture(own, public, public_ratio=0.4, length=50, seed=3)
    seen = torch.stack([mixture[i]["input_ids"] for i in range(50)]).flatten()
    for start in range(46):
        assert (seen[start : start + 5] >= 100).sum() == 2
    assert seen[seen < 100][:28].bincount().tolist() == [4] * 7
    assert (seen[seen >= 100] - 100).bincount().tolist() == [4] * 5
    again = Mixture(own, public, public_ratio=0.4, length=50, seed=3)
    assert all(torch.equal(mixture[i]["input_ids"], again[i]["input_ids"]) for i in range(50))
    alone = Mixture(own, None, public_ratio=0.0, length=14, seed=3)
    assert sorted(int(alone[i]["input_ids"]) for i in range(14)) == sorted([*range(7)] * 2)
