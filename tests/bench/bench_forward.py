"""Forward passes on the CPU against `FlexOlmoForCausalLM` in the fastest of its implementations, on the same weights.

Hidden 1024, FFN 2816, 8 layers, 7 experts, k = 5, an OLMo-2 anchor: the models hold the very same tensors (FlexMoE
views of FlexOlmo's stacks), and give the same logits before anything is timed. Rows: prefill of 512 tokens, decoding
with a KV cache at batch 1 and 8, each in float32 and bfloat16, each as loaded and after `prepack_for_cpu`. In every
round each contender runs once, in rotating order, so that whatever else the machine does falls on all; a ratio is the
median over the rounds of (theirs / ours).

At batch 1 in bfloat16 a prepacked model is held against memory, too: in each round a buffer as large as the weights
of the experts that one token goes to is read (summed by as many threads), and the time within the layers of experts
is compared with that. The share of a whole step, attention, norms and head included, is reported beside it.

Asserts a ratio of at least 1.0 in each row, and a share of at least 0.8. `batched_mm` is for decoding only: it
copies the chosen experts' weights for each token, 59 GB in the prefill. Needs 6 GB of memory, and a C++ compiler for
what `prepack_for_cpu` compiles. Run: python tests/bench/bench_forward.py [--out JSON].
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

from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM
from flexmoe.modeling.linear_flexmoe import has_instructions

# One file for each of the two kinds of CPU: torch's bfloat16 has little in common on them.
FILE = "forward_avx512_bf16.json" if has_instructions(torch.bfloat16) else "forward.json"
RESULT = Path(__file__).parents[2] / "docs" / "benchmarks" / FILE
BAR = 1.0  # times the speed of FlexOlmo's fastest implementation
SHARE = 0.8  # of the read bandwidth, by the layers of experts of a prepacked model that decodes one token
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
WARM_UP = 3  # rounds that are not counted
STEPS = 96  # rounds of a decode row: what else runs here moves single ones by tens of percents
HOPELESS = 4  # times the fastest of FlexOlmo's when warming up: measured no further
# float32: sums in another order. bfloat16: the median token's distance from its float32 logits, as a multiple of
# theirs; roundings send a few tokens to other experts in either model, and those decide any mean
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1.25}

Contender = Callable[[], float]


def flex_olmo(sizes: Mapping[str, Any] = SIZES) -> FlexOlmoForCausalLM:
    torch.manual_seed(0)
    config = FlexOlmoConfig(**sizes, num_experts=EXPERTS, num_experts_per_tok=K, norm_topk_prob=True)
    return FlexOlmoForCausalLM(config).eval()


@torch.no_grad()
def with_its_tensors(source: FlexOlmoForCausalLM, sizes: Mapping[str, Any] = SIZES) -> FlexMoeForCausalLM:
    """FlexMoE whose parameters are FlexOlmo's own, rows aside: those are float32, as `from_pretrained` leaves them."""
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


def reading(bytes_: int) -> Contender:
    """Reads as many bytes once, as fast as torch can."""
    buffer = torch.ones(bytes_ // 4)
    return lambda: timed(buffer.sum)


class TimeInLayers:
    """Seconds that a model's layers of experts have taken since they were asked for last."""

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
    """Seconds of every contender in every round; one that is hopeless when warming up has that one time only."""
    warm = {name: run() for name, run in contenders.items()}
    fastest = min(seconds for name, seconds in warm.items() if name not in OURS)
    names = [name for name in contenders if name in OURS or warm[name] < HOPELESS * fastest]
    seconds = {name: [] if name in names else [warm[name]] for name in contenders}
    for number in range(rounds):
        for i in range(len(names)):
            name = names[(number + i) % len(names)]
            seconds[name].append(contenders[name]())
    return seconds


def row(seconds: Mapping[str, list[float]], ours: str) -> dict[str, object]:
    """One of ours against the fastest of the others, by its median."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    fastest = min((name for name in medians if name not in OURS), key=medians.__getitem__)
    pairs = zip(seconds[fastest], seconds[ours], strict=True)
    ratio = statistics.median(theirs / own for theirs, own in pairs)
    return {
        "speed_over_flex_olmo": round(ratio, 3),
        "fastest_of_flex_olmo": fastest,
        "milliseconds": {name: round(1000 * value, 2) for name, value in medians.items()},
        "rounds": len(seconds[ours]),
        "passed": ratio >= BAR,
    }


def share_of_bandwidth(model: FlexMoeForCausalLM) -> dict[str, object]:
    """How near a prepacked model that decodes one token comes to what its memory gives."""
    expert = sum(p.nbytes for p in model.flexmoe_blocks()[0].experts["public"].parameters())
    in_layers = K * expert * len(model.flexmoe_blocks())
    unused = (EXPERTS - K) * expert * len(model.flexmoe_blocks())
    embedding = model.get_input_embeddings().weight.nbytes
    whole = sum(p.nbytes for p in model.parameters()) - unused - embedding
    read, step, layers = reading(in_layers), decode(model, None, 1), TimeInLayers(model)
    seconds: dict[str, list[float]] = {"read": [], "layers": [], "step": []}
    for number in range(STEPS):
        seconds["read"].append(read())
        layers.take()
        took = step()
        if number >= WARM_UP:
            seconds["step"].append(took)
            seconds["layers"].append(layers.take())
    seconds["read"] = seconds["read"][WARM_UP:]
    shares = [read / within for read, within in zip(seconds["read"], seconds["layers"], strict=True)]
    of_step = [whole / in_layers * read / step for read, step in zip(seconds["read"], seconds["step"], strict=True)]
    share = statistics.median(shares)
    return {
        "share_of_read_bandwidth": round(share, 3),
        "share_of_the_whole_step": round(statistics.median(of_step), 3),
        "read_gb_per_second": round(in_layers / statistics.median(seconds["read"]) / 1e9, 1),
        "bytes_read_per_token": in_layers,
        "milliseconds": {name: round(1000 * statistics.median(values), 2) for name, values in seconds.items()},
        "rounds": len(shares),
        "passed": share >= SHARE,
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
    parser.add_argument("--out", type=Path, default=RESULT, help="where the result goes")
    arguments = parser.parse_args()
    before = machine()
    with torch.no_grad():
        measured = measure()
    result = {
        **measured,
        "bars": {"speed_over_flex_olmo": BAR, "share_of_read_bandwidth": SHARE},
        "path": f"torch, eager, {THREADS} threads; prepacked: oneDNN's layout for several rows, Inductor's loops for "
        "one; SDPA attention in all",
        "shapes": {**SIZES, "experts": EXPERTS, "k": K, "prefill": PREFILL, "decode_context": CONTEXT},
        **before,
    }
    keep(result, arguments.out)
    missed = [name for name, values in result["rows"].items() if not values["passed"]]
    assert not missed, f"slower than FlexOlmo: {missed}"
    assert result["memory"]["passed"], f"below {SHARE:.0%} of the read bandwidth: {result['memory']}"


if __name__ == "__main__":
    main()
