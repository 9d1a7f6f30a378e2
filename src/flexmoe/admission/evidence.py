"""Checks of an expert's evidence: does its table claim every token, or its calibration every text?

In a table of log ratios, tokens that are more frequent in own text than in public text are paid for by others that are
less frequent. So some text must speak against the expert: one of the tokens in the lowest tenth of its scores. A table
without such tokens claims text of any kind, as does a calibration that turns a table round, or has a large bias. A
calibration's factor above 1 makes the router row longer.

Shapes: D decays, V vocabulary. Needs no data and no forward pass. Does not cover tables that claim the tokens which
public text consists of: only such text shows that (`flexmoe.admission.verification`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from flexmoe.admission.findings import Finding, Worst, not_checked
from flexmoe.admission.measures import unreadable_reason
from flexmoe.modeling.evidence_flexmoe import FADING

EVIDENCE = "evidence"

EVIDENCE_THRESHOLD = 4.6
"""Maximum part of a logit that evidence has in any layer after a text of tokens with the lowest tenth of scores, as
of a bias: e ** 4.6 = 99. Measured: -63 to -21 for the experts of the demo on SmolLM2-135M."""
LOWEST = 0.1  # the share of the vocabulary that should speak against an expert


def routed_row(weight: Tensor, bias: Tensor, calibration: Tensor | None) -> tuple[Tensor, Tensor]:
    """A router row as it counts in routing: weight [1, H] and bias [1], calibrated if there is a calibration."""
    if calibration is None:
        return weight, bias
    factor, fading, last = calibration[0], calibration[-2], calibration[-1:]
    start = last + fading * FADING  # after the first token
    return weight * factor.abs().clamp(min=1.0), factor * bias + last.maximum(start)


def check_evidence(table_V: Tensor, calibrations: Sequence[Tensor], evidence: Mapping[str, Any]) -> Finding:
    """What the evidence adds to the logit after a long text that should speak against it; the worst layer counts.

    Args:
        calibrations: one per layer.
        evidence: the expert's record.
    """
    if reason := next((why for tensor in (table_V, *calibrations) if (why := unreadable_reason(tensor))), None):
        return not_checked(EVIDENCE, f"the expert's evidence {reason}")
    low, worst = float(table_V.double().quantile(LOWEST)), Worst(EVIDENCE_THRESHOLD)
    for layer, calibration in enumerate(calibrations):
        factors, bias = calibration[1:-2].tolist(), float(calibration[-1])
        sums = [low * (1 - decay ** evidence["window"]) / (1 - decay) for decay in evidence["decays"]]
        logit = bias + sum(factor * value for factor, value in zip(factors, sums, strict=True))
        worst.add(logit, f"in layer {layer}, a text of the tokens with its lowest scores")
    return worst.finding(EVIDENCE, f"{worst.subject} adds {{value}} to the expert's logit")


__all__ = ["EVIDENCE", "EVIDENCE_THRESHOLD", "check_evidence", "routed_row"]
