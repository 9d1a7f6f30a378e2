"""A training step of one expert against the FlexOlmo repository's way of freezing.

There both experts' networks are in the optimiser, all their gradients are computed, and public's are set to zero after
backward; here public's networks have no gradient at all. Same two-expert model, same batch, steps taken in turns, so
that whatever else the machine does falls on both. The widths are those of OLMo-2 7B, divided by eight.

`make bench` runs it; the figures go to docs/benchmarks/training.json.
"""

import copy
import json
import statistics
import time
from pathlib import Path

import torch
from machine import machine
from transformers import Olmo2Config

from flexmoe.expert_trainer import EXPERTS_PER_TOKEN
from flexmoe.modeling import FlexMoeConfig, FlexMoeForCausalLM
from flexmoe.next_token_loss import next_token_loss

RESULT = Path(__file__).parents[2] / "docs" / "benchmarks" / "training.json"
SHAPES = {"layers": 4, "hidden": 512, "ffn": 1376, "heads": 4, "vocabulary": 2048, "batch": 4, "sequence": 256}
WARM_UP, STEPS = 2, 12


class Ours:
    """Only the own networks have gradients and optimiser state."""

    def __init__(self, model: FlexMoeForCausalLM) -> None:
        self.model = copy.deepcopy(model)
        self.freeze()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def freeze(self) -> None:
        self.model.freeze_except("own", rows=True)

    def step(self, input_ids: torch.Tensor) -> float:
        logits = self.model(input_ids=input_ids, use_cache=False, num_experts_per_tok=EXPERTS_PER_TOKEN).logits
        loss = next_token_loss(logits, input_ids, z_loss=1e-5)
        loss.backward()
        self.after_backward()
        torch.nn.utils.clip_grad_norm_(self.optimiser.param_groups[0]["params"], 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=False)  # kept, so that they can be counted
        return loss.item()

    def after_backward(self) -> None:
        pass

    def extra_bytes(self) -> int:
        """Gradients and optimiser state."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        states = [value for state in self.optimiser.state.values() for value in state.values() if value.dim()]
        return sum(tensor.nbytes for tensor in gradients + states)


class FlexOlmoWay(Ours):
    """Both experts' networks and rows have gradients and optimiser state; public's gradients are thrown away."""

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
    ours, theirs = Ours(model), FlexOlmoWay(model)
    batches = torch.randint(
        3, SHAPES["vocabulary"], (WARM_UP + STEPS, SHAPES["batch"], SHAPES["sequence"]), generator=torch.Generator()
    )
    seconds: dict[Ours, list[float]] = {ours: [], theirs: []}
    for number, batch in enumerate(batches):
        order = (ours, theirs) if number % 2 else (theirs, ours)
        losses = {}
        for way in order:
            start = time.perf_counter()
            losses[way] = way.step(batch)
            seconds[way].append(time.perf_counter() - start)
        assert abs(losses[ours] - losses[theirs]) < 1e-3, "the two ways train different things"

    pairs = list(zip(seconds[ours][WARM_UP:], seconds[theirs][WARM_UP:], strict=True))
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
    result["passed"] = all(result[figure] <= bar for figure, bar in result["bars"].items())
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    assert result["step_time_ratio"] <= 0.88, result
    assert result["gradient_and_optimiser_bytes_ratio"] <= 0.5, result


if __name__ == "__main__":
    test_a_step_is_faster_and_smaller_than_zeroing_gradients()
