"""Text that the composed model writes for a reader to judge: continuations and a chat, with and without experts.

Shapes: B prompts, L tokens each.

All prompts are one batch, in which each row has its own experts. Sampling is at a low temperature, so that
little of the difference between two rows is chance.

Does not cover scores (`scoring`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

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

PROMPT_TOKENS, FEWEST_TOKENS, NEW_TOKENS = 40, 8, 40
TEMPERATURE, TOP_P, REPETITION_PENALTY = 0.3, 0.9, 1.1  # a small model repeats itself without a penalty

Record = dict[str, str]


@dataclass
class _Row:
    """A row of the batch: the record and the key of it that its text belongs to, its prompt, and its experts."""

    record: Record
    label: str
    ids: Sequence[int]
    experts: Sequence[str]


def samples(
    model: FlexMoeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str]],
    owners: Sequence[str],
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    seed: int = 0,
) -> dict[str, list[Record]]:
    """What the model writes, by public alone ("experts_off") and by all experts ("experts_on").

    Args:
        texts: held-out documents of public text and of each owner.
        owners: whose questions are asked.

    Returns:
        "continuations": of the beginning of a document of each domain, with the keys "domain" and "prompt", and for
        owners what public and their own expert write ("expert_own"). "chat": answers to a question on the text of
        each owner, with the keys "domain" and "question"; none if the anchor has no chat template.
    """
    rows = {
        "continuations": list(_continued(model, tokenizer, texts, prompt_tokens)),
        "chat": list(_asked(model, tokenizer, owners)) if tokenizer.chat_template else [],
    }
    _write(model, tokenizer, [row for each in rows.values() for row in each], new_tokens, seed)
    return {kind: list({id(row.record): row.record for row in each}.values()) for kind, each in rows.items()}


def _continued(
    model: FlexMoeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Sequence[str]],
    prompt_tokens: int,
) -> Iterator[_Row]:
    for domain, documents in texts.items():
        ids = tokenizer(documents[len(documents) // 2], add_special_tokens=False)["input_ids"][:prompt_tokens]
        record = {"domain": domain, "prompt": tokenizer.decode(ids)}
        yield _Row(record, "experts_off", ids, [PUBLIC])
        if domain != PUBLIC:
            yield _Row(record, "expert_own", ids, [PUBLIC, domain])
        yield _Row(record, "experts_on", ids, list(model.expert_names))


def _asked(model: FlexMoeForCausalLM, tokenizer: PreTrainedTokenizerBase, owners: Sequence[str]) -> Iterator[_Row]:
    for owner in owners:
        question = QUESTIONS[owner]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        record = {"domain": owner, "question": question}
        yield _Row(record, "experts_off", ids, [PUBLIC])
        yield _Row(record, "experts_on", ids, list(model.expert_names))


def _write(
    model: FlexMoeForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[_Row],
    new_tokens: int,
    seed: int,
) -> None:
    """Puts what follows each prompt, without special tokens, into the row's record."""
    length = max(len(row.ids) for row in rows)
    ids_BL = torch.tensor([[tokenizer.pad_token_id] * (length - len(row.ids)) + list(row.ids) for row in rows])
    mask_BL = torch.tensor([[0] * (length - len(row.ids)) + [1] * len(row.ids) for row in rows])
    torch.manual_seed(seed)
    out_BL = model.generate(
        ids_BL,
        attention_mask=mask_BL,
        experts=[list(row.experts) for row in rows],
        min_new_tokens=min(FEWEST_TOKENS, new_tokens),
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        top_p=TOP_P,
        repetition_penalty=REPETITION_PENALTY,
        pad_token_id=tokenizer.pad_token_id,
    )
    for row, ids in zip(rows, out_BL, strict=True):
        row.record[row.label] = tokenizer.decode(ids[length:], skip_special_tokens=True)
