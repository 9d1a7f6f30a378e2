"""`make results-tiny`: the demo with the anchor that it trains itself, over several seeds, with alternatives.

Per seed, in addition to the demo: the recipe of the FlexOlmo paper (hidden-mean rows trained by the loss, own data
only) on the same tokens; other router rows with the demo's experts; and for the first seed, log-odds rows with a bias
and experts trained with them. Writes `results.md`, `results.json` and the plots into `docs/`, the report of the first
seed into `docs/demo-tiny/`, and the generated block of the README. Exit code 1 if a threshold is missed on the mean
over seeds. Finished stages are reused, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import readme_figures
from rich.console import Console

from flexmoe.conversion.compose import PRIOR_WITH_BIASES
from flexmoe.demo.pipeline import (
    MODEL,
    SCORING_CODE,
    TINY,
    Demo,
    DemoSettings,
    without_loading_bars,
)
from flexmoe.demo.plots import plot_losses, plot_routing
from flexmoe.demo.report import Threshold, kept, markdown_table, thresholds, with_means
from flexmoe.demo.row_variants import owner_rows, put_rows
from flexmoe.demo.scoring import domain_losses, load, two_expert_model

ROOT = Path(__file__).resolve().parents[1]
PAPER = {"router": "hidden_mean", "router_bias": True, "public_ratio": 0.0}
ROWS: dict[str, dict[str, Any]] = {
    "log_odds": {"method": "log_odds", "bias": False, "prior": 0.0},
    "log_odds, prior 0.5": {"method": "log_odds", "bias": False, "prior": 0.5},
    "log_odds, prior 1": {"method": "log_odds", "bias": False, "prior": 1.0},
    "log_odds with bias": {"method": "log_odds", "bias": True, "prior": PRIOR_WITH_BIASES},
    "lda": {"method": "lda", "bias": False, "prior": 0.0},
    "lda with bias": {"method": "lda", "bias": True, "prior": PRIOR_WITH_BIASES},
    "hidden_mean": {"method": "hidden_mean", "bias": False, "prior": 0.0},
    "random": {"method": "random", "bias": False, "prior": 0.0},
}


def one_seed(out: Path, settings: DemoSettings, console: Console, *, with_bias: bool) -> dict[str, Any]:
    """The demo's report for one seed, with the losses of the alternatives: `trained`, `rows`, `with_bias`."""
    demo = Demo(out, settings, console)
    report, _ = demo.measured_run()
    report["trained"] = {"paper's recipe": trained(demo, "paper", PAPER, 0.0)}
    if with_bias:
        report["with_bias"] = trained(demo, "with-bias", {"router_bias": True}, PRIOR_WITH_BIASES)
    report["rows"] = cached(out / "rows", demo, lambda: rows_on_same_experts(demo))
    return report


def trained(demo: Demo, name: str, changes: Mapping[str, Any], prior: float) -> dict[str, Any]:
    """Losses of experts that are trained with `changes` on the same tokens, composed and scored as in the demo."""
    owners = demo.settings.owners
    stages = demo.train_all(replace(demo.settings.owner, **changes), below=f"{name}-owners")
    composed = demo.compose(f"{name}-composed", list(owners), below=f"{name}-owners", public_prior=prior)

    def make(folder: Path) -> None:
        tokens = demo.tokens()
        losses = {"composed": domain_losses(load(composed.folder / MODEL), tokens)}
        for owner in owners:
            model = two_expert_model(demo.grafted_model, stages[owner].folder / "package")
            losses[f"two-expert-{owner}"] = domain_losses(model, tokens)
        (folder / "losses.json").write_text(json.dumps(losses, indent=2) + "\n", encoding="utf-8")

    inputs = [demo.done["corpus"], composed, *stages.values()]
    scored = demo.stages.run(f"{name}-scores", make, settings={"prior": prior}, code=SCORING_CODE, inputs=inputs)
    return json.loads((scored.folder / "losses.json").read_text(encoding="utf-8"))


