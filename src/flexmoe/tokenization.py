"""The anchor's tokenizer in a FlexMoE checkpoint: every checkpoint that is written reads text as its anchor does.

`AutoTokenizer` chooses a class by `model_type` and by `tokenizer_class`. A conversion changes the `model_type`, so the
same files may give other tokens. `copy_tokenizer` therefore stores the class that was chosen for the source, and
compares the ids of both on `PROBE`.

Does not cover training a tokenizer, or tokenizers that are code of a repository: these are refused.
"""

from __future__ import annotations

import copy
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from flexmoe.foreign_code import foreign_code, without_foreign_code
from flexmoe.io.folders import file_inside
from flexmoe.io.lfs import refuse_pointers
from flexmoe.io.strict_json import json_text, read_json_object
from flexmoe.modeling.configuration_flexmoe import FlexMoeConfig

TOKENIZER_CONFIG = "tokenizer_config.json"
ANY_CLASS = "TokenizersBackend"
"""transformers' class that reads tokenizer.json as it is, for every family."""

TOKENIZER_FILES = frozenset(
    {
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("tokenizer.model", "sentencepiece.model", "sentencepiece.bpe.model", "spiece.model", "spm.model"),
        *("source.spm", "target.spm", "spm_char.model", "vocab.json", "vocab.txt", "vocab.bpe", "dict.txt"),
        *("vocab-src.json", "vocab-tgt.json", "target_vocab.json", "merges.txt", "bpe.codes", "emoji.json"),
        *("entity_vocab.json", "normalizer.json", "byte_maps.json", "prophetnet.tokenizer", "tekken.json"),
        *("word_shape.json", "word_pronunciation.json"),
    }
)
"""The files that tokenizers of transformers read and write; beside these, `_OTHER_VOCABULARY`."""

_SETTINGS = frozenset({"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"})

# such as tokenizer.model.v3 of Mistral, and qwen.tiktoken
_OTHER_VOCABULARY = re.compile(r"tokenizer\.model\.v\d{1,2}(m\d{1,2})?|\w[\w.-]*\.tiktoken", re.ASCII)

PROBE = (
    "Hello world, it's 12 o'clock; they'LL say we've 1234567 or 3.14159 or ١٢٣.",
    "def f(x):\n        return x+1  # comment\n\n\n\tif x>=2 and y!=3: print('a  b')\r\n",
    "  leading, trailing and   inner spaces   ",
    "\n\n \n\t\n",
    "naïve café cafe\u0301 Straße ŒUVRE ﬁne Ⅷ ½",
    "Привет, мир! Γειά σου 世界你好 こんにちは 안녕하세요 नमस्ते สวัสดี שלום مرحبا",
    "🙂👩‍👩‍👧 → ≤ “quoted” … — e.g. https://example.org/a_b?c=d&e=%20",
    "<s>[INST] <|endoftext|> </s> <unk> ▁under\u00a0no-break\u200bzero\u2028line \x07 \ufffd",
)
"""Texts in which pre-tokenizers, normalisers and special tokens differ."""

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


class TokenizerError(ValueError):
    """A tokenizer that cannot be read, or that reads other tokens than the anchor's."""


def is_tokenizer_file(name: str) -> bool:
    """Whether a file of this name belongs to a tokenizer."""
    return name in TOKENIZER_FILES or _OTHER_VOCABULARY.fullmatch(name) is not None


