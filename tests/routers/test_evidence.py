"""Evidence fitted from text: scores of tokens, calibration, and that each fold is judged by the fit of the others."""

import functools

import pytest
import torch

from flexmoe.modeling.evidence_flexmoe import FADING, sequence_features
from flexmoe.routers import evidence as evidence_module
from flexmoe.routers.evidence import Evidence, EvidenceSettings, calibrate, score_table
from flexmoe.routers.hidden_states import RowText, fit_rows
from flexmoe.routers.rows import RouterRow, RowMethod, log_odds
from flexmoe.testing import tiny_anchor

V, L, H = 50, 16, 6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def text(seed: int, favourite: int, sequences: int = 40) -> torch.Tensor:
    """Sequences [N, L] in which a fourth of the tokens is `favourite`."""
    ids = torch.randint(0, V, (sequences, L), generator=generator(seed))
    return ids.masked_fill(torch.rand(ids.shape, generator=generator(seed + 100)) < 0.25, favourite)


def test_scores_are_log_ratios_shrunk_to_public_rates() -> None:
    own, public = torch.tensor([0] * 30 + [1] * 10), torch.tensor([0] * 10 + [1] * 10 + [2] * 20)
    settings = EvidenceSettings(strength=10.0, step=1e-6)
    rates = (torch.tensor([10.0, 10.0, 20.0]) + 0.5) / 41.5
    expected = ((torch.tensor([30.0, 10.0, 0.0]) + 10 * rates) / 50 / rates).log()
    assert torch.allclose(score_table(own, public, 3, settings), expected, atol=1e-4)


def test_scores_are_clipped_rounded_and_without_rare_tokens() -> None:
    own, public = torch.tensor([0] * 1000 + [1] * 3), torch.tensor([1] * 1000 + [2])
    table = score_table(own, public, 4, EvidenceSettings(strength=1.0))
    assert table.abs().max() == 4.0
    assert torch.equal(table % 0.25, torch.zeros(4))
    rare = score_table(own, public, 4, EvidenceSettings(strength=1.0, min_count=4))
    absent = score_table(own[:1000], public, 4, EvidenceSettings(strength=1.0))
    assert torch.equal(rare, absent)


def test_calibration_is_the_logistic_regression() -> None:
    """Features that are log-odds already need a factor of 1 and no bias; a useless one gets none, nor a negative."""
    label = (torch.arange(40_000) % 2).bool()
    logits = torch.randn(40_000, dtype=torch.float64, generator=generator(1)) + label * 1.0 - 0.5
    useless = -logits + torch.randn(40_000, dtype=torch.float64, generator=generator(2)) * 0.01
    features = torch.stack([logits, useless, torch.zeros_like(logits)], 1)
    calibration = calibrate(features[label], features[~label])
    assert calibration[0] == pytest.approx(1.0, abs=0.05)
    assert calibration[1] == 0.0
    assert calibration[-1] == pytest.approx(0.0, abs=0.05)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_each_fold_is_judged_by_the_fit_of_the_others(share: float) -> None:
    """States without any information, with many units: a row separates the tokens that it is fitted on."""
    own, public = text(1, favourite=3), text(2, favourite=9)
    evidence = Evidence(own, public, V, EvidenceSettings(strength=20.0))
    fit = functools.partial(log_odds, hidden_size=400, bias=False, generator=generator(0))
    indices = [
        torch.randperm(len(side), generator=generator(3))[: int(share * len(side))].sort().values
        for side in (own, public)
    ]
    drawn = [side[order] for side, order in zip((own, public), indices, strict=True)]
    states = [torch.randn(side.numel(), 400, generator=generator(4 + i)) for i, side in enumerate(drawn)]
    calibrated = evidence.fitting(fit, drawn, indices, [side.numel() - 1 for side in drawn])
    row, logits = calibrated(*(side_TH[:-1] for side_TH in states), None)
    assert min((logits[0] > 0).float().mean(), (logits[1] < 0).float().mean()) > 0.7  # the row separates them
    assert abs(row.calibration[0]) < 0.1  # nothing is in the states, however well they are separated
    assert row.calibration[1:-2].sum() > 0.05  # all is in the tokens
    score = sequence_features(evidence.table, own, evidence.record) @ row.calibration[1:-1] + row.calibration[-1]
    assert (score > 0).float().mean() > 0.7
    assert torch.equal(row.weight, fit(*(side_TH[:-1] for side_TH in states)).weight)  # of all tokens


