"""The loss of training, compared with autograd's."""

import pytest
import torch
import torch.nn.functional as F

from flexmoe.training.next_token_loss import next_token_loss


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_loss_and_gradient_equal_autograds(z_loss):
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(3, 6, 11, generator=generator)).requires_grad_()
    input_ids = torch.randint(11, (3, 6), generator=generator)
    kept = logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(kept, input_ids[:, 1:].flatten()) + z_loss * kept.logsumexp(-1).square().mean()
    loss = next_token_loss(logits, input_ids, z_loss)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(2 * value, logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients)
    torch.testing.assert_close(
        next_token_loss(logits + 1e4, input_ids, 0.0), next_token_loss(logits, input_ids, 0.0), atol=1e-3, rtol=0
    )
