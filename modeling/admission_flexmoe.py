"""Whether a contributed expert is let in, as far as its numbers alone tell: row, bias and weights beside those there.

An honest row is the log-odds of "mine" against "public", a function of the layer's input, whose scale is another in
every layer and family. So a row is measured by the others' rows in its layer, and by public's first matrix, which
reads the same input; a weight by public's own of that name. No data and no forward pass: the rows, one reading of the
newcomer's weights, a sample of public's.

| planted | seen by |
|---|---|
| a row much longer than the others' | `row against the others`, `row against public` where nobody else is there |
| a bias that says "mine" before any token is seen | `bias` |
| a network that drowns everybody (a scaled `down_proj`, a huge low-rank difference) | `weights` |
| a network that says nothing (its weights are lost) | `empty weights` |

Does not cover what only data shows (`flexmoe.admission`): a row of honest length that points at public text, and what
the expert answers. Nor files (`packages_flexmoe`) and whose they are (`trust_flexmoe`). `docs/admission.md` has the
figures behind the bars.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .adapters_flexmoe import beneath_adapter
from .configuration_flexmoe import PUBLIC
from .experts_flexmoe import FlexMoeBlock
from .low_rank_flexmoe import LowRankDelta, LowRankExpert, matrices
from .manifest_flexmoe import PackageError
from .quantization_flexmoe import is_quantized

Judgement = Literal["accept", "refuse", "not judged"]
Row = tuple[Tensor, Tensor]
"""A router row in one layer: weight [1, H] and bias [1]."""

ROW_BAR = 12.0
"""Longest row, in lengths of the longest of the others' in its layer; of the shortest of those that come with it,
where nobody is there yet. Measured, with one other that has the shortest: rows of eight kinds of text fitted as
log-odds up to 2.4, beside one of public text itself 3.2; rows made by different methods (log-odds beside an untrained
hidden mean) up to 9.1."""

LONE_ROW_BAR = 1000.0
"""Longest row, in lengths of a typical row of public's first matrix, or of 1 where those are shorter. Honest ones in
the demo's anchor: up to 13. They give the scale of the input only roughly: a block that normalises its output may have
tiny ones, and before any training inputs of OLMo-2 are its embeddings, of size 0.02. So this is for the absurd."""

BIAS_BAR = 4.6
"""Largest bias, above public's and those of the owners who are there: e ** 4.6 = 99, so 99 % for the newcomer before
any token is seen. Honest ones, fitted: -16 to +1; FlexOlmo's are at most zero."""

WEIGHT_BAR = 4.0
"""Largest root mean square of a tensor, in public's own (or in what `judge_scale` takes where that is small). Honest
full experts have 1.07 to 1.15 times public's; their differences from it, as low-rank ones hold them, 0.34 to 0.56."""

EMPTY_BAR = 0.01
"""Smallest root mean square of a matrix, in public's own: below, the network has lost its weights."""

