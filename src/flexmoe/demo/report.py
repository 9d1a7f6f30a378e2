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

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from flexmoe.demo.corpus import PUBLIC
from flexmoe.demo.plots import plot_losses, plot_routing

REPORT_VERSIONS = ("flexmoe", "python", "torch", "transformers", "tokenizers", "safetensors", "numpy", "sympy")
SYSTEM_NOTES = {
    "anchor": "the dense public model",
    "composed": "all experts active",
    "composed-k1": "top-1 routing",
    "composed-k2": "top-2 routing",
    "soup": "one dense model: the average of the owners' feed-forward weights",
    "true-domain": "upper bound: oracle routing by domain, to the owner's two-expert model or to the anchor",
}
UNLIMITED = 10_000  # columns
THRESHOLD_COLUMNS = ("criterion", "measured", "threshold", "met")
_ABOUT_CONTINUATIONS = (
    "Prompts are excerpts of 40 tokens of held-out text, and sampled continuations at most as many, so both may begin "
    "or end inside a word. Bytes that are not valid UTF-8 are shown as `?`."
)

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


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The thresholds that depend on the anchor; the defaults are those of the anchor that is trained here.

    `kept`: share of its own gain that each owner keeps; `public`: change of the loss on public text; `ceiling`: mean
    loss above that of oracle routing; `each_domain`: the loss on the text of each owner is below the anchor's; `soup`:
    the mean loss is below that of the experts' average, which needs experts that are far enough from the anchor.
    """

    kept: float = 0.9
    public: float = 0.01
    ceiling: float = 0.02
    each_domain: bool = False
    soup: bool = True


REAL_ANCHOR = Bounds(kept=0.95, public=0.005, each_domain=True, soup=False)


def thresholds(
    systems: Mapping[str, Mapping[str, Any]], owners: Sequence[str], bounds: Bounds | None = None
) -> list[Threshold]:
    """The thresholds of the demo; `systems[name]` is `{"loss": {domain: nats}, "mean": nats}`."""
    bounds = bounds or Bounds()
    composed, anchor, ceiling = systems["composed"], systems["anchor"], systems["true-domain"]
    public_change = composed["loss"][PUBLIC] / anchor["loss"][PUBLIC] - 1
    above_ceiling = composed["mean"] / ceiling["mean"] - 1
    best_two = min(systems[f"two-expert-{o}"]["mean"] for o in owners)
    return [
        Threshold("mean loss of composed, against the anchor's", composed["mean"], "<", anchor["mean"]),
        Threshold("mean loss of composed, against the best two-expert model's", composed["mean"], "<", best_two),
        *(
            [Threshold("mean loss of composed, against the soup's", composed["mean"], "<", systems["soup"]["mean"])]
            if bounds.soup
            else []
        ),
        *(
            Threshold(f"loss of composed on {o}, against the anchor's", composed["loss"][o], "<", anchor["loss"][o])
            for o in (owners if bounds.each_domain else ())
        ),
        *(
            Threshold(f"share of its own gain that {o} keeps", kept(systems, o), "≥", bounds.kept, True)
            for o in owners
        ),
        Threshold("change of the loss on public text", public_change, "≤", bounds.public, True),
        Threshold("mean loss above that of oracle routing", above_ceiling, "≤", bounds.ceiling, True),
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
    limits = thresholds(systems, owners, REAL_ANCHOR if _anchor_source(settings) else None)
    return {
        "domains": scores["domains"],
        "owners": owners,
        "systems": systems,
        "kept": {owner: kept(systems, owner) for owner in owners},
        "thresholds": [{**asdict(each), "passed": each.passed} for each in limits],
        "routing": scores["routing"],
        "opt_out": results["opt_out"],
        "continuations": scores["continuations"],
        "chat": scores["chat"],
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
    path.write_text(json.dumps(_without_nan(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    plot_losses({name: s["loss"] for name, s in report["systems"].items()}, out / "losses.png")
    plot_routing(report["routing"], out / "routing.png")
    (out / "report.md").write_text(markdown(report), encoding="utf-8")
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
        "## Thresholds\n",
        markdown_table(THRESHOLD_COLUMNS, [_threshold(record).row() for record in report["thresholds"]]),
        "## Routing\n\nShare of the routing weight per expert (columns) and domain of text (rows).\n",
        _routing_table(report),
        "![Routing shares](routing.png)\n",
        "## Opt-out\n",
        _opt_out_text(report["opt_out"]),
        f"## Continuations with and without the owners' experts\n\n{_ABOUT_CONTINUATIONS}\n",
        *(_continuation(c) for c in report["continuations"]),
        *_chat(report.get("chat", [])),
        "## Corpus\n",
        _corpus_text(report),
        "## Run\n",
        _run_text(report),
    ]
    return "\n".join(parts)


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Prints the losses, the thresholds and the result of the opt-out."""
    _print_losses(report, console)
    table = Table(*(Column(heading, overflow="fold") for heading in THRESHOLD_COLUMNS), box=SIMPLE_HEAD)
    for threshold in map(_threshold, report["thresholds"]):
        table.add_row(*threshold.row(), style="" if threshold.passed else "bold red")
    console.print(table)
    mix = ", ".join(f"{kind} {share:.1%}" for kind, share in report["mix"].items())
    console.print(f"Public mix: {mix}.", highlight=False)
    console.print(_opt_out_text(report["opt_out"]).strip(), highlight=False)
    console.print(f"{report['seconds']:.0f} s, {report['peak_bytes'] / 1e9:.2f} GB at the peak.", highlight=False)


