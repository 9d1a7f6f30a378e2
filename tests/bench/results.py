"""`make results`: the demo over several seeds, the bars it is held to, and what the alternatives give.

Per seed, beside the demo itself: the paper's recipe (hidden-mean rows trained by the loss, own data only), with the
same tokens; other rows on the demo's own experts; and for the first seed, log-odds rows with a bias and experts
trained through them. Writes `results.md`, `results.json` and the plots into `docs/`, the first seed's own report into
`docs/demo/`, and the figures into the README. Ends with exit code 1 if a bar is missed on the mean over seeds.
Finished stages are reused, so an interrupted run goes on.
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
from flexmoe.demo.pipeline import DEFAULT_OWNERS, MODEL, Demo, DemoSettings, without_loading_bars
from flexmoe.demo.plots import plot_losses, plot_routing
from flexmoe.demo.report import Bar, bars, kept, markdown_table, with_means
from flexmoe.demo.row_variants import owner_rows, put_rows
from flexmoe.demo.scoring import domain_losses, load, two_expert_model

ROOT = Path(__file__).resolve().parents[2]
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
    """The demo's report for one seed, with the alternatives' losses: `trained`, `rows` and, if asked, `with_bias`."""
    demo = Demo(out, settings, console)
    report, _ = demo.measured_run()
    report["trained"] = {"paper's recipe": trained(demo, "paper", PAPER, 0.0)}
    if with_bias:
        report["with_bias"] = trained(demo, "with-bias", {"router_bias": True}, PRIOR_WITH_BIASES)
    report["rows"] = cached(out / "rows", demo, lambda: rows_on_same_experts(demo))
    return report


def trained(demo: Demo, name: str, changes: Mapping[str, Any], prior: float) -> dict[str, Any]:
    """Experts trained another way with the same tokens, composed and scored as the demo's own."""
    owners = demo.settings.owners
    stages = demo.train_all(replace(demo.settings.owner, **changes), below=f"{name}-owners")
    composed = demo.compose(f"{name}-composed", list(owners), below=f"{name}-owners", public_prior=prior)

    def make(folder: Path) -> None:
        tokens = demo.tokens()
        losses = {"composed": domain_losses(load(composed.folder / MODEL), tokens)}
        for owner in owners:
            model = two_expert_model(demo.grafted_model, stages[owner].folder / "package")
            losses[f"two-expert-{owner}"] = domain_losses(model, tokens)
        (folder / "losses.json").write_text(json.dumps(losses, indent=2) + "\n")

    inputs = [demo.done["corpus"], composed, *stages.values()]
    code = ["flexmoe.modeling", "flexmoe.evaluation", "flexmoe.demo.scoring"]
    scored = demo.stages.run(f"{name}-scores", make, settings={"prior": prior}, code=code, inputs=inputs)
    return json.loads((scored.folder / "losses.json").read_text())


def rows_on_same_experts(demo: Demo) -> dict[str, dict[str, float]]:
    """Losses of the demo's composed model behind rows made by each method."""
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
    """The result of `make`, kept in a stage below the composed model."""

    def write(folder: Path) -> None:
        (folder / "losses.json").write_text(json.dumps(make(), indent=2) + "\n")

    code = ["flexmoe.modeling", "flexmoe.router_rows", "flexmoe.hidden_states", "flexmoe.demo.row_variants"]
    inputs = [demo.done["corpus"], demo.done["composed"]]
    stage = demo.stages.run(folder.name, write, settings={"rows": ROWS}, code=code, inputs=inputs)
    return json.loads((stage.folder / "losses.json").read_text())


