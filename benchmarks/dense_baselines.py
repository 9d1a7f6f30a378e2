"""Dense models trained on the owners' text, for comparison: one on everybody's, and one per owner.

All parameters are trained, on the sequences that the owners' experts are trained on: the same documents, split, share
of public text, and number of steps. Shapes: N sequences of L tokens, M models.

Source: Branch-Train-Merge, arXiv 2208.03306 (an ensemble whose weights are the posterior over models, given the text
so far). Does not cover how experts are trained (`flexmoe.training`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexmoe.data import read_public_sample
from flexmoe.demo.anchor import rate_share
from flexmoe.demo.corpus import read_texts
from flexmoe.io.strict_json import read_json_object
from flexmoe.modeling import FlexMoeConfig
from flexmoe.tokenization import load_tokenizer
from flexmoe.training.next_token_loss import next_token_loss
from flexmoe.training.text import OWN, PUBLIC_SIDE, pack_text, read_sides
from flexmoe.training.trainer import Mixture

PART_TOKENS = 512  # of a forward pass


@dataclass(frozen=True)
class OwnersTokens:
    """The sequences that one owner's expert was trained on, in order, and the settings of that training."""

    sequences_NL: Tensor
    config: Mapping[str, Any]

    @property
    def per_step(self) -> int:
        """Sequences of an optimiser step."""
        return self.config["batch_size"] * self.config["gradient_accumulation_steps"]


def tokens_of(package: Path, documents: Path, grafted: Path) -> OwnersTokens:
    """What `flexmoe train` trained the expert in `package` on, read again from the owner's documents."""
    settings = read_json_object(package / "expert_config.json")["training"]["config"]
    config = FlexMoeConfig.from_pretrained(grafted)
    assert config.public_sample is not None
    sides = {OWN: read_texts(documents), PUBLIC_SIDE: read_public_sample(grafted, config.public_sample)}
    text = pack_text(
        read_sides(
            sides,
            load_tokenizer(grafted),
            validation_fraction=settings["validation_fraction"],
            seed=settings["seed"],
            vocab_size=config.get_text_config().vocab_size,
        ),
        sequence_length=settings["sequence_length"],
        validation_tokens=settings["validation_tokens"],
        seed=settings["seed"],
    )
    assert text.public is not None
    mixture = Mixture(
        text.own.sequences,
        text.public.sequences,
        public_ratio=settings["public_ratio"],
        length=settings["max_steps"] * settings["batch_size"] * settings["gradient_accumulation_steps"],
        seed=settings["seed"],
    )
    return OwnersTokens(torch.stack([mixture[i]["input_ids"] for i in range(len(mixture))]), settings)


def everybodys(tokens: Sequence[OwnersTokens], seed: int) -> OwnersTokens:
    """The sequences of all owners in random order; each may have sequences of another length."""
    length = min(each.sequences_NL.shape[1] for each in tokens)
    joint = torch.cat([each.sequences_NL.reshape(-1, length) for each in tokens])
    order = torch.randperm(len(joint), generator=torch.Generator().manual_seed(seed))
    step = max(each.per_step * each.sequences_NL.shape[1] for each in tokens)
    config = {**tokens[0].config, "batch_size": step // length, "gradient_accumulation_steps": 1}
    return OwnersTokens(joint[order], config)


def train_dense(model: PreTrainedModel, tokens: OwnersTokens, learning_rate: float) -> PreTrainedModel:
    """Trains all parameters, in float32, with the optimiser and the schedule of `flexmoe train`."""
    model.float()
    steps = len(tokens.sequences_NL) // tokens.per_step
    warmup = max(1, min(steps // 5, max(10, steps // 20)))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate_share(step, warmup, steps)
        batch_NL = tokens.sequences_NL[step * tokens.per_step : (step + 1) * tokens.per_step]
        for part_NL in batch_NL.split(max(1, PART_TOKENS // batch_NL.shape[1])):
            loss = next_token_loss(model(input_ids=part_NL, use_cache=False).logits, part_NL, z_loss=1e-5)
            (loss * len(part_NL) / len(batch_NL)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def ensemble_losses(losses_MNL: Tensor, k: int | None = None) -> Tensor:
    """The loss per token of an ensemble, [N, L - 1], whose weights are the posterior given the tokens before it.

    Args:
        losses_MNL: the losses of the models, [M, N, L - 1]; the prior over models is uniform.
        k: of the models, those with the best posterior; None: all.
    """
    logs_MNL = -losses_MNL.double()
    seen_MNL = logs_MNL.cumsum(-1) - logs_MNL  # without the token itself
    kept = seen_MNL.topk(k or len(seen_MNL), dim=0)
    return -(kept.values.log_softmax(0) + logs_MNL.gather(0, kept.indices)).logsumexp(0).float()
