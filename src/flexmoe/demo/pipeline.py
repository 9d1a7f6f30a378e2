"""The stages of the demo: a public anchor, owners that train separately, a composed model, an owner that opts out.

A stage runs again only if its inputs have changed (`stages`). The owners train in parallel, one process each, and
share the cores.

Does not cover what the stages do: each is a call of the library or of the command line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers.utils import logging as transformers_logging

from flexmoe.conversion.compose import compose, remove
from flexmoe.conversion.graft import graft
from flexmoe.demo.anchor import AnchorSettings, train_anchor
from flexmoe.demo.corpus import PUBLIC, CorpusSettings, build_corpus, read_texts
from flexmoe.demo.memory import PeakMemory
from flexmoe.demo.opt_out import prove_opt_out
from flexmoe.demo.owners import PACKAGE, OwnerSettings, train_owner
from flexmoe.demo.report import build_report, print_report, write_report
from flexmoe.demo.scoring import (
    Models,
    continuations,
    held_out_tokens,
    load,
    prompts,
    routing_shares,
    score_systems,
)
from flexmoe.demo.sources import installed_versions
from flexmoe.demo.stages import Stage, Stages
from flexmoe.tokenization import load_tokenizer

DEFAULT_OWNERS = ("math", "code", "unicode")
ANCHOR_STEPS_PER_OWNER_STEP = 4
MODEL = "model"

# Code that the results of the stages depend on; if it changes, the stages run again.
CHECKPOINT_CODE = (
    "flexmoe.modeling",
    "flexmoe.io",
    "flexmoe.cards",
    "flexmoe.packages",
    "flexmoe.hub",
    "flexmoe.admission",
    "flexmoe.conversion",
)
TRAINING_CODE = (
    "flexmoe.modeling",
    "flexmoe.cpu",
    "flexmoe.io",
    "flexmoe.packages",
    "flexmoe.data",
    "flexmoe.routers.hidden_states",
    "flexmoe.routers.rows",
    "flexmoe.tokenization",
    "flexmoe.training",
    "flexmoe.demo.owners",
)
SCORING_CODE = (
    "flexmoe.modeling",
    "flexmoe.cpu",
    "flexmoe.packages",
    "flexmoe.data",
    "flexmoe.evaluation",
    "flexmoe.demo.scoring",
)


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Settings of a run. `opt_out`: the owner that opts out; None stands for the first one."""

    corpus: CorpusSettings
    anchor: AnchorSettings = field(default_factory=AnchorSettings)
    owner: OwnerSettings = field(default_factory=OwnerSettings)
    opt_out: str | None = None

    def __post_init__(self) -> None:
        if len(self.owners) < 2:
            raise ValueError(f"the demo needs at least two owners, because one opts out; got {list(self.owners)}")
        if self.opt_out is not None and self.opt_out not in self.owners:
            raise ValueError(f"opt_out={self.opt_out!r} is no owner of this demo; use one of {list(self.owners)}")

    @property
    def owners(self) -> tuple[str, ...]:
        return self.corpus.owners

    @property
    def leaving(self) -> str:
        return self.opt_out or self.owners[0]

    @classmethod
    def of(cls, *, seed: int = 0, owners: Sequence[str] = DEFAULT_OWNERS, steps: int | None = None) -> DemoSettings:
        """The settings of `flexmoe demo`. `steps`: steps of each owner; the anchor gets four times as many."""
        owner = OwnerSettings(seed=seed) if steps is None else OwnerSettings(seed=seed, steps=steps)
        if owner.steps < 1:
            raise ValueError(f"steps={owner.steps}: must be at least 1")
        anchor = AnchorSettings(seed=seed, steps=ANCHOR_STEPS_PER_OWNER_STEP * owner.steps)
        return cls(corpus=CorpusSettings(owners=tuple(owners), seed=seed), anchor=anchor, owner=owner)


def run_demo(
    out: str | Path,
    *,
    seed: int = 0,
    owners: Sequence[str] = DEFAULT_OWNERS,
    steps: int | None = None,
    settings: DemoSettings | None = None,
    console: Console | None = None,
) -> Path:
    """Runs the demo in the folder `out`, and reuses unchanged stages there; returns the path of `report.json`.

    `settings` overrides `seed`, `owners` and `steps`. `out` also gets `report.md`, two plots, and a folder per stage.

    Raises:
        ValueError: there is no text for an owner, or `steps` is not positive.
        FileExistsError: `out` has files that are not from the demo.
        RuntimeError: the process of an owner failed.
    """
    settings = settings or DemoSettings.of(seed=seed, owners=owners, steps=steps)
    console = console or Console()
    with without_loading_bars():
        report, path = Demo(Path(out), settings, console).measured_run()
    print_report(report, console)
    return path


