"""Low-rank experts, trained and compressed, against the full expert of the same owner and tokens.

    python benchmarks/bench_low_rank.py [--owners unicode cpp] [--only trained] [--work DIR] [--out JSON]

The anchor, the owners' text and the measure are those of `bench_defaults.py`: OLMo-2 of hidden size 128, 126,976
tokens of an owner in 62 steps, the loss on held-out own and public text. A run is one of

    full         trained in full
    trained      trained at a rank, from a start: A random, random orthonormal rows, the principal components of the
                 inputs (as in EVA, arXiv 2410.07170), or the leading inputs of the gradient (the product's)
    compressed   the full expert compressed to a rank in the Frobenius norm, or in the metric of the loss on own text

Runs that are in the output file already are not repeated, so an interrupted call resumes. At the end, the bars: an
expert trained from the gradient is at least as good as a compressed one of each rank, it has 95 % of the full expert's
gain at rank 16 of 128, and compression is better with the owner's text at ranks 16 and 4.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench_defaults import OWNERS, SEQUENCE, SIZES, prepare_anchor, read_documents
from machine import machine
from torch import nn
from transformers import set_seed

from flexmoe.conversion.low_rank import compress
from flexmoe.data.tokens import split_documents
from flexmoe.demo.corpus import read_texts
from flexmoe.modeling import PUBLIC, FlexMoeConfig, FlexMoeForCausalLM
from flexmoe.modeling.low_rank_flexmoe import LowRankDelta
from flexmoe.training import experts
from flexmoe.training.defaults import choose
from flexmoe.training.low_rank import initialize_from_gradient
from flexmoe.training.settings import ChosenSettings, TrainingSettings
from flexmoe.training.text import SplitText, TrainingText, pack_text
from flexmoe.training.trainer import ExpertTrainer

RESULT = Path(__file__).parents[1] / "docs" / "benchmarks" / "low_rank_training.json"
ANCHOR, NAME = "olmo2-128", "own"
FULL_RATE = 2e-3
RANKS = (64, 16, 4, 1)
RATES = {64: (5e-3, 1e-2), 16: (5e-3, 1e-2, 2e-2), 4: (1e-2, 2e-2), 1: (2e-2,)}  # from the gradient
OTHER_STARTS = {"random": (1e-2, 2e-2, 4e-2), "orthogonal": (1e-2,), "activations": (1e-2,)}  # unicode, rank 16
LONG = 186  # steps of the longer runs: unicode, rank 16
WANTED = 0.95  # of the gain of a full expert, at rank 16
KEYS = ("owner", "steps", "kind", "rank", "rate", "start", "metric")  # what a run is
Run = dict[str, Any]


def runs(owner: str) -> Iterator[Run]:
    yield {"owner": owner, "kind": "full", "rate": FULL_RATE}
    for rank in RANKS:
        for metric in ("frobenius", "loss"):
            yield {"owner": owner, "kind": "compressed", "rank": rank, "metric": metric}
    for rank in RANKS:
        for rate in RATES[rank]:
            yield {"owner": owner, "kind": "trained", "rank": rank, "rate": rate, "start": "gradient"}
    if owner == OWNERS[0]:
        for start, rates in OTHER_STARTS.items():
            for rate in rates:
                yield {"owner": owner, "kind": "trained", "rank": 16, "rate": rate, "start": start}
        long = {"owner": owner, "steps": LONG}
        yield {**long, "kind": "full", "rate": FULL_RATE}
        yield {**long, "kind": "trained", "rank": 16, "rate": 1e-2, "start": "gradient"}
        for metric in ("frobenius", "loss"):
            yield {**long, "kind": "compressed", "rank": 16, "metric": metric}


class Bench:
    """Runs on one anchor."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.grafted = prepare_anchor(ANCHOR, work, None)
        self._read: dict[str, dict[str, SplitText]] = {}

    def measure(self, run: Run) -> Run:
        """The run with its losses."""
        start = time.process_time()
        trainer = self.compressed(run) if run["kind"] == "compressed" else self.trained(run)
        ranks = trainer.model.config.expert_records[-1].get("rank")
        losses = {side: round(trainer.evaluate()[f"eval_{side}_loss"], 4) for side in trainer.eval_dataset}
        return {**run, "ranks": ranks, "losses": losses, "cpu_seconds": round(time.process_time() - start, 1)}

    def trained(self, run: Run) -> ExpertTrainer:
        settings = self.settings(run)
        config, text = FlexMoeConfig.from_pretrained(self.grafted), self.text(run["owner"])
        arguments = self._arguments(run["owner"], settings)
        set_seed(settings.seed)
        model = experts._two_expert_model(self.grafted, NAME, config, text, arguments, settings)
        trainer = self._trainer(model, run["owner"], settings)
        if run["kind"] == "trained":
            STARTS[run["start"]](trainer)
        trainer.train()
        if run["kind"] == "full":
            trainer.model.save_expert(NAME, self.package(run), overwrite=True)
        return trainer

    def compressed(self, run: Run) -> ExpertTrainer:
        owner, out = run["owner"], self.work / ANCHOR / run["owner"] / "compressed"
        own = self.work / ANCHOR / owner / "training.jsonl"  # without the documents of the measure
        documents, _ = split_documents(read_texts(self.work / "corpus" / "owners" / f"{owner}.jsonl"), 0.05, 0)
        own.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
        data = [own] if run["metric"] == "loss" else None
        compress(self.package(run), out, anchor=self.grafted, rank=run["rank"], data=data, overwrite=True)
        model = FlexMoeForCausalLM.from_pretrained(self.grafted)
        model.add_expert(out)
        for block in model.flexmoe_blocks():
            nn.init.zeros_(block.router[PUBLIC].bias)  # as in training
        return self._trainer(model, owner, self.settings({"owner": owner, "kind": "full", "rate": FULL_RATE}))

    def anchor_loss(self, owner: str) -> float:
        """Of own text, with an expert that equals public."""
        model = FlexMoeForCausalLM.from_pretrained(self.grafted)
        model.add_expert_copy(NAME)
        trainer = self._trainer(model, owner, self.settings({"owner": owner, "kind": "full", "rate": FULL_RATE}))
        return round(trainer.evaluate()["eval_own_loss"], 4)

    def read(self, owner: str) -> dict[str, SplitText]:
        if owner not in self._read:
            self._read[owner] = read_documents(ANCHOR, owner, self.grafted, self.work)
        return self._read[owner]

    def text(self, owner: str) -> TrainingText:
        sizes = SIZES[ANCHOR]
        return pack_text(
            self.read(owner), sequence_length=SEQUENCE[ANCHOR], validation_tokens=sizes["validation"], seed=0
        )

    def settings(self, run: Run) -> ChosenSettings:
        situation = experts.situation(FlexMoeConfig.from_pretrained(self.grafted), self.read(run["owner"]))
        return choose(settings_of(run), situation)[0]

    def package(self, run: Run) -> Path:
        """Of the full expert with the owner and the steps of a run."""
        return self.work / ANCHOR / run["owner"] / f"full-{steps_of(run)}"

    def _arguments(self, owner: str, settings: ChosenSettings) -> Any:
        folder = self.work / ANCHOR / owner
        folder.mkdir(exist_ok=True)
        config = FlexMoeConfig.from_pretrained(self.grafted)
        arguments = experts._training_arguments(folder, self.text(owner), config, settings, False)
        arguments.save_strategy = "no"
        return arguments

    def _trainer(self, model: FlexMoeForCausalLM, owner: str, settings: ChosenSettings) -> ExpertTrainer:
        arguments = self._arguments(owner, settings)
        arguments.eval_on_start = False
        return experts._trainer(model, self.text(owner), arguments, settings, NAME, experts._nothing)


