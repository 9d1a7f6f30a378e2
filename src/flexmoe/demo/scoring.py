"""Evaluates the systems of the demo on all domains: loss per token, and routing shares.

Shapes: N sequences of a domain, L tokens each.

The systems are the anchor, the anchor with one owner's expert, all experts with several values of k, and the soup.
`true-domain` is the upper bound for a router: an oracle routes each owner's domain to that owner's two-expert model,
and public text to the anchor.

Does not cover generated text (`generation`), thresholds and presentation (`report`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexmoe.cpu.linear import has_instructions
from flexmoe.data import pack
from flexmoe.demo.corpus import PUBLIC
from flexmoe.evaluation import token_losses
from flexmoe.io.dense import load_causal_lm
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.modeling.anchors_flexmoe import find_ffn_sites
from flexmoe.usage import track_usage

Losses = dict[str, float]


@dataclass(frozen=True)
class Models:
    """Folders of the dense anchor, the composed and the opted-out model."""

    anchor: Path
    composed: Path
    opted_out: Path | None = None


def load(folder: Path) -> PreTrainedModel:
    """Loads a model for evaluation: as it is stored, but in float32 on a CPU without instructions for bfloat16."""
    return load_causal_lm(folder, dtype="auto" if has_instructions(torch.bfloat16) else torch.float32).eval()


def held_out_tokens(
    texts: Mapping[str, Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    vocab_size: int,
    sequences: int | None = None,
) -> dict[str, torch.Tensor]:
    """Each domain's held-out text as int64 [N, L], with at most `sequences` sequences."""
    return {
        name: pack(documents, tokenizer, sequence_length, vocab_size=vocab_size)[:sequences]
        for name, documents in texts.items()
    }


def domain_losses(model: PreTrainedModel, tokens: Mapping[str, torch.Tensor], **forward: Any) -> Losses:
    """The mean loss per domain, in nats per token."""
    return {name: token_losses(model, ids_NL, **forward).mean().item() for name, ids_NL in tokens.items()}


def score_systems(
    models: Models, tokens: Mapping[str, torch.Tensor], top_k: Sequence[int] = (1, 2)
) -> tuple[dict[str, Losses], dict[str, dict[str, float]]]:
    """The losses of all systems on all domains, and the routing shares of the composed model.

    All experts are active in "composed" and "opted-out"; "composed-k<k>" are for `top_k`. Two-expert models are the
    composed one with all other experts disabled: without a prior, that is bit for bit the model that the owner
    trained. No two models with experts are in memory at the same time.
    """
    systems = {"anchor": domain_losses(load(models.anchor), tokens)}
    left = {}
    if models.opted_out is not None:
        model = load(models.opted_out)
        left["opted-out"] = domain_losses(model, tokens, num_experts_per_tok=len(model.expert_names))
        del model
    composed = load(models.composed)
    owners = [name for name in composed.expert_names if name != PUBLIC]
    for owner in owners:
        with composed.only_experts(PUBLIC, owner):
            systems[f"two-expert-{owner}"] = domain_losses(composed, tokens, num_experts_per_tok=2)
    systems["composed"], shares = losses_and_shares(composed, tokens)
    for k in top_k:
        systems[f"composed-k{k}"] = domain_losses(composed, tokens, num_experts_per_tok=k)
    systems["soup"] = domain_losses(soup(load(models.anchor), composed), tokens)
    systems["true-domain"] = true_domain(systems, owners)
    return {**systems, **left}, shares


def two_expert_model(grafted: Path, package: Path) -> FlexMoeForCausalLM:
    """The model that an owner trained: public and its own expert, without a prior."""
    model = load(grafted)
    model.add_expert(package)
    return model


def soup(anchor: PreTrainedModel, composed: FlexMoeForCausalLM) -> PreTrainedModel:
    """Replaces the feed-forward weights of the dense anchor by the average of all owners' weights, in place."""
    owners = [name for name in composed.expert_names if name != PUBLIC]
    for site, block in zip(find_ffn_sites(anchor), composed.flexmoe_blocks(), strict=True):
        weights = [block.experts[name].state_dict() for name in owners]
        site.ffn(anchor).load_state_dict({key: torch.stack([w[key] for w in weights]).mean(0) for key in weights[0]})
    return anchor


def true_domain(systems: Mapping[str, Losses], owners: Sequence[str]) -> Losses:
    """The upper bound: each owner's domain with its two-expert model, public text with the anchor."""
    return {PUBLIC: systems["anchor"][PUBLIC], **{o: systems[f"two-expert-{o}"][o] for o in owners}}


def losses_and_shares(
    model: FlexMoeForCausalLM, tokens: Mapping[str, torch.Tensor]
) -> tuple[Losses, dict[str, dict[str, float]]]:
    """Loss, and each expert's share of the routing weight (mean over tokens and layers), with all experts active."""
    losses: Losses = {}
    shares: dict[str, dict[str, float]] = {}
    for name, ids_NL in tokens.items():
        with track_usage(model) as usage:
            losses |= domain_losses(model, {name: ids_NL}, num_experts_per_tok=len(model.expert_names))
        shares[name] = usage.share()
    return losses, shares


def prompts(tokens: Mapping[str, torch.Tensor], length: int = 64, per_domain: int = 2) -> torch.Tensor:
    """The first tokens of some held-out sequences of every domain, int64 [B, L]."""
    return torch.cat([ids_NL[:per_domain, :length] for ids_NL in tokens.values()])
