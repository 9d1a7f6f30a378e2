"""Checks of an expert's weights: do they have the size of public's?

| attack | detected by |
|---|---|
| outputs that dominate the mixture (a scaled `down_proj`, a huge low-rank difference) | `weights` |
| weights that are lost (all zero) | `empty weights` |

Shapes: R rank, I input, O output size. Needs no data and no forward pass: the weights are read once, of public's a
sample of rows. Does not cover the effect on text (`flexmoe.admission.verification`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from flexmoe.admission.findings import Finding, FindingVerdict, Worst, not_checked
from flexmoe.admission.measures import PUBLIC_ROWS, find_tensor, rms, unreadable_reason
from flexmoe.modeling.low_rank_flexmoe import LowRankDelta, is_low_rank

WEIGHT_THRESHOLD = 4.0
"""Maximum root mean square of a tensor relative to public's (see `check_weights`). Measured: full experts 1.07 to
1.15; their differences from public, as in low-rank experts, 0.34 to 0.56."""

EMPTY_THRESHOLD = 0.01
"""Minimum root mean square of a matrix relative to public's: below it, the network has lost its weights."""

WEIGHTS, EMPTY = "weights", "empty weights"


def check_weights(networks: Sequence[nn.Module], publics: Sequence[nn.Module]) -> list[Finding]:
    """Compares the root mean square of each tensor with that of public's tensor of the same name.

    The root mean square makes networks of different widths comparable. If public's is small (a matrix initialised with
    zeros), the reference is that of a matrix that preserves the size of its input, `1 / sqrt(smaller side)`. Of a
    low-rank expert, the difference from public is measured.

    Args:
        networks: the incoming expert's, one per layer.
        publics: public's; quantised, sharded and offloaded weights are not read.
    """
    sizes, unread = [], ""
    for layer, (network, public) in enumerate(zip(networks, publics, strict=True)):
        for name, ours in _named_weights(network):
            theirs = find_tensor(public, name)
            if reason := _not_comparable(ours, theirs):
                unread = unread or f"{name} in layer {layer}: {reason}"
            elif theirs is not None:
                sizes.append(_Size.of(f"{name} in layer {layer}", ours, theirs))
    if not sizes:
        reason = unread or "there is nothing to compare"
        return [not_checked(WEIGHTS, reason), not_checked(EMPTY, reason)]
    return [_check_largest(sizes, unread), *_check_smallest(sizes, unread)]


@dataclass(frozen=True)
class _Size:
    """Root mean squares of one tensor: the expert's, public's, and of a matrix that preserves its input's size."""

    name: str
    ours: float
    public: float
    unit: float
    is_matrix: bool  # of a full expert; not a difference from public

    @classmethod
    def of(cls, name: str, ours: Tensor | LowRankDelta, public: Tensor) -> _Size:
        is_delta, is_vector = isinstance(ours, LowRankDelta), public.dim() < 2
        unit = 1.0 if is_vector else min(public.shape[-2:]) ** -0.5
        size = _difference_rms(ours) if isinstance(ours, LowRankDelta) else rms(ours)
        return cls(name, size, rms(public, PUBLIC_ROWS), unit, not (is_delta or is_vector))


def _check_largest(sizes: Sequence[_Size], unread: str) -> Finding:
    worst = Worst(WEIGHT_THRESHOLD)
    for size in sizes:
        is_small = size.public < size.unit
        reference = "a matrix that preserves the size of its input (public's is smaller)" if is_small else "public's"
        worst.add(size.ours / max(size.public, size.unit), size.name, reference)
    return worst.finding(
        WEIGHTS, f"{worst.subject} has {{value}} times the size of {worst.reference}{_except(unread)}"
    )


def _check_smallest(sizes: Sequence[_Size], unread: str) -> list[Finding]:
    """Empty for a low-rank expert: without differences it equals public."""
    values = {size.name: size.ours / size.public for size in sizes if size.is_matrix and size.public > 0}
    if not values:
        return []
    name = min(values, key=values.__getitem__)
    # NaN is reported by the other check
    verdict: FindingVerdict = "refuse" if values[name] < EMPTY_THRESHOLD else "accept"
    message = f"{name} has {values[name]:.3g} times the size of public's, the smallest of all{_except(unread)}"
    return [Finding(EMPTY, verdict, values[name], EMPTY_THRESHOLD, message)]


def _except(unread: str) -> str:
    return f"; not all are checked: {unread}" if unread else ""


def _named_weights(network: nn.Module) -> list[tuple[str, Tensor | LowRankDelta]]:
    """An expert's tensors by their names in public's network; of a low-rank expert, its differences."""
    if not is_low_rank(network):
        return list(network.named_parameters())
    deltas = [(path, part) for path, part in network.named_modules() if isinstance(part, LowRankDelta)]
    biases = [(f"{path}.bias", part.B.bias) for path, part in deltas if part.B.bias is not None]
    return [*((f"{path}.weight", part) for path, part in deltas), *biases]


def _not_comparable(ours: Tensor | LowRankDelta, public: Tensor | None) -> str | None:
    """Why the two cannot be compared; None if they can."""
    if public is None:
        return "public's network has no such tensor"
    factors = [ours.A.weight, ours.B.weight] if isinstance(ours, LowRankDelta) else [ours]
    reason = next((why for factor in factors if (why := unreadable_reason(factor))), None)
    if reason is not None:
        return f"the expert's tensor {reason}"
    reason = unreadable_reason(public)
    return None if reason is None else f"public's tensor {reason}"


def _difference_rms(delta: LowRankDelta) -> float:
    """The root mean square of `scale * B A`: `|B A| ** 2 = <B^T B, A A^T>`, without computing the product."""
    a_RI, b_OR = (factor.weight.detach().double() for factor in (delta.A, delta.B))
    squares = ((b_OR.T @ b_OR) * (a_RI @ a_RI.T)).sum().clamp(min=0.0).item()  # rounding may make it negative
    return abs(delta.scale) * (squares / (a_RI.shape[1] * b_OR.shape[0])) ** 0.5


__all__ = ["EMPTY", "EMPTY_THRESHOLD", "WEIGHTS", "WEIGHT_THRESHOLD", "check_weights"]