PUBLIC_ROWS = 256  # of each of public's tensors that are looked at, spread evenly: it is trusted, so a sample will do
PIECE = 1 << 18  # numbers turned to float32 at a time


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name.
        verdict: "accept", "refuse", or "not judged" where it could not look.
        figure: what was measured, the worst over layers; None if nothing was.
        bar: what the figure is held to.
        sentence: both in words, with the layer; or why it could not look.
    """

    check: str
    verdict: Judgement
    figure: float | None
    bar: float | None
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


class AdmissionError(PackageError):
    """An expert that a check refuses.

    Attributes:
        findings: of all checks, those that accept too.
    """

    def __init__(self, message: str, findings: Sequence[Finding] = ()) -> None:
        super().__init__(message)
        self.findings = tuple(findings)


def refuse_unless_admitted(name: str, findings: Sequence[Finding]) -> None:
    """Lets an expert pass that no finding refuses; one that could not be judged is no reason.

    Raises:
        AdmissionError: a finding refuses it; says which, with figure and bar, and what to do.
    """
    refused = [finding for finding in findings if finding.verdict == "refuse"]
    if not refused:
        return
    reasons = " ".join(
        f"{finding.check}: {finding.sentence} (measured {finding.figure:.4g}, bar {finding.bar:.4g})."
        for finding in refused
        if finding.figure is not None and finding.bar is not None
    )
    raise AdmissionError(
        f"Expert {name!r} is refused. {reasons} Nothing was changed. `flexmoe verify PACKAGE --model MODEL --data "
        "FILES` shows all checks and what the expert does to public text. Ask its owner for one whose row is fitted "
        "as log-odds, as `flexmoe train` does; if you know better, verify=False (--no-verify) adds it unjudged.",
        findings,
    )


def judge_parts(
    blocks: Sequence[FlexMoeBlock], parts: Sequence[tuple[nn.Module, nn.Module]], *, replaced: str | None = None
) -> list[Finding]:
    """All checks of this module, on a live model and a newcomer that is not part of it yet. Changes nothing.

    Args:
        blocks: the model's, in layer order.
        parts: the newcomer's network and router row in each of them.
        replaced: the expert whose place it takes, which is no measure for it.
    """
    names = [name for name in blocks[0].router if name not in (PUBLIC, replaced)]
    publics = [block.experts[PUBLIC] for block in blocks]
    return [
        *judge_rows(
            [_live_row(row) for _, row in parts],
            public=[_live_row(block.router[PUBLIC]) for block in blocks],
            others={name: [_live_row(block.router[name]) for block in blocks] for name in names},
            input_matrices=[
                _input_matrix(public, block.hidden_size) for public, block in zip(publics, blocks, strict=True)
            ],
        ),
        *judge_scale([network for network, _ in parts], publics),
    ]


def judge_row_tensors(
    rows: Mapping[str, Tensor],
    *,
    public: Mapping[str, Tensor],
    others: Mapping[str, Mapping[str, Tensor]],
    newcomers: Mapping[str, Mapping[str, Tensor]] | None = None,
    input_matrices: Sequence[Tensor | None] | None = None,
) -> list[Finding]:
    """`judge_rows` of rows by the names that a package gives them, `layers.<i>.router.weight` and `.bias`."""
    layers = sorted(int(name.split(".")[1]) for name in rows if name.endswith(".router.weight"))

    def listed(tensors: Mapping[str, Tensor]) -> list[Row]:
        return [(tensors[f"layers.{i}.router.weight"], tensors[f"layers.{i}.router.bias"]) for i in layers]

    return judge_rows(
        listed(rows),
        public=listed(public),
        others={name: listed(tensors) for name, tensors in others.items()},
        newcomers={name: listed(tensors) for name, tensors in (newcomers or {}).items()},
        input_matrices=input_matrices,
    )


def judge_rows(
    rows: Sequence[Row],
    *,
    public: Sequence[Row],
    others: Mapping[str, Sequence[Row]],
    newcomers: Mapping[str, Sequence[Row]] | None = None,
    input_matrices: Sequence[Tensor | None] | None = None,
) -> list[Finding]:
    """Holds a newcomer's rows and biases against public's and the others', layer by layer.

    Args:
        rows: the newcomer's, one per layer, as are all that follow.
        public: public's. A row of zeros is no measure of length; an imported model's is one.
        others: rows of the owners who are there already.
        newcomers: rows of others who come at the same time: the shortest is the measure of length where nobody is
            there yet. They are none for a bias, so that two cannot vouch for each other.
        input_matrices: for each layer the matrix of public's network that reads the router's input, or None.
    """
    reason = next((why for weight, bias in rows if (why := _unreadable(weight) or _unreadable(bias))), None)
    if reason is not None:
        checks = ("row against the others", "row against public", "bias")
        return [_not_judged(check, f"the newcomer's row {reason}") for check in checks]
    lengths = [_norm(weight) for weight, _ in rows]
    biases = [float(bias) for _, bias in rows]
    everyone = {PUBLIC: public, **others}
    against = [
        _readable_pairs({name: theirs[layer] for name, theirs in everyone.items()}) for layer in range(len(rows))
    ]
    coming = [
        _readable_pairs({name: theirs[layer] for name, theirs in (newcomers or {}).items()})
        for layer in range(len(rows))
    ]
    return [
        _row_against_others(lengths, against, coming),
        _row_against_public(rows, lengths, input_matrices or [None] * len(rows)),
        _bias(biases, against),
    ]


def judge_scale(networks: Sequence[nn.Module], publics: Sequence[nn.Module]) -> list[Finding]:
    """Holds the size of a newcomer's weights, tensor by tensor, against that of public's.

    The size is the root mean square, so that networks of another width compare. Where public's own is small (a matrix
    that starts at zero), the measure is that of a matrix that keeps the size of what it is given, `1 / sqrt(side)`. Of
    a low-rank expert, the difference that it makes is measured.

    Args:
        networks: the newcomer's, one per layer.
        publics: public's, live ones: quantised, sharded and offloaded weights are not read.
    """
    sizes, unread = [], ""
    for layer, (network, public) in enumerate(zip(networks, publics, strict=True)):
        for name, ours in _named_weights(network):
            like = _find(public, name)
            if reason := _why_not(ours, like):
                unread = unread or f"{name} in layer {layer}: {reason}"
            elif like is not None:
                sizes.append(_Size.of(f"{name} in layer {layer}", ours, like))
    if not sizes:
        reason = unread or "there is nothing to compare"
        return [_not_judged("weights", reason), _not_judged("empty weights", reason)]
    return [_too_large(sizes, unread), *_too_small(sizes, unread)]


# The checks of weights


@dataclass(frozen=True)
class _Size:
    """Root mean squares of one tensor: the newcomer's, public's, and that of one which keeps the size of its input."""

    what: str
    ours: float
    public: float
    unit: float
    is_matrix: bool  # of the network's own, no difference from public's

    @classmethod
    def of(cls, what: str, ours: Tensor | LowRankDelta, public: Tensor) -> _Size:
        is_delta, is_vector = isinstance(ours, LowRankDelta), public.dim() < 2
        unit = 1.0 if is_vector else min(public.shape[-2:]) ** -0.5
        size = _difference_rms(ours) if isinstance(ours, LowRankDelta) else _rms(ours)
        return cls(what, size, _rms(public, PUBLIC_ROWS), unit, not (is_delta or is_vector))


def _too_large(sizes: Sequence[_Size], unread: str) -> Finding:
    worst = _Worst(WEIGHT_BAR)
    for size in sizes:
        is_small = size.public < size.unit
        beside = "one that keeps the size of its input (public's is smaller)" if is_small else "public's"
        worst.see(size.ours / max(size.public, size.unit), size.what, beside)
    return worst.finding("weights", f"{worst.what} has {{figure}} times the size of {worst.beside}{_but(unread)}")


def _too_small(sizes: Sequence[_Size], unread: str) -> list[Finding]:
    """Nothing, where there is no matrix to ask it of: a low-rank expert without differences is public again."""
    figures = {size.what: size.ours / size.public for size in sizes if size.is_matrix and size.public > 0}
    if not figures:
        return []
    what = min(figures, key=figures.__getitem__)
    verdict: Judgement = "refuse" if figures[what] < EMPTY_BAR else "accept"  # too large a number is not this check's
    said = f"{what} has {figures[what]:.3g} times the size of public's, the least of all{_but(unread)}"
    return [Finding("empty weights", verdict, figures[what], EMPTY_BAR, said)]


def _but(unread: str) -> str:
    return f"; not all are judged: {unread}" if unread else ""


# The checks of rows


def _row_against_others(
    lengths: Sequence[float],
    against: Sequence[Mapping[str, tuple[float, float]]],
    coming: Sequence[Mapping[str, tuple[float, float]]],
) -> Finding:
    worst = _Worst(ROW_BAR)
    for layer, length in enumerate(lengths):
        if theirs := _lengths(against[layer]):
            whose = max(theirs, key=theirs.__getitem__)
            worst.see(length / theirs[whose], f"the row in layer {layer}", f"the longest other one, of {whose!r}")
        elif theirs := _lengths(coming[layer]):
            whose = min(theirs, key=theirs.__getitem__)
            beside = f"the shortest other one that comes with it, of {whose!r}"
            worst.see(length / theirs[whose], f"the row in layer {layer}", beside)
    if not worst.what:
        return _not_judged("row against the others", "no other expert has a row that can be read and is not zero")
    return worst.finding("row against the others", f"{worst.what} is {{figure}} times as long as {worst.beside}")


def _lengths(rows: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Of rows that are a measure: neither zero nor beyond all numbers."""
    return {name: length for name, (length, _) in rows.items() if 0 < length < math.inf}


