"""Checks of an incoming expert on public text: its share of the routing weight, and the change of the loss.

Shapes: N sequences of L tokens, int64 [N, L]. Does not cover text of the expert's own kind, and answers poisoned for a
trigger that the text does not hold.
"""

from __future__ import annotations

import itertools
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flexmoe.admission.findings import Finding, FindingVerdict
from flexmoe.data import LONGEST_SEQUENCE, Documents, pack, read_public_sample
from flexmoe.evaluation import token_losses
from flexmoe.modeling.modeling_flexmoe import FlexMoeForCausalLM
from flexmoe.packages.modules import ExpertPart
from flexmoe.tokenization import load_tokenizer
from flexmoe.usage import track_usage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARE_THRESHOLD = 0.5
"""Maximum share of public text's routing weight: public and the other experts keep the majority. Measured in the demo:
0.02 to 0.26; a row of zeros, which is undecided, has exactly this share beside public alone."""

LAYER_SHARE_THRESHOLD = 0.6
"""Maximum share in any one layer. Measured: at most 0.32."""

LOSS_THRESHOLD = 0.02
"""Maximum relative increase of the loss on public text. Measured in the demo: -0.5 % to +0.2 %; with rows that are
hidden means, as FlexOlmo initialises them, up to +1.0 %."""

MAX_TOKENS = 32_768
"""Default number of tokens of public text; both losses are computed on the same ones."""

SHARE, LAYER_SHARE, LOSS = "share of public text", "share in one layer", "loss on public text"
_ROUNDING = (
    1e-6  # shares are sums of float32 softmaxes: that of a row of zeros is 0.5 up to a few units in the last place
)


@dataclass(frozen=True, kw_only=True)
class PublicText:
    """The effect of an incoming expert on public text.

    Attributes:
        tokens: number of tokens.
        share: the expert's share of their routing weight, over all layers; `layer_shares` by layer.
        loss_before, loss_after: nats per token without and with the expert.
    """

    tokens: int
    share: float
    layer_shares: list[float]
    loss_before: float
    loss_after: float


def read_public_text(
    host: FlexMoeForCausalLM,
    folder: Path,
    *,
    data: Documents | None,
    public_sample: bool,
    tokenizer: PreTrainedTokenizerBase | None,
    max_tokens: int,
) -> torch.Tensor | None:
    """Public text as sequences [N, L]; None if neither `data` nor `public_sample` is given.

    Args:
        folder: of the model, with its public sample and, by default, its tokenizer.
        data: iterated twice, so that only the lengths of all documents are held.
        Others: as in `flexmoe.verify`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there are less than two tokens.
    """
    if data is None and not public_sample:
        return None
    record: Mapping[str, Any] | None = host.config.public_sample
    documents = read_public_sample(folder, record) if data is None else data
    lengths = [len(document) for document in documents]
    order = list(range(len(lengths)))
    random.Random(0).shuffle(order)  # so that a few long ones do not dominate; seeded, so that runs agree
    # a token has some five characters: enough documents, without tokenising gigabytes
    before = itertools.accumulate((lengths[i] for i in order), initial=0)
    wanted = [i for i, characters in zip(order, before, strict=False) if characters <= 16 * max_tokens]
    texts = dict.fromkeys(wanted, "")
    texts.update((i, document) for i, document in enumerate(documents) if i in texts)
    chosen = list(texts.values())
    if data is not None and (note := data.skipped_note()):
        warnings.warn(note, stacklevel=3)
    config = host.config.get_text_config()
    packed = pack(chosen, tokenizer or load_tokenizer(folder), 2, vocab_size=config.vocab_size)
    stream = packed.flatten()[:max_tokens]
    limit = getattr(config, "max_position_embeddings", None) or LONGEST_SEQUENCE
    length = min(LONGEST_SEQUENCE, limit, len(stream))
    return stream[: len(stream) // length * length].view(-1, length)


def measure_public_text(
    host: FlexMoeForCausalLM,
    record: Mapping[str, Any],
    parts: Sequence[ExpertPart],
    text_NL: torch.Tensor,
    batch_size: int,
) -> PublicText:
    """Measures the loss, adds the expert to `host`, and measures again with its share of the routing weight.

    Args:
        record: the expert's, with its name in the model.
        parts: its network and router row in each layer.

    Raises:
        ValueError: the model's loss without the expert is not finite.
    """
    name = record["name"]
    before = token_losses(host, text_NL, batch_size).mean().item()
    if not math.isfinite(before):
        raise ValueError("The model's own loss on this public text is not finite, so nothing can be measured on it.")
    host.insert_expert(record, parts, replaces=name in host.expert_names)
    with track_usage(host) as usage:
        after = token_losses(host, text_NL, batch_size).mean().item()
    return PublicText(
        tokens=text_NL.numel(),
        share=usage.share().get(name, 0.0),
        layer_shares=[usage.share(block.layer_index).get(name, 0.0) for block in host.flexmoe_blocks()],
        loss_before=before,
        loss_after=after,
    )


def check_public_text(text: PublicText) -> list[Finding]:
    """Compares the effect on public text with the thresholds."""
    layer = max(range(len(text.layer_shares)), key=lambda i: _nan_as_infinite(text.layer_shares[i]))
    largest, rise = text.layer_shares[layer], text.loss_after / text.loss_before - 1
    return [
        _finding(
            SHARE, text.share, SHARE_THRESHOLD, f"{text.share:.1%} of the routing weight of {text.tokens} tokens"
        ),
        _finding(LAYER_SHARE, largest, LAYER_SHARE_THRESHOLD, f"{largest:.1%} in layer {layer}, the largest"),
        _finding(LOSS, rise, LOSS_THRESHOLD, f"from {text.loss_before:.4f} to {text.loss_after:.4f}, {rise:+.2%}"),
    ]


def _finding(check: str, value: float, threshold: float, message: str) -> Finding:
    verdict: FindingVerdict = "accept" if value <= threshold + _ROUNDING else "refuse"  # refuses NaN
    return Finding(check, verdict, value, threshold, message)


def _nan_as_infinite(share: float) -> float:
    return math.inf if math.isnan(share) else share


__all__ = [
    "LAYER_SHARE",
    "LAYER_SHARE_THRESHOLD",
    "LOSS",
    "LOSS_THRESHOLD",
    "MAX_TOKENS",
    "SHARE",
    "SHARE_THRESHOLD",
    "PublicText",
    "check_public_text",
    "measure_public_text",
    "read_public_text",
]