def tokenizer_files(folder: Path) -> list[str]:
    """The names of the files of a tokenizer in `folder`."""
    return sorted(path.name for path in folder.iterdir() if is_tokenizer_file(path.name) and not path.is_dir())


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds a vocabulary."""
    return not _SETTINGS.issuperset(tokenizer_files(folder))


def read_tokenizer(
    folder: Path, config: PreTrainedConfig | None = None, repo: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, of the class that `AutoTokenizer` chooses for a model with this config.

    Args:
        config: None takes that of the folder.
        repo: the Hub id that the folder is a snapshot of; for some, transformers chooses another class.

    Raises:
        TokenizerError: it cannot be read, or is code of the repository.
        GitLfsPointerError: a file of it is a Git LFS pointer.
    """
    refuse_pointers(folder / name for name in tokenizer_files(folder))
    try:
        if config is None and repo is not None:
            config = AutoConfig.from_pretrained(folder)
        if config is not None:
            config = copy.copy(config)
            config._name_or_path = repo or str(folder)
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and sentencepiece raise various kinds
        code = foreign_code(_tokenizer_config(folder))
        why = f" It is code of the repository ({', '.join(code)}), which FlexMoE does not run." if code else ""
        raise TokenizerError(
            f"The tokenizer in {folder} cannot be read ({type(error).__name__}: {str(error).strip()[:300]}).{why} "
            "Mend or complete its files, install what it needs, or remove them to go on without a tokenizer."
        ) from error


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, for work on text; warns if a FlexMoE's tokenizer is not its anchor's.

    Raises:
        TokenizerError: as `read_tokenizer`.

    Example:
        tokenizer = load_tokenizer("graft")
    """
    folder = Path(folder)
    tokenizer = read_tokenizer(folder)
    if reason := differs_from_anchor(folder, tokenizer):
        warnings.warn(reason, stacklevel=2)
    return tokenizer


def differs_from_anchor(folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> str | None:
    """Why the tokenizer of a FlexMoE checkpoint is not its anchor's; None if it is, or if there is none to compare.

    Checkpoints that FlexMoE wrote before it stored the tokenizer's class may differ.
    """
    if not has_tokenizer(folder) or not _is_of_flexmoe(folder):
        return None
    anchor = read_tokenizer(folder, FlexMoeConfig.from_pretrained(folder).anchor_config)
    tokenizer = tokenizer or read_tokenizer(folder)
    if type(anchor) is type(tokenizer) or (text := first_difference(anchor, tokenizer)) is None:
        return None
    return (
        f"{folder}: its tokenizer loads as {type(tokenizer).__name__}, its anchor's as {type(anchor).__name__}, and "
        f"the two read other tokens in {text!r}. What was trained on this checkpoint was trained on other tokens than "
        f"its anchor knows. Graft the anchor again; or, to read the anchor's tokens from now on, set "
        f'"tokenizer_class": "{type(anchor).__name__}" in {TOKENIZER_CONFIG}.'
    )


def check_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a FlexMoE checkpoint, for `copy_tokenizer`; None if it has none.

    Raises:
        TokenizerError: it is not its anchor's, or as `read_tokenizer`.
    """
    tokenizer = read_tokenizer(folder) if has_tokenizer(folder) else None
    if reason := differs_from_anchor(folder, tokenizer):
        raise TokenizerError(reason)
    return tokenizer


def first_difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    """The first text of `PROBE` that two tokenizers read or write differently, or the name of a special id."""
    for name in _SPECIAL:
        if getattr(one, name) != getattr(other, name):
            return name
    if len(one) != len(other):
        return f"a vocabulary of {len(one)} against {len(other)}"
    for text in (*PROBE, "".join(PROBE), *_around_special(one)):
        for special in (True, False):
            ids, others = (list(t(text, add_special_tokens=special)["input_ids"]) for t in (one, other))
            if ids != others or one.decode(ids) != other.decode(others):
                return text
    return None


