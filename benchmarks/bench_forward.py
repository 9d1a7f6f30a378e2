"""Forward passes on the CPU against `FlexOlmoForCausalLM` in its fastest implementation, with the same weights.

Hidden 1024, FFN 2816, 8 layers, 7 experts, k = 5, an OLMo-2 anchor. The models share their tensors (FlexMoE has views
of FlexOlmo's stacks), and their logits are compared before the timing. Rows: prefill of 512 tokens, decoding with a KV
cache at batch 1 and 8, each in float32 and bfloat16, as loaded and after `prepack_for_cpu`. In every round each
contender runs once, in rotating order, so that other load affects all of them; a ratio is the median over the rounds
of (theirs / ours).

A prepacked model in bfloat16 at batch 1 is also compared with the memory bandwidth: each round reads a buffer as large
as the weights of the experts that one token uses (a sum, with the same number of threads), and compares that time with
the time in the blocks. The share of a complete step, with attention, norms and head, is reported, too.

Asserts a ratio of at least 1.0 in each row, and a share of at least 0.8. `batched_mm` is for decoding only: it copies
the weights of the selected experts for each token, 59 GB in the prefill. Needs 6 GB of memory, and a C++ compiler for
`prepack_for_cpu`. Run: python benchmarks/bench_forward.py [--out JSON].
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from machine import keep, machine
from torch import Tensor, nn
from transformers import FlexOlmoConfig, FlexOlmoForCausalLM, Olmo2Config, PreTrainedModel

from flexmoe.cpu.linear import has_instructions
from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM

# One file for CPUs with bfloat16 instructions and one for others, because the results have little in common.
FILE = "forward_avx512_bf16.json" if has_instructions(torch.bfloat16) else "forward.json"
RESULT = Path(__file__).parents[1] / "docs" / "benchmarks" / FILE
MIN_RATIO = 1.0  # times the speed of FlexOlmo's fastest implementation
MIN_SHARE = 0.8  # of the read bandwidth, in the blocks of a prepacked model that decodes one token
OURS = ("flexmoe", "prepacked")
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
PREFILL_ROUNDS = 7
WARMUP = 3  # rounds that are not timed
STEPS = 96  # rounds of a decode row: other load changes single ones by tens of percents
TOO_SLOW = 4  # times the fastest of FlexOlmo's in the warmup: not measured further
# float32: another order of sums. bfloat16: the median distance of a token's logits from those in float32, as a
# multiple of FlexOlmo's; the median, because rounding routes a few tokens to other experts in either model
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1.25}

Contender = Callable[[], float]


def flex_olmo(sizes: Mapping[str, Any] = SIZES) -> FlexOlmoForCausalLM:
    torch.manual_seed(0)
    config = FlexOlmoConfig(**sizes, num_experts=EXPERTS, num_experts_per_tok=K, norm_topk_prob=True)
    return FlexOlmoForCausalLM(config).eval()


@torch.no_grad()
def with_its_tensors(source: FlexOlmoForCausalLM, sizes: Mapping[str, Any] = SIZES) -> FlexMoeForCausalLM:
    """A FlexMoE that shares the parameters of FlexOlmo, except rows, which are float32 as after `from_pretrained`."""
    config = FlexMoeConfig(
        anchor_config=Olmo2Config(**sizes), experts=NAMES, num_experts_per_tok=K, norm_topk_prob=True
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
            tensors[f"{block}.router.{name}.bias"] = torch.zeros(1, dtype=torch.float32)
    model = FlexMoeForCausalLM(config).eval()
    model.load_state_dict(tensors, assign=True)
    return model


def run_experts_as(model: PreTrainedModel, implementation: str | None) -> None:
    """Sets the experts implementation of FlexOlmo; None, for FlexMoE, changes nothing."""
    if implementation is not None:
        model.config._experts_implementation = implementation


def prefill(model: PreTrainedModel, implementation: str | None) -> Contender:
    tokens = some_tokens(1, PREFILL)

    def run() -> float:
        run_experts_as(model, implementation)
        return timed(lambda: model(tokens, use_cache=False, logits_to_keep=1))

    return run


def decode(model: PreTrainedModel, implementation: str | None, batch: int) -> Contender:
    """One decoding step per call, with a growing cache."""
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


def reading(bytes_: int) -> Contender:
    """Reads this number of bytes once, as fast as torch can."""
    buffer = torch.ones(bytes_ // 4)
    return lambda: timed(buffer.sum)


class TimeInBlocks:
    """Seconds spent in the blocks of a model since the last call of `take`."""

    def __init__(self, model: FlexMoeForCausalLM) -> None:
        self.seconds = 0.0
        for block in model.flexmoe_blocks():
            block.forward = self._timing(block.forward)

    def _timing(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Tensor) -> Tensor:
            start = time.perf_counter()
            out = forward(*args)
            self.seconds += time.perf_counter() - start
            return out

        return run

    def take(self) -> float:
        taken, self.seconds = self.seconds, 0.0
        return taken


def race(contenders: Mapping[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds of every contender in every round; a contender that is too slow in the warmup has that time only."""
    warm = {name: run() for name, run in contenders.items()}
    fastest = min(seconds for name, seconds in warm.items() if name not in OURS)
    names = [name for name in contenders if name in OURS or warm[name] < TOO_SLOW * fastest]
    seconds = {name: [] if name in names else [warm[name]] for name in contenders}
    for number in range(rounds):
        for i in range(len(names)):
            name = names[(number + i) % len(names)]
            seconds[name].append(contenders[name]())
    return seconds