def rows_on_same_experts(demo: Demo) -> dict[str, dict[str, float]]:
    """Losses of the demo's composed model with router rows of each method."""
    settings, tokens = demo.settings, demo.tokens()
    data = {owner: demo.folder(f"owners/{owner}") / "data" / "documents.jsonl" for owner in settings.owners}
    fitted: dict[tuple[str, bool], Any] = {}
    losses = {}
    for name, variant in ROWS.items():
        key = (variant["method"], variant["bias"])
        if key not in fitted:
            fitted[key] = owner_rows(
                demo.grafted_model,
                data,
                key[0],
                bias=key[1],
                tokens=settings.owner.router_tokens,
                sequence_length=settings.owner.sequence_length,
                seed=settings.owner.seed,
            )
        model = load(demo.folder("composed") / MODEL)
        put_rows(model, fitted[key], variant["prior"])
        losses[name] = domain_losses(model, tokens)
    return losses


def cached(folder: Path, demo: Demo, make: Any) -> Any:
    """The result of `make`, cached as a stage that depends on the composed model."""

    def write(folder: Path) -> None:
        (folder / "losses.json").write_text(json.dumps(make(), indent=2) + "\n", encoding="utf-8")

    code = [*SCORING_CODE, "flexmoe.routers.rows", "flexmoe.routers.hidden_states", "flexmoe.demo.row_variants"]
    inputs = [demo.done["corpus"], demo.done["composed"]]
    stage = demo.stages.run(folder.name, write, settings={"rows": ROWS}, code=code, inputs=inputs)
    return json.loads((stage.folder / "losses.json").read_text(encoding="utf-8"))


