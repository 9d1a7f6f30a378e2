"""Checks of what networks compute, on small networks with visible constants."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from flexmoe.admission.findings import Finding
from flexmoe.admission.outputs import (
    EMPTY,
    EMPTY_THRESHOLD,
    OUTPUT,
    OUTPUT_THRESHOLD,
    OutputCheck,
    Probes,
    Reference,
    zeros,
)
from flexmoe.modeling.low_rank_flexmoe import LowRankExpert

H, WIDTH = 32, 64
ACCEPT, REFUSE, NOT_CHECKED = "accept", "refuse", "not checked"


class Gated(nn.Module):
    """A gated network whose output is as large as its input."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(H, width, bias=False) for _ in range(2))
        self.down, self.act = nn.Linear(width, H, bias=False), nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Plain(nn.Module):
    """A network with biases."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(H, width), nn.GELU(), nn.Linear(width, H)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(x)))


class Residual(Plain):
    """A network that adds what it is given, as those of BLOOM and MPT."""

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + residual


def network(kind: type[nn.Module] = Gated, seed: int = 0, scale: float = 1.5) -> nn.Module:
    """Trained networks compute outputs at least as large as their input; matrices of this scale do, too."""
    torch.manual_seed(seed)
    made = kind().requires_grad_(False).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=scale * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5)
    return made


def scaled(module: nn.Module, **factors: float) -> nn.Module:
    made = copy.deepcopy(module)
    for name, factor in factors.items():
        getattr(made, name).weight.mul_(factor)
    return made


def repeated(module: nn.Module, times: int) -> nn.Module:
    """The same network with each neuron `times` times: its output is as many times as large."""
    made = type(module)(WIDTH * times).requires_grad_(False).eval()
    for name, part in module.named_children():
        if isinstance(part, nn.Linear):
            sizes = (1, times) if name == "down" else (times, 1)
            getattr(made, name).weight.copy_(part.weight.repeat(*sizes))
    return made


def low_rank(public: nn.Module, a: float, b: float) -> LowRankExpert:
    made = LowRankExpert(public, 2, None).requires_grad_(False)
    for part in (made.gate, made.up, made.down):
        nn.init.constant_(part.A.weight, a)
        nn.init.constant_(part.B.weight, b)
    return made.eval()


def check(*layers: tuple[nn.Module, nn.Module], dtype: torch.dtype = torch.float32) -> dict[str, Finding]:
    """The findings by check; a layer is an expert's network and public's."""
    found = OutputCheck()
    for layer, (expert, public) in enumerate(layers):
        probes = Probes(layer, H, dtype)
        reference = Reference.of(copy.deepcopy(public).to(dtype), probes)
        public_as = copy.deepcopy(public).to(dtype)
        found.add(layer, copy.deepcopy(expert).to(dtype), public_as, reference, probes, unread="it is not finite")
    return {finding.check: finding for finding in found.findings()}


def verdicts(found: dict[str, Finding]) -> tuple[str, str | None]:
    return found[OUTPUT].verdict, found[EMPTY].verdict if EMPTY in found else None


@pytest.mark.parametrize(
    ("change", "value", "verdict"),
    [
        (lambda n: n, 1, ACCEPT),
        (lambda n: scaled(n, down=-1.0), 1, ACCEPT),
        (lambda n: scaled(n, down=OUTPUT_THRESHOLD - 0.1), OUTPUT_THRESHOLD - 0.1, ACCEPT),
        (lambda n: scaled(n, down=OUTPUT_THRESHOLD + 0.1), OUTPUT_THRESHOLD + 0.1, REFUSE),
        (lambda n: scaled(n, down=300), 300, REFUSE),
        (lambda n: repeated(n, 300), 300, REFUSE),  # the same network, whose matrices have public's size
        (lambda n: scaled(n, gate=7, up=7, down=7), None, REFUSE),
        (lambda n: scaled(n, up=1e6, down=1e-6), 1, ACCEPT),  # the same network again
        (lambda n: scaled(n, up=1e-30, down=1e30), 1, ACCEPT),
        (lambda n: scaled(n, up=1e25, down=1e25), None, REFUSE),  # overflows
    ],
)
def test_equal_networks_are_decided_alike(
    change: Callable[[nn.Module], nn.Module], value: float | None, verdict: str
) -> None:
    public = network()
    found = check((public, public), (change(public), public))[OUTPUT]
    assert found.verdict == verdict
    if value is not None:
        assert found.value == pytest.approx(value, rel=0.02)
    if verdict == REFUSE:
        assert "in layer 1" in found.message


@pytest.mark.parametrize(("a", "b"), [(3e38, 0.0), (1e37, 1e-37), (1e-37, 1e37), (1e20, 1e20), (30.0, 30.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_that_are_huge_are_refused_whatever_their_product(a: float, b: float, dtype: torch.dtype) -> None:
    public = network()
    assert check((low_rank(public, a, b), public), dtype=dtype)[OUTPUT].verdict == REFUSE


@pytest.mark.parametrize(("a", "b"), [(0.1, 0.0), (0.1, 0.05), (1e10, 1e-12), (1e-20, 1.0)])
def test_factors_with_a_small_difference_are_accepted(a: float, b: float) -> None:
    public = network()
    assert verdicts(check((low_rank(public, a, b), public))) == (ACCEPT, ACCEPT)


@pytest.mark.parametrize("kind", [Gated, Plain, Residual])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.05, 0.5, 1.5, 5.0])
def test_honest_experts_are_accepted(kind: type[nn.Module], dtype: torch.dtype, scale: float) -> None:
    """Copies, other weights of the same size, and half way between; also of publics that compute nearly nothing."""
    public, other = network(kind, scale=scale), network(kind, seed=1, scale=scale)
    between = copy.deepcopy(public)
    between.load_state_dict({key: (value + other.state_dict()[key]) / 2 for key, value in public.state_dict().items()})
    for expert in (public, other, between):
        found = check((expert, public), dtype=dtype)
        assert verdicts(found) == (ACCEPT, ACCEPT), found
        assert found[OUTPUT].value < 3


@pytest.mark.parametrize(
    ("change", "value", "verdict"),
    [
        (lambda n: scaled(n, up=0.0), 0, REFUSE),  # what is left is the same for all inputs
        (lambda n: scaled(n, down=0.0), 0, REFUSE),
        (lambda n: scaled(n, down=EMPTY_THRESHOLD * 0.9), EMPTY_THRESHOLD * 0.9, REFUSE),
        (lambda n: scaled(n, down=EMPTY_THRESHOLD * 1.1), EMPTY_THRESHOLD * 1.1, ACCEPT),
    ],
)
@pytest.mark.parametrize("kind", [Gated, Plain])
def test_lost_weights(
    kind: type[nn.Module], change: Callable[[nn.Module], nn.Module], value: float, verdict: str
) -> None:
    public = network(kind)
    found = check((change(public), public))
    assert verdicts(found) == (ACCEPT, verdict)
    assert found[EMPTY].value == pytest.approx(value, rel=1e-3, abs=1e-6)
    assert "in layer 0, the output varies" in found[EMPTY].message


def test_an_expert_of_a_public_network_that_is_zero_may_grow_to_the_size_of_its_input() -> None:
    public, grown = network(scale=0.0), network(scale=1.5)
    found = check((grown, public))
    assert verdicts(found) == (ACCEPT, None)  # there is no variation to compare with
    assert "its input (public's is smaller)" in found[OUTPUT].message
    assert check((scaled(grown, down=100), public))[OUTPUT].verdict == REFUSE


def test_what_overflows_in_the_dtype_of_the_model_is_refused() -> None:
    public = network()
    expert = scaled(public, up=1e5, down=1e-5)  # numbers of 1e5 on the way
    assert check((expert, public), dtype=torch.float32)[OUTPUT].verdict == ACCEPT
    found = check((scaled(public, up=1e4, gate=1e-1, down=1e-3), public), dtype=torch.float16)[OUTPUT]
    assert (found.verdict, found.value) == (REFUSE, math.inf)
    assert "NaN or infinite for input of size" in found.message


def test_a_public_network_that_overflows_early_leaves_a_margin() -> None:
    """In float16, public is finite up to some size; an expert that is a little larger must not fail there."""
    public = network(scale=6.0)
    probes = Probes(0, H, torch.float16)
    reference = Reference.of(copy.deepcopy(public).half(), probes)
    assert reference is not None
    assert reference.finite_up_to <= 64
    assert reference.scale <= 1
    assert verdicts(check((scaled(public, up=2.0), public), dtype=torch.float16)) == (ACCEPT, ACCEPT)


class TestWithoutPublic:
    def check(self, expert: nn.Module, public: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Finding]:
        found, probes = OutputCheck(), Probes(0, H, dtype)
        found.add(0, expert.to(dtype), zeros(copy.deepcopy(public), dtype), None, probes, unread="it is elsewhere")
        return {finding.check: finding for finding in found.findings()}

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_outputs_have_to_be_finite(self, dtype: torch.dtype) -> None:
        public = network()
        found = self.check(scaled(public, down=300), public, dtype)
        assert verdicts(found) == (NOT_CHECKED, NOT_CHECKED)
        assert found[OUTPUT].message == "layer 0: it is elsewhere"
        huge = 100 * torch.finfo(dtype).max ** 0.5
        refused = scaled(public, gate=huge, up=huge)
        assert self.check(refused, public, dtype)[OUTPUT].verdict == REFUSE

    def test_a_low_rank_difference_has_to_be_finite(self) -> None:
        public = network()
        assert self.check(low_rank(public, 3e38, 0.0), public)[OUTPUT].verdict == REFUSE
        assert self.check(low_rank(public, 0.1, 0.1), public)[OUTPUT].verdict == NOT_CHECKED

    def test_a_public_network_that_computes_nan(self) -> None:
        public = network()
        nan = copy.deepcopy(public)
        nan.down.weight.fill_(math.nan)
        assert check((public, nan))[OUTPUT].verdict == NOT_CHECKED

    def test_the_other_layers_are_compared(self) -> None:
        public = network()
        nan = scaled(public, down=math.nan)
        found = check((public, nan), (scaled(public, down=100), public))[OUTPUT]
        assert found.verdict == REFUSE
        assert "not all layers are compared: layer 0" in found.message


def test_results_are_reproducible_and_change_nothing() -> None:
    public = network(Plain)
    before = torch.random.get_rng_state()
    state = {key: value.clone() for key, value in public.state_dict().items()}
    first, second = (check((scaled(public, down=2.0), public))[OUTPUT] for _ in range(2))
    assert first == second
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(state[key], value) for key, value in public.state_dict().items())
