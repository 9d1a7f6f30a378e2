"""`make results`: eight owners on SmolLM2-135M-Instruct, several seeds, and what else could be done with their text.

Per seed, the demo with eight owners (`flexmoe.demo`), and on the same tokens: low-rank experts; the recipe of the
FlexOlmo paper (rows trained by the loss, own data only); the average of the experts (soup); dense models per owner as
an ensemble (Branch-Train-Merge); and one dense model trained on everybody's text, which no owner of private text can
have: the ceiling without restrictions. Each kind of dense model gets the better of two learning rates.

Writes docs/benchmarks/eight_owners.json after each system, and docs/eight-owners.md. Finished stages are reused, so an
interrupted run continues. Exit code 1 if a bar is missed. Does not cover other routers (`routers`).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from dense_baselines import ensemble_losses, everybodys, tokens_of, train_dense
from machine import machine
from rich.console import Console

from flexmoe.demo.anchor_source import SMOLLM2
from flexmoe.demo.corpus import PUBLIC
from flexmoe.demo.owners import PACKAGE
from flexmoe.demo.pipeline import MODEL, SCORING_CODE, Demo, DemoSettings, without_loading_bars
from flexmoe.demo.report import Threshold, markdown_table
from flexmoe.demo.scoring import domain_losses, load, soup, two_expert_model
from flexmoe.demo.stages import Stage
from flexmoe.evaluation import token_losses

ROOT = Path(__file__).resolve().parents[1]
OWNERS = ("medicine", "verilog", "chinese", "music", "unicode", "math", "phonetics", "german")
RECIPES: dict[str, dict[str, Any]] = {
    "low-rank experts": {"method": "low_rank"},
    "paper's recipe": {"router": "hidden_mean", "router_bias": True, "public_ratio": 0.0},
}
UNRESTRICTED, ENSEMBLE = "one dense model on everybody's text", "Branch-Train-Merge"
DENSE_CODE = (*SCORING_CODE, "flexmoe.training", "dense_baselines")
Losses = dict[str, float]

SMALL_GAIN = 0.02
"""Of the anchor's loss; the share of a smaller gain says nothing."""