def test_a_fold_is_scored_by_tables_of_text_outside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An own and a public sequence have tokens that their side has nowhere else, as the other side has everywhere."""
    count = 16
    everywhere = torch.arange(2 * count).view(2, count).expand(count, 2, count)
    own, public = (
        torch.cat([common_NL, torch.arange(count)[:, None].expand(count, L) + first], 1)
        for common_NL, first in ((everywhere[:, 1], 0), (everywhere[:, 0], count))
    )
    seen: list[torch.Tensor] = []

    def features(table_V: torch.Tensor, ids_NL: torch.Tensor, record: object) -> torch.Tensor:
        seen.append(table_V[ids_NL[:, count:]])
        return torch.zeros(ids_NL.numel(), 4)

    monkeypatch.setattr(evidence_module, "sequence_features", features)
    monkeypatch.setattr(evidence_module, "SWITCHED", 10**6)
    evidence = Evidence(own, public, 2 * count, EvidenceSettings(strength=20.0))
    indices = [torch.tensor([2, 3, 7, 9, 15]), torch.tensor([0, 1, 5, 6, 11, 12])]
    drawn = [side[order] for side, order in zip((own, public), indices, strict=True)]
    evidence.fitting(log_odds, drawn, indices, [side.numel() for side in drawn])
    own_seen, public_seen = (torch.cat([scores.flatten() for scores in seen[side::2]]) for side in (0, 1))
    assert own_seen.max() < evidence.table[:count].min() - 0.5, "a fold's own tokens were counted"
    assert public_seen.min() > evidence.table[count:].max() + 0.5, "a fold's public tokens were counted"


def test_a_calibration_knows_that_owners_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """After public text, own text is recognised sooner than by a calibration of text without changes."""
    length = 64
    own, public = (text(i, favourite, sequences=160).view(-1, length) for i, favourite in ((1, 3), (2, 9)))
    evidence = Evidence(own, public, V, EvidenceSettings(strength=20.0))
    fit = functools.partial(log_odds, hidden_size=8, bias=False, generator=generator(0))
    indices = [torch.arange(len(side)) for side in (own, public)]
    states = [torch.randn(side.numel(), 8, generator=generator(4 + i)) for i, side in enumerate((own, public))]
    changed = torch.cat([public[:, : length // 2], own[:, length // 2 :]], 1)
    recognised = []
    for every in (evidence_module.SWITCHED, 10**6):
        monkeypatch.setattr(evidence_module, "SWITCHED", every)
        row, _ = evidence.fitting(fit, [own, public], indices, [own.numel(), public.numel()])(*states, None)
        features = sequence_features(evidence.table, changed, evidence.record)
        score = (features @ row.calibration[1:-1] + row.calibration[-1]).view(len(changed), -1)
        recognised.append((score[:, length // 2 :] > 0).float().mean())
    assert recognised[0] > recognised[1] + 0.1


def test_a_few_tokens_are_no_fold() -> None:
    """The last sequence has a single token with a state: a fold of it alone would leave nothing to compare."""
    own, public = text(1, 3, sequences=3), text(2, 9, sequences=20)
    evidence = Evidence(own, public, V, EvidenceSettings())
    seen: list[object] = []

    def fit(own_TH: torch.Tensor, public_TH: torch.Tensor, start: object, folds: object = None) -> RouterRow:
        seen.append(folds)
        held_out = torch.ones(len(own_TH)), -torch.ones(len(public_TH))
        return RouterRow(torch.ones(H), held_out=None if folds is None else held_out)

    drawn = [torch.arange(3), torch.arange(20)]
    for tokens, folds in ((2 * L + 1, ([L, L + 1], [10 * L, 10 * L])), (L + 1, None)):
        sequences = [own[: -(-tokens // L)], public]
        fitting = evidence.fitting(fit, sequences, [drawn[0][: len(sequences[0])], drawn[1]], [tokens, 20 * L])
        fitting(torch.zeros(tokens, H), torch.zeros(20 * L, H), None)
        assert seen.pop() == folds


def test_a_method_without_folds_is_refused() -> None:
    def fit(own, public, *, hidden_size, bias, generator, start=None):  # type: ignore[no-untyped-def]
        raise AssertionError("not called")

    method = RowMethod("mine", fit, "states", trained_by_loss=False)
    evidence = Evidence(text(1, 3), text(2, 9), V, EvidenceSettings())
    sides = [RowText([], side) for side in (text(1, 3), text(2, 9))]
    with pytest.raises(ValueError, match=r"router='mine' has no argument `folds`.*--evidence none"):
        fit_rows(tiny_anchor("llama"), method, *sides, tokens=100, bias=False, seed=0, evidence=evidence)


def test_text_that_cannot_be_divided_is_not_calibrated() -> None:
    evidence = Evidence(text(1, 3, sequences=1), text(2, 9, sequences=8), V, EvidenceSettings())
    calls = []

    def fit(own_TH: torch.Tensor, public_TH: torch.Tensor, start: object) -> RouterRow:
        calls.append((len(own_TH), len(public_TH)))
        return RouterRow(torch.ones(H))

    drawn = [text(1, 3, sequences=1), text(2, 9, sequences=8)]
    row, _ = evidence.fitting(fit, drawn, [torch.arange(1), torch.arange(8)], [L, 8 * L])(
        torch.zeros(L, H), torch.zeros(8 * L, H), None
    )
    assert calls == [(L, 8 * L)]
    assert row.calibration.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_what_fades_is_one_before_anything_is_read() -> None:
    evidence = EvidenceSettings().record(V)
    features = sequence_features(torch.zeros(V), torch.zeros(1, L, dtype=torch.long), evidence)
    assert torch.allclose(features[:, -1], FADING ** torch.arange(1, L + 1).float(), atol=1e-6)
