"""`make routers`: routers on the same experts and text: rows, evidence, and those of other work.

The experts are those of `make results`: eight owners on SmolLM2-135M-Instruct, whose stages are reused or made here.
Held-out text of each domain; sequences in which the owner changes every 64 tokens; and text that nobody owns. Writes
docs/benchmarks/routers.json and docs/routers.md. Finished stages are reused. Exit code 1 if a bar is missed.

    kept           the share of the gain of an expert alone (with public) over the anchor; 1 is no loss by routing
    kept_start     of the first 16 tokens of a sequence, over all owners; kept_switch where owners change
    bytes_per_owner what an owner contributes to the router

Does not cover experts that are trained with a router (`make results` has the paper's recipe), or the speed of the
baselines' routers, which are not made to be fast.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from dense_baselines import ensemble_losses
from eight_owners import OWNERS, SMALL_GAIN
from machine import machine
from rich.console import Console
from router_baselines import BASELINES, Baseline, LayerInputs, LayerRouter, chosen_losses, top_k_logits
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn
from transformers import AutoConfig

from flexmoe.data import pack
from flexmoe.demo.anchor_source import SMOLLM2
from flexmoe.demo.corpus import PUBLIC, read_texts
from flexmoe.demo.pipeline import MODEL, SCORING_CODE, Demo, DemoSettings, without_loading_bars
from flexmoe.demo.report import Threshold, markdown_table
from flexmoe.demo.row_variants import drop_evidence
from flexmoe.demo.scoring import load, soup
from flexmoe.demo.sources import read_source
from flexmoe.evaluation import token_losses
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.packages.package import ExpertPackage
from flexmoe.tokenization import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
CODE = (
    *SCORING_CODE,
    "flexmoe.routers",
    "flexmoe.demo.row_variants",
    "router_baselines",
    "dense_baselines",
    "routers",
)
DEFAULT, ROWS, ENSEMBLE = "rows + evidence", "the same rows alone", "posterior over models (BTM)"
CLASSIFIER, MEMBERS = "classifier of the first 32 tokens", "members"
NOBODYS, SWITCHES = "nobody's", "switches"
NOBODYS_KIND, NOBODYS_CHARACTERS = "cpp", 8_000
SEGMENT, SEGMENTS_EACH, AFTER_SWITCH = 64, 4, 8  # so many segments fill sequences, whatever the number of owners
START, READ = 16, 32
STATE_SEQUENCES, PIECES = 18, 400  # sequences of 256 tokens: as many as rows are fitted on
Losses = dict[str, Tensor]  # by domain, [N, L - 1]

LIMITS = {
    "kept_mean": 0.97,
    "kept_worst": 0.92,
    "kept_start": 0.85,
    "kept_switch": 0.90,
    "public": 0.002,
    "above_ensemble": 0.01,
}


@dataclass(frozen=True)
class Text:
    """Tokens by domain, int64 [N, L], and the owner of each segment of `SWITCHES`, [N, L / SEGMENT]."""

    tokens: Mapping[str, Tensor]
    owners: Sequence[str]
    segment_owners: Tensor

    @property
    def sha256(self) -> str:
        """Of all tokens."""
        return hashlib.sha256(b"".join(ids.numpy().tobytes() for ids in self.tokens.values())).hexdigest()

    @classmethod
    def of(cls, demo: Demo) -> Text:
        """The held-out text of a run."""
        owners, tokens = demo.settings.owners, dict(demo.tokens())
        length = next(iter(tokens.values())).shape[1]
        pieces = [tokens[owner].reshape(-1, SEGMENT)[:SEGMENTS_EACH] for owner in owners]
        # owner after owner, so that two segments in a row are of different ones
        tokens[SWITCHES] = torch.stack(pieces, 1).reshape(-1, length)
        segment_owners = torch.arange(len(owners)).repeat(SEGMENTS_EACH).view(-1, length // SEGMENT)
        documents = [document.text for document in read_source(NOBODYS_KIND, NOBODYS_CHARACTERS)]
        packed = packed_text(demo, documents, length)
        return cls({**tokens, NOBODYS: packed[: len(tokens[PUBLIC])]}, owners, segment_owners)


def packed_text(demo: Demo, documents: Sequence[str], length: int) -> Tensor:
    """Documents as tokens of the anchor, int64 [N, `length`]."""
    folder = demo.folder("anchor")
    return pack(documents, load_tokenizer(folder), length, vocab_size=AutoConfig.from_pretrained(folder).vocab_size)


class Routers:
    """One seed: the losses per token of all systems, each a stage."""

    def __init__(self, out: Path, settings: DemoSettings, console: Console) -> None:
        self.demo = Demo(out, settings, console)
        self._read: dict[str, list[Tensor]] = {}

    def run(self) -> tuple[Text, dict[str, Losses], dict[str, Any]]:
        """Text, losses by system and domain, and by system what it costs."""
        demo = self.demo
        demo.build()
        text = Text.of(demo)
        members = self._losses(MEMBERS, text, lambda: self._members(text))
        found = {"anchor": _member(members, PUBLIC)}
        costs: dict[str, Any] = {}
        for name, make in self._systems().items():
            stored = self._losses(name, text, lambda make=make: _timed_losses(*make(), text))  # type: ignore[misc]
            costs[name] = {
                "tokens_per_second": stored.pop("seconds").reciprocal().item() * text.tokens[PUBLIC].numel(),
                "forward_passes": 1,
            }
            found[name] = stored
        many = {"forward_passes": len(text.owners) + 1, "tokens_per_second": None}
        stacked = {
            domain: torch.stack([members[f"{name}|{domain}"] for name in self._names]) for domain in text.tokens
        }
        found[ENSEMBLE] = {domain: ensemble_losses(losses_MNL) for domain, losses_MNL in stacked.items()}
        found[f"{ENSEMBLE}, the best one"] = {domain: ensemble_losses(each, 1) for domain, each in stacked.items()}
        found[CLASSIFIER] = self._classified(text, stacked)
        found["true domain"] = true_domain(text, members)
        costs |= {ENSEMBLE: many, f"{ENSEMBLE}, the best one": many}
        costs |= {name: {"forward_passes": 1, "tokens_per_second": None} for name in (CLASSIFIER, "true domain")}
        for name, size in self._bytes().items():
            costs[name]["bytes_per_owner"] = size
        return text, found, costs

    @property
    def _names(self) -> tuple[str, ...]:
        return (PUBLIC, *self.demo.settings.owners)

    def _losses(self, name: str, text: Text, make: Callable[[], Losses]) -> Losses:
        demo = self.demo

        def write(folder: Path) -> None:
            save_file(make(), folder / "losses.safetensors")

        inputs = [demo.done["corpus"], demo.done["composed"]]
        safe = name.replace(" ", "-").replace("'", "")
        stage = demo.stages.run(f"routers/{safe}", write, settings={"text": text.sha256}, code=CODE, inputs=inputs)
        return load_file(stage.folder / "losses.safetensors")

    def _members(self, text: Text) -> Losses:
        """ "<model>|<domain>": the losses of the anchor ("public"), and of each owner's two-expert model."""
        model, found = load(self.demo.folder("composed") / MODEL), {}
        for name in self._names:
            chosen = (PUBLIC,) if name == PUBLIC else (PUBLIC, name)
            with model.only_experts(*chosen):
                for domain, ids_NL in text.tokens.items():
                    found[f"{name}|{domain}"] = token_losses(model, ids_NL, num_experts_per_tok=2)
        return found

    def _systems(self) -> dict[str, Callable[[], tuple[Any, dict[str, Any]]]]:
        """By name, a function that makes a model and the arguments of its forward pass."""
        everyone = {"num_experts_per_tok": len(self._names)}
        return {
            DEFAULT: lambda: (self._composed(), everyone),
            ROWS: lambda: (drop_evidence(self._composed()), everyone),
            **{
                name: lambda each=each: (self._with_baseline(each), {"num_experts_per_tok": each.top_k})
                for name, each in BASELINES.items()
            },  # type: ignore[misc]
            "soup": lambda: (soup(load(self.demo.folder("anchor")), self._composed()), {}),
        }

    def _composed(self) -> FlexMoeForCausalLM:
        return cast(FlexMoeForCausalLM, load(self.demo.folder("composed") / MODEL))

    def _with_baseline(self, baseline: Baseline) -> FlexMoeForCausalLM:
        model = self._composed()
        states = self._states(model)
        for layer, block in enumerate(model.flexmoe_blocks()):
            inputs = LayerInputs(
                {name: by_layer[layer] for name, by_layer in states.items()},
                {owner: _difference(block, owner) for owner in self.demo.settings.owners},
            )
            names = [name for name in self._names if baseline.with_public or name != PUBLIC]
            block.router.forward = _routed(baseline.fit(inputs), names, baseline.top_k)  # type: ignore[method-assign]
        return model

    def _states(self, model: FlexMoeForCausalLM) -> dict[str, list[Tensor]]:
        """FFN inputs [T, H] of all layers on each side's training text, read with that side's expert alone."""
        for name in self._names:
            if name in self._read:
                continue
            ids_NL = self._training_tokens(name, 256)[:STATE_SEQUENCES]
            with model.only_experts(name), _recorded(model) as states, torch.no_grad():
                model.base_model(input_ids=ids_NL, use_cache=False)
            self._read[name] = states
        return self._read

    def _training_tokens(self, name: str, length: int) -> Tensor:
        """The training text of public or of an owner, int64 [N, `length`]."""
        file = "public.jsonl" if name == PUBLIC else f"owners/{name}.jsonl"
        return packed_text(self.demo, read_texts(self.demo.folder("corpus") / file), length)

    def _classified(self, text: Text, stacked: Mapping[str, Tensor]) -> Losses:
        """A classifier of joint text chooses one model for a sequence when it has read its first tokens."""
        tokenizer = load_tokenizer(self.demo.folder("anchor"))
        pieces, labels = [], []
        for label, name in enumerate(self._names):
            ids_NL = self._training_tokens(name, READ)[:PIECES]
            pieces += tokenizer.batch_decode(ids_NL)
            labels += [label] * len(ids_NL)
        classifier = make_pipeline(
            TfidfVectorizer(analyzer="char", ngram_range=(1, 3), sublinear_tf=True, max_features=20_000),
            LogisticRegression(C=10.0, max_iter=500, class_weight="balanced"),
        ).fit(pieces, labels)
        found = {}
        for domain, ids_NL in text.tokens.items():
            choices = classifier.predict(tokenizer.batch_decode(ids_NL[:, :READ]))
            found[domain] = chosen_losses(stacked[domain], torch.from_numpy(choices), READ)
        return found

    def _bytes(self) -> dict[str, int]:
        """What an owner's part of a router takes, by system; of others, there is none or it is of nobody."""
        owner = self.demo.settings.owners[0]
        with safe_open(self.demo.packages[owner] / "expert.safetensors", "pt") as package:
            router = {key: package.get_tensor(key) for key in package.keys() if "router" in key}  # noqa: SIM118
        rows = sum(tensor.nbytes for key, tensor in router.items() if key.endswith(("weight", "bias")))
        prototypes = sum(tensor.nbytes for key, tensor in router.items() if key.endswith("weight"))
        return {
            DEFAULT: sum(tensor.nbytes for tensor in router.values()),
            ROWS: rows,
            "DUME": rows,
            "Arrow": prototypes,
            ENSEMBLE: 0,
            f"{ENSEMBLE}, the best one": 0,
        }