class EightOwners:
    """One seed: the demo's stages, and those of the comparisons, each of which adds to `losses`."""

    def __init__(self, out: Path, settings: DemoSettings, console: Console) -> None:
        self.demo = Demo(out, settings, console)
        self.losses: dict[str, Losses] = {}
        self.opt_out: dict[str, Any] = {}

    def run(self, part: str, dense_rates: tuple[float, ...]) -> None:
        """Runs "main", "dense" or one of `RECIPES`."""
        if part == "main":
            self.main()
        elif part == "dense":
            self.dense(dense_rates)
        else:
            self.recipe(part)

    def main(self) -> None:
        """Anchor, owners, composition and opt-out: the losses of `anchor`, `soup`, `composed`, `two-expert`."""
        demo = self.demo
        demo.build()
        self.opt_out = json.loads((demo.folder("opt-out-proof") / "verdict.json").read_text(encoding="utf-8"))
        self.losses |= self._scored("main", self._main_losses, [*demo.done.values()])

    def _main_losses(self) -> dict[str, Losses]:
        demo, tokens = self.demo, self.demo.tokens()
        found = {"anchor": domain_losses(load(demo.folder("anchor")), tokens)}
        found |= self._with_experts("composed", demo.packages, demo.folder("composed") / MODEL)
        found["soup"] = domain_losses(soup(load(demo.folder("anchor")), load(demo.folder("composed") / MODEL)), tokens)
        return found

    def recipe(self, name: str) -> None:
        """Experts trained and composed in another way."""
        demo, below = self.demo, name.replace(" ", "-").replace("'", "")
        stages = demo.train_all(replace(demo.settings.owner, **RECIPES[name]), below=below)
        packages = {owner: stage.folder / PACKAGE for owner, stage in stages.items()}
        composed = demo.compose(f"{below}-composed", list(packages), below=below)
        inputs = [demo.done["corpus"], composed, *stages.values()]
        self.losses |= self._scored(below, lambda: self._with_experts(name, packages, composed.folder / MODEL), inputs)

    def dense(self, rates: tuple[float, ...]) -> None:
        """The dense models: one on all text, and one per owner, each kind at the better of the rates."""
        demo = self.demo
        inputs = [demo.done["grafted"], *(demo.done[f"owners/{owner}"] for owner in demo.settings.owners)]
        kinds = (("dense", UNRESTRICTED, self._unrestricted), ("branches", ENSEMBLE, self._ensemble))
        for below, name, train in kinds:
            found = []
            for rate in rates:
                make = functools.partial(lambda name, train, rate: {name: train(rate)}, name, train, rate)
                found.append(self._scored(f"{below}-{rate:g}", make, inputs)[name])
            self.losses[name] = min(found, key=lambda losses: statistics.mean(losses.values()))

    def _unrestricted(self, rate: float) -> Losses:
        demo = self.demo
        tokens = everybodys([self._tokens_of(owner) for owner in demo.settings.owners], demo.settings.corpus.seed)
        return domain_losses(train_dense(load(demo.folder("anchor")), tokens, rate), demo.tokens())

    def _ensemble(self, rate: float) -> Losses:
        """The owners' dense models and the anchor, weighted by how well they predicted the text so far."""
        demo, tokens = self.demo, self.demo.tokens()
        members = [{name: token_losses(load(demo.folder("anchor")), ids) for name, ids in tokens.items()}]
        for owner in demo.settings.owners:
            model = train_dense(load(demo.folder("anchor")), self._tokens_of(owner), rate)
            members.append({name: token_losses(model, ids) for name, ids in tokens.items()})
        stacked = {name: torch.stack([member[name] for member in members]) for name in tokens}
        return {name: ensemble_losses(losses).mean().item() for name, losses in stacked.items()}

    def _tokens_of(self, owner: str) -> Any:
        demo = self.demo
        folder = demo.folder(f"owners/{owner}")
        return tokens_of(folder / PACKAGE, folder / "data" / "documents.jsonl", demo.grafted_model)

    def _with_experts(self, name: str, packages: Mapping[str, Path], composed: Path) -> dict[str, Losses]:
        """The composed model on all domains, and each owner's two-expert model on its own and on public text."""
        tokens = self.demo.tokens()
        model = load(composed)
        found = {name: domain_losses(model, tokens, num_experts_per_tok=len(packages) + 1)}
        del model
        alone: Losses = {}
        for owner, package in packages.items():
            alone |= domain_losses(two_expert_model(self.demo.grafted_model, package), {owner: tokens[owner]})
        return {**found, f"{name}, each expert alone": alone}

    def _scored(
        self,
        name: str,
        make: Callable[[], dict[str, Losses]],
        inputs: list[Stage],
        settings: Mapping[str, Any] | None = None,
    ) -> dict[str, Losses]:
        def write(folder: Path) -> None:
            (folder / "losses.json").write_text(json.dumps(make(), indent=2) + "\n", encoding="utf-8")

        stage = self.demo.stages.run(
            f"scores-{name}", write, settings=dict(settings or {}), code=DENSE_CODE, inputs=inputs
        )
        return json.loads((stage.folder / "losses.json").read_text(encoding="utf-8"))


def kept(losses: Mapping[str, Losses], name: str, owner: str) -> float:
    """The share of an owner's gain that a composition keeps; the gain is that of the expert alone.

    NaN if the expert is hardly better than the anchor: then there is nothing to keep.
    """
    anchor, alone = losses["anchor"][owner], losses[f"{name}, each expert alone"][owner]
    gain = anchor - alone
    return (anchor - losses[name][owner]) / gain if gain > SMALL_GAIN * anchor else math.nan


def mean_kept(all_losses: Sequence[Mapping[str, Losses]], name: str, owner: str) -> float:
    """The mean over the seeds in which there is something to keep; NaN if there is none."""
    shares = [share for losses in all_losses if not math.isnan(share := kept(losses, name, owner))]
    return statistics.mean(shares) if shares else math.nan


def bars(seeds: Mapping[str, Any], owners: tuple[str, ...]) -> list[Threshold]:
    """The bars, on the mean over seeds."""
    all_losses = [seed["losses"] for seed in seeds.values()]
    means = (mean_kept(all_losses, "composed", owner) for owner in owners)
    shares = [share for share in means if not math.isnan(share)]
    public = [losses["composed"][PUBLIC] / losses["anchor"][PUBLIC] - 1 for losses in all_losses]
    above = [losses["composed"][owner] - losses["anchor"][owner] for losses in all_losses for owner in owners]
    exact = [all(value for key, value in seed["opt_out"].items() if key.endswith("_equal")) for seed in seeds.values()]
    return [
        Threshold("largest change of a domain's loss, composed against anchor", max(above), "<", 0.0),
        Threshold("share of its own gain that an owner keeps, mean", statistics.mean(shares), "≥", 0.95, True),
        Threshold("share of its own gain that an owner keeps, worst", min(shares), "≥", 0.9, True),
        Threshold("change of the loss on public text", statistics.mean(public), "≤", 0.005, True),
        Threshold("opt-outs that are exact", statistics.mean(exact), "≥", 1.0, True),
    ]