def _row_against_public(
    rows: Sequence[Row], lengths: Sequence[float], input_matrices: Sequence[Tensor | None]
) -> Finding:
    worst, reason = _Worst(LONE_ROW_BAR), "no matrix of public's that reads what the router reads is at hand"
    for layer, (row, length, matrix) in enumerate(zip(rows, lengths, input_matrices, strict=True)):
        if matrix is None:
            continue
        if why := _unreadable(matrix):
            reason = f"public's first matrix {why}"
            continue
        typical = _rms(matrix, PUBLIC_ROWS) * row[0].numel() ** 0.5
        beside = "a typical row of public's first matrix" if typical >= 1 else "1 (those of public's are shorter)"
        worst.see(length / max(1.0, typical), f"the row in layer {layer}", beside)
    if not worst.what:
        return _not_judged("row against public", reason)
    return worst.finding("row against public", f"{worst.what} is {{figure}} times as long as {worst.beside}")


def _bias(biases: Sequence[float], against: Sequence[Mapping[str, tuple[float, float]]]) -> Finding:
    worst = _Worst(BIAS_BAR)
    for layer, (bias, theirs) in enumerate(zip(biases, against, strict=True)):
        if PUBLIC in theirs:
            highest = max(theirs, key=lambda name: theirs[name][1])
            worst.see(
                bias - theirs[highest][1], f"the bias in layer {layer}", f"the largest other one, of {highest!r}"
            )
    if not worst.what:
        return _not_judged("bias", "public's bias cannot be read")
    return worst.finding("bias", f"{worst.what} is {{figure}} above {worst.beside}")


