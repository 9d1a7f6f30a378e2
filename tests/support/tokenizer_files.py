"""Folders with the tokenizer files of a dense model of any family, as `AutoTokenizer` reads them."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.models.auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from flexmoe.tokenization import PROBE

KINDS = ("byte level", "metaspace", "unigram")
DECLARED = (
    None,
    "PreTrainedTokenizerFast",
    "GPT2Tokenizer",
    "LlamaTokenizerFast",
    "GPTNeoXTokenizer",
    "Qwen2Tokenizer",
)
"""Values of `tokenizer_class` that checkpoints have; each family is also tried with its own."""

WITHOUT_DEFAULTS = {"gemma4_assistant": "its hidden_size_per_layer_input must be 0, and is 256 by default"}
"""Families whose config transformers 5.23 refuses to make from its own defaults."""

_TEXTS = [*PROBE, "Hello world, it's a test 12345. "] * 20
_SPECIAL = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
_CL100K = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)


@functools.cache
def tokenizer_json(kind: str) -> str:
    """A trained tokenizer: "byte level" as in OLMo 2, "metaspace" or "unigram" as made from sentencepiece."""
    if kind == "unigram":
        return _unigram()
    backend = Tokenizer(models.BPE(byte_fallback=kind == "metaspace", unk_token="<unk>", fuse_unk=True))
    alphabet: list[str] = []
    if kind == "byte level":
        split = pre_tokenizers.Split(Regex(_CL100K), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = _SPECIAL + ([f"<0x{byte:02X}>" for byte in range(256)] if kind == "metaspace" else [])
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_TEXTS, trainer)
    return backend.to_str()


def _unigram() -> str:
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<pad>", *_SPECIAL], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(_TEXTS, trainer)
    return backend.to_str()


def families(every: bool) -> list[str]:
    """The causal families, or one for each way in which `AutoTokenizer` treats them."""
    known = [f for f in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if f in CONFIG_MAPPING and f not in WITHOUT_DEFAULTS]
    if every:
        return known
    ways = {}
    for family in known:
        way = (TOKENIZER_MAPPING_NAMES.get(family), family in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS)
        ways.setdefault(way, family)
    return list(ways.values())


def declared_classes(family: str) -> list[str | None]:
    """The values of `tokenizer_class` to try for a family."""
    return list(dict.fromkeys([*DECLARED, TOKENIZER_MAPPING_NAMES.get(family)]))


def write_tokenizer(folder: Path, family: str, kind: str, tokenizer_class: str | None) -> Any:
    """Writes config.json and the tokenizer's files of a model of this family into `folder`; returns its config."""
    folder.mkdir(parents=True)
    config = CONFIG_MAPPING[family]()
    config.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json(kind), encoding="utf-8")
    values = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    if tokenizer_class is not None:
        values["tokenizer_class"] = tokenizer_class
    (folder / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
    return config


def cases(every: bool) -> Iterator[tuple[str, str, str | None]]:
    """Family, kind of tokenizer and declared class."""
    for family in families(every):
        for kind in KINDS:
            for declared in declared_classes(family):
                yield family, kind, declared