@contextlib.contextmanager
def without_loading_bars() -> Iterator[None]:
    """Disables the progress bars of transformers, because the demo loads many models."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


class Demo:
    """A run: its folder, its settings, and its stages in order."""

    def __init__(self, out: Path, settings: DemoSettings, console: Console) -> None:
        self.out, self.settings, self.console = out, settings, console
        self.done: dict[str, Stage] = {}
        self.stages = Stages(out, self._announce)

    def measured_run(self) -> tuple[dict[str, Any], Path]:
        """Runs all stages, measuring time and memory; returns the report and the path of `report.json`."""
        started = time.perf_counter()
        with PeakMemory() as peak:
            results = self.run()
        report = build_report(
            results,
            settings=asdict(self.settings),
            seconds=time.perf_counter() - started,
            peak_bytes=peak.bytes,
            versions=installed_versions(),
        )
        return report, write_report(report, self.out)

    def run(self) -> dict[str, Any]:
        """Runs all stages; returns the results for the report."""
        self._keep("corpus", self.corpus())
        self._keep("anchor", self.anchor())
        self._keep("grafted", self.grafted())
        for owner, stage in self.train_all(self.settings.owner).items():
            self._keep(f"owners/{owner}", stage)
        self._keep("composed", self.compose("composed", list(self.settings.owners)))
        self._keep("opted-out", self.opted_out())
        self._keep("opt-out-proof", self.proof())
        self._keep("scores", self.scores())
        return {
            "owners": list(self.settings.owners),
            "mix": json.loads((self.folder("corpus") / "mix.json").read_text(encoding="utf-8")),
            "scores": json.loads((self.folder("scores") / "scores.json").read_text(encoding="utf-8")),
            "opt_out": json.loads((self.folder("opt-out-proof") / "verdict.json").read_text(encoding="utf-8")),
            "stages": {name: {"seconds": round(s.seconds, 1), "reused": s.reused} for name, s in self.done.items()},
        }

    def folder(self, stage: str) -> Path:
        """The folder of a finished stage."""
        return self.done[stage].folder

    def corpus(self) -> Stage:
        settings = self.settings.corpus
        return self.stages.run(
            "corpus",
            lambda folder: build_corpus(settings, folder),
            settings={**asdict(settings), "versions": installed_versions()},
            code=[
                "flexmoe.demo.corpus",
                "flexmoe.demo.sources",
                "flexmoe.demo.worked_problems",
                "flexmoe.demo.near_duplicates",
            ],
        )

    def anchor(self) -> Stage:
        settings, public = self.settings.anchor, self.folder("corpus") / "public.jsonl"

        def make(folder: Path) -> None:
            columns = (
                TextColumn("  {task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} steps"),
                TimeElapsedColumn(),
            )
            with Progress(*columns, console=self.console, transient=True) as bar:
                task = bar.add_task("training the anchor", total=settings.steps)
                train_anchor(
                    read_texts(public), settings, folder, lambda step, steps: bar.update(task, completed=step)
                )

        return self.stages.run(
            "anchor",
            make,
            settings={**settings.as_dict(), "public": _sha256(public)},
            code=["flexmoe.demo.anchor", "flexmoe.data", "flexmoe.training.next_token_loss"],
        )

    def grafted(self) -> Stage:
        public, seed = self.folder("corpus") / "public.jsonl", self.settings.corpus.seed
        return self.stages.run(
            "grafted",
            lambda folder: graft(self.folder("anchor"), folder / MODEL, public_data=[public], seed=seed),
            settings={"public": _sha256(public), "seed": seed},
            code=[*CHECKPOINT_CODE, "flexmoe.data"],
            inputs=[self.done["anchor"]],
        )

    def train_all(self, settings: OwnerSettings, *, below: str = "owners") -> dict[str, Stage]:
        """Trains all owners in parallel, each in the stage `<below>/<owner>` and a separate process."""
        owners = self.settings.owners
        threads = max(1, (os.cpu_count() or 1) // len(owners))
        with ThreadPoolExecutor(max_workers=min(len(owners), (os.cpu_count() or 1) + 1)) as pool:
            stages = pool.map(lambda owner: self._train(owner, settings, f"{below}/{owner}", threads), owners)
            return dict(zip(owners, stages, strict=True))

    def compose(
        self, name: str, owners: Sequence[str], *, below: str = "owners", public_prior: float | None = None
    ) -> Stage:
        """Composes the grafted model and the packages of `owners` in the stage `name`; all experts are active."""
        packages = [self.stages.root / below / owner / PACKAGE for owner in owners]
        k = len(self.settings.owners) + 1

        def make(folder: Path) -> None:
            compose(self.grafted_model, packages, folder / MODEL, public_prior=public_prior, num_experts_per_tok=k)

        return self.stages.run(
            name,
            make,
            settings={
                "owners": list(owners),
                "packages": [_sha256(p / "expert_config.json") for p in packages],
                "prior": public_prior,
                "k": k,
            },
            code=CHECKPOINT_CODE,
            inputs=[self.done["grafted"]],
        )

    def opted_out(self) -> Stage:
        owner = self.settings.leaving
        return self.stages.run(
            "opted-out",
            lambda folder: remove(self.folder("composed") / MODEL, owner, folder / MODEL),
            settings={"owner": owner},
            code=CHECKPOINT_CODE,
            inputs=[self.done["composed"]],
        )

    def proof(self) -> Stage:
        owner, k = self.settings.leaving, len(self.settings.owners) + 1

        def make(folder: Path) -> None:
            verdict = prove_opt_out(
                owner,
                self.folder("opted-out") / MODEL,
                self.grafted_model,
                self.packages,
                prompts(self.tokens()),
                folder,
                num_experts_per_tok=k,
            )
            (folder / "verdict.json").write_text(json.dumps(verdict, indent=2) + "\n", encoding="utf-8")

        packages = [self.done[f"owners/{name}"] for name in self.settings.owners]
        return self.stages.run(
            "opt-out-proof",
            make,
            settings={"owner": owner, "k": k},
            code=[*CHECKPOINT_CODE, "flexmoe.demo.opt_out", "flexmoe.demo.fresh_process"],
            inputs=[self.done["corpus"], self.done["grafted"], self.done["opted-out"], *packages],
        )

    def scores(self) -> Stage:
        models = Models(
            anchor=self.folder("anchor"),
            grafted=self.grafted_model,
            packages=self.packages,
            composed=self.folder("composed") / MODEL,
            opted_out=self.folder("opted-out") / MODEL,
        )

        def make(folder: Path) -> None:
            tokens = self.tokens()
            model = load(models.composed)
            scores = {
                "domains": list(tokens),
                "tokens": {name: ids.numel() for name, ids in tokens.items()},
                "losses": score_systems(models, tokens),
                "routing": routing_shares(model, tokens),
                "continuations": continuations(
                    model, load_tokenizer(models.composed), tokens, seed=self.settings.corpus.seed
                ),
            }
            (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")

        read = ["corpus", "anchor", "grafted", *(f"owners/{o}" for o in self.settings.owners), "composed", "opted-out"]
        return self.stages.run(
            "scores",
            make,
            settings={"sequence_length": self.settings.anchor.sequence_length, "seed": self.settings.corpus.seed},
            code=SCORING_CODE,
            inputs=[self.done[name] for name in read],
        )

    @property
    def grafted_model(self) -> Path:
        return self.folder("grafted") / MODEL

    @property
    def packages(self) -> dict[str, Path]:
        return {owner: self.folder(f"owners/{owner}") / PACKAGE for owner in self.settings.owners}

    def tokens(self) -> dict[str, Any]:
        """Held-out tokens of public text and of each owner's domain, each int64 [N, L]."""
        domains = [PUBLIC, *self.settings.owners]
        held_out = self.folder("corpus") / "held_out"
        anchor, tokenizer = self.settings.anchor, load_tokenizer(self.folder("anchor"))
        return held_out_tokens(held_out, domains, tokenizer, anchor.sequence_length, anchor.vocabulary)

    def _train(self, owner: str, settings: OwnerSettings, name: str, threads: int) -> Stage:
        data = self.folder("corpus") / "owners" / f"{owner}.jsonl"
        statement = f"Demo text of kind {owner!r}, gathered on this machine."
        return self.stages.run(
            name,
            lambda folder: train_owner(
                owner, data, self.grafted_model, folder, settings, threads=threads, statement=statement
            ),
            settings={**settings.as_dict(), "data": _sha256(data)},
            code=TRAINING_CODE,
            inputs=[self.done["grafted"]],
        )

    def _keep(self, name: str, stage: Stage) -> None:
        self.done[name] = stage

    def _announce(self, name: str, reused: bool) -> None:
        self.console.print(f"[dim]{'reusing' if reused else 'making '}[/] {name}", highlight=False)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
