"""Evaluates the systems of the demo on all domains: loss per token, routing shares, continuations.

Shapes: N sequences of a domain, L tokens each.

The systems are the anchor, the anchor with one owner's expert, all experts with several values of k, and the soup.
`true-domain` is the upper bound for a router: an oracle routes each owner's domain to that owner's two-expert model,
and public text to the anchor.

Does not cover thresholds and presentation (`report`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexmoe.data import pack
from flexmoe.demo.corpus import PUBLIC, read_texts
from flexmoe.evaluation import token_losses
from flexmoe.io.dense import load_causal_lm
from flexmoe.modeling import FlexMoeForCausalLM
from flexmoe.modeling.anchors_flexmoe import find_ffn_sites
from flexmoe.usage import track_usage

Losses = dict[str, float]


@dataclass(frozen=True)
class Models:
    """Folders of the dense anchor, the grafted model, the packages, the composed and the opted-out model."""

    anchor: Path
    grafted: Path
    packages: Mapping[str, Path]
    composed: Path
    opted_out: Path | None = None


def load(folder: Path) -> PreTrainedModel:
    """Loads a model for evaluation."""
    return load_causal_lm(folder, dtype="auto").eval()


def held_out_tokens(
    folder: Path, domains: Sequence[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int, vocab_size: int
) -> dict[str, torch.Tensor]:
    """Each domain's held-out text as int64 [N, L]."""
    return {
        name: pack(read_texts(folder / f"{name}.jsonl"), tokenizer, sequence_length, vocab_size=vocab_size)
        for name in domains
    }


def domain_losses(model: PreTrainedModel, tokens: Mapping[str, torch.Tensor], **forward: Any) -> Losses:
    """The mean loss per domain, in nats per token."""
    return {name: token_losses(model, ids_NL, **forward).mean().item() for name, ids_NL in tokens.items()}


def score_systems(models: Models, tokens: Mapping[str, torch.Tensor]) -> dict[str, Losses]:
    """The losses of all systems on all domains; all experts are active in "composed" and "opted-out"."""
    systems = {"anchor": domain_losses(load(models.anchor), tokens)}
    for owner, package in models.packages.items():
        systems[f"two-expert-{owner}"] = domain_losses(two_expert_model(models.grafted, package), tokens)
    composed = load(models.composed)
    n_experts = len(composed.expert_names)
    for name, k in {"composed": n_experts, "composed-k1": 1, "composed-k2": 2}.items():
        systems[name] = domain_losses(composed, tokens, num_experts_per_tok=k)
    systems["soup"] = domain_losses(soup(load(models.anchor), composed), tokens)
    systems["true-domain"] = true_domain(systems, list(models.packages))
    if models.opted_out is not None:
        systems["opted-out"] = domain_losses(load(models.opted_out), tokens, num_experts_per_tok=n_experts)
    return systems


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


def routing_shares(model: FlexMoeForCausalLM, tokens: Mapping[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Each expert's share of the routing weight per domain (mean over tokens and layers)."""
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
    """Continuations of a held-out prompt of each domain, by public alone and by all experts, with the same seed."""
    records = []
    for domain, ids_NL in tokens.items():
        prompt_1L = ids_NL[len(ids_NL) // 2, :prompt_tokens][None]
        record = {"domain": domain, "prompt": tokenizer.decode(prompt_1L[0])}
        for label, experts in {"experts_off": [PUBLIC], "experts_on": list(model.expert_names)}.items():
            record[label] = tokenizer.decode(_sample(model, prompt_1L, experts, new_tokens, seed)[prompt_tokens:])
        records.append(record)
    return records


def prompts(tokens: Mapping[str, torch.Tensor], length: int = 64, per_domain: int = 2) -> torch.Tensor:
    """The first tokens of some held-out sequences of every domain, int64 [B, L]."""
    return torch.cat([ids_NL[:per_domain, :length] for ids_NL in tokens.values()])


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