def _print_losses(report: Mapping[str, Any], console: Console) -> None:
    """Prints the losses with a row per system; without perplexities where these make the table wider than the console.

    Nothing is cut: where even that is too wide, cells take several lines.
    """
    table = _losses(report, "Held-out loss in nats per token (perplexity)", _loss_cell)
    if console.measure(table, options=console.options.update(max_width=UNLIMITED)).maximum > console.width:
        table = _losses(
            report, "Held-out loss in nats per token", lambda score, domain: f"{score['loss'][domain]:.3f}"
        )
    console.print(table)


def _losses(report: Mapping[str, Any], title: str, cell: Callable[[Mapping[str, Any], str], str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("system", overflow="fold")
    for heading in (*report["domains"], "mean"):
        table.add_column(heading, justify="right", overflow="fold")
    for system, score in report["systems"].items():
        style = "bold green" if system == "composed" else "dim" if system == "true-domain" else ""
        cells = [cell(score, domain) for domain in report["domains"]]
        table.add_row(system, *cells, f"{score['mean']:.3f}", style=style)
    return table


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
        f"{len(owners)} owners ({', '.join(owners)}) each trained an expert in isolation, on text that no other owner "
        f"has. Composed without joint training, the model's mean held-out loss is {composed:.3f}, and the anchor's is "
        f"{anchor:.3f}; every owner keeps at least {lowest} of the gain of its two-expert model.\n"
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
        return f"public and {system.removeprefix('two-expert-')} only, as the owner trained it"
    if system == "opted-out":
        return f"composed, without {report['opt_out']['owner']}"
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
        f"Owner {verdict['owner']} opted out. The result, compared with a model composed in a new process from the "
        f"packages of {', '.join(verdict['composed_from'])} alone: state dict {equal[verdict['state_dict_equal']]} "
        f"(sha256 {verdict['state_dict_sha256'][:16]}…), config {equal[verdict['config_equal']]}, "
        f"logits {equal[verdict['logits_equal']]} on {' x '.join(map(str, verdict['logits_compared']))} values, "
        f"every file {equal[verdict['files_equal']]}.\n"
    )


def _continuation(record: Mapping[str, str]) -> str:
    texts = {
        "prompt": "prompt",
        "public only": "experts_off",
        f"public and {record['domain']}": "expert_own",
        "all experts": "experts_on",
    }
    return _labelled_texts(record["domain"], record, texts)


def _chat(records: Sequence[Mapping[str, str]]) -> list[str]:
    """The section with questions and answers; empty without them."""
    if not records:
        return []
    texts = {"question": "question", "public only": "experts_off", "all experts": "experts_on"}
    about = (
        "A question on the text of each owner, in the anchor's chat template. Answers are cut off after 40 tokens.\n"
    )
    return [f"## Chat\n\n{about}", *(_labelled_texts(record["domain"], record, texts) for record in records)]


def _labelled_texts(title: str, record: Mapping[str, str], texts: Mapping[str, str]) -> str:
    """The texts of the record under a heading; `texts` is {label: key}, and keys that it lacks are left out."""
    fence = "~~~~"
    parts = [f"### {title}\n"]
    for label, key in texts.items():
        if key in record:
            parts.append(f"{label}\n\n{fence}text\n{_whole_characters(record[key])}\n{fence}\n")
    return "\n".join(parts)


def _anchor_source(settings: Mapping[str, Any]) -> str | None:
    """The anchor that was given, None if the demo trained it."""
    return settings.get("anchor", {}).get("source")


def _whole_characters(text: str) -> str:
    """The text without the characters that its first and last token cut; other bytes that are no character are "?"."""
    return text.strip().strip("\ufffd").strip().replace("\ufffd", "?")


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
            "characters of the owner",
        ],
        rows,
    )
    source = _anchor_source(report["settings"])
    anchor = (
        "Tokenizer and anchor were trained on the public mix"
        if source is None
        else f"The anchor {source} was not trained here. The public text, stored with the graft for the owners"
    )
    return (
        f"{anchor}: {mix}. Documents were deduplicated across all kinds "
        "before the split. The largest overlap of a held-out document with a single training document is "
        f"{overlap['largest']:.0%} of its word 5-grams.\n\n{table}"
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
