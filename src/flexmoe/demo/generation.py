"""Text that the composed model writes for a reader to judge: continuations and a chat, with and without experts.

Shapes: B prompts, L tokens each.

All prompts of a kind are one batch, in which each row has its own experts. Sampling is at a low temperature, so that
little of the difference between two rows is chance.

Does not cover scores (`scoring`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from flexmoe.demo.corpus import PUBLIC
from flexmoe.modeling import FlexMoeForCausalLM

QUESTIONS = {
    "math": "Find the derivative of f(x) = (3 x^2 + 1) sin(2 x).",
    "code": "Write a Python function that reads a file and returns its lines without comments.",
    "unicode": "What are the Unicode entries of U+00C4 and U+00E4?",
    "cpp": "Declare a C++ class for a tensor that owns its storage.",
    "medicine": "List the ICD-10-CM codes for fractures of the forearm.",
    "verilog": "Write a Verilog module for a counter with a synchronous reset.",
    "chinese": "Write dictionary entries for the words 茶, 水 and 火.",
    "music": "Write a jig in D major in ABC notation.",
    "phonetics": "How are the words light, lighter and lightning pronounced, in ARPAbet?",
    "german": "Write the German entries of a message catalogue for Save, Delete and Log out.",
}
"""What a user asks about the text of each kind."""

NEW_TOKENS = 40
TEMPERATURE, TOP_P, REPETITION_PENALTY = 0.3, 0.9, 1.1  # a small model repeats itself without a penalty


def continuations(
    model: FlexMoeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str]],
    *,
    prompt_tokens: int = 40,
    new_tokens: int = NEW_TOKENS,
    seed: int = 0,
) -> list[dict[str, str]]:
    """Continuations of the beginning of a held-out document of each domain.

    A record has the keys "domain", "prompt" and the continuations by public alone ("experts_off"), by public and the
    domain's own expert ("expert_own", not for public text) and by all experts ("experts_on").
    """
    records, prompts, experts = [], [], []
    for domain, documents in texts.items():
        ids = tokenizer(documents[len(documents) // 2], add_special_tokens=False)["input_ids"][:prompt_tokens]
        for label, names in _selections(model, domain).items():
            records.append((domain, label))
            prompts.append(ids)
            experts.append(names)
    written = _generate(model, tokenizer, prompts, experts, new_tokens, seed, min_new_tokens=new_tokens)
    found: dict[str, dict[str, str]] = {}
    for (domain, label), prompt, text in zip(records, prompts, written, strict=True):
        found.setdefault(domain, {"domain": domain, "prompt": tokenizer.decode(prompt)})[label] = text
    return list(found.values())


def chat(
    model: FlexMoeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    owners: Sequence[str],
    *,
    new_tokens: int = NEW_TOKENS,
    seed: int = 0,
) -> list[dict[str, str]]:
    """Answers to a question on the text of each owner, by public alone and by all experts; none without a template.

    A record has the keys "domain", "question", "experts_off" and "experts_on".
    """
    if not tokenizer.chat_template:
        return []
    labels = {"experts_off": [PUBLIC], "experts_on": list(model.expert_names)}
    asked = [(owner, label) for owner in owners for label in labels]
    prompts = [_chat_prompt(tokenizer, QUESTIONS[owner]) for owner, _ in asked]
    answers = _generate(model, tokenizer, prompts, [labels[label] for _, label in asked], new_tokens, seed)
    found: dict[str, dict[str, str]] = {}
    for (owner, label), answer in zip(asked, answers, strict=True):
        found.setdefault(owner, {"domain": owner, "question": QUESTIONS[owner]})[label] = answer
    return list(found.values())


def _selections(model: FlexMoeForCausalLM, domain: str) -> dict[str, list[str]]:
    own = {} if domain == PUBLIC else {"expert_own": [PUBLIC, domain]}
    return {"experts_off": [PUBLIC], **own, "experts_on": list(model.expert_names)}


def _chat_prompt(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _generate(
    model: FlexMoeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    experts: Sequence[Sequence[str]],
    new_tokens: int,
    seed: int,
    **options: Any,
) -> list[str]:
    """What follows each prompt, without special tokens."""
    length = max(map(len, prompts))
    ids_BL = torch.tensor([[tokenizer.pad_token_id] * (length - len(ids)) + list(ids) for ids in prompts])
    mask_BL = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
    torch.manual_seed(seed)
    out_BL = model.generate(
        ids_BL,
        attention_mask=mask_BL,
        experts=[list(names) for names in experts],
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        top_p=TOP_P,
        repetition_penalty=REPETITION_PENALTY,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    return [tokenizer.decode(ids[length:], skip_special_tokens=True) for ids in out_BL]
