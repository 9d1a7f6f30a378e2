"""Checks of router rows and biases: would the incoming expert take over the routing?

A trained row is the log-odds of "mine" against "public", a function of the layer's input, whose scale differs between
units, layers and families. So rows are compared with the other rows of their layer, and with public's first matrix,
which has the same input, in the scale of that input where it is known (`flexmoe.admission.router_inputs`).

| attack | detected by |
|---|---|
| a row much longer than the others | `row against the others`; `row against public` if there is no other expert |
| a bias that selects the expert before any token is seen | `bias` |

Shapes: a row is weight [1, H] and bias [1], H the hidden size. Needs no data and no forward pass. Does not cover rows
of ordinary length that point at public text, which only data shows (`flexmoe.admission.verification`). The
measurements behind the thresholds are in `docs/admission.md`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from flexmoe.admission.evidence import routed_row
from flexmoe.admission.findings import Finding, Worst, not_checked
from flexmoe.admission.measures import norm, unreadable_reason
from flexmoe.admission.router_inputs import RouterInput
from flexmoe.modeling.configuration_flexmoe import PUBLIC

Row = tuple[Tensor, Tensor]
"""A router row in one layer: weight [1, H] and bias [1]."""

ROW_THRESHOLD = 12.0
"""Maximum length of a row relative to the longest other row in its layer; if there is no other expert yet, relative to
the shortest of the other incoming rows. Measured, with one other row that is the shortest: rows of eight kinds of
text, fitted as log-odds, up to 2.4, relative to one of public text itself 3.2; rows of different methods (log-odds and
an untrained hidden mean) up to 9.1."""

LONE_ROW_THRESHOLD = 1000.0
"""Maximum length of a row relative to a typical row of public's first matrix, or to 1 if those are shorter. Measured
in the demo's anchor: up to 13. These rows indicate the scale of the input only roughly: a block that normalises its
output may have tiny ones, and before any training, inputs of OLMo-2 are its embeddings, of size 0.02. So this
threshold detects extreme rows only."""

BIAS_THRESHOLD = 4.6
"""Maximum difference between a bias and the largest of public's and the other experts': e ** 4.6 = 99, so 99 % for the
new expert before any token is seen. Fitted biases: -16 to +1; those of FlexOlmo are at most zero."""

OTHERS, LONE, BIAS = "row against the others", "row against public", "bias"


def check_row_tensors(
    rows: Mapping[str, Tensor],
    *,
    public: Mapping[str, Tensor],
    others: Mapping[str, Mapping[str, Tensor]],
    incoming: Mapping[str, Mapping[str, Tensor]] | None = None,
    inputs: Sequence[RouterInput] | None = None,
) -> list[Finding]:
    """`check_rows` for rows by their names in a package, `layers.<i>.router.weight` and so on."""
    layers = sorted(int(name.split(".")[1]) for name in rows if name.endswith(".router.weight"))

    def by_layer(tensors: Mapping[str, Tensor]) -> list[Row]:
        at = [f"layers.{i}.router" for i in layers]
        return [routed_row(tensors[f"{a}.weight"], tensors[f"{a}.bias"], tensors.get(f"{a}.calibration")) for a in at]

    return check_rows(
        by_layer(rows),
        public=by_layer(public),
        others={name: by_layer(tensors) for name, tensors in others.items()},
        incoming={name: by_layer(tensors) for name, tensors in (incoming or {}).items()},
        inputs=inputs,
    )


def check_rows(
    rows: Sequence[Row],
    *,
    public: Sequence[Row],
    others: Mapping[str, Sequence[Row]],
    incoming: Mapping[str, Sequence[Row]] | None = None,
    inputs: Sequence[RouterInput] | None = None,
) -> list[Finding]:
    """Compares rows and biases with those of public and of the other experts, layer by layer.

    Args:
        rows: the incoming expert's, one per layer, as are all that follow.
        public: public's. A row of zeros is no reference for lengths; that of an imported model is.
        others: the rows of the experts in the model.
        incoming: the rows of other experts that are added at the same time. If the model has no other expert, the
            shortest is the reference for lengths. They are no reference for biases, so that two incoming experts
            cannot justify each other.
        inputs: for each layer what is known of the router's input; None if nothing is.
    """
    reason = next((why for row in rows for tensor in row if (why := unreadable_reason(tensor))), None)
    if reason is not None:
        return [not_checked(check, f"the expert's row {reason}") for check in (OTHERS, LONE, BIAS)]
    inputs = inputs or [RouterInput()] * len(rows)
    lengths = [norm(each.scaled(weight)) for each, (weight, _) in zip(inputs, rows, strict=True)]
    biases = [float(bias) for _, bias in rows]
    layers = range(len(rows))
    existing = {PUBLIC: public, **others}
    present = [_readable(inputs[i], {name: theirs[i] for name, theirs in existing.items()}) for i in layers]
    arriving = [_readable(inputs[i], {name: theirs[i] for name, theirs in (incoming or {}).items()}) for i in layers]
    return [
        _check_against_others(lengths, present, arriving),
        _check_against_public(lengths, inputs, rows[0][0].numel()),
        _check_bias(biases, present),
    ]


def _check_against_others(
    lengths: Sequence[float],
    present: Sequence[Mapping[str, tuple[float, float]]],
    arriving: Sequence[Mapping[str, tuple[float, float]]],
) -> Finding:
    worst = Worst(ROW_THRESHOLD)
    for layer, length in enumerate(lengths):
        if theirs := _reference_lengths(present[layer]):
            name = max(theirs, key=theirs.__getitem__)
            worst.add(length / theirs[name], f"the row in layer {layer}", f"the longest other row, of {name!r}")
        elif theirs := _reference_lengths(arriving[layer]):
            name = min(theirs, key=theirs.__getitem__)
            reference = f"the shortest other incoming row, of {name!r}"
            worst.add(length / theirs[name], f"the row in layer {layer}", reference)
    if not worst.subject:
        return not_checked(OTHERS, "no other expert has a readable row that is not zero")
    return worst.finding(OTHERS, f"{worst.subject} is {{value}} times as long as {worst.reference}")


def _check_against_public(lengths: Sequence[float], inputs: Sequence[RouterInput], hidden_size: int) -> Finding:
    worst, reason = Worst(LONE_ROW_THRESHOLD), "no matrix of public's network with the router's input is available"
    for layer, (length, each) in enumerate(zip(lengths, inputs, strict=True)):
        if each.matrix is None:
            continue
        if why := unreadable_reason(each.matrix):
            reason = f"public's first matrix {why}"
            continue
        typical = each.typical_length(hidden_size)
        reference = "a typical row of public's first matrix" if typical >= 1 else "1 (public's rows are shorter)"
        worst.add(length / max(1.0, typical), f"the row in layer {layer}", reference)
    if not worst.subject:
        return not_checked(LONE, reason)
    return worst.finding(LONE, f"{worst.subject} is {{value}} times as long as {worst.reference}")


def _check_bias(biases: Sequence[float], present: Sequence[Mapping[str, tuple[float, float]]]) -> Finding:
    worst = Worst(BIAS_THRESHOLD)
    for layer, (bias, theirs) in enumerate(zip(biases, present, strict=True)):
        if PUBLIC in theirs:
            name = max(theirs, key=lambda name: theirs[name][1])
            reference = f"the largest other bias, of {name!r}"
            worst.add(bias - theirs[name][1], f"the bias in layer {layer}", reference)
    if not worst.subject:
        return not_checked(BIAS, "public's bias cannot be read")
    return worst.finding(BIAS, f"{worst.subject} is {{value}} above {worst.reference}")


def _readable(router_input: RouterInput, rows: Mapping[str, Row]) -> dict[str, tuple[float, float]]:
    """(length, bias) of each readable row."""
    return {
        name: (norm(router_input.scaled(weight)), float(bias))
        for name, (weight, bias) in rows.items()
        if not unreadable_reason(weight) and not unreadable_reason(bias)
    }


def _reference_lengths(rows: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """The lengths that are neither zero, infinite nor NaN."""
    return {name: length for name, (length, _) in rows.items() if 0 < length < math.inf}


__all__ = [
    "BIAS",
    "BIAS_THRESHOLD",
    "LONE",
    "LONE_ROW_THRESHOLD",
    "OTHERS",
    "ROW_THRESHOLD",
    "Row",
    "check_row_tensors",
    "check_rows",
]
