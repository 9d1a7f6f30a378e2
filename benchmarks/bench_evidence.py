"""What evidence costs in inference: the same model with the evidence of its experts and with their rows alone.

    python benchmarks/bench_evidence.py [--layers 30] [--context 512]

A Llama of the shape of SmolLM2-135M (by default with fewer layers) and three experts with evidence. A prefill of
`--context` tokens, and single tokens after it, alternate between both, so that other load affects both. The bar: the
median of the paired ratios of time is at most 1.02. The results are written to docs/benchmarks/evidence.json.

Does not cover GPUs, or what evidence brings (docs/evidence.md).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine
from transformers import LlamaConfig

from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM
from flexmoe.routers.evidence import EvidenceSettings

RESULT = Path(__file__).parents[1] / "docs" / "benchmarks" / "evidence.json"
OWNERS = ("math", "law", "code")
SLOWER = 1.02
ROUNDS = {"prefill": 12, "decode": 120}


def build(layers: int) -> FlexMoeForCausalLM:
    shape: dict[str, Any] = {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49_152}
    anchor = LlamaConfig(num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3, **shape)
    evidence = EvidenceSettings().record(anchor.vocab_size)
    records = [{"name": name, "evidence": evidence} for name in OWNERS]
    torch.manual_seed(0)
    model = FlexMoeForCausalLM(FlexMoeConfig(anchor_config=anchor, experts=["public", *records])).eval()
    for block in model.flexmoe_blocks():
        for name in OWNERS:
            torch.nn.init.normal_(block.router[name].weight, std=0.02)
            torch.nn.init.constant_(block.router[name].calibration[1:-2], 0.05)
    return model.requires_grad_(False)


def seconds(model: FlexMoeForCausalLM, records: list[Any], step: Callable[[], object]) -> float:
    model.config.experts = records
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare(model: FlexMoeForCausalLM, make: Callable[[], Callable[[], object]], rounds: int) -> dict[str, float]:
    """Paired times of a step with and without evidence, each with a state of its own that `make` sets up."""
    with_evidence = model.config.expert_records
    rows_alone = [{key: value for key, value in record.items() if key != "evidence"} for record in with_evidence]
    variants = {"evidence": with_evidence, "rows": rows_alone}
    steps = {}
    for name, records in variants.items():
        model.config.experts = records
        steps[name] = make()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 2):
        for name in sorted(variants, reverse=bool(number % 2)):
            times[name].append(seconds(model, variants[name], steps[name]))
    model.config.experts = with_evidence
    ratios = [ours / theirs for ours, theirs in zip(times["evidence"][2:], times["rows"][2:], strict=True)]
    medians = {f"{name}_seconds": statistics.median(values[2:]) for name, values in times.items()}
    return {"ratio": round(statistics.median(ratios), 4), **medians}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--context", type=int, default=512)
    arguments = parser.parse_args()
    before, model = machine(), build(arguments.layers)
    ids = torch.randint(3, 49_152, (1, arguments.context))

    def prefill() -> Callable[[], object]:
        return lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1)

    def decode() -> Callable[[], object]:
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        return lambda: model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)

    with torch.no_grad():
        found = {name: compare(model, make, ROUNDS[name]) for name, make in (("prefill", prefill), ("decode", decode))}
    shapes = {"layers": arguments.layers, "context": arguments.context, "experts": len(OWNERS) + 1}
    RESULT.write_text(json.dumps({**found, "limit": SLOWER, "shapes": shapes, **before}, indent=2) + "\n")
    sys.stderr.write(f"{found}\n")
    return 0 if all(each["ratio"] <= SLOWER for each in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
