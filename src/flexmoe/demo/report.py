"""The report of the demo: its thresholds, and the results as JSON, Markdown and terminal output.

Does not cover several seeds (`benchmarks/results.py` averages reports), and plots (`plots`).
"""

from __future__ import annotations

import json
import math
import operator
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from flexmoe.demo.corpus import PUBLIC
from flexmoe.demo.plots import plot_losses, plot_routing

REPORT_VERSIONS = ("flexmoe", "python", "torch", "transformers", "tokenizers", "safetensors", "numpy", "sympy")
SYSTEM_NOTES = {
    "anchor": "the public model alone",
    "composed": "all experts active",
    "composed-k1": "the best expert per token",
    "composed-k2": "the best two per token",
    "soup": "one dense model: the average of the owners' feed-forward weights",
    "true-domain": "ceiling: an oracle sends each owner's text to its own two-expert model, public text to the anchor",
}


Relation = Literal["<", "≤", "≥"]
_HOLDS: dict[Relation, Callable[[float, float], bool]] = {"<": operator.lt, "≤": operator.le, "≥": operator.ge}


@dataclass(frozen=True)
class Threshold:
    """A requirement: `value` must be in `relation` to `bound`."""

    name: str
    value: float
    relation: Relation
    bound: float
    percent: bool = False

    @property
    def passed(self) -> bool:
        return _HOLDS[self.relation](self.value, self.bound)

    def row(self) -> tuple[str, str, str, str]:
        """Cells of a table: name, measured value, threshold, whether it is met."""

        def show(value: float) -> str:
            return f"{value:.1%}" if self.percent else f"{value:.3f}"

        return (
            self.name,
            show(self.value),
            f"{self.relation} {show(self.bound)}",
            "yes" if self.passed else "NO",
        )


def thresholds(systems: Mapping[str, Mapping[str, Any]], owners: Sequence[str]) -> list[Threshold]:
    """The thresholds of the demo; `systems[name]` is `{"loss": {domain: nats}, "mean": nats}`."""
    composed, anchor, ceiling = systems["composed"], systems["anchor"], systems["true-domain"]
    public_change = composed["loss"][PUBLIC] / anchor["loss"][PUBLIC] - 1
    above_ceiling = composed["mean"] / ceiling["mean"] - 1
    best_two = min(systems[f"two-expert-{o}"]["mean"] for o in owners)
    return [
        Threshold("mean loss of composed, against the anchor's", composed["mean"], "<", anchor["mean"]),
        Threshold("... against the best two-expert model's", composed["mean"], "<", best_two),
        Threshold("... against the soup's", composed["mean"], "<", systems["soup"]["mean"]),
        *(Threshold(f"own gain kept by {o}", kept(systems, o), "≥", 0.9, True) for o in owners),
        Threshold("loss on public text, change", public_change, "≤", 0.01, True),
        Threshold("mean loss above routing by the true domain", above_ceiling, "≤", 0.02, True),
    ]


def kept(systems: Mapping[str, Mapping[str, Any]], owner: str) -> float:
    """The share of an owner's gain (anchor minus two-expert model, on its domain) that the composed model keeps."""
    anchor, own, composed = (systems[s]["loss"][owner] for s in ("anchor", f"two-expert-{owner}", "composed"))
    return (anchor - composed) / (anchor - own) if anchor != own else math.nan