def averaged(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds, the spread of what is promised, and every alternative as a system of its own."""
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


def all_bars(result: Mapping[str, Any]) -> list[Bar]:
    """The demo's bars on the mean over seeds, and the lead over the paper's recipe."""
    systems, owners = result["systems"], result["owners"]
    paper = mean(result["trained"]["paper's recipe"]["composed"])
    return [
        *bars(systems, owners),
        Bar("mean loss of composed, against the paper's recipe", systems["composed"]["mean"], "<", paper),
        Bar("opt-outs that are exact", statistics.mean(map(is_exact, result["opt_out"])), "≥", 1.0, percent=True),
    ]


def is_exact(verdict: Mapping[str, Any]) -> bool:
    """Whether an opt-out left the model that never met the owner."""
    return all(verdict[f"{what}_equal"] for what in ("state_dict", "logits", "config", "files"))


def bias_cost(report: Mapping[str, Any]) -> float:
    """What doing without a bias costs one seed, as a share of the gain with one; both trained through their rows."""
    anchor, free = report["systems"]["anchor"]["mean"], report["systems"]["composed"]["mean"]
    biased = mean(report["with_bias"]["composed"])
    return (free - biased) / (anchor - biased)


def markdown(result: Mapping[str, Any], promises: Sequence[Bar], ranks: Mapping[str, Any] | None = None) -> str:
    """`docs/results.md`; `ranks` is what `ranks.py` found."""
    domains, seeds = result["domains"], result["seeds"]
    minutes = statistics.mean(result["seconds"]) / 60
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join(
        [
            "# Results\n",
            f"The demo (`make demo`) over seeds {', '.join(map(str, seeds))}, written by `make results`: text, anchor "
            "and experts anew for each seed. Losses are nats per token on held-out text, means over seeds; ± is the "
            f"standard deviation of the mean over domains. One run takes about {minutes:.0f} minutes and "
            f"{result['peak_bytes'] / 1e9:.1f} GB on this machine; "
            f"[demo/report.md](demo/report.md) is the report of seed {seeds[0]}, with continuations and the corpus.\n",
            markdown_table(["system", *domains, "mean"], _system_rows(result)),
            "![Held-out loss per system and domain](losses.png)\n",
            "`true-domain` is the ceiling: each owner's text goes to that owner's two-expert model, public text to "
            "the anchor. `soup` is one dense model with the average of the owners' feed-forward weights.\n",
            "## What it is held to\n",
            markdown_table(["mean over seeds", "measured", "wanted", "met"], [bar.row() for bar in promises]),
            "Kept per seed, standard deviation: "
            + ", ".join(f"{o} {result['kept'][o]:.1%} ± {s:.1%}" for o, s in result["kept_spread"].items())
            + f". Public text per seed: {', '.join(f'{c:+.2%}' for c in result['public_change'])}.\n",
            "## Who answers\n",
            "![Routing shares](routing.png)\n",
            "## Trained another way, with the same tokens\n",
            markdown_table(
                ["recipe", *domains, "mean", *(f"kept, {o}" for o in result["owners"])], _trained_rows(result)
            ),
            "The paper's recipe: rows start at the mean hidden state and learn through the language-model loss on the "
            "owner's data alone. "
            f"With a bias in the rows (log_odds, seed {seeds[0]} only, experts trained through them) the mean is "
            f"{mean(result['with_bias']['composed']):.3f}; doing without costs {result['bias_cost']:.1%} of the "
            "gain.\n",
            "## Other rows in front of the same experts\n",
            markdown_table(
                ["rows", *domains, "mean"], [_row(name, losses) for name, losses in result["rows"].items()]
            ),
            "`hidden_mean` and `random` are shown as they start, untrained.\n",
            *rank_section(ranks),
            f"Opt-out: state dict, logits and files equal to those of a model that never met the owner, for "
            f"{sum(map(is_exact, result['opt_out']))} of {len(seeds)} seeds.\n",
            versions + ".\n",
        ]
    )


def rank_section(ranks: Mapping[str, Any] | None) -> list[str]:
    """What smaller experts cost, as FlexMoRE's table has it; nothing if nobody looked."""
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
        "## Smaller experts\n",
        markdown_table(["experts", "package", *domains, "mean", "gain kept", "lost of the difference"], rows),
        f"Seed {ranks['seed']}, written by `tests/bench/ranks.py`. *compressed*: the demo's own experts after "
        "`flexmoe compress --rank R`; *trained*: `flexmoe train --method low_rank --rank R` with the same tokens and "
        "learning rate. *Gain kept* is the share of the full experts' gain over the anchor in the mean over domains; "
        "*lost of the difference* is the relative Frobenius error. Hidden size "
        f"{ranks['hidden_size']}, so that is the highest rank there is.\n",
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
    """Seconds of a run from scratch: stages follow one another, but owners train side by side."""
    owners = [stage["seconds"] for name, stage in stages.items() if name.startswith("owners/")]
    others = [stage["seconds"] for name, stage in stages.items() if not name.startswith("owners/")]
    return sum(others) + max(owners)


def public_change(systems: Mapping[str, Any]) -> float:
    """Loss on public text, composed against anchor."""
    return systems["composed"]["loss"]["public"] / systems["anchor"]["loss"]["public"] - 1


def mean(losses: Mapping[str, float]) -> float:
    """The plain mean over domains."""
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
    """Writes `results.md` from the results and from what `ranks.py` left in `docs`, if it ran."""
    ranks = docs / "benchmarks" / "ranks.json"
    found = json.loads(ranks.read_text()) if ranks.is_file() else None
    (docs / "results.md").write_text(markdown(result, all_bars(result), found))


def main() -> int:
    """Runs, writes, prints; the exit code says whether every bar was met."""
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
        settings = DemoSettings.of(seed=seed, owners=DEFAULT_OWNERS, steps=arguments.steps)
        with without_loading_bars():
            first = seed == arguments.seeds[0]
            reports.append(one_seed(arguments.out / f"seed-{seed}", settings, console, with_bias=first))
    result = averaged(reports)
    promises = all_bars(result)
    docs = arguments.docs
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    write_markdown(docs, result)
    first = arguments.out / f"seed-{arguments.seeds[0]}"
    (docs / "demo").mkdir(exist_ok=True)
    for name in ("report.md", "report.json", "losses.png", "routing.png"):
        shutil.copyfile(first / name, docs / "demo" / name)
    plot_losses({name: s["loss"] for name, s in result["systems"].items()}, docs / "losses.png")
    plot_routing(result["routing"], docs / "routing.png")
    if docs == ROOT / "docs":
        readme_figures.main()
    console.print((docs / "results.md").read_text(), markup=False, highlight=False)
    missed = [bar.name for bar in promises if not bar.passed]
    if missed:
        console.print(f"[bold red]Missed: {'; '.join(missed)}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
