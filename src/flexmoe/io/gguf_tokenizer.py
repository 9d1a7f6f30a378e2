"""The tokenizer of a GGUF file, as the files that `AutoTokenizer` loads.

transformers builds it. Three things are then taken from the file or checked against it, because a wrong one gives
other tokens without an error: ids, special tokens, and how text is split before tokens are looked up.

Does not cover normalisation (NFC in the tokenizers of Qwen and Command R), which GGUF files do not state.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from transformers import TOKENIZER_MAPPING, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from flexmoe.io.tensors import listed

GPT2_SPLIT = frozenset(
    {
        *("gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v2-code", "mpt", "olmo", "jais"),
        *("roberta-bpe", "gigachat", "a.x-4.0", "mellum", "modern-bert", "exaone4", "trillion", "granite-docling"),
    }
)
"""Pre-tokenizers that split as GPT-2's, which transformers takes where it knows none."""

DIGITS_THEN_GPT2_SPLIT = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"}
)
"""Pre-tokenizers that first isolate each digit. transformers splits as GPT-2's instead: it reads other tokens where
two or more white-space characters precede a digit, as in a numbered list after an empty line.

Source: `llm_tokenizer_bpe` in https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp
"""

_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}

_START = {"add_bos_token": "tokenizer.ggml.add_bos_token", "add_eos_token": "tokenizer.ggml.add_eos_token"}

CONTROL = 3  # of tokenizer.ggml.token_type


def special_ids(entries: Mapping[str, Any]) -> dict[str, Any]:
    """The ids of special tokens, as in a generation config: `eos_token_id` is a list if a turn ends with another.

    llama.cpp stops at both; a chat model of transformers would go on after its turn.

    Args:
        entries: the metadata of a GGUF file.
    """
    ids = {
        f"{name}_token_id": entries[f"tokenizer.ggml.{key}_token_id"]
        for name, key in _SPECIAL.items()
        if f"tokenizer.ggml.{key}_token_id" in entries
    }
    turn = entries.get("tokenizer.ggml.eot_token_id")
    if turn is not None and turn != ids.get("eos_token_id"):
        ids["eos_token_id"] = [*([ids["eos_token_id"]] if "eos_token_id" in ids else []), turn]
    return ids


def convert_tokenizer(
    file: Path, entries: Mapping[str, Any], config_class: type[PreTrainedConfig], folder: Path
) -> None:
    """Writes the tokenizer and the chat template of a GGUF file into `folder`.

    Args:
        entries: the file's metadata.
        config_class: of the file's model, for which transformers has a class of tokenizers.

    Raises:
        ValueError: transformers builds a tokenizer that gives tokens other ids than the file.

    Warns:
        UserWarning: the file has no tokenizer, or a pre-tokenizer that transformers does not have.
    """
    kind = entries.get("tokenizer.ggml.model")
    if kind is None or "tokenizer.ggml.tokens" not in entries:
        warnings.warn(f"{file.name} holds no tokenizer: copy one into the folder that is written.", stacklevel=7)
        return
    try:
        tokenizer = _load(file, config_class)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: transformers cannot build its tokenizer {kind!r} ({type(error).__name__}: {error}). Graft the "
            "original checkpoint instead."
        ) from error
    if kind == "gpt2":
        _split_as(tokenizer.backend_tokenizer, entries.get("tokenizer.ggml.pre"), file)
    tokenizer = _with_the_files_tokens(tokenizer, entries)
    _check_ids(tokenizer, entries, file)
    tokenizer.save_pretrained(folder)


def _load(file: Path, config_class: type[PreTrainedConfig]) -> Any:
    """transformers' tokenizer of the file, of the class that `AutoTokenizer` chooses.

    `AutoTokenizer` itself builds the config again, for which it reads the whole vocabulary with the gguf package.
    """
    chosen = TOKENIZER_MAPPING.get(config_class, PreTrainedTokenizerFast)
    reads_gguf = isinstance(chosen, type) and issubclass(chosen, PreTrainedTokenizerFast)
    if not reads_gguf or (file.parent / "tokenizer_config.json").exists():  # which may name another class
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    return chosen.from_pretrained(file.parent, gguf_file=file.name)


def _with_the_files_tokens(tokenizer: Any, entries: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The same tokenizer with the file's special tokens, and without tokens that the file does not have.

    transformers adds "<|endoftext|>" to each byte-level vocabulary, with an id that has no embedding.
    """
    tokens = entries["tokenizer.ggml.tokens"]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < len(tokens)]
    special = {}
    for name, given in special_ids(entries).items():
        special[name.removesuffix("_id")] = tokens[given[0] if isinstance(given, list) else given]
    starts = {} if entries["tokenizer.ggml.model"] == "gemma4" else _START  # gemma4's template writes the token itself
    added = {name: entries[key] for name, key in starts.items() if key in entries}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        chat_template=entries.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{"bos_token": None, "eos_token": None, **special, **added},
    )


def _split_as(backend: Tokenizer, pre: str | None, file: Path) -> None:
    """Gives a byte-level tokenizer the split that the file names, unless transformers did."""
    state = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer is not None else {}
    if state.get("type") != "ByteLevel" or not state.get("use_regex", True) or pre in GPT2_SPLIT:
        return  # a split of its own, or GPT-2's and meant
    if pre in DIGITS_THEN_GPT2_SPLIT:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        return
    stated = "no pre-tokenizer" if pre is None else f"the pre-tokenizer {pre!r}, which transformers does not have"
    warnings.warn(
        f"{file.name} states {stated}, so text is split as by GPT-2's. Tokens may differ from those that the model "
        "was trained on, which makes it worse without an error. If the original tokenizer is available, copy its "
        "files over those that are written, before anything is trained.",
        stacklevel=8,
    )


def _check_ids(tokenizer: Any, entries: Mapping[str, Any], file: Path) -> None:
    """Checks that ids are the file's, and that special tokens in a text are read as one token."""
    tokens, types = entries["tokenizer.ggml.tokens"], entries.get("tokenizer.ggml.token_type") or []
    vocabulary = tokenizer.get_vocab()
    wrong = [token for i, token in enumerate(tokens) if token in vocabulary and vocabulary[token] != i]
    unread = [
        token
        for i, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if kind == CONTROL and token in vocabulary and tokenizer(token, add_special_tokens=False)["input_ids"] != [i]
    ]
    if wrong or unread or len(vocabulary) > len(tokens):
        raise ValueError(
            f"{file}: the tokenizer that transformers builds does not read the file's tokens. It has "
            f"{len(vocabulary)} of {len(tokens)}; with other ids: {listed(wrong) or 'none'}; special tokens that it "
            f"cuts into pieces: {listed(unread) or 'none'}. Graft the original checkpoint instead."
        )


__all__ = ["DIGITS_THEN_GPT2_SPLIT", "GPT2_SPLIT", "convert_tokenizer", "special_ids"]
