"""`make ranks`: losses of low-rank experts, for the demo's experts compressed to several ranks or trained at them.

Compression keeps the largest singular values of the difference from public. Both kinds are composed like the demo's
experts, with rows of the same kind, and evaluated on the same text. Writes `docs/benchmarks/ranks.json` and its
section of `docs/results.md`. Finished stages are reused.

Source: FlexMoRE, arXiv 2602.08818, table of ranks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from results import ROOT, mean, write_markdown
from rich.console import Console

from flexmoe.conversion.compose import compose
from flexmoe.conversion.low_rank import compress
from flexmoe.demo.owners import PACKAGE
from flexmoe.demo.pipeline import (
    CHECKPOINT_CODE,
    MODEL,
    SCORING_CODE,
    TINY,
    Demo,
    DemoSettings,
    without_loading_bars,
)
from flexmoe.demo.scoring import domain_losses, load

RANKS = (64, 16, 4, 1)
CODE = (*CHECKPOINT_CODE, *SCORING_CODE)


def compressed(demo: Demo, rank: int) -> dict[str, Any]:
    """The losses of the demo's experts compressed to a rank."""

    def make(folder: Path) -> None:
        errors = []
        for owner, package in demo.packages.items():
            layers = compress(package, folder / owner, anchor=demo.grafted_model, rank=rank)
            errors += [layer.error for layer in layers]
        found = scored(demo, [folder / owner for owner in demo.settings.owners], folder / MODEL)
        found["error"] = statistics.mean(errors)
        (folder / "found.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    names = ("corpus", "grafted", *(f"owners/{owner}" for owner in demo.settings.owners))
    inputs = [demo.done[name] for name in names]
    stage = demo.stages.run(f"compressed-{rank}", make, settings={"rank": rank}, code=CODE, inputs=inputs)
    return json.loads((stage.folder / "found.json").read_text(encoding="utf-8"))


def trained(demo: Demo, rank: int) -> dict[str, Any]:
    """The losses of experts trained at a rank on the demo's tokens."""
    settings = replace(demo.settings.owner, method="low_rank", rank=rank, learning_rate=None)
    owners = demo.train_all(settings, below=f"rank-{rank}-owners")

    def make(folder: Path) -> None:
        found = scored(demo, [stage.folder / PACKAGE for stage in owners.values()], folder / MODEL)
        (folder / "found.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")

    inputs = [demo.done["corpus"], demo.done["grafted"], *owners.values()]
    stage = demo.stages.run(f"rank-{rank}-scores", make, settings={"rank": rank}, code=CODE, inputs=inputs)
    return json.loads((stage.folder / "found.json").read_text(encoding="utf-8"))


def scored(demo: Demo, packages: list[Path], out: Path) -> dict[str, Any]:
    """Composes the packages like the demo: losses by domain, and mean bytes of a package."""
    k = len(demo.settings.owners) + 1
    model = load(compose(demo.grafted_model, packages, out, num_experts_per_tok=k))
    sizes = [sum(file.stat().st_size for file in package.glob("*.safetensors")) for package in packages]
    return {"losses": domain_losses(model, demo.tokens()), "bytes": statistics.mean(sizes), "error": None}


def main() -> int:
    """Runs, writes and prints. The exit code is 1 if the loss of a smaller rank is lower, beyond noise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/results/seed-0"))
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--trained", type=int, nargs="*", default=list(RANKS), help="ranks to train at")
    arguments = parser.parse_args()
    console = Console()
    settings = DemoSettings.of(seed=arguments.seed, anchor=TINY, steps=arguments.steps)
    demo = Demo(arguments.out, settings, console)
    with without_loading_bars():
        losses = demo.run()["scores"]["losses"]
        packages = list(demo.packages.values())
        bytes_of_full = statistics.mean(sum(f.stat().st_size for f in p.glob("*.safetensors")) for p in packages)
        experts = {"full": {"losses": losses["composed"], "bytes": bytes_of_full, "error": None}}
        experts |= {f"compressed, rank {rank}": compressed(demo, rank) for rank in RANKS}
        experts |= {f"trained, rank {rank}": trained(demo, rank) for rank in arguments.trained}
    found = {
        "seed": arguments.seed,
        "hidden_size": settings.anchor.hidden,
        "domains": list(losses["composed"]),
        "systems": {"anchor": losses["anchor"], "full": losses["composed"]},
        "experts": experts,
    }
    benchmarks = arguments.docs / "benchmarks"
    benchmarks.mkdir(parents=True, exist_ok=True)
    (benchmarks / "ranks.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if (arguments.docs / "results.json").is_file():
        write_markdown(arguments.docs, json.loads((arguments.docs / "results.json").read_text(encoding="utf-8")))
    means = {name: mean(entry["losses"]) for name, entry in experts.items()}
    for name, loss in means.items():
        console.print(f"{name:<22} {loss:.4f}", highlight=False)
    by_rank = [means[f"compressed, rank {rank}"] for rank in RANKS]
    ordered = all(one <= other + 0.005 for one, other in itertools.pairwise(by_rank))
    return 0 if ordered and means["full"] <= min(by_rank) + 0.005 else 1


if __name__ == "__main__":
    sys.exit(main())
