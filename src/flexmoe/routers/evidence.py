"""Evidence of an expert, fitted by its owner alone: a table of scores by token, and a calibration per layer.

The score of a token is the log ratio of its rates in own and in public text. Own rates are shrunk towards public ones
with the weight of `strength` tokens, so a token that own text does not have counts against it, the more so the more
own text there is. A layer's calibration is the logistic regression of own against public tokens on the row's logit and
the sums of scores, whose factors are not negative, and on what fades at the start of a text.

Nothing is calibrated on text that it was fitted on: the text is divided into folds, in its own order (the parts of a
document are close to each other), and each is scored by the row and the table of the others.

Where all text so far is of one owner, the longest memory is the best, and it is the worst after another's text. So a
calibration also counts tokens of sequences that begin with text of the other side.

Shapes: N sequences of L tokens, T = N * L, K tokens that a calibration counts, D decays, V vocabulary, F = D + 1
features (sums, and what fades).

Does not cover the row itself (`flexmoe.routers.rows`), or what is computed with it (`flexmoe.modeling`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flexmoe.modeling.evidence_flexmoe import calibration_size, sequence_features
from flexmoe.routers.rows import Logits, RouterRow

RIDGE = 1e-4  # of the calibration, on features of variance 1
STEPS = 60  # of Newton's method
BATCH = 64  # sequences whose sums are computed at a time
FOLDS = 8  # of the text, or as many as there are sequences
SWITCHED = 2  # each so-manieth own sequence is also read with a change of owner in it

FitRow = Callable[..., RouterRow]
"""`fit(own, public, start=..., folds=...)` of a method that needs states, its other arguments bound."""
FitLayer = Callable[[Tensor, Tensor, Logits | None], tuple[RouterRow, Logits]]
"""Fits the row of a layer on own and public states [T, H], starting from logits of these tokens; with the row's own
logits of them, from which the next layer can start."""


@dataclass(frozen=True)
class EvidenceSettings:
    """How a table is made, and what is summed.

    Attributes:
        decays: of the sums, per token.
        window: tokens that a sum reaches back.
        strength: tokens of own text that public rates weigh as much as.
        clip: the largest score.
        step: scores are multiples of it.
        min_count: own tokens that occur less often count as absent.
    """

    decays: tuple[float, ...] = (0.7, 0.9, 0.98)
    window: int = 1024
    strength: float = 2000.0
    clip: float = 4.0
    step: float = 0.25
    min_count: int = 1

    def record(self, vocab_size: int) -> dict[str, Any]:
        """The entry "evidence" of the expert's record."""
        return {"tokens": vocab_size, "kind": "unigram", **asdict(self), "decays": list(self.decays)}


def score_table(own: Tensor, public: Tensor, vocab_size: int, settings: EvidenceSettings) -> Tensor:
    """The scores float32 [V] of tokens, from own and public ids of any shape.

    Example:
        ```pycon
        >>> import torch
        >>> from flexmoe.routers.evidence import EvidenceSettings, score_table
        >>> own, public = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 1, 1])
        >>> score_table(own, public, 3, EvidenceSettings(strength=1.0)).tolist()
        [0.5, -0.75, -1.5]
        ```
    """
    return _scores(_counts(own, vocab_size), _counts(public, vocab_size), settings)


def _counts(ids: Tensor, vocab_size: int) -> Tensor:
    """How often each token occurs, float64 [V]."""
    return torch.bincount(ids.flatten().long().cpu(), minlength=vocab_size).double()


def _scores(own_V: Tensor, public_V: Tensor, settings: EvidenceSettings) -> Tensor:
    """The scores float32 [V], from counts."""
    own_V = own_V.where(own_V >= settings.min_count, 0.0)
    rates_V = (public_V + 0.5) / (public_V.sum() + 0.5 * len(public_V))
    own_rates_V = (own_V + settings.strength * rates_V) / (own_V.sum() + settings.strength)
    scores_V = (own_rates_V / rates_V).log().clamp(-settings.clip, settings.clip)
    return ((scores_V / settings.step).round() * settings.step).float()


