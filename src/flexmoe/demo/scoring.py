"""Scores every system of the demo on every domain: loss per token, routing shares, continuations.

Shapes: N sequences of a domain, L tokens each.

A system is anything that predicts the next token: the anchor alone, the anchor with one owner's expert, all experts at
several k, the soup. `true-domain` is the ceiling that a router can be measured against: each owner's domain is scored
by that owner's two-expert model and public text by the anchor, as if an oracle had said where the text comes from.

Does not cover: bars and presentation (`report`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from flexmoe.data import pack
from flexmoe.evaluation import token_losses
from flexmoe.modeling import FlexMoeForCausalLM, track_usage
from flexmoe.modeling.anchors_flexmoe import find_ffn_sites

from .corpus import PUBLIC, read_texts

Losses = dict[str, float]


@dataclass(frozen=True)
class Models:
    """Where the systems lie: dense anchor, grafted model, packages, composed and opted-out model."""

    anchor: Path
    grafted: Path
    packages: Mapping[str, Path]
    composed: Path
    opted_out: Path | None = None


def load(folder: Path) -> PreTrainedModel:
    """The model in a folder, for scoring."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def held_out_tokens(
    folder: Path, domains: Sequence[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> dict[str, torch.Tensor]:
    """Each domain's held-out text as int64 [N, L]."""
    return {name: pack(read_texts(folder / f"{name}.jsonl"), tokenizer, sequence_length) for name in domains}


def domain_losses(model: PreTrainedModel, tokens: Mapping[str, torch.Tensor], **forward: Any) -> Losses:
    """Mean loss in nats per token, per domain."""
    return {name: token_losses(model, ids_NL, **forward).mean().item() for name, ids_NL in tokens.items()}


def score_systems(models: Models, tokens: Mapping[str, torch.Tensor]) -> dict[str, Losses]:
    """Every system's loss on every domain; all experts are active in "composed" and "opted-out"."""
    systems = {"anchor": domain_losses(load(models.anchor), tokens)}
    for owner, package in models.packages.items():
        systems[f"two-expert-{owner}"] = domain_losses(two_expert_model(models.grafted, package), tokens)
    composed = load(models.composed)
    everyone = len(composed.expert_names)
    for name, k in {"composed": everyone, "composed-k1": 1, "composed-k2": 2}.items():
        systems[name] = domain_losses(composed, tokens, num_experts_per_tok=k)
    systems["soup"] = domain_losses(soup(load(models.anchor), composed), tokens)
    systems["true-domain"] = true_domain(systems, list(models.packages))
    if models.opted_out is not None:
        systems["opted-out"] = domain_losses(load(models.opted_out), tokens, num_experts_per_tok=everyone)
    return systems


def two_expert_model(grafted: Path, package: Path) -> FlexMoeForCausalLM:
    """Public and one owner, as that owner trained it: no prior."""
    model = load(grafted)
    model.add_expert(package)
    return model


def soup(anchor: PreTrainedModel, composed: FlexMoeForCausalLM) -> PreTrainedModel:
    """The dense anchor with, in each layer, the plain average of all owners' feed-forward weights (in place)."""
    owners = [name for name in composed.expert_names if name != PUBLIC]
    for site, block in zip(find_ffn_sites(anchor), composed.flexmoe_blocks(), strict=True):
        weights = [block.experts[name].state_dict() for name in owners]
        site.ffn(anchor).load_state_dict({key: torch.stack([w[key] for w in weights]).mean(0) for key in weights[0]})
    return anchor


def true_domain(systems: Mapping[str, Losses], owners: Sequence[str]) -> Losses:
    """The ceiling: each owner's domain by its own two-expert model, public text by the anchor."""
    return {PUBLIC: systems["anchor"][PUBLIC], **{o: systems[f"two-expert-{o}"][o] for o in owners}}


def routing_shares(model: FlexMoeForCausalLM, tokens: Mapping[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Per domain, the share of the routing weight that each expert carried (mean over tokens and layers)."""
    shares = {}
    for name, ids_NL in tokens.items():
        with track_usage(model) as usage:
            token_losses(model, ids_NL, num_experts_per_tok=len(model.expert_names))
        shares[name] = usage.share()
    return shares


def continuations(
    model: FlexMoeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    tokens: Mapping[str, torch.Tensor],
    *,
    prompt_tokens: int = 40,
    new_tokens: int = 60,
    seed: int = 0,
) -> list[dict[str, str]]:
    """A held-out prompt of each domain, continued with experts off (public alone) and on (everyone), same draws."""
    found = []
    for domain, ids_NL in tokens.items():
        prompt_1L = ids_NL[len(ids_NL) // 2, :prompt_tokens][None]
        record = {"domain": domain, "prompt": tokenizer.decode(prompt_1L[0])}
        for label, experts in {"experts_off": [PUBLIC], "experts_on": list(model.expert_names)}.items():
            record[label] = tokenizer.decode(_sample(model, prompt_1L, experts, new_tokens, seed)[prompt_tokens:])
        found.append(record)
    return found


def prompts(tokens: Mapping[str, torch.Tensor], length: int = 64, per_domain: int = 2) -> torch.Tensor:
    """int64 [B, L]: the starts of a few held-out sequences of every domain."""
    return torch.cat([ids_NL[:per_domain, :length] for ids_NL in tokens.values()])


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model."""
    return AutoTokenizer.from_pretrained(folder)


def _sample(
    model: FlexMoeForCausalLM, prompt_1L: torch.Tensor, experts: list[str], new_tokens: int, seed: int
) -> torch.Tensor:
    torch.manual_seed(seed)
    return model.generate(
        prompt_1L,
        attention_mask=torch.ones_like(prompt_1L),
        experts=experts,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=True,
        temperature=0.7,
        top_k=0,
        top_p=0.9,
    )[0]