class _Worst:
    """The figure that is nearest to its bar or furthest beyond it, and what it belongs to."""

    def __init__(self, bar: float) -> None:
        self.bar, self.figure, self.what, self.beside = bar, -math.inf, "", ""

    def see(self, figure: float, what: str, beside: str = "") -> None:
        """Takes in one more; what is no number counts as infinite."""
        figure = math.inf if math.isnan(figure) else figure
        if not self.what or figure > self.figure:
            self.figure, self.what, self.beside = figure, what, beside

    def finding(self, check: str, sentence: str) -> Finding:
        """The finding; `{figure}` in the sentence is filled in."""
        verdict: Judgement = "accept" if self.figure <= self.bar else "refuse"
        return Finding(check, verdict, self.figure, self.bar, sentence.format(figure=f"{self.figure:.3g}"))


def _not_judged(check: str, reason: str) -> Finding:
    return Finding(check, "not judged", None, None, reason)


# Reading


def _named_weights(network: nn.Module) -> list[tuple[str, Tensor | LowRankDelta]]:
    """An expert's tensors by the names that public has them under; of a low-rank one, its differences from those."""
    if not isinstance(network, LowRankExpert):
        return list(network.named_parameters())
    deltas = [(path, part) for path, part in network.named_modules() if isinstance(part, LowRankDelta)]
    biases = [(f"{path}.bias", part.B.bias) for path, part in deltas if part.B.bias is not None]
    return [*((f"{path}.weight", part) for path, part in deltas), *biases]


def _why_not(ours: Tensor | LowRankDelta, public: Tensor | None) -> str | None:
    """Why the two cannot be compared; None if they can."""
    if public is None:
        return "public's network has no such tensor"
    factors = [ours.A.weight, ours.B.weight] if isinstance(ours, LowRankDelta) else [ours]
    reason = next((why for factor in factors if (why := _unreadable(factor))), None)
    if reason is not None:
        return f"the newcomer's {reason}"
    reason = _unreadable(public)
    return None if reason is None else f"public's {reason}"


