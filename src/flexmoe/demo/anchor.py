"""The anchor of the demo: a BPE tokenizer and a small OLMo-2 model, both trained on the public mix only.

Shapes: N sequences in all, B in a batch, L tokens each. The result is an ordinary transformers checkpoint without
experts. A plain PyTorch loop: 500 steps of 2,048 tokens take minutes on two cores.

Does not cover real anchors, which are downloaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Olmo2Config, Olmo2ForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from flexmoe.data import pack
from flexmoe.training.next_token_loss import next_token_loss

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class AnchorSettings:
    """Sizes of the anchor and of its training; `sequence_length * batch_size` tokens per step."""

    vocabulary: int = 3072
    layers: int = 4
    hidden: int = 128
    intermediate: int = 512
    heads: int = 4
    steps: int = 500
    sequence_length: int = 256
    batch_size: int = 8
    learning_rate: float = 3e-3
    warmup_share: float = 0.05
    seed: int = 0

    def as_dict(self) -> dict[str, int | float]:
        """For cache keys and reports."""
        return asdict(self)


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; `<|endoftext|>` is its bos, eos and pad token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def train_anchor(
    texts: Sequence[str],
    settings: AnchorSettings,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
    build: Callable[[PreTrainedTokenizerFast, AnchorSettings], PreTrainedModel] | None = None,
) -> None:
    """Trains tokenizer and model, and saves both to `folder`; calls `progress(step, steps)` after each step.

    `build` makes the untrained model; None: `build_anchor`.
    """
    tokenizer = train_tokenizer(texts, settings.vocabulary)
    tokens_NL = pack(texts, tokenizer, settings.sequence_length, vocab_size=settings.vocabulary)
    model = (build or build_anchor)(tokenizer, settings)
    _train(model, tokens_NL, settings, progress)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_anchor(tokenizer: PreTrainedTokenizerFast, settings: AnchorSettings) -> Olmo2ForCausalLM:
    """The untrained anchor; deterministic for a given `settings.seed`."""
    torch.manual_seed(settings.seed)
    return Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=settings.vocabulary,
            hidden_size=settings.hidden,
            intermediate_size=settings.intermediate,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            max_position_embeddings=4 * settings.sequence_length,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _train(
    model: PreTrainedModel,
    tokens_NL: torch.Tensor,
    settings: AnchorSettings,
    progress: Callable[[int, int], None] | None,
) -> None:
    generator = torch.Generator().manual_seed(settings.seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    warmup = max(1, round(settings.warmup_share * settings.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, warmup, settings.steps))
    model.train()
    order = torch.randperm(len(tokens_NL), generator=generator)
    for step in range(settings.steps):
        while len(order) < settings.batch_size:
            order = torch.cat([order, torch.randperm(len(tokens_NL), generator=generator)])
        batch_BL, order = tokens_NL[order[: settings.batch_size]], order[settings.batch_size :]
        loss = next_token_loss(model(input_ids=batch_BL, use_cache=False).logits, batch_BL, z_loss=0.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if progress is not None:
            progress(step + 1, settings.steps)
    if not math.isfinite(loss.item()):
        raise ValueError(f"the anchor's loss became {loss.item()} after {settings.steps} steps; lower learning_rate")
    model.eval()


def rate_share(step: int, warmup: int, steps: int) -> float:
    """The factor of the peak learning rate: linear warmup, then cosine decay to 0.1."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))
