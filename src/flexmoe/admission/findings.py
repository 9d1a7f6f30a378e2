"""Findings of admission checks: a measured value, its threshold, and whether the expert is refused.

Does not cover the checks themselves (`flexmoe.admission.rows`, `weights`, `verification`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from flexmoe.packages.manifest import PackageError

FindingVerdict = Literal["accept", "refuse", "not checked"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: its name.
        verdict: "accept", "refuse", or "not checked" if the check could not be made.
        value: the measured value, the worst over layers; None if nothing was measured.
        threshold: the largest (for "empty output": smallest) accepted value.
        message: value and threshold in words, with the layer; or why the check could not be made.
    """

    check: str
    verdict: FindingVerdict
    value: float | None
    threshold: float | None
    message: str

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


class AdmissionError(PackageError):
    """An expert that a check refuses.

    Attributes:
        findings: of all checks, including those that accept.
    """

    def __init__(self, message: str, findings: Sequence[Finding] = ()) -> None:
        super().__init__(message)
        self.findings = tuple(findings)


def refuse_unless_admitted(name: str, findings: Sequence[Finding], package: Path | None = None) -> None:
    """Raises an error if a finding refuses the expert; checks that could not be made do not refuse it.

    Args:
        package: the folder of its package, for the message.

    Raises:
        AdmissionError: with each refusing check, its value and threshold, and what to do.
    """
    refused = [finding for finding in findings if finding.verdict == "refuse"]
    if not refused:
        return
    reasons = " ".join(
        f"{finding.check}: {finding.message} (measured {finding.value:.4g}, threshold {finding.threshold:.4g})."
        for finding in refused
        if finding.value is not None and finding.threshold is not None
    )
    where = "" if package is None else f"{package}: "
    raise AdmissionError(
        f"{where}Expert {name!r} is refused. {reasons} Nothing was changed. `flexmoe verify PACKAGE --model MODEL "
        "--data FILES` shows all checks and the effect on public text. Ask the owner for an expert whose networks "
        "compute outputs of public's size and whose router row is fitted as log-odds, as by `flexmoe train`; "
        "verify=False (--no-verify) adds it without these checks.",
        findings,
    )


def not_checked(check: str, reason: str) -> Finding:
    """The finding of a check that could not be made."""
    return Finding(check, "not checked", None, None, reason)


class Worst:
    """The largest value seen, compared with a threshold.

    Attributes:
        value: the largest value; NaN counts as infinite.
        subject, reference: descriptions of what was measured, and of what it was compared with; empty before the first
            value.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold, self.value, self.subject, self.reference = threshold, -math.inf, "", ""

    def add(self, value: float, subject: str, reference: str = "") -> None:
        """Takes one more value into account."""
        value = math.inf if math.isnan(value) else value
        if not self.subject or value > self.value:
            self.value, self.subject, self.reference = value, subject, reference

    def finding(self, check: str, message: str) -> Finding:
        """The finding; `{value}` in the message is replaced."""
        verdict: FindingVerdict = "accept" if self.value <= self.threshold else "refuse"
        return Finding(check, verdict, self.value, self.threshold, message.format(value=f"{self.value:.3g}"))


__all__ = ["AdmissionError", "Finding", "FindingVerdict", "Worst", "not_checked", "refuse_unless_admitted"]