class Evidence:
    """The evidence of one owner: its table, and what its calibration needs."""

    def __init__(self, own_NL: Tensor, public_NL: Tensor, vocab_size: int, settings: EvidenceSettings) -> None:
        self.record, self._settings = settings.record(vocab_size), settings
        own, public = ((side_NL, _counts(side_NL, vocab_size)) for side_NL in (own_NL, public_NL))
        self._sides = (own, public)
        self.table = _scores(own[1], public[1], settings)

    def fitting(
        self, fit: FitRow, sequences: Sequence[Tensor], drawn: Sequence[Tensor], counts: Sequence[int]
    ) -> FitLayer:
        """A function that fits the row of a layer as `fit(own, public)` does, and its calibration.

        Args:
            sequences: [N, L] of own and of public text, whose states the rows are fitted on.
            drawn: the ascending indices [N] of these sequences among those that the table was made of.
            counts: the numbers of tokens that have states.
        """
        length = sequences[0].shape[1]
        whole = [(tokens + length // 2) // length for tokens in counts]  # without a last one of a few tokens
        count = min(FOLDS, *whole)
        if count < 2:  # too little text to be divided
            return functools.partial(_uncalibrated, fit, calibration_size(self.record))
        bounds = [[*(fold * n // count for fold in range(count)), len(of)] for n, of in zip(whole, drawn, strict=True)]
        generator = torch.Generator().manual_seed(0)
        read: list[list[tuple[Tensor, Tensor]]] = []
        for fold in range(count):
            ranges = [range(*of_side[fold : fold + 2]) for of_side in bounds]
            own_V, public_V = (_without(*each) for each in zip(self._sides, drawn, ranges, strict=True))
            table = _scores(own_V, public_V, self._settings)
            read.append([*self._read(sequences, ranges, table, generator)])
        sides = []
        for (*starts, _), tokens, folds in zip(bounds, counts, zip(*read, strict=True), strict=True):
            features, places = (torch.cat(parts) for parts in zip(*folds, strict=True))
            has_state = places < tokens
            ends = [start * length for start in starts[1:]] + [tokens]
            sizes = [end - start * length for start, end in zip(starts, ends, strict=True)]
            sides.append(_Side(sizes, features[has_state], places[has_state]))
        return functools.partial(_fit_calibrated, fit, sides)

    def _read(
        self, sequences: Sequence[Tensor], ranges: Sequence[range], table: Tensor, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """By side, the features [K, F] of the tokens of a fold by the table of the others, and which tokens [K] of the
        side these are: each token after the beginning of its sequence, and some after text of the other side."""
        (own_NL, public_NL), length = (side_NL.cpu() for side_NL in sequences), sequences[0].shape[1]
        own_N, public_N = (torch.arange(fold.start, fold.stop) for fold in ranges)
        changed_N = own_N[own_N % SWITCHED == SWITCHED - 1]
        other_N = public_N[torch.randint(len(public_N), (len(changed_N),), generator=generator)]
        change_N = torch.randint(length // 8, length - length // 8, (len(changed_N),), generator=generator)
        is_after_NL = torch.arange(length) >= change_N[:, None]
        tails = ((own_NL, own_N, changed_N), (public_NL, public_N, other_N))
        for (tail_NL, whole_N, tail_N), (head_NL, _, head_N) in (tails, tails[::-1]):
            mixed_NL = torch.where(is_after_NL, tail_NL[tail_N], head_NL[head_N])
            is_counted = torch.cat([torch.ones(len(whole_N), length, dtype=torch.bool), is_after_NL])
            features = self._features(torch.cat([tail_NL[whole_N], mixed_NL]), table)
            places = torch.cat([whole_N, tail_N])[:, None] * length + torch.arange(length)
            yield features[is_counted.flatten()], places[is_counted]

    def _features(self, sequences_NL: Tensor, table_V: Tensor) -> Tensor:
        """[T, F]."""
        parts = (part_NL.long().cpu() for part_NL in sequences_NL.split(BATCH))
        return torch.cat([sequence_features(table_V, part_NL, self.record) for part_NL in parts])


@dataclass(frozen=True)
class _Side:
    """What the calibration of one side needs: the numbers of tokens of its folds, the features [K, F] of tokens by the
    table of the other folds, and which tokens [K] these are."""

    folds: list[int]
    features: Tensor
    places: Tensor


def _without(side: tuple[Tensor, Tensor], drawn_N: Tensor, fold: range) -> Tensor:
    """The counts of a side, of its sequences [N, L] and their counts, without a fold: from its first drawn sequence to
    that of the next fold, or from the beginning and to the end."""
    side_NL, counts_V = side
    start = int(drawn_N[fold.start]) if fold.start else 0
    stop = int(drawn_N[fold.stop]) if fold.stop < len(drawn_N) else len(side_NL)
    return counts_V - _counts(side_NL[start:stop], len(counts_V))


def fit_layer(fit: FitRow, own_TH: Tensor, public_TH: Tensor, start: Logits | None) -> tuple[RouterRow, Logits]:
    """A `FitLayer` of a method's function, its options bound."""
    row = fit(own_TH, public_TH, start=start)
    return row, (row.logits(own_TH), row.logits(public_TH))


def _uncalibrated(
    fit: FitRow, size: int, own_TH: Tensor, public_TH: Tensor, start: Logits | None
) -> tuple[RouterRow, Logits]:
    row, logits = fit_layer(fit, own_TH, public_TH, start)
    return replace(row, calibration=torch.tensor([1.0] + [0.0] * (size - 1))), logits


def _fit_calibrated(
    fit: FitRow, sides: Sequence[_Side], own_TH: Tensor, public_TH: Tensor, start: Logits | None
) -> tuple[RouterRow, Logits]:
    """The row, and the calibration of the logits that its tokens get from rows without their fold."""
    row = fit(own_TH, public_TH, start=start, folds=tuple(side.folds for side in sides))
    assert row.held_out is not None, "a method that takes folds returns these logits"
    found = [
        torch.cat([held_out_T.cpu()[side.places, None], side.features], 1).double()
        for held_out_T, side in zip(row.held_out, sides, strict=True)
    ]
    return replace(row, calibration=calibrate(*found), held_out=None), (row.logits(own_TH), row.logits(public_TH))


def calibrate(own: Tensor, public: Tensor) -> Tensor:
    """A calibration float32 [1 + F + 1]: logistic regression of own against public tokens, [T, 1 + F] each.

    The factors of the row's logit and of the sums are not negative: one that would be is left out.
    """
    *kept, fading = range(own.shape[1])
    while True:
        factors, bias = _logistic_regression(own[:, [*kept, fading]], public[:, [*kept, fading]])
        if not (factors[:-1] < 0).any():
            break
        kept.pop(int(factors[:-1].argmin()))
    calibration = torch.zeros(own.shape[1] + 1, dtype=torch.float64)
    calibration[[*kept, fading]], calibration[-1] = factors, bias
    return calibration.float()


def _logistic_regression(own: Tensor, public: Tensor) -> tuple[Tensor, Tensor]:
    """The factors float64 of the columns, and the bias; both sides weigh the same."""
    sides = [(own, 1.0), (public, 0.0)]
    scale = torch.cat([own, public]).std(0).clamp(min=1e-9)
    ridge = torch.full((own.shape[1] + 1,), RIDGE, dtype=torch.float64)
    ridge[-1] = 1e-9
    theta = torch.zeros_like(ridge)
    for _ in range(STEPS):
        gradient, hessian = ridge * theta, ridge.diag()
        for x, label in sides:
            z = torch.nn.functional.pad(x / scale, (0, 1), value=1.0)
            p_T = torch.sigmoid(z @ theta)
            gradient = gradient + z.T @ (p_T - label) * (0.5 / len(z))
            hessian = hessian + (z * (p_T * (1 - p_T))[:, None]).T @ z * (0.5 / len(z))
        step = torch.linalg.solve(hessian, gradient).clamp(-4, 4)  # far from the solution, it may be much too long
        theta = theta - step
        if step.abs().max() < 1e-7:
            break
    return theta[:-1] / scale, theta[-1]


__all__ = ["Evidence", "EvidenceSettings", "calibrate", "score_table"]
