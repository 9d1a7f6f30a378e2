"""Checks of what an expert's networks compute: is the output finite, and of the size of public's?

Each network is called with random inputs, and so is public's network of the same layer. What counts is the output, not
single tensors: a huge factor beside a tiny one, neurons repeated many times and matrices that are all a little too
large are measured by their effect, in any class of network.

| attack | detected by |
|---|---|
| outputs that dominate the mixture (scaled matrices, repeated neurons, a huge low-rank difference) | `output` |
| numbers that overflow when they are multiplied (a factor of 3e38 beside one of zeros) | `output` |
| weights that are lost (all zero) | `empty output` |

Shapes: N probes, H hidden size. Needs no data. Does not cover inputs that no random probe resembles (a neuron that one
direction of real hidden states activates), which only text shows (`flexmoe.admission.verification`), or where the
networks come from (`flexmoe.admission.checks`, `flexmoe.admission.stored_outputs`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flexmoe.admission.findings import Finding, FindingVerdict, Worst, not_checked
from flexmoe.modeling.low_rank_flexmoe import is_low_rank

OUTPUT_THRESHOLD = 16.0
"""Maximum size of an expert's output, relative to public's for the same input. Measured: trained experts 0.9 to 1.3,
with noise of the size of the weights up to 3.1 (docs/admission.md). If public's output is smaller than its input, as
in an untrained anchor, the input's size is the reference; experts of random weights there: up to 11."""

EMPTY_THRESHOLD = 0.01
"""Minimum variation of the output between inputs, relative to public's: below it, the network has lost its weights, or
only its last bias is left. Measured: trained experts 0.9 to 1.1, with noise up to 1.5."""

SCALES = tuple(8.0**power for power in range(-2, 6))
"""Sizes of the probes, 1/64 to 32,768. Inputs of trained networks are about 0.1 to 30 in size: behind a norm, they
have that of its weights. The factor is the margin: an expert must be finite up to an eighth of the size up to which
public is."""

OUTPUT, EMPTY = "output", "empty output"

NOT_FINITE = "public's own output is not finite"

_PROBES = 4  # at each scale: norms over 4 H numbers, and products that are as fast as those of a single row
_WIDE_RANGE = 1e30  # dtypes with larger numbers (bfloat16, float32) hold the output of any network at any scale above


@dataclass(frozen=True)
class Reference:
    """What public's network computes in one layer.

    Attributes:
        finite_up_to: the largest of `SCALES` for which its output is finite.
        scale: of the probes that are compared, an eighth of that or 1.
        size: root mean square of its output; `input_size` of its input.
        variation: root mean square of its output less the mean over the probes.
    """

    finite_up_to: float
    scale: float
    size: float
    input_size: float
    variation: float

    @classmethod
    def of(cls, public: nn.Module, probes: Probes) -> Reference | None:
        """What this network computes; None if it is not finite even for small input."""
        sizes = (scale for scale in reversed(SCALES) if _is_finite(_call(public, probes.rows(scale))))
        finite_up_to = next(sizes, 0.0)
        if finite_up_to <= SCALES[0]:
            return None
        scale = min(1.0, finite_up_to / 8)
        x_NH = probes.rows(scale)
        y_NH = _call(public, x_NH)
        size = _rms(y_NH)
        return cls(finite_up_to, scale, size, _rms(x_NH), _variation(y_NH)) if math.isfinite(size) else None


