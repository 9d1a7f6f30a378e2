"""The files beside a model's weights: generation settings, tokenizer, chat templates, licence, public sample.

One table for all ways in and out: a conversion copies, a push sends and a pull keeps exactly these. The card, the
config and code are not among them: they are written anew with each model.

Does not cover the weights (`flexmoe.hub.contents`) or how a tokenizer is read (`flexmoe.tokenization`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from flexmoe.foreign_code import copy_companion
from flexmoe.io.folders import file_inside
from flexmoe.io.hashing import sha256_of
from flexmoe.packages.package import CONFIG_FILE
from flexmoe.tokenization import copy_tokenizer, is_tokenizer_file

GENERATION_FILE = "generation_config.json"
TEMPLATES = "additional_chat_templates"

_TEMPLATE = re.compile(r"\w[\w.-]*\.jinja", re.ASCII)
# chat_template.jinja and .json, and those that publishers add, such as chat_template_tools.jinja
_CHAT_TEMPLATE = re.compile(r"chat_template([_.-][\w.-]*)?\.(jinja|json)", re.ASCII)
# LICENSE, LICENSE-APACHE-2.0.txt, COPYING.LESSER, MODEL_LICENSE, USE_POLICY.md
_TERMS = re.compile(
    r"([A-Z0-9]+[-_])*(LICEN[SC]ES?|NOTICE|COPYING|(ACCEPTABLE_)?USE_POLICY|TERMS(_OF_USE)?)"
    r"([-_][\w-]+(\.\d+)*|\.LESSER|\.LLAMA\d*)?(\.(txt|md|rst))?",
    re.ASCII | re.IGNORECASE,
)
_SAMPLE = re.compile(r"\w[\w.-]*\.jsonl", re.ASCII)


def is_terms(name: str) -> bool:
    """Whether a file is a licence, a notice or terms of use, as text."""
    return _TERMS.fullmatch(name) is not None


def is_companion(name: str) -> bool:
    """Whether a file of this name belongs beside a model's weights; the public sample is named by the config."""
    folder, _, file = name.rpartition("/")
    if folder:
        return folder == TEMPLATES and _TEMPLATE.fullmatch(file) is not None
    return (
        name == GENERATION_FILE
        or _CHAT_TEMPLATE.fullmatch(name) is not None
        or is_tokenizer_file(name)
        or is_terms(name)
    )


def companions(folder: Path, public_sample: Any = None) -> dict[str, Path]:
    """The files beside the weights of a model or composition, by their paths in the folder.

    Args:
        public_sample: the record of the public sample in the model's config; None: it has none.

    Raises:
        ValueError: a link leads out of the folder, or the public sample is not the recorded one.
    """
    found = {name: file_inside(folder, name) for name in _files(folder) if is_companion(name)}
    templates = folder / TEMPLATES
    if templates.is_dir() and not templates.is_symlink():
        for name in _files(templates):
            if is_companion(path := f"{TEMPLATES}/{name}"):
                found[path] = file_inside(templates, name)
    return found | _public_sample(folder, public_sample)


def copy_companions(
    source: Path,
    folder: Path,
    config: PreTrainedConfig,
    *,
    repo: str | None = None,
    public_sample: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Copies the files beside the weights of the model in `source` into `folder`, for a model with this config.

    Args:
        repo: the Hub id that `source` is a snapshot of.
        public_sample: the record of the public sample in the config of `source`; None: it is not copied.
        tokenizer: that of `source`, if it was read already.

    Raises:
        TokenizerError: the tokenizer cannot be read, or would read other tokens in `folder`.
        ValueError: as `companions`.

    Warns:
        UserWarning: a file names code of others, which is left out; or tokens have no embedding.
    """
    for name, path in companions(source, public_sample).items():
        if not is_tokenizer_file(name):
            (folder / name).parent.mkdir(exist_ok=True)
            copy_companion(path, folder / name)
    copy_tokenizer(source, folder, config, repo, tokenizer)


def check_digest(path: Path, recorded: Any, what: str) -> None:
    """Compares a file with the hash in the config: an untrusted config could name any file.

    Raises:
        ValueError: they differ.
    """
    if (found := sha256_of(path)[1]) != recorded:
        raise ValueError(
            f"{path} has SHA-256 {found}, but {what} recorded in {CONFIG_FILE} has {recorded}: the file was changed. "
            "Restore it, or save the model again."
        )


def _public_sample(folder: Path, record: Any) -> dict[str, Path]:
    name = record.get("file") if isinstance(record, Mapping) else None
    if not isinstance(name, str) or not _SAMPLE.fullmatch(name) or not (folder / name).is_file():
        return {}
    path = file_inside(folder, name)
    check_digest(path, record.get("sha256"), "the public sample")
    return {name: path}


def _files(folder: Path) -> list[str]:
    """What lies in a folder and is no folder: links that lead nowhere, too, which `file_inside` refuses."""
    return sorted(entry.name for entry in os.scandir(folder) if not entry.is_dir())


__all__ = ["GENERATION_FILE", "check_digest", "companions", "copy_companions", "is_companion", "is_terms"]
