"""What is generated for the report: which experts each row of a batch may use, its prompt, and where its text goes."""

from __future__ import annotations

import pytest
import torch

from flexmoe.demo.anchor import train_tokenizer
from flexmoe.demo.generation import QUESTIONS, samples

OFF, ON = ["public"], ["public", "math", "code"]
TEXTS = {"public": ["a few words of prose"], "math": ["x is 2"], "code": ["def f(): return 3"]}


class Writer:
    """A model that continues each prompt by the number of experts that its row may use."""

    expert_names = ON

    def __init__(self, tokenizer: object) -> None:
        self.tokenizer = tokenizer

    def generate(self, ids_BL: torch.Tensor, *, attention_mask: torch.Tensor, experts: list, **_: object):
        self.ids_BL, self.mask_BL, self.experts = ids_BL, attention_mask, experts
        digits = [self.tokenizer.encode(str(len(names)))[-1] for names in experts]
        return torch.cat([ids_BL, torch.tensor(digits)[:, None]], 1)


@pytest.fixture
def writer() -> Writer:
    tokenizer = train_tokenizer(["prose"], 300)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}:"
    return Writer(tokenizer)


def test_each_row_has_its_experts(writer: Writer) -> None:
    written = samples(writer, writer.tokenizer, TEXTS, ["code"], prompt_tokens=5)
    asked = [OFF, ON]
    assert writer.experts == [OFF, ON, OFF, ["public", "math"], ON, OFF, ["public", "code"], ON, *asked]
    records = written["continuations"]
    assert [record["domain"] for record in records] == list(TEXTS)
    assert [record["prompt"] for record in records] == ["a few", "x is ", "def f"]
    own = {"experts_off": "1", "expert_own": "2", "experts_on": "3"}
    assert [{k: v for k, v in record.items() if k in own} for record in records[1:]] == [own, own]
    assert "expert_own" not in records[0]


def test_shorter_prompts_are_padded_on_the_left(writer: Writer) -> None:
    texts = {"math": ["x"], "code": ["def"]}
    samples(writer, writer.tokenizer, texts, [])
    pad = writer.tokenizer.pad_token_id
    assert writer.mask_BL.tolist() == [[0, 0, 1]] * 3 + [[1, 1, 1]] * 3
    assert writer.ids_BL[0].tolist()[:2] == [pad, pad]
    assert writer.tokenizer.decode(writer.ids_BL[3]) == "def"


def test_questions_are_asked_in_the_template_of_the_anchor(writer: Writer) -> None:
    records = samples(writer, writer.tokenizer, TEXTS, ["math", "code"])["chat"]
    assert [record["question"] for record in records] == [QUESTIONS["math"], QUESTIONS["code"]]
    assert [(record["experts_off"], record["experts_on"]) for record in records] == [("1", "3")] * 2
    assert writer.tokenizer.decode(writer.ids_BL[-2][writer.mask_BL[-2] == 1]) == f"<{QUESTIONS['code']}>:"


def test_an_anchor_without_a_template_is_not_asked(writer: Writer) -> None:
    writer.tokenizer.chat_template = None
    assert samples(writer, writer.tokenizer, TEXTS, ["math"])["chat"] == []
