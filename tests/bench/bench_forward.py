"""Forward passes on the CPU against `FlexOlmoForCausalLM` in the fastest of its implementations, on the same weights.

Hidden 1024, FFN 2816, 8 layers, 7 experts, k = 5, an OLMo-2 anchor: the two models hold the very same tensors (FlexMoE
views of FlexOlmo's stacks), and give the same logits before anything is timed. Rows: prefill of 512 tokens, decoding
with a KV cache at batch 1 and 8, each in float32 and bfloat16. In every round each contender runs once, in rotating
order, so that whatever else the machine does falls on all; a ratio is the median over the rounds of (theirs / ours).

Asserts a ratio of at least 1.0 in each row. `batched_mm` is for decoding only: it copies the chosen experts' weights
for each token, 59 GB in the prefill. Run: python tests/bench/bench_forward.py [--out JSON]. Needs 6 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from machine import keep, machine
from torch import Tensor, nn
from transformers import FlexOlmoConfig, FlexOlmoForCausalLM, Olmo2Config, PreTrainedModel

from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM

RESULT = Path(__file__).parents[2] / "docs" / "benchmarks" / "forward.json"
BAR = 1.0  # times the speed of FlexOlmo's fastest implementation
THREADS = 2
EXPERTS, K = 7, 5
NAMES = ["public", *(f"owner-{i}" for i in range(1, EXPERTS))]
SIZES = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
PREFILL, CONTEXT, CHECKED = 512, 32, 64  # tokens
ROUNDS = {("prefill", torch.float32): 5, ("prefill", torch.bfloat16): 2}
STEPS = 96  # rounds of a decode row: what else runs here moves single ones by tens of percents
HOPELESS = 4  # times the fastest of FlexOlmo's when warming up: measured no further
# float32: sums in another order. bfloat16: the median token's distance from its float32 logits, as a multiple of
# theirs; roundings send a few tokens to other experts in either model, and those decide any mean
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1.25}

Contender = Callable[[], float]


def flex_olmo() -> FlexOlmoForCausalLM:
    torch.manual_seed(0)
    config = FlexOlmoConfig(**SIZES, num_experts=EXPERTS, num_experts_per_tok=K, norm_topk_prob=True)
    return FlexOlmoForCausalLM(config).eval()


@torch.no_grad()
def with_its_tensors(source: FlexOlmoForCausalLM) -> FlexMoeForCausalLM:
    """FlexMoE whose parameters are FlexOlmo's own, rows aside: those are float32, as `from_pretrained` leaves them."""
    config = FlexMoeConfig(
        anchor_config=Olmo2Config(**SIZES), experts=NAMES, num_experts_per_tok=K, norm_topk_prob=True
    )
    tensors = {f"anchor.{name}": value for name, value in source.state_dict().items() if ".mlp." not in name}
    for index, layer in enumerate(source.model.layers):
        block = f"anchor.model.layers.{index}.mlp"
        for i, name in enumerate(NAMES):
            gate, up = layer.mlp.experts.gate_up_proj[i].chunk(2)
            tensors[f"{block}.experts.{name}.gate_proj.weight"] = gate
            tensors[f"{block}.experts.{name}.up_proj.weight"] = up
            tensors[f"{block}.experts.{name}.down_proj.weight"] = layer.mlp.experts.down_proj[i]
            tensors[f"{block}.router.{name}.weight"] = layer.mlp.gate.weight[i, None].float()
            tensors[f"{block}.router.{name}.bias"] = torch.zeros(1)
    model = FlexMoeForCausalLM(config).eval()
    model.load_state_dict(tensors, assign=True)
    return model


def run_experts_as(model: PreTrainedModel, implementation: str | None) -> None:
    """From now on FlexOlmo runs its experts so; None leaves the model, which is ours, alone."""
    if implementation is not None:
        model.config._experts_implementation = implementation


def prefill(model: PreTrainedModel, implementation: str | None) -> Contender:
    tokens = some_tokens(1, PREFILL)

    def run() -> float:
        run_experts_as(model, implementation)
        return timed(lambda: model(tokens, use_cache=False, logits_to_keep=1))

    return run


