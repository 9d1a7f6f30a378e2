"""The thresholds of the demo, and its report as JSON and Markdown."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from flexmoe.demo import plots
from flexmoe.demo.report import (
    REAL_ANCHOR,
    Threshold,
    build_report,
    kept,
    markdown,
    thresholds,
    unequal_parts,
    with_means,
    write_report,
)
from flexmoe.demo.scoring import true_domain

DOCS = Path(__file__).resolve().parents[2] / "docs"
LOSSES = {
    "anchor": {"public": 4.0, "math": 4.0, "code": 5.0},
    "two-expert-math": {"public": 4.0, "math": 3.0, "code": 5.0},
    "two-expert-code": {"public": 4.0, "math": 4.0, "code": 4.0},
    "composed": {"public": 4.02, "math": 3.05, "code": 4.2},
    "soup": {"public": 4.1, "math": 3.6, "code": 4.7},
}


def test_thresholds() -> None:
    losses = {**LOSSES, "true-domain": true_domain(LOSSES, ["math", "code"])}
    systems = with_means(losses)
    assert losses["true-domain"] == {"public": 4.0, "math": 3.0, "code": 4.0}
    assert kept(systems, "math") == pytest.approx(0.95)
    assert kept(systems, "code") == pytest.approx(0.8)
    passed = {threshold.name: threshold.passed for threshold in thresholds(systems, ["math", "code"])}
    assert passed["share of its own gain that math keeps"]
    assert not passed["share of its own gain that code keeps"]
    assert passed["change of the loss on public text"]  # 0.5 %
    assert not passed["mean loss above that of oracle routing"]  # 2.5 %
    assert all(value for name, value in passed.items() if "against" in name)


def test_threshold_as_cells_of_a_table() -> None:
    assert Threshold("gain", 0.85, "≥", 0.9, percent=True).row() == ("gain", "85.0%", "≥ 90.0%", "NO")
    assert Threshold("loss", 3.0, "≤", 3.5).row() == ("loss", "3.000", "≤ 3.500", "yes")
    assert Threshold("loss", 3.0, "<", 3.0).row() == ("loss", "3.000", "< 3.000", "NO")


def test_equal_loss_does_not_pass_a_strict_threshold() -> None:
    losses = {**dict.fromkeys(LOSSES, LOSSES["anchor"]), "true-domain": LOSSES["anchor"]}
    passed = {threshold.name: threshold.passed for threshold in thresholds(with_means(losses), ["math", "code"])}
    assert not any(value for name, value in passed.items() if "against" in name)
    assert passed["change of the loss on public text"]


def test_share_of_no_gain_is_null_in_json(tmp_path: Path) -> None:
    losses = {**dict.fromkeys(LOSSES, LOSSES["anchor"]), "true-domain": LOSSES["anchor"]}
    report = build_report(
        {
            "owners": ["math", "code"],
            "scores": {
                "losses": losses,
                "domains": list(LOSSES["anchor"]),
                "routing": {"public": {"public": 1.0}},
                "continuations": [],
                "chat": [],
                "tokens": {},
            },
            "opt_out": {"owner": "math", "composed_from": ["code"], "state_dict_sha256": "0", "logits_compared": [1]}
            | dict.fromkeys(("state_dict_equal", "logits_equal", "config_equal", "files_equal"), True),
            "mix": {"public_mix": {"english": 1.0}, "kinds": {}, "overlap": {"largest": 0.0}},
            "stages": {},
        },
        settings={"corpus": {"seed": 0}},
        seconds=1.0,
        peak_bytes=1,
        versions={},
    )
    assert math.isnan(report["kept"]["math"])

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    text = write_report(report, tmp_path).read_text()
    assert json.loads(text, parse_constant=refuse)["kept"] == {"math": None, "code": None}
    assert "keeps at least an unknown share" in markdown(report)


def test_a_real_anchor_has_stricter_thresholds() -> None:
    systems = with_means({**LOSSES, "true-domain": true_domain(LOSSES, ["math", "code"])})
    own = thresholds(systems, ["math", "code"])
    real = {threshold.name: threshold for threshold in thresholds(systems, ["math", "code"], REAL_ANCHOR)}
    soup = "mean loss of composed, against the soup's"
    assert {threshold.name for threshold in own} - set(real) == {soup}
    assert real["loss of composed on code, against the anchor's"].passed
    for threshold in (each for each in own if each.name != soup):
        bound = real[threshold.name].bound
        assert bound >= threshold.bound if threshold.relation == "≥" else bound <= threshold.bound
    assert real["share of its own gain that math keeps"].bound == 0.95
    assert real["change of the loss on public text"].bound == 0.005


def test_continuations_of_an_own_expert_and_the_chat_are_shown() -> None:
    report = json.loads((DOCS / "demo" / "report.json").read_text(encoding="utf-8"))
    parts = {"experts_off": "of public", "expert_own": "of two", "experts_on": "of all"}
    records = [{"domain": "music", "prompt": "T: A Jig", **parts}]
    chat = [{"domain": "music", "question": "Which jig?", "experts_off": "none", "experts_on": "this one"}]
    settings = {**report["settings"], "anchor": {"source": "smollm2"}}
    text = markdown({**report, "settings": settings, "continuations": records, "chat": chat})
    assert text.index("T: A Jig") < text.index("of public") < text.index("public and music\n\n") < text.index("of two")
    assert text.index("of two") < text.index("of all") < text.index("## Chat") < text.index("Which jig?")
    assert text.index("Which jig?") < text.index("this one")
    assert "The anchor smollm2 was not trained here." in text


def test_unequal_parts_of_an_opt_out() -> None:
    result = {"owner": "math", "state_dict_equal": True, "logits_equal": False, "config_equal": True}
    assert unequal_parts(result) == ["logits"]


def test_cut_characters_are_not_shown(tmp_path: Path) -> None:
    report = json.loads((DOCS / "demo" / "report.json").read_text(encoding="utf-8"))
    record = {
        "domain": "unicode",
        "prompt": "\ufffd U+1F355 \ufffd",
        "experts_off": "a\ufffdb",
        "experts_on": "\ufffd\n",
    }
    text = markdown({**report, "continuations": [record]})
    assert "\ufffd" not in text
    assert "text\nU+1F355\n~~~~" in text
    assert "text\na?b\n~~~~" in text


def test_the_published_report_is_this_code() -> None:
    report = json.loads((DOCS / "demo" / "report.json").read_text(encoding="utf-8"))
    assert markdown(report) == (DOCS / "demo" / "report.md").read_text(encoding="utf-8")


def test_every_value_of_the_plots_is_written_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: figures.append(figure))
    plots.plot_losses(LOSSES, tmp_path / "losses.png")
    plots.plot_routing({"public": {"public": 0.75, "math": 0.25}}, tmp_path / "routing.png")
    losses, routing = ([text.get_text() for axis in figure.axes for text in axis.texts] for figure in figures)
    values = [f"{loss:.3f}" for domain in LOSSES["anchor"] for loss in (LOSSES[system][domain] for system in LOSSES)]
    means = [f"{sum(losses.values()) / len(losses):.3f}" for losses in LOSSES.values()]
    assert sorted(losses) == sorted(values + means)
    assert routing == ["75%", "25%"]