def row(seconds: Mapping[str, list[float]], ours: str) -> dict[str, object]:
    """One of ours against the contender of FlexOlmo with the lowest median."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    fastest = min((name for name in medians if name not in OURS), key=medians.__getitem__)
    pairs = zip(seconds[fastest], seconds[ours], strict=True)
    ratio = statistics.median(theirs / own for theirs, own in pairs)
    return {
        "speed_over_flex_olmo": round(ratio, 3),
        "fastest_of_flex_olmo": fastest,
        "milliseconds": {name: round(1000 * value, 2) for name, value in medians.items()},
        "rounds": len(seconds[ours]),
        "passed": ratio >= MIN_RATIO,
    }


def share_of_bandwidth(model: FlexMoeForCausalLM) -> dict[str, object]:
    """The share of the read bandwidth that a prepacked model reaches when it decodes one token."""
    expert = sum(p.nbytes for p in model.flexmoe_blocks()[0].experts["public"].parameters())
    in_layers = K * expert * len(model.flexmoe_blocks())
    unused = (EXPERTS - K) * expert * len(model.flexmoe_blocks())
    embedding = model.get_input_embeddings().weight.nbytes
    in_step = sum(p.nbytes for p in model.parameters()) - unused - embedding
    read, step, layers = reading(in_layers), decode(model, None, 1), TimeInBlocks(model)
    seconds: dict[str, list[float]] = {"read": [], "layers": [], "step": []}
    for number in range(STEPS):
        seconds["read"].append(read())
        layers.take()
        took = step()
        if number >= WARMUP:
            seconds["step"].append(took)
            seconds["layers"].append(layers.take())
    seconds["read"] = seconds["read"][WARMUP:]
    shares = [read / within for read, within in zip(seconds["read"], seconds["layers"], strict=True)]
    of_step = [in_step / in_layers * read / step for read, step in zip(seconds["read"], seconds["step"], strict=True)]
    share = statistics.median(shares)
    return {
        "share_of_read_bandwidth": round(share, 3),
        "share_of_the_whole_step": round(statistics.median(of_step), 3),
        "read_gb_per_second": round(in_layers / statistics.median(seconds["read"]) / 1e9, 1),
        "bytes_read_per_token": in_layers,
        "milliseconds": {name: round(1000 * statistics.median(values), 2) for name, values in seconds.items()},
        "rounds": len(shares),
        "passed": share >= MIN_SHARE,
    }


def check_logits(ours: nn.Module, theirs: nn.Module, exact: Tensor | None) -> tuple[Tensor, float]:
    """The logits of FlexOlmo, and the distance of ours from them, or relative to their distance from `exact`."""
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
    memory: dict[str, int] = {}
    exact = None
    for dtype in (torch.float32, torch.bfloat16):
        theirs = source.to(dtype)
        ours, prepacked = with_its_tensors(theirs), with_its_tensors(theirs)
        name = str(dtype).removeprefix("torch.")
        memory[name] = prepacked.prepack_for_cpu()
        for kind, model in zip(OURS, (ours, prepacked), strict=True):
            logits, distance = check_logits(model, theirs, exact)
            distances[f"{name}, {kind}"] = distance
            assert distance <= TOLERANCES[dtype], f"{name}: the models differ: {distances}"
        exact = logits if exact is None else exact
        models = dict(zip(OURS, (ours, prepacked), strict=True))
        contenders = {kind: prefill(model, None) for kind, model in models.items()}
        contenders |= {way: prefill(theirs, way) for way in ("eager", "grouped_mm")}
        rows |= rows_of(f"prefill {PREFILL}, {name}", race(contenders, PREFILL_ROUNDS))
        for batch in (1, 8):
            contenders = {kind: decode(model, None, batch) for kind, model in models.items()}
            contenders |= {way: decode(theirs, way, batch) for way in ("eager", "grouped_mm", "batched_mm")}
            rows |= rows_of(f"decode batch {batch}, {name}", race(contenders, STEPS))
        sys.stderr.write(f"{json.dumps(rows)}\n")
    return {"rows": rows, "memory": share_of_bandwidth(prepacked), "logits": distances, "prepacked_bytes": memory}


def rows_of(name: str, seconds: Mapping[str, list[float]]) -> dict[str, object]:
    return {name: row(seconds, "flexmoe"), f"{name}, prepacked": row(seconds, "prepacked")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT, help="output file")
    arguments = parser.parse_args()
    before = machine()
    with torch.no_grad():
        measured = measure()
    result = {
        **measured,
        "bars": {"speed_over_flex_olmo": MIN_RATIO, "share_of_read_bandwidth": MIN_SHARE},
        "path": f"torch, eager, {THREADS} threads; prepacked: oneDNN's layout for several rows, Inductor's loops for "
        "one; SDPA attention in all",
        "shapes": {**SIZES, "experts": EXPERTS, "k": K, "prefill": PREFILL, "decode_context": CONTEXT},
        **before,
    }
    keep(result, arguments.out)
    missed = [name for name, values in result["rows"].items() if not values["passed"]]
    assert not missed, f"slower than FlexOlmo: {missed}"
    assert result["memory"]["passed"], f"below {MIN_SHARE:.0%} of the read bandwidth: {result['memory']}"


if __name__ == "__main__":
    main()