def decode(model: PreTrainedModel, implementation: str | None, batch: int) -> Contender:
    """One step per call, each on the cache that the last one left."""
    run_experts_as(model, implementation and "eager")
    cache = model(some_tokens(batch, CONTEXT), use_cache=True, logits_to_keep=1).past_key_values
    following = iter(some_tokens(batch, STEPS + 2).split(1, -1))

    def run() -> float:
        token = next(following)
        run_experts_as(model, implementation)
        return timed(lambda: model(token, past_key_values=cache, use_cache=True))

    return run


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def some_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(length))


def race(contenders: Mapping[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds of every contender in every round; one that is hopeless when warming up has that one time only."""
    warm = {name: run() for name, run in contenders.items()}
    fastest = min(seconds for name, seconds in warm.items() if name != "flexmoe")
    names = [name for name in contenders if name == "flexmoe" or warm[name] < HOPELESS * fastest]
    seconds = {name: [] if name in names else [warm[name]] for name in contenders}
    for number in range(rounds):
        for i in range(len(names)):
            name = names[(number + i) % len(names)]
            seconds[name].append(contenders[name]())
    return seconds


def row(seconds: Mapping[str, list[float]]) -> dict[str, object]:
    """Ours against the fastest of the others, by its median."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    fastest = min((name for name in medians if name != "flexmoe"), key=medians.__getitem__)
    pairs = zip(seconds[fastest], seconds["flexmoe"], strict=True)
    ratio = statistics.median(theirs / ours for theirs, ours in pairs)
    return {
        "speed_over_flex_olmo": round(ratio, 3),
        "fastest_of_flex_olmo": fastest,
        "milliseconds": {name: round(1000 * value, 2) for name, value in medians.items()},
        "rounds": len(seconds["flexmoe"]),
        "passed": ratio >= BAR,
    }


def check_logits(ours: nn.Module, theirs: nn.Module, exact: Tensor | None) -> tuple[Tensor, float]:
    """FlexOlmo's logits, and how far ours are: from them, or as a multiple of their own distance from `exact`."""
    tokens = some_tokens(2, CHECKED)
    run_experts_as(theirs, "eager")
    their_logits = theirs(tokens).logits.float()
    our_logits = ours(tokens).logits.float()
    if exact is None:
        return their_logits, ((our_logits - their_logits).abs().max() / their_logits.abs().max()).item()
    ours_off, theirs_off = ((logits - exact).norm(dim=-1).median() for logits in (our_logits, their_logits))
    return their_logits, (ours_off / theirs_off).item()


def measure() -> dict[str, object]:
    torch.set_num_threads(THREADS)
    source = flex_olmo()
    rows: dict[str, object] = {}
    distances: dict[str, float] = {}
    exact = None
    for dtype in (torch.float32, torch.bfloat16):
        theirs = source.to(dtype)
        ours = with_its_tensors(theirs)
        name = str(dtype).removeprefix("torch.")
        logits, distances[name] = check_logits(ours, theirs, exact)
        exact = logits if exact is None else exact
        assert distances[name] <= TOLERANCES[dtype], f"{name}: the two models differ: {distances}"
        contenders = {"flexmoe": prefill(ours, None)}
        contenders |= {way: prefill(theirs, way) for way in ("eager", "grouped_mm")}
        rows[f"prefill {PREFILL}, {name}"] = row(race(contenders, ROUNDS["prefill", dtype]))
        for batch in (1, 8):
            contenders = {"flexmoe": decode(ours, None, batch)}
            contenders |= {way: decode(theirs, way, batch) for way in ("eager", "grouped_mm", "batched_mm")}
            rows[f"decode batch {batch}, {name}"] = row(race(contenders, STEPS))
        sys.stderr.write(f"{json.dumps(rows)}\n")
    return {"rows": rows, "logits": distances}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT, help="where the result goes")
    arguments = parser.parse_args()
    before = machine()
    with torch.no_grad():
        measured = measure()
    result = {
        **measured,
        "bars": {"speed_over_flex_olmo": BAR},
        "path": f"torch, eager, {THREADS} threads, module calls; SDPA attention in both",
        "shapes": {**SIZES, "experts": EXPERTS, "k": K, "prefill": PREFILL, "decode_context": CONTEXT},
        **before,
    }
    keep(result, arguments.out)
    missed = [name for name, values in result["rows"].items() if not values["passed"]]
    assert not missed, f"slower than FlexOlmo: {missed}"


if __name__ == "__main__":
    main()