def markdown(result: Mapping[str, Any]) -> str:
    """The text of docs/eight-owners.md."""
    owners, seeds = tuple(result["owners"]), result["seeds"]
    domains = [PUBLIC, *owners]
    by_seeds: dict[tuple[str, ...], list[str]] = {}
    for name in dict.fromkeys(name for seed in seeds.values() for name in seed["losses"]):
        if not name.endswith("each expert alone"):
            have = tuple(seed for seed in seeds if name in seeds[seed]["losses"])
            by_seeds.setdefault(have, []).append(name)
    shares = []
    for name in ("composed", *RECIPES):
        have = [seed["losses"] for seed in seeds.values() if name in seed["losses"]]
        if have:
            means = (mean_kept(have, name, owner) for owner in owners)
            shares.append([name, *("–" if math.isnan(mean) else f"{mean:.0%}" for mean in means)])
    lines = [
        "# Eight owners on SmolLM2-135M-Instruct\n",
        f"Written by `make results`, with seed(s) {', '.join(seeds)}. Loss in nats per token on held-out text, mean "
        "over seeds; ± is the standard deviation of the mean over domains. Nothing was set by hand but the "
        f"duration, 0.4 passes over {result['own_tokens']:,} own tokens per owner.\n",
        *_systems(seeds, by_seeds, domains),
        "Share of the gain of an expert alone (with public) that the composition of all keeps; – if the expert alone "
        f"gains less than {SMALL_GAIN:.0%} of the anchor's loss:\n",
        markdown_table(["", *owners], shares),
        "## Bars\n",
        markdown_table(("criterion", "measured", "bar", "met"), [bar.row() for bar in bars(seeds, owners)]),
    ]
    if gap := _gap(seeds, domains):
        lines.append(gap)
    return "\n".join(lines)


def _systems(
    seeds: Mapping[str, Any], by_seeds: Mapping[tuple[str, ...], list[str]], domains: list[str]
) -> Iterator[str]:
    """A table of the systems of all seeds; one of others, with anchor and composition on the same text."""
    for some, names in by_seeds.items():
        same_text: list[str] = []
        if len(some) < len(seeds):
            yield f"Of seed(s) {', '.join(some)} alone, whose text differs from that of the others:\n"
            same_text = ["anchor", "composed"]
        rows = []
        for name in same_text + names:
            losses = [seeds[seed]["losses"][name] for seed in some]
            means = [statistics.mean(each[domain] for domain in domains) for each in losses]
            spread = f" ± {statistics.stdev(means):.3f}" if len(means) > 1 else ""
            cells = [f"{statistics.mean(each[domain] for each in losses):.3f}" for domain in domains]
            rows.append(
                [f"**{name}**" if name == "composed" else name, *cells, f"{statistics.mean(means):.3f}{spread}"]
            )
        yield markdown_table(["system", *domains, "mean"], rows)


def _gap(seeds: Mapping[str, Any], domains: list[str]) -> str | None:
    """How far the composition is from the model without restrictions."""
    have = [seed["losses"] for seed in seeds.values() if UNRESTRICTED in seed["losses"]]
    if not have:
        return None
    gaps = [
        statistics.mean(losses["composed"][d] for d in domains)
        / statistics.mean(losses[UNRESTRICTED][d] for d in domains)
        - 1
        for losses in have
    ]
    return f"Mean loss of the composition, against {UNRESTRICTED} on the same text: {statistics.mean(gaps):+.1%}.\n"


def main() -> int:
    """Runs and writes; the exit code is 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/eight-owners"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--anchor", default=SMOLLM2)
    parser.add_argument("--owners", nargs="+", default=list(OWNERS))
    parser.add_argument("--parts", nargs="*", default=["dense", *RECIPES], help="of the comparisons")
    parser.add_argument("--dense-rates", type=float, nargs="+", default=[4e-4, 1e-4])
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    file = arguments.docs / "benchmarks" / "eight_owners.json"
    result: dict[str, Any] = {**machine(), "owners": arguments.owners, "seeds": {}}
    for seed in arguments.seeds:
        settings = DemoSettings.of(anchor=arguments.anchor, seed=seed, owners=arguments.owners)
        result["own_tokens"] = settings.corpus.owner_tokens
        one = EightOwners(arguments.out / f"seed-{seed}", settings, Console())
        for part in ("main", *arguments.parts):
            with without_loading_bars():
                one.run(part, tuple(arguments.dense_rates))
            result["seeds"][str(seed)] = {"losses": one.losses, "opt_out": one.opt_out}
            file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            (arguments.docs / "eight-owners.md").write_text(markdown(result), encoding="utf-8")
    missed = [bar.name for bar in bars(result["seeds"], tuple(arguments.owners)) if not bar.passed]
    sys.stderr.write(f"missed: {', '.join(missed) or 'none'}\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
