"""Tokenising documents in little memory, splitting them, packing them."""

import hashlib
import json
import random
import tracemalloc
from math import ceil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from flexmoe.admission.public_text import read_public_text
from flexmoe.data import Documents, cut_sequences, held_out, pack, split_documents, split_tokens, tokenize
from flexmoe.routers import prompt_gates, text_rows
from tests.support.letters import letter_tokenizer


@pytest.fixture(scope="module")
def digits():
    """A tokenizer whose token of "7" is 7 and whose end-of-sequence token is 10."""
    words = {str(number): number for number in range(10)} | {"<eos>": 10, "<note>": 11}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", model_max_length=4)


def merges(kind: str) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer: like GPT-2's, or like Llama-2's, which puts a space before each text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind == "llama-2", unk_token=None))
    if kind == "gpt-2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if kind == "gpt-2" else [],
        show_progress=False,
    )
    tokenizer.train_from_iterator(words(3000, 0).splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def words(count: int, seed: int) -> str:
    chance = random.Random(seed)
    made = ("".join(chance.choices("aeioustnr", k=chance.randint(1, 9))) for _ in range(count))
    return "".join(word + chance.choice([" ", " ", " ", "  ", "\n", "\n\n  ", ", "]) for word in made)


def test_packing_puts_eos_after_each_document_and_drops_the_tail(digits):
    packed = pack(["1 2 3", "4", "5 6 7 8 9"], digits, 5, vocab_size=11)
    assert packed.dtype == torch.int64
    assert packed.tolist() == [[1, 2, 3, 10, 4], [10, 5, 6, 7, 8]]
    assert pack(["1"] * 2500, digits, 2, vocab_size=11).tolist() == [[1, 10]] * 2500
    with pytest.raises(ValueError, match=r"2 document\(s\) with 4 tokens in all: less than one sequence of 8"):
        pack(["1", "2"], digits, 8, vocab_size=11)
    with pytest.raises(ValueError, match="at least 2"):
        pack(["1", "2"], digits, 1, vocab_size=11)


def test_tokens_without_an_embedding_are_refused(digits):
    assert pack(["1", "2 <note>"], digits, 2, vocab_size=12).shape == (2, 2)
    with pytest.raises(ValueError, match=r"Document 2 holds the token '<note>' with the id 11.* below 11 only"):
        pack(["1", "2 <note>"], digits, 2, vocab_size=11)
    with pytest.raises(ValueError, match="The end of each document holds the token '<eos>' with the id 10"):
        pack(["1"], digits, 2, vocab_size=10)


@pytest.mark.promise(
    "`graft --router-data`, recipes, `verify`",
    "a text with a token that has no embedding",
    "refused with the token and the document",
)
def test_every_way_in_refuses_them(tmp_path):
    """Training and evaluation: `tests/training/test_experts.py`."""
    tokenizer = letter_tokenizer()
    tokenizer.add_tokens(["<note>"])
    (tmp_path / "public.txt").write_text("a <note>")
    config = SimpleNamespace(vocab_size=len(tokenizer) - 1, max_position_embeddings=99, public_sample=None)
    config.get_text_config = lambda: config
    message = rf"token '<note>' with the id {config.vocab_size}, .* below {config.vocab_size} only"
    with pytest.raises(ValueError, match=message):
        read_public_text(
            SimpleNamespace(config=config),
            tmp_path,
            data=Documents([tmp_path / "public.txt"]),
            public_sample=False,
            tokenizer=tokenizer,
            max_tokens=100,
        )
    tokenizer.save_pretrained(tmp_path / "anchor")
    (tmp_path / "anchor/config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=f"Router data, math: Document 1 .*{message}"):
        text_rows._streams({"math": ["a <note>"]}, SimpleNamespace(folder=tmp_path / "anchor", config=config))
    with pytest.raises(ValueError, match=f"A prompt .*{message}"):
        prompt_gates._encoded(["a <note>"], tokenizer, config.vocab_size)


@pytest.mark.parametrize("max_tokens", [100, 100_000])
def test_public_text_is_the_beginning_of_all_documents_shuffled(tmp_path, max_tokens):
    texts = [f"{'abcdefgh'[number % 8] * (number + 1)}" for number in range(120)]
    (tmp_path / "public.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = letter_tokenizer()
    config = SimpleNamespace(vocab_size=len(tokenizer), max_position_embeddings=10, public_sample=None)
    config.get_text_config = lambda: config
    found = read_public_text(
        SimpleNamespace(config=config),
        tmp_path,
        data=Documents([tmp_path / "public.jsonl"]),
        public_sample=False,
        tokenizer=tokenizer,
        max_tokens=max_tokens,
    )
    random.Random(0).shuffle(texts)
    expected = pack(texts, tokenizer, 2, vocab_size=len(tokenizer)).flatten()[:max_tokens]
    assert found.flatten().tolist() == expected[: found.numel()].tolist()
    assert found.numel() > len(expected) - 10


def test_a_tokenizer_without_an_end_of_sequence():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="no eos_token"):
        pack(["a"], tokenizer, 2, vocab_size=1)


def test_batches_do_not_matter(digits, monkeypatch):
    documents = ["1 2 3", "", "4 5", "6" * 50, "7"]
    whole = tokenize(documents, digits, vocab_size=11)
    monkeypatch.setattr("flexmoe.data.tokens.BATCH_CHARACTERS", 4)
    parts = tokenize(iter(documents), digits, vocab_size=11)
    assert parts.tokens.tolist() == whole.tokens.tolist()
    assert parts.ends.tolist() == whole.ends.tolist() == [4, 5, 8, 10, 12]
    assert (parts.sha256, parts.tokens_sha256()) == (whole.sha256, whole.tokens_sha256())
    assert tokenize(documents[::-1], digits, vocab_size=11).sha256 != whole.sha256


@pytest.mark.parametrize("kind", ["gpt-2", "llama-2"])
def test_long_documents_have_the_tokens_of_the_whole(kind, monkeypatch):
    tokenizer, text = merges(kind), words(4000, 1)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    asked = []

    def recording(texts, tokenizer):
        asked.extend(map(len, texts))
        return original(texts, tokenizer)

    from flexmoe.data import tokens

    original = tokens._ids
    monkeypatch.setattr(tokens, "_ids", recording)
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 2000)
    assert tokenize([text], tokenizer, vocab_size=400).tokens[:-1].tolist() == expected
    if kind == "gpt-2":
        assert max(asked) < 2200, "tokenised as a whole"
    else:
        assert max(asked) == len(text), "a piece would begin with a space"


def old_order(document: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\n{document}".encode()).digest()


def test_the_split_is_by_document_and_keeps_copies_together():
    documents = [f"document {i % 40}" for i in range(100)]
    training, validation = split_documents(documents, 0.1, seed=3)
    assert sorted(training + validation) == sorted(documents)
    assert not set(training) & set(validation)
    # packages that were trained with an earlier version held out the same documents
    assert set(validation) == set(sorted(set(documents), key=lambda text: old_order(text, 3))[: ceil(0.1 * 40)])
    assert set(split_documents(documents[::-1], 0.1, seed=3)[1]) == set(validation), "depends on the order"
    assert set(split_documents(documents, 0.1, seed=4)[1]) != set(validation), "does not depend on the seed"
    assert split_documents(documents, 0.0, seed=3) == (documents, [])
    assert split_documents(["a", "b"], 0.99, seed=0)[0], "nothing left to train on"
    with pytest.raises(ValueError, match="1 distinct document"):
        split_documents(["same", "same"], 0.05, seed=0)
    with pytest.raises(ValueError, match="below 1"):
        split_documents(documents, 1.0, seed=0)


@pytest.mark.parametrize("fraction", [0, 0.3, 0.9])
@pytest.mark.parametrize("block", [1, 3, 1000])
def test_split_tokens_are_those_of_split_documents(digits, fraction, block, monkeypatch):
    monkeypatch.setattr("flexmoe.data.tokens._MOVED_AT_ONCE", block)
    chance = random.Random(5)
    documents = [" ".join(chance.choices("123456789", k=chance.randint(1, 6))) for _ in range(60)]
    text = tokenize(documents, digits, vocab_size=11, seed=2)
    sides = split_tokens(text, held_out(text.keys, fraction))
    for tokens, side in zip(sides, split_documents(documents, fraction, seed=2), strict=True):
        assert tokens.tolist() == [int(token) for document in side for token in (*document.split(), 10)]


@pytest.mark.promise("`train`, `evaluate`", "large text", "4 bytes per token are held")
def test_tokens_need_four_bytes_each(digits):
    documents = ["1 2 3 4 5 6 7 8 9 0 " * 200] * 1000  # 2 million tokens
    tokenize(documents[:2], digits, vocab_size=11)  # what is allocated once
    tracemalloc.start()
    try:
        text = tokenize(documents, digits, vocab_size=11)
        training, _ = split_tokens(text, np.arange(1000) % 20 == 7)
        sequences = cut_sequences(training, 64, 950)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sequences.numel() == 1_900_950 // 64 * 64
    assert peak < 4 * 2_001_000 * 1.15 + 25_000_000, "a batch of Python integers, and a growing array, come on top"