class Probes:
    """Random inputs [N, H] for the networks of one layer: the same for all, so that results are reproducible.

    Attributes:
        dtype, device: those that the networks compute in and on.
    """

    def __init__(self, layer: int, hidden_size: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        generator = torch.Generator().manual_seed(layer)
        self._rows_NH = torch.randn(_PROBES, hidden_size, generator=generator, device="cpu")
        self.dtype, self.device = dtype, torch.device(device)

    def rows(self, scale: float) -> Tensor:
        """The probes at this scale."""
        return (self._rows_NH * scale).to(self.dtype).to(self.device)


class OutputCheck:
    """The findings about an expert's outputs, collected layer by layer."""

    def __init__(self) -> None:
        self._largest = Worst(OUTPUT_THRESHOLD)
        self._variations: list[tuple[float, int]] = []  # relative to public's, and the layer
        self._fault, self._unread = "", ""

    def add(
        self,
        layer: int,
        expert: nn.Module,
        public: nn.Module,
        reference: Reference | None,
        probes: Probes,
        *,
        unread: str = "",
    ) -> None:
        """Calls the expert's network of a layer, in eval mode, and compares its output.

        Args:
            public: public's network, which a low-rank expert reads; of zeros if it is not known.
            reference: what public's computes; None if it is not known: the output then has to be finite only.
            unread: why not, then.
        """
        if reference is None:
            self._unread = self._unread or f"layer {layer}: {unread}"
        outputs = {scale: _call(expert, probes.rows(scale), public) for scale in _sizes(reference, probes.dtype)}
        if failing := next((scale for scale, y_NH in outputs.items() if not _is_finite(y_NH)), None):
            self._fault = (
                self._fault or f"in layer {layer}, the output is NaN or infinite for input of size {failing:g}"
            )
        elif reference is not None:
            self._compare(layer, outputs[reference.scale], reference)

    def findings(self) -> list[Finding]:
        """Those of all layers so far."""
        if self._fault:
            return [Finding(OUTPUT, "refuse", math.inf, OUTPUT_THRESHOLD, self._fault)]
        if not self._largest.subject:
            reason = self._unread or "there is nothing to compare"
            return [not_checked(OUTPUT, reason), not_checked(EMPTY, reason)]
        rest = f"; not all layers are compared: {self._unread}" if self._unread else ""
        message = f"{self._largest.subject}, the output is {{value}} times as large as {self._largest.reference}{rest}"
        return [self._largest.finding(OUTPUT, message), *self._check_smallest(rest)]

    def _compare(self, layer: int, y_NH: Tensor, reference: Reference) -> None:
        is_small = reference.size < reference.input_size
        what = "its input (public's is smaller)" if is_small else "public's for the same input"
        self._largest.add(_rms(y_NH) / max(reference.size, reference.input_size), f"in layer {layer}", what)
        if reference.variation > 0:
            self._variations.append((_variation(y_NH) / reference.variation, layer))

    def _check_smallest(self, rest: str) -> list[Finding]:
        if not self._variations:
            return []
        value, layer = min(self._variations)
        verdict: FindingVerdict = "refuse" if value < EMPTY_THRESHOLD else "accept"
        message = f"in layer {layer}, the output varies {value:.3g} times as much as public's{rest}"
        return [Finding(EMPTY, verdict, value, EMPTY_THRESHOLD, message)]


def filled(network: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A network in eval mode with these tensors, which are not copied.

    Args:
        network: without weights (on the meta device); it is changed.
        tensors: by their names in its state dict.
    """
    network.load_state_dict(dict(tensors), assign=True)
    return network.eval()


def zeros(network: nn.Module, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """A network without weights, filled with zeros."""
    state = network.state_dict()
    return filled(network, {key: torch.zeros(value.shape, dtype=dtype, device=device) for key, value in state.items()})


def _call(network: nn.Module, x_NH: Tensor, public: nn.Module | None = None) -> Tensor:
    """The output [N, H], called as by a block, in eval mode and without gradients."""
    described = public if public is not None and is_low_rank(network) else network
    reads = [described] if described is not network else []
    takes_residual = "residual" in inspect.signature(described.forward).parameters
    residual = [x_NH.new_zeros(())] if takes_residual else []
    with torch.no_grad(), torch.autocast(x_NH.device.type, enabled=False):
        output: Any = network(x_NH.unsqueeze(0), *reads, *residual)
    return output.squeeze(0)


def _sizes(reference: Reference | None, dtype: torch.dtype) -> list[float]:
    """The scales at which an expert's output has to be finite: that of the comparison, and the largest."""
    if reference is not None:
        return sorted({reference.scale, reference.finite_up_to / 8})
    return [1.0, SCALES[-2]] if torch.finfo(dtype).max > _WIDE_RANGE else [SCALES[0]]


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _rms(tensor: Tensor) -> float:
    return tensor.float().square().mean().sqrt().item()  # infinite from 1e19 on, which is refused


def _variation(y_NH: Tensor) -> float:
    return _rms(y_NH.float() - y_NH.float().mean(0))


__all__ = [
    "EMPTY",
    "EMPTY_THRESHOLD",
    "NOT_FINITE",
    "OUTPUT",
    "OUTPUT_THRESHOLD",
    "SCALES",
    "OutputCheck",
    "Probes",
    "Reference",
    "filled",
    "zeros",
]