def _find(module: nn.Module, name: str) -> Tensor | None:
    """The tensor `name` of a live network, beneath the adapters that are around its parts; None if it has none."""
    *path, leaf = name.split(".")
    found: Any = beneath_adapter(module)
    for step in path:
        found = getattr(found, step, None)
        if found is None:
            return None
        found = beneath_adapter(found)
    tensor = getattr(found, leaf, None)
    return tensor.detach() if isinstance(tensor, Tensor) else None


def input_matrix_name(public: nn.Module, hidden_size: int) -> str | None:
    """What public's network, which may be on the meta device, calls its first matrix that has the hidden size for a
    side: the one that reads what the router reads. None if it has no such plain matrix."""
    try:
        paths = [path for path, _ in matrices(public)]
    except ValueError:  # no plain matrix: quantised, or of a kind of its own
        return None
    for name in (f"{path.removesuffix('.base_layer')}.weight" for path in paths):
        if (matrix := _find(public, name)) is not None and hidden_size in matrix.shape:
            return name
    return None


def _input_matrix(public: nn.Module, hidden_size: int) -> Tensor | None:
    name = input_matrix_name(public, hidden_size)
    return None if name is None else _find(public, name)


def _live_row(row: nn.Module) -> Row:
    plain: Any = beneath_adapter(row)
    return plain.weight.detach(), plain.bias.detach()


def _readable_pairs(rows: Mapping[str, Row]) -> dict[str, tuple[float, float]]:
    """(length, bias) of each row that can be read."""
    return {
        name: (_norm(weight), float(bias))
        for name, (weight, bias) in rows.items()
        if not _unreadable(weight) and not _unreadable(bias)
    }


def _unreadable(tensor: Tensor) -> str | None:
    """Why the numbers of a tensor cannot be read here and now; None if they can."""
    if tensor.is_meta:
        return "lies on the meta device, as offloaded ones do"
    if hasattr(tensor, "full_tensor"):  # a DTensor: gathering it would have all processes take part
        return "is sharded over processes"
    return "is quantised" if is_quantized(tensor) else None


def _norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor.detach().double()).item()


def _rms(tensor: Tensor, rows: int | None = None) -> float:
    """The root mean square, to half a percent; with `rows`, of so many at least that are spread evenly.

    torch adds up bfloat16 in float32, at the speed of memory if the sum's dtype is not asked for; of the smaller
    formats that is done here, in pieces that stay in the cache.
    """
    tensor = tensor.detach()
    if rows is not None and tensor.dim() > 1:
        tensor = tensor[:: sample_step(len(tensor), rows)]
    if not tensor.numel():
        return 0.0
    if tensor.dtype == torch.float16 or tensor.dtype.itemsize == 1:
        pieces = tensor.flatten().split(PIECE)
        norm = sum((_norm32(piece) ** 2 for piece in pieces), torch.zeros((), device=tensor.device)).sqrt()
    else:
        norm = torch.linalg.vector_norm(tensor)
    return norm.item() / tensor.numel() ** 0.5


def sample_step(length: int, rows: int = PUBLIC_ROWS) -> int:
    """Every how many-th row of a tensor is looked at. Of a sample taken so, all rows are."""
    return max(1, length // rows)


def _norm32(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor.float())


def _difference_rms(delta: LowRankDelta) -> float:
    """The root mean square of `scale * B A`: `|B A| ** 2 = <B^T B, A A^T>`, so the product is never made."""
    a_RI, b_OR = (factor.weight.detach().double() for factor in (delta.A, delta.B))
    squares = ((b_OR.T @ b_OR) * (a_RI @ a_RI.T)).sum().clamp(min=0.0).item()  # rounding may leave less than none
    return abs(delta.scale) * (squares / (a_RI.shape[1] * b_OR.shape[0])) ** 0.5


__all__ = [
    "BIAS_BAR",
    "EMPTY_BAR",
    "LONE_ROW_BAR",
    "ROW_BAR",
    "WEIGHT_BAR",
    "AdmissionError",
    "Finding",
    "input_matrix_name",
    "judge_parts",
    "judge_row_tensors",
    "judge_rows",
    "judge_scale",
    "refuse_unless_admitted",
    "sample_step",
]
