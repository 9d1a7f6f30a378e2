"""An FFN, and changes of its parts that code which reads its weights must respect."""

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.activations import ACT2FN

HIDDEN, INNER = 16, 24


class Ffn(nn.Module):
    """A gated FFN that multiplies the gate from the right."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(HIDDEN, INNER, bias=bias), nn.Linear(HIDDEN, INNER, bias=bias)
        self.last = nn.Linear(INNER, HIDDEN, bias=bias)
        self.act = ACT2FN["gelu_pytorch_tanh"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(x) * self.act(self.first(x)))


def hooked(ffn: Ffn) -> None:
    ffn.first.register_forward_hook(lambda module, args, output: output + 1)


def pre_hooked(ffn: Ffn) -> None:
    ffn.last.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def activation_hooked(ffn: Ffn) -> None:
    ffn.act.register_forward_hook(lambda module, args, output: output + 1)


def overridden(ffn: Ffn) -> None:
    own = ffn.second.forward
    ffn.second.forward = lambda x: own(x) + 1


def parametrized(ffn: Ffn) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2 * weight

    parametrize.register_parametrization(ffn.second, "weight", Doubled())


def wrapped(ffn: Ffn) -> None:
    ffn.first = nn.Sequential(ffn.first, nn.Tanh())


def other_activation(ffn: Ffn) -> None:
    ffn.act = nn.Sigmoid()


def other_weight(ffn: Ffn) -> None:
    ffn.last.weight.data.mul_(3)


CHANGES = [
    hooked,
    pre_hooked,
    activation_hooked,
    overridden,
    parametrized,
    wrapped,
    other_activation,
    other_weight,
]