def with_means(losses: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Losses per system and domain, with perplexities and the unweighted mean over domains."""
    return {
        system: {
            "loss": dict(per_domain),
            "perplexity": {domain: math.exp(loss) for domain, loss in per_domain.items()},
            "mean": sum(per_domain.values()) / len(per_domain),
        }
        for system, per_domain in losses.items()
    }


def build_report(
    results: Mapping[str, Any],
    *,
    settings: Mapping[str, Any],
    seconds: float,
    peak_bytes: int,
    versions: Mapping[str, str],
) -> dict[str, Any]:
    """The results of a run as one JSON object."""
    scores, owners = results["scores"], results["owners"]
    systems = with_means(scores["losses"])
    return {
        "domains": scores["domains"],
        "owners": owners,
        "systems": systems,
        "kept": {owner: kept(systems, owner) for owner in owners},
        "bars": [{**asdict(each), "passed": each.passed} for each in thresholds(systems, owners)],
        "routing": scores["routing"],
        "opt_out": results["opt_out"],
        "continuations": scores["continuations"],
        "mix": results["mix"]["public_mix"],
        "corpus": {
            "kinds": results["mix"]["kinds"],
            "overlap": results["mix"]["overlap"],
            "held_out_tokens": scores["tokens"],
        },
        "seeds": [settings["corpus"]["seed"]],
        "settings": settings,
        "seconds": round(seconds, 1),
        "stages": results["stages"],
        "peak_bytes": peak_bytes,
        "versions": {name: versions[name] for name in REPORT_VERSIONS if name in versions},
        "machine": {"system": platform.system(), "processor": platform.machine()},
    }


def write_report(report: Mapping[str, Any], out: Path) -> Path:
    """Writes report.json, report.md, losses.png and routing.png to `out`; returns the path of report.json.

    NaN and infinities are null in report.json, because JSON has neither.
    """
    path = out / "report.json"
    path.write_text(json.dumps(_without_nan(report), indent=2, allow_nan=False) + "\n")
    plot_losses({name: s["loss"] for name, s in report["systems"].items()}, out / "losses.png")
    plot_routing(report["routing"], out / "routing.png")
    (out / "report.md").write_text(markdown(report))
    return path


def unequal_parts(verdict: Mapping[str, Any]) -> list[str]:
    """Which of state dict, logits, config and files differ after the opt-out; none if it is exact."""
    return [key.removesuffix("_equal") for key, value in verdict.items() if key.endswith("_equal") and not value]


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    parts = [
        "# FlexMoE demo\n",
        _sentence(report),
        "## Held-out loss (perplexity)\n",
        _loss_table(report),
        "![Held-out loss per system and domain](losses.png)\n",
        "## What it is held to\n",
        markdown_table(["", "measured", "wanted", "met"], [_threshold(record).row() for record in report["bars"]]),
        "## Who answers\n\nShare of the routing weight that each expert carries, per domain of text.\n",
        _routing_table(report),
        "![Routing shares](routing.png)\n",
        "## Opting out\n",
        _opt_out_text(report["opt_out"]),
        "## The same prompts, experts off and on\n",
        *(_continuation(c) for c in report["continuations"]),
        "## The text\n",
        _corpus_text(report),
        "## The run\n",
        _run_text(report),
    ]
    return "\n".join(parts)


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Prints the losses, the thresholds and the result of the opt-out."""
    domains = report["domains"]
    table = Table(title="Held-out loss in nats per token (perplexity)", title_justify="left", title_style="bold")
    table.add_column("system")
    for heading in (*domains, "mean"):
        table.add_column(heading, justify="right")
    for system, score in report["systems"].items():
        style = "bold green" if system == "composed" else "dim" if system == "true-domain" else ""
        table.add_row(system, *(_loss_cell(score, d) for d in domains), f"{score['mean']:.3f}", style=style)
    console.print(table)
    table = Table("what it is held to", "measured", "wanted", "met", title_justify="left")
    for threshold in map(_threshold, report["bars"]):
        table.add_row(*threshold.row(), style="" if threshold.passed else "bold red")
    console.print(table)
    mix = ", ".join(f"{kind} {share:.1%}" for kind, share in report["mix"].items())
    console.print(f"Public mix: {mix}.", highlight=False)
    console.print(_opt_out_text(report["opt_out"]).strip(), highlight=False)
    console.print(f"{report['seconds']:.0f} s, {report['peak_bytes'] / 1e9:.2f} GB at the peak.", highlight=False)


def _threshold(record: Mapping[str, Any]) -> Threshold:
    return Threshold(**{key: value for key, value in record.items() if key != "passed"})


def _without_nan(value: Any) -> Any:
    """Replaces NaN and infinities by None."""
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sentence(report: Mapping[str, Any]) -> str:
    owners = report["owners"]
    composed, anchor = report["systems"]["composed"]["mean"], report["systems"]["anchor"]["mean"]
    shares = [share for share in report["kept"].values() if math.isfinite(share)]
    lowest = f"{min(shares):.0%}" if shares else "an unknown share"  # no expert improved on the anchor
    return (
        f"{len(owners)} owners ({', '.join(owners)}) trained an expert each, alone, on text that nobody else saw. "
        f"Put together without any joint training, mean held-out loss goes from {anchor:.3f} to {composed:.3f}; "
        f"every owner keeps at least {lowest} of what its expert gained alone.\n"
    )


def _loss_table(report: Mapping[str, Any]) -> str:
    domains = report["domains"]
    rows = []
    for system, score in report["systems"].items():
        cells = [_loss_cell(score, domain) for domain in domains] + [f"{score['mean']:.3f}"]
        name = f"**{system}**" if system == "composed" else system
        rows.append([name, *cells, _note(system, report)])
    return markdown_table(["system", *domains, "mean", ""], rows)


def _note(system: str, report: Mapping[str, Any]) -> str:
    if system.startswith("two-expert-"):
        return f"public and {system.removeprefix('two-expert-')} only, as its owner trained it"
    if system == "opted-out":
        return f"composed, after {report['opt_out']['owner']} left"
    return SYSTEM_NOTES.get(system, "")


def _loss_cell(score: Mapping[str, Any], domain: str) -> str:
    return f"{score['loss'][domain]:.3f} ({score['perplexity'][domain]:.1f})"


def _routing_table(report: Mapping[str, Any]) -> str:
    experts = list(next(iter(report["routing"].values())))
    rows = [[domain, *(f"{shares[e]:.1%}" for e in experts)] for domain, shares in report["routing"].items()]
    return markdown_table(["text \\ expert", *experts], rows)


def _opt_out_text(verdict: Mapping[str, Any]) -> str:
    equal = {True: "equal", False: "NOT EQUAL"}
    return (
        f"Owner {verdict['owner']} opted out. Against a model composed in a fresh process from the packages of "
        f"{', '.join(verdict['composed_from'])} alone: state dict {equal[verdict['state_dict_equal']]} "
        f"(sha256 {verdict['state_dict_sha256'][:16]}…), config {equal[verdict['config_equal']]}, "
        f"logits {equal[verdict['logits_equal']]} on {' x '.join(map(str, verdict['logits_compared']))} values, "
        f"every file {equal[verdict['files_equal']]}.\n"
    )


def _continuation(record: Mapping[str, str]) -> str:
    fence = "~~~~"
    parts = [f"### {record['domain']}\n"]
    for label, key in (("prompt", "prompt"), ("experts off", "experts_off"), ("experts on", "experts_on")):
        parts.append(f"{label}\n\n{fence}text\n{record[key].strip()}\n{fence}\n")
    return "\n".join(parts)


def _corpus_text(report: Mapping[str, Any]) -> str:
    mix = ", ".join(f"{kind} {share:.1%}" for kind, share in report["mix"].items())
    kinds, overlap = report["corpus"]["kinds"], report["corpus"]["overlap"]
    rows = [
        [
            kind,
            *(
                f"{sizes[key]:,}"
                for key in (
                    "documents",
                    "near_duplicates_dropped",
                    "held_out_documents",
                    "public_characters",
                    "private_characters",
                )
            ),
        ]
        for kind, sizes in kinds.items()
    ]
    table = markdown_table(
        [
            "kind",
            "documents",
            "near-duplicates dropped",
            "held out",
            "characters in the public mix",
            "characters kept by the owner",
        ],
        rows,
    )
    return (
        f"The public mix, on which tokenizer and anchor were trained: {mix}. Documents were deduplicated across all "
        "kinds before they were split; the largest share of a held-out document's word 5-grams that any one training "
        f"document holds too is {overlap['largest']:.0%}.\n\n{table}"
    )


def _run_text(report: Mapping[str, Any]) -> str:
    stages = "; ".join(
        f"{name} {s['seconds']:.0f} s{' (reused)' if s['reused'] else ''}" for name, s in report["stages"].items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"{report['seconds']:.0f} s, {report['peak_bytes'] / 1e9:.2f} GB at the peak over all processes, "
        f"seed {report['seeds'][0]}. Stages: {stages}.\n\n{versions}.\n"
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right-aligned."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"