def steps_of(run: Run) -> int:
    return run.get("steps", SIZES[ANCHOR]["tokens"] // SIZES[ANCHOR]["step"])


def settings_of(run: Run) -> TrainingSettings:
    sizes = SIZES[ANCHOR]
    low_rank = {"method": "low_rank", "rank": run["rank"]} if run["kind"] == "trained" else {}
    return TrainingSettings(
        sequence_length=SEQUENCE[ANCHOR],
        batch_size=sizes["step"] // SEQUENCE[ANCHOR],
        max_steps=steps_of(run),
        router_tokens=sizes["rows"],
        public_ratio=0.4,
        validation_tokens=sizes["validation"],
        learning_rate=run["rate"],
        warmup_steps=steps_of(run) // 20,
        eval_steps=10**6,
        **low_rank,
    )


def start_orthogonal(trainer: ExpertTrainer) -> None:
    for _, delta in deltas(trainer.model):
        nn.init.orthogonal_(delta.A.weight)


@torch.no_grad()
def start_from_activations(trainer: ExpertTrainer) -> None:
    """A: the principal components of the matrix's inputs on 64 sequences of own text."""
    moments: dict[str, torch.Tensor] = {}
    hooks = []
    for name, delta in deltas(trainer.model):

        def add(_: nn.Module, args: tuple[torch.Tensor, ...], __: torch.Tensor, name: str = name) -> None:
            x_TI = args[0].flatten(0, -2).double()
            moments[name] = moments.get(name, 0) + x_TI.T @ x_TI

        hooks.append(delta.register_forward_hook(add))
    sequences = trainer.train_dataset._sides[0]
    for ids in sequences[:64].split(4):
        trainer.model.eval()(input_ids=ids.long(), use_cache=False, num_experts_per_tok=2)
    for hook in hooks:
        hook.remove()
    for name, delta in deltas(trainer.model):
        components = torch.linalg.eigh(moments[name])[1].flip(1).T
        delta.A.weight.copy_(components[: len(delta.A.weight)])


def deltas(model: nn.Module) -> list[tuple[str, LowRankDelta]]:
    return [(name, part) for name, part in model.named_modules() if isinstance(part, LowRankDelta)]


STARTS: dict[str, Callable[[ExpertTrainer], None]] = {
    "random": lambda trainer: None,  # as the factors are created
    "orthogonal": start_orthogonal,
    "activations": start_from_activations,
    "gradient": initialize_from_gradient,
}


def shares(kept: list[Run], before: dict[str, float]) -> None:
    """Adds each run's share of the full expert's gain on own text."""
    full = {(run["owner"], steps_of(run)): run["losses"]["own"] for run in kept if run["kind"] == "full"}
    for run in kept:
        start, end = before[run["owner"]], full[run["owner"], steps_of(run)]
        run["share"] = round((start - run["losses"]["own"]) / (start - end), 3)


def missed(kept: list[Run]) -> list[str]:
    """The bars that the runs miss."""
    found = []
    lengths = sorted({(run["owner"], steps_of(run)) for run in kept})
    for (owner, steps), rank in itertools.product(lengths, RANKS):
        here = [run for run in kept if (run["owner"], steps_of(run), run.get("rank")) == (owner, steps, rank)]
        compressed = {run["metric"]: run for run in here if run["kind"] == "compressed"}
        trained = [run for run in here if run.get("start") == "gradient"]
        if not (compressed and trained):
            continue
        best = max(run["share"] for run in trained)
        for metric, run in compressed.items():
            if best < run["share"]:
                theirs = f"compressed ({metric}) {run['share']:.1%}"
                found.append(f"{owner}, {steps} steps, rank {rank}: trained {best:.1%}, {theirs}")
        if rank == 16 and best < WANTED:
            found.append(f"{owner}, {steps} steps, rank 16: {best:.1%} of the gain")
        if rank in (16, 4) and compressed["loss"]["share"] < compressed["frobenius"]["share"]:
            found.append(f"{owner}, {steps} steps, rank {rank}: compression is worse with the owner's text")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--owners", nargs="*", default=OWNERS)
    parser.add_argument("--only", nargs="*", help="kinds of runs")
    parser.add_argument("--ranks", nargs="*", type=int, help="only these")
    parser.add_argument("--steps", nargs="*", type=int, help="only runs of these lengths")
    parser.add_argument("--work", type=Path, default=Path("build/defaults"))
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    kept = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else {"runs": []}
    before = kept.get("before", {})
    bench = Bench(arguments.work)
    for owner in arguments.owners:
        for run in runs(owner):
            if arguments.only and run["kind"] not in arguments.only:
                continue
            if arguments.ranks and run.get("rank", arguments.ranks[0]) not in arguments.ranks:
                continue
            if arguments.steps and steps_of(run) not in arguments.steps:
                continue
            if any(run == {key: done[key] for key in KEYS if key in done} for done in kept["runs"]):
                continue
            if owner not in before:
                before[owner] = bench.anchor_loss(owner)
            kept["runs"].append(bench.measure(run))
            shares(kept["runs"], before)
            sys.stderr.write(f"{kept['runs'][-1]}\n")
            kept = {**machine(), "anchor": ANCHOR, "before": before, "runs": kept["runs"]}
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    faults = missed(kept["runs"])
    assert not faults, "\n".join(faults)


if __name__ == "__main__":
    main()
