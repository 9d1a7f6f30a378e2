"""Training an expert: this checkout against another one and against PEFT, and against FlexOlmo's way of freezing.

    python benchmarks/bench_training.py
    python benchmarks/bench_training.py --other CHECKOUT --anchor DENSE --own TEXT --public TEXT [--rows NAME] [--peft]

Without arguments, as `make bench` runs it: a training step against freezing as in the FlexOlmo repository, which
passes the networks of both experts to the optimizer, computes all their gradients, and zeroes those of public after
backward; here the networks of public have no gradients. Both use the same two-expert model and the same batches, in
alternating steps, so that other load affects both. The widths are those of OLMo-2 7B divided by eight. The results are
written to docs/benchmarks/training.json.

With `--other`, `flexmoe train` of this checkout against that of another one (`training_speed`): tokens per second,
peak memory and losses with the same anchor, text and settings, in separate processes that take alternating steps.
`--peft` adds low-rank experts against LoRA of the same rank on the same matrices, with transformers' Trainer. The
results are written to docs/benchmarks/training_speed.json.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from machine import machine
from training_speed import add_arguments, compare, work
from transformers import Olmo2Config

from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM
from flexmoe.training.next_token_loss import next_token_loss
from flexmoe.training.trainer import EXPERTS_PER_TOKEN

RESULT = Path(__file__).parents[1] / "docs" / "benchmarks" / "training.json"
SHAPES = {"layers": 4, "hidden": 512, "ffn": 1376, "heads": 4, "vocabulary": 2048, "batch": 4, "sequence": 256}
WARMUP, STEPS = 2, 12


class FrozenPublic:
    """Only the trained expert has gradients and optimizer state."""

    def __init__(self, model: FlexMoeForCausalLM) -> None:
        self.model = copy.deepcopy(model)
        self.freeze()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def freeze(self) -> None:
        self.model.freeze_except("own", rows=True)

    def step(self, input_ids: torch.Tensor) -> float:
        logits = self.model(input_ids=input_ids, use_cache=False, num_experts_per_tok=EXPERTS_PER_TOKEN).logits
        loss = next_token_loss(logits, input_ids, z_loss=1e-5)
        loss.backward()
        self.after_backward()
        torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # kept, to count their bytes
        return loss.item()

    def after_backward(self) -> None:
        pass

    def extra_bytes(self) -> int:
        """Bytes of gradients and optimizer state."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        states = [value for state in self.optimizer.state.values() for value in state.values() if value.dim()]
        return sum(tensor.nbytes for tensor in gradients + states)


class ZeroedGradients(FrozenPublic):
    """Both experts have gradients and optimizer state; the gradients of public are set to zero."""

    def freeze(self) -> None:
        self.model.freeze_except("public", "own", rows=True)

    def after_backward(self) -> None:
        for block in self.model.flexmoe_blocks():
            for parameter in [*block.experts["public"].parameters(), *block.router["public"].parameters()]:
                parameter.grad.zero_()


def two_expert_model() -> FlexMoeForCausalLM:
    torch.manual_seed(0)
    anchor = Olmo2Config(
        vocab_size=SHAPES["vocabulary"],
        hidden_size=SHAPES["hidden"],
        intermediate_size=SHAPES["ffn"],
        num_hidden_layers=SHAPES["layers"],
        num_attention_heads=SHAPES["heads"],
        max_position_embeddings=SHAPES["sequence"],
        pad_token_id=0,
    )
    model = FlexMoeForCausalLM(FlexMoeConfig(anchor_config=anchor))
    model.add_expert_copy("own")
    return model.train()


def test_a_step_is_faster_and_smaller_than_zeroing_gradients() -> None:
    before = machine()
    model = two_expert_model()
    ours, theirs = FrozenPublic(model), ZeroedGradients(model)
    batches = torch.randint(
        3, SHAPES["vocabulary"], (WARMUP + STEPS, SHAPES["batch"], SHAPES["sequence"]), generator=torch.Generator()
    )
    seconds: dict[FrozenPublic, list[float]] = {ours: [], theirs: []}
    for number, batch in enumerate(batches):
        order = (ours, theirs) if number % 2 else (theirs, ours)
        losses = {}
        for trainer in order:
            start = time.perf_counter()
            losses[trainer] = trainer.step(batch)
            seconds[trainer].append(time.perf_counter() - start)
        assert abs(losses[ours] - losses[theirs]) < 1e-3, "both methods must have the same loss"

    pairs = list(zip(seconds[ours][WARMUP:], seconds[theirs][WARMUP:], strict=True))
    result = {
        "step_time_ratio": statistics.median(ours_s / theirs_s for ours_s, theirs_s in pairs),
        "step_seconds": {
            "flexmoe": statistics.median(ours_s for ours_s, _ in pairs),
            "flexolmo_way": statistics.median(theirs_s for _, theirs_s in pairs),
        },
        "gradient_and_optimiser_bytes_ratio": ours.extra_bytes() / theirs.extra_bytes(),
        "gradient_and_optimiser_bytes": {"flexmoe": ours.extra_bytes(), "flexolmo_way": theirs.extra_bytes()},
        "bars": {"step_time_ratio": 0.88, "gradient_and_optimiser_bytes_ratio": 0.5},
        "path": "torch, both experts on every token (k = 2 of 2), AdamW fused, float32",
        "shapes": SHAPES,
        "steps": STEPS,
        "threads": torch.get_num_threads(),
        **before,
    }
    result["passed"] = all(result[figure] <= limit for figure, limit in result["bars"].items())
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    assert result["step_time_ratio"] <= 0.88, result
    assert result["gradient_and_optimiser_bytes_ratio"] <= 0.5, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
    elif arguments.other:
        compare(arguments)
    else:
        test_a_step_is_faster_and_smaller_than_zeroing_gradients()


if __name__ == "__main__":
    main()