def _around_special(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    for token in list(tokenizer.get_added_vocab())[:16]:
        yield f"a {token} b{token}c"


def copy_tokenizer(
    source: Path,
    folder: Path,
    config: PreTrainedConfig,
    repo: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Copies the tokenizer of the checkpoint `source` into `folder`, a checkpoint of a model with this config.

    Args:
        repo: the Hub id that `source` is a snapshot of.
        tokenizer: that of `source`, if it was read already; large ones take seconds.

    Raises:
        TokenizerError: it cannot be read, or would read other tokens in `folder`.
        ValueError: a file is a link out of `source`.

    Warns:
        UserWarning: code of the repository that the files name is left out; or ids have no embedding.
    """
    for name in tokenizer_files(source):
        shutil.copyfile(file_inside(source, name), folder / name)
    values = _tokenizer_config(source)
    if code := foreign_code(values):
        warnings.warn(
            f"{source / TOKENIZER_CONFIG} names code of a repository, which is left out, so text is read as without "
            f"it: {', '.join(code)}.",
            stacklevel=3,
        )
    if not has_tokenizer(source):
        _write_config(folder, values, values.get("tokenizer_class"))
        return
    tokenizer = tokenizer or read_tokenizer(source, repo=repo)
    _write_config(folder, values, type(tokenizer).__name__)
    # of one FlexMoE model to another: the same files, class and `model_type`
    unchanged = config.model_type == FlexMoeConfig.model_type and _is_of_flexmoe(source)
    if unchanged and _tokenizer_config(folder) == values:
        return warn_of_missing_embeddings(tokenizer, config)
    if _first_difference(tokenizer, folder, config) is not None:
        # the class reads a vocabulary in its own way: store what it made of it
        tokenizer.save_pretrained(folder)
        _write_config(folder, _tokenizer_config(folder), ANY_CLASS)
        if (text := _first_difference(tokenizer, folder, config)) is not None:
            raise TokenizerError(
                f"The tokenizer in {source} ({type(tokenizer).__name__}) would read other tokens in {text!r} as part "
                f"of a {config.model_type} model. Save it as a tokenizer.json that {ANY_CLASS} reads alike, or remove "
                "its files to go on without a tokenizer."
            )
    warn_of_missing_embeddings(tokenizer, config)


def _first_difference(tokenizer: PreTrainedTokenizerBase, folder: Path, config: PreTrainedConfig) -> str | None:
    try:
        return first_difference(tokenizer, read_tokenizer(folder, config))
    except TokenizerError as error:
        return str(error)


def warn_of_missing_embeddings(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Warns of ids that the model has no embedding for: a text that contains one cannot be read."""
    rows = config.get_text_config().vocab_size
    if beyond := sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows):
        first = ", ".join(f"{token!r} ({i})" for i, token in beyond[:5])
        warnings.warn(
            f"The tokenizer has {len(beyond)} token(s) without an embedding, as the model has {rows} rows: {first}. "
            "Texts that contain one will be refused. If they are needed, call resize_token_embeddings on the anchor, "
            "save it and graft that.",
            stacklevel=4,
        )


def _is_of_flexmoe(folder: Path) -> bool:
    path = folder / "config.json"
    return path.is_file() and read_json_object(path).get("model_type") == FlexMoeConfig.model_type


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / TOKENIZER_CONFIG
    return read_json_object(path) if path.is_file() else {}


def _write_config(folder: Path, values: dict[str, Any], tokenizer_class: str | None) -> None:
    """Writes tokenizer_config.json with this class and without code; the file keeps its bytes if it has both."""
    wanted = without_foreign_code(copy.deepcopy(values))
    if tokenizer_class is not None:
        wanted["tokenizer_class"] = tokenizer_class
    path = folder / TOKENIZER_CONFIG
    if values and not wanted:
        path.unlink(missing_ok=True)
    elif wanted and _tokenizer_config(folder) != wanted:
        path.write_text(json_text(wanted), encoding="utf-8")


__all__ = [
    "PROBE",
    "TOKENIZER_FILES",
    "TokenizerError",
    "check_tokenizer",
    "copy_tokenizer",
    "differs_from_anchor",
    "first_difference",
    "has_tokenizer",
    "is_tokenizer_file",
    "load_tokenizer",
    "read_tokenizer",
]