def _timed_losses(model: Any, forward: Mapping[str, Any], text: Text) -> Losses:
    started = time.perf_counter()
    found = {PUBLIC: token_losses(model, text.tokens[PUBLIC], **forward)}
    seconds = time.perf_counter() - started
    rest = {name: token_losses(model, ids, **forward) for name, ids in text.tokens.items() if name != PUBLIC}
    return {**found, **rest, "seconds": torch.tensor(seconds)}


def _member(members: Losses, name: str) -> Losses:
    return {key.split("|")[1]: losses for key, losses in members.items() if key.startswith(f"{name}|")}


def true_domain(text: Text, members: Losses) -> Losses:
    """Each owner's text by its two-expert model, all other text by the anchor."""
    found = {name: members[f"{name if name in text.owners else PUBLIC}|{name}"] for name in text.tokens}
    switches = torch.stack([members[f"{owner}|{SWITCHES}"] for owner in text.owners])
    return {**found, SWITCHES: switches.gather(0, _owner_of_token(text)[None]).squeeze(0)}


def _owner_of_token(text: Text) -> Tensor:
    """[N, L - 1]: the owner of each predicted token of `SWITCHES`."""
    return text.segment_owners.repeat_interleave(SEGMENT, 1)[:, 1:]


def _difference(block: Any, owner: str) -> Tensor:
    """The matrices of an expert that read the FFN's input, minus those of public, [O, H]."""
    public, own = (dict(block.experts[name].named_parameters()) for name in (PUBLIC, owner))
    return torch.cat([own[key] - public[key] for key in public if public[key].shape[-1] == block.hidden_size]).detach()