def averaged(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds, standard deviations of the headline figures, and the losses of every alternative."""
    losses = mean_tree([{name: s["loss"] for name, s in r["systems"].items()} for r in reports])
    systems = with_means(losses)
    owners = reports[0]["owners"]
    return {
        "seeds": [seed for r in reports for seed in r["seeds"]],
        "owners": owners,
        "domains": reports[0]["domains"],
        "systems": systems,
        "spread": {name: spread([r["systems"][name]["mean"] for r in reports]) for name in systems},
        "kept": {o: statistics.mean(r["kept"][o] for r in reports) for o in owners},
        "kept_spread": {o: spread([r["kept"][o] for r in reports]) for o in owners},
        "public_change": [public_change(r["systems"]) for r in reports],
        "routing": mean_tree([r["routing"] for r in reports]),
        "trained": mean_tree([r["trained"] for r in reports]),
        "with_bias": reports[0]["with_bias"],
        "bias_cost": bias_cost(reports[0]),
        "rows": mean_tree([r["rows"] for r in reports]),
        "opt_out": [r["opt_out"] for r in reports],
        "seconds": [run_seconds(r["stages"]) for r in reports],
        "peak_bytes": max(r["peak_bytes"] for r in reports),
        "mix": reports[0]["mix"],
        "versions": reports[0]["versions"],
    }


def all_thresholds(result: Mapping[str, Any]) -> list[Threshold]:
    """The demo's thresholds on the mean over seeds, the paper's recipe, and exact opt-outs."""
    systems, owners = result["systems"], result["owners"]
    paper = mean(result["trained"]["paper's recipe"]["composed"])
    return [
        *thresholds(systems, owners),
        Threshold("mean loss of composed, against the paper's recipe", systems["composed"]["mean"], "<", paper),
        Threshold(
            "opt-outs that are exact", statistics.mean(map(is_exact, result["opt_out"])), "≥", 1.0, percent=True
        ),
    ]


def is_exact(verdict: Mapping[str, Any]) -> bool:
    """Whether the model after an opt-out equals one that was composed without the owner."""
    return all(verdict[f"{what}_equal"] for what in ("state_dict", "logits", "config", "files"))


def bias_cost(report: Mapping[str, Any]) -> float:
    """Loss of gain without a bias, as a share of the gain with one; experts were trained with their rows."""
    anchor, free = report["systems"]["anchor"]["mean"], report["systems"]["composed"]["mean"]
    biased = mean(report["with_bias"]["composed"])
    return (free - biased) / (anchor - biased)


def markdown(result: Mapping[str, Any], limits: Sequence[Threshold], ranks: Mapping[str, Any] | None = None) -> str:
    """The text of `docs/results.md`; `ranks` is the result of `ranks.py`."""
    domains, seeds = result["domains"], result["seeds"]
    minutes = statistics.mean(result["seconds"]) / 60
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join(
        [
            "# Results\n",
            f"The demo with the anchor that it trains itself (`flexmoe demo --anchor tiny`), with seeds "
            f"{', '.join(map(str, seeds))}, written by `make results-tiny`. Text, anchor "
            "and experts differ between seeds. Losses are nats per token on held-out text, mean over seeds; ± is the "
            f"standard deviation of the mean over domains. One run takes about {minutes:.0f} minutes and "
            f"{result['peak_bytes'] / 1e9:.1f} GB of memory on 2 cores. "
            f"[demo-tiny/report.md](demo-tiny/report.md) is the report of seed {seeds[0]}, with generated text.\n",
            markdown_table(["system", *domains, "mean"], _system_rows(result)),
            "![Held-out loss per system and domain](losses.png)\n",
            "`true-domain` is the ceiling: each owner's text is routed to that owner's two-expert model, public text "
            "to the anchor. `soup` is one dense model with the average of the owners' feed-forward weights.\n",
            "## Thresholds\n",
            markdown_table(["mean over seeds", "measured", "threshold", "met"], [limit.row() for limit in limits]),
            "Share of the gain kept, mean and standard deviation over seeds: "
            + ", ".join(f"{o} {result['kept'][o]:.1%} ± {s:.1%}" for o, s in result["kept_spread"].items())
            + f". Change on public text per seed: {', '.join(f'{c:+.2%}' for c in result['public_change'])}.\n",
            "## Routing\n",
            "![Routing shares](routing.png)\n",
            "## Other training recipes, on the same tokens\n",
            markdown_table(
                ["recipe", *domains, "mean", *(f"kept, {o}" for o in result["owners"])], _trained_rows(result)
            ),
            "In the paper's recipe, rows start at the mean hidden state and are trained by the language-model loss on "
            "the owner's data alone. "
            f"With a bias in the rows (log_odds, seed {seeds[0]} only, experts trained with these rows) the mean is "
            f"{mean(result['with_bias']['composed']):.3f}; leaving the bias out costs {result['bias_cost']:.1%} of "
            "the gain.\n",
            "## Other router rows, with the same experts\n",
            markdown_table(
                ["rows", *domains, "mean"], [_row(name, losses) for name, losses in result["rows"].items()]
            ),
            "`hidden_mean` and `random` are untrained here.\n",
            *rank_section(ranks),
            "Opt-out: config, state dict, logits and files equal those of a model that was composed without the "
            f"owner, for {sum(map(is_exact, result['opt_out']))} of {len(seeds)} seeds.\n",
            versions + ".\n",
        ]
    )


def rank_section(ranks: Mapping[str, Any] | None) -> list[str]:
    """Losses of low-rank experts, as in the table of the FlexMoRE paper. Empty if they were not measured."""
    if ranks is None:
        return []
    domains = ranks["domains"]
    anchor, full = (mean(ranks["systems"][name]) for name in ("anchor", "full"))
    rows = []
    for name, found in ranks["experts"].items():
        gain = (anchor - mean(found["losses"])) / (anchor - full)
        title, *cells = _row(name, found["losses"])
        lost = "" if found["error"] is None else f"{found['error']:.0%}"
        rows.append([title, f"{found['bytes'] / 1e3:,.0f} kB", *cells, f"{gain:.0%}", lost])
    return [
        "## Low-rank experts\n",
        markdown_table(["experts", "package", *domains, "mean", "gain kept", "relative error"], rows),
        f"Seed {ranks['seed']}, written by `benchmarks/ranks.py`. *compressed*: the demo's experts after "
        "`flexmoe compress --rank R`; *trained*: `flexmoe train --method low_rank --rank R` with the same tokens, at "
        "the rate that it chooses. *Gain kept* is the share of the full experts' gain over the anchor, in the mean "
        "over domains; *relative error* is the Frobenius norm of the error over that of the difference from public. "
        "The full rank "
        f"is {ranks['hidden_size']}.\n",
    ]


def _system_rows(result: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, score in result["systems"].items():
        cells = [f"{score['loss'][d]:.3f}" for d in result["domains"]]
        title = f"**{name}**" if name == "composed" else name
        rows.append([title, *cells, f"{score['mean']:.3f} ± {result['spread'][name]:.3f}"])
    return rows


def _trained_rows(result: Mapping[str, Any]) -> list[list[str]]:
    anchor = result["systems"]["anchor"]
    own = {"log_odds (default)": {name: s["loss"] for name, s in result["systems"].items()}, **result["trained"]}
    rows = []
    for name, losses in own.items():
        systems = {"anchor": anchor, **with_means(losses)}
        rows.append([*_row(name, losses["composed"]), *(f"{kept(systems, o):.0%}" for o in result["owners"])])
    return rows


def _row(name: str, losses: Mapping[str, float]) -> list[str]:
    return [name, *(f"{loss:.3f}" for loss in losses.values()), f"{mean(losses):.3f}"]


def run_seconds(stages: Mapping[str, Any]) -> float:
    """Seconds of a run from scratch: stages run one after another, owners train in parallel."""
    owners = [stage["seconds"] for name, stage in stages.items() if name.startswith("owners/")]
    others = [stage["seconds"] for name, stage in stages.items() if not name.startswith("owners/")]
    return sum(others) + max(owners)


def public_change(systems: Mapping[str, Any]) -> float:
    """Relative change of the loss on public text, composed against anchor."""
    return systems["composed"]["loss"]["public"] / systems["anchor"]["loss"]["public"] - 1


def mean(losses: Mapping[str, float]) -> float:
    """The unweighted mean over domains."""
    return statistics.mean(losses.values())


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds; zero for one seed."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def mean_tree(trees: Sequence[Any]) -> Any:
    """The mean of equal-shaped trees of numbers."""
    if isinstance(trees[0], Mapping):
        return {key: mean_tree([tree[key] for tree in trees]) for key in trees[0]}
    return statistics.mean(trees)


def write_markdown(docs: Path, result: Mapping[str, Any]) -> None:
    """Writes `results.md` from the results, and from those of `ranks.py` if there are any."""
    ranks = docs / "benchmarks" / "ranks.json"
    found = json.loads(ranks.read_text(encoding="utf-8")) if ranks.is_file() else None
    (docs / "results.md").write_text(markdown(result, all_thresholds(result), found), encoding="utf-8")


def main() -> int:
    """Runs, writes and prints. The exit code is 1 if a threshold was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=None)
    arguments = parser.parse_args()
    console = Console()
    reports = []
    for seed in arguments.seeds:
        console.print(f"[bold]seed {seed}")
        settings = DemoSettings.of(seed=seed, anchor=TINY, steps=arguments.steps)
        with without_loading_bars():
            first = seed == arguments.seeds[0]
            reports.append(one_seed(arguments.out / f"seed-{seed}", settings, console, with_bias=first))
    result = averaged(reports)
    limits = all_thresholds(result)
    docs = arguments.docs
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    write_markdown(docs, result)
    first = arguments.out / f"seed-{arguments.seeds[0]}"
    (docs / "demo-tiny").mkdir(exist_ok=True)
    for name in ("report.md", "report.json", "losses.png", "routing.png"):
        shutil.copyfile(first / name, docs / "demo-tiny" / name)
    plot_losses({name: s["loss"] for name, s in result["systems"].items()}, docs / "losses.png")
    plot_routing(result["routing"], docs / "routing.png")
    if docs == ROOT / "docs":
        readme_figures.main()
    console.print((docs / "results.md").read_text(encoding="utf-8"), markup=False, highlight=False)
    missed = [limit.name for limit in limits if not limit.passed]
    if missed:
        console.print(f"[bold red]Missed: {'; '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