def _routed(router: LayerRouter, chosen: Sequence[str], k: int) -> Callable[..., Tensor]:
    """The forward of a `FlexMoeRouter` with a baseline's logits of the k best experts."""

    def forward(x_TH: Tensor, names: Sequence[str], evidence: object = None) -> Tensor:
        if set(names) != {PUBLIC, *chosen}:
            raise ValueError("a baseline is run with all experts")
        logits = top_k_logits(router(x_TH), k)
        columns = {name: logits[:, i] for i, name in enumerate(chosen)}
        absent = torch.full_like(logits[:, 0], float("-inf"))
        return torch.stack([columns.get(name, absent) for name in names], 1)

    return forward


@contextmanager
def _recorded(model: FlexMoeForCausalLM) -> Iterator[list[Tensor]]:
    """The inputs [T, H] of the blocks in one forward pass, in order."""
    states: list[Tensor] = []

    def keep(block: nn.Module, args: tuple[Tensor, ...]) -> None:
        states.append(args[0].flatten(0, -2))

    handles = [block.register_forward_pre_hook(keep) for block in model.flexmoe_blocks()]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def measures(text: Text, losses: Mapping[str, Losses], name: str) -> dict[str, Any]:
    """The figures of a system for one seed; shares as fractions."""
    anchor, alone, system = losses["anchor"], losses["true domain"], losses[name]

    def share(owners: Sequence[str], part: slice) -> float:
        gains = [
            sum((anchor[owner][:, part] - by[owner][:, part]).sum().item() for owner in owners)
            for by in (system, alone)
        ]
        return gains[0] / gains[1]

    kept = {owner: share([owner], slice(None)) for owner in text.owners if _gains(anchor, alone, owner)}
    owner_NL, since = _owner_of_token(text), torch.arange(1, text.tokens[SWITCHES].shape[1]) % SEGMENT
    is_later = torch.arange(1, text.tokens[SWITCHES].shape[1]) >= SEGMENT  # the first segment follows none
    after = ((since < AFTER_SWITCH) & is_later).expand_as(owner_NL)

    def switched(mask: Tensor) -> float:
        lost, gained = ((anchor[SWITCHES] - by[SWITCHES])[mask].sum() for by in (system, alone))
        return (lost / gained).item()

    domains = (PUBLIC, *text.owners)
    return {
        "kept": kept,
        "kept_mean": statistics.mean(kept.values()),
        "kept_worst": min(kept.values()),
        "kept_start": share(list(kept), slice(0, START)),
        "kept_switch": switched(torch.ones_like(after)),
        "kept_after_switch": switched(after),
        "public": _change(system, anchor, PUBLIC),
        "nobodys": _change(system, anchor, NOBODYS),
        "mean_loss": statistics.mean(system[domain].mean().item() for domain in domains),
    }


def _gains(anchor: Losses, alone: Losses, owner: str) -> bool:
    return bool((anchor[owner].mean() - alone[owner].mean()) > SMALL_GAIN * anchor[owner].mean())


def _change(system: Losses, anchor: Losses, domain: str) -> float:
    return (system[domain].mean() / anchor[domain].mean() - 1).item()


def over_seeds(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds; an owner's share over those seeds in which its expert gains."""
    owners = {
        owner: [each["kept"][owner] for each in found if owner in each["kept"]]
        for each in found
        for owner in each["kept"]
    }
    means = {key: statistics.mean(each[key] for each in found) for key in found[0] if key != "kept"}
    return {"kept": {owner: statistics.mean(shares) for owner, shares in owners.items()}, **means}


def bars(systems: Mapping[str, Any]) -> list[Threshold]:
    """The bars of the default router, on means over seeds."""
    own, rows = systems[DEFAULT], systems[ROWS]
    above = own["mean_loss"] / systems[ENSEMBLE]["mean_loss"] - 1
    return [
        *(
            Threshold(f"{name.replace('_', ' ')}", own[name], "≥", LIMITS[name], True)
            for name in ("kept_mean", "kept_worst", "kept_start", "kept_switch")
        ),
        Threshold("change of the loss on public text", own["public"], "≤", LIMITS["public"], True),
        Threshold("mean loss above that of the ensemble", above, "≤", LIMITS["above_ensemble"], True),
        Threshold(
            "loss on nobody's text, above that by the rows alone", own["nobodys"] - rows["nobodys"], "≤", 0.0, True
        ),
    ]


def markdown(result: Mapping[str, Any]) -> str:
    """The text of docs/routers.md."""

    def percent(value: float | None) -> str:
        return "" if value is None or math.isnan(value) else f"{value:.1%}"

    rows = [
        [
            f"**{name}**" if name == DEFAULT else name,
            percent(each["kept_mean"]),
            percent(each["kept_worst"]),
            percent(each["kept_start"]),
            percent(each["kept_switch"]),
            percent(each["kept_after_switch"]),
            f"{each['public']:+.1%}",
            f"{each['nobodys']:+.1%}",
            f"{each['mean_loss']:.3f}",
            str(each.get("forward_passes", "")),
            f"{each['bytes_per_owner'] / 1000:,.0f} kB" if "bytes_per_owner" in each else "",
        ]
        for name, each in result["systems"].items()
    ]
    header = (
        "router",
        "kept, mean",
        "worst owner",
        "first 16 tokens",
        "owner changes",
        "8 tokens after",
        "public text",
    )
    header = (*header, "nobody's text", "mean loss", "passes", "per owner")
    owners = result["owners"]
    by_owner = [
        [name, *(percent(each["kept"].get(owner)) for owner in owners)] for name, each in result["systems"].items()
    ]
    return "\n".join(
        [
            "# Routers on the same experts\n",
            f"Written by `make routers`, seed(s) {', '.join(map(str, result['seeds']))}: {len(owners)} owners on "
            "SmolLM2-135M-Instruct, with the experts of `make results`. *Kept* is the share of the gain of an expert "
            "alone (with public) over the anchor, means over seeds; changes of the loss on public text and on text "
            "that nobody owns (C++ headers) are against the anchor. *Owner changes*: every 64 tokens.\n",
            _settings(result["expert"]),
            markdown_table(header, rows),
            "Owners whose expert gains less than 2 % of the anchor's loss do not count. The ensemble runs every "
            "owner's model on all text; the classifier and DUME are fitted on the text of all owners together, which "
            "owners of private text cannot do. Arrow, SpectR and SEQR have no public expert to choose: they were made "
            "for adapters, one of which fits. The baselines take as many experts per token as their sources do, and "
            "choose once for all matrices of a network (PEFT's Arrow chooses for each).\n",
            "## By owner\n",
            markdown_table(("router", *owners), by_owner),
            "## Bars\n",
            markdown_table(("criterion", "measured", "bar", "met"), [bar.row() for bar in bars(result["systems"])]),
        ]
    )


def _settings(expert: Mapping[str, Any]) -> str:
    """A sentence on how the experts were made."""
    evidence = expert["evidence"]
    return (
        f"An expert was trained on {expert['tokens']:,} tokens ({expert['public_tokens']:,} of them public), its rows "
        f"are fitted on up to {expert['router_tokens']:,} tokens of each side, and its evidence has the decays "
        f"{', '.join(map(str, evidence['decays']))} and a strength of {evidence['strength']:,.0f} tokens.\n"
    )


def _expert_of(package: Path) -> dict[str, Any]:
    """What `_settings` tells of an expert."""
    manifest = ExpertPackage.open(package).manifest
    tokens = {key: manifest.training[key] for key in ("tokens", "public_tokens")}
    return {**tokens, "router_tokens": manifest.training["config"]["router_tokens"], "evidence": manifest.evidence}


def main() -> int:
    """Runs and writes; the exit code is 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/eight-owners"), help="that of `make results`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--anchor", default=SMOLLM2)
    parser.add_argument("--owners", nargs="+", default=list(OWNERS))
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    result: dict[str, Any] = {**machine(), "owners": arguments.owners, "seeds": [], "default": DEFAULT}
    by_seed: dict[str, list[dict[str, Any]]] = {}
    for seed in arguments.seeds:
        settings = DemoSettings.of(anchor=arguments.anchor, seed=seed, owners=arguments.owners)
        with without_loading_bars():
            routers = Routers(arguments.out / f"seed-{seed}", settings, Console())
            text, losses, costs = routers.run()
        result["expert"] = _expert_of(routers.demo.packages[arguments.owners[0]])
        for name in losses:
            by_seed.setdefault(name, []).append(measures(text, losses, name))
        result["seeds"].append(seed)
        result["systems"] = {name: {**over_seeds(found), **costs.get(name, {})} for name, found in by_seed.items()}
        result["by_seed"] = by_seed
        file = arguments.docs / "benchmarks" / "routers.json"
        file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        (arguments.docs / "routers.md").write_text(markdown(result), encoding="utf-8")
    missed = [bar.name for bar in bars(result["systems"]) if not bar.passed]
    sys.stderr.write(f"missed: {', '.join(missed) or 'none'}\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
