"""Files that do not belong to a model folder, at random: names that resemble those of a model, links, folders, pipes.

Each holds `MARK`, so that a copy is recognised wherever it turns up.
"""

from __future__ import annotations

import os
from pathlib import Path
from random import Random

MARK = b"stray-0f6b21c4"

_NAMES = (
    *("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "router.safetensors"),
    *(
        "expert.safetensors",
        "expert-00001-of-00003.safetensors",
        "expert.safetensors.index.json",
        "expert_config.json",
    ),
    *("config.json", "generation_config.json", "README.md", "modeling_flexmoe.py", "public_sample.jsonl", "model.sig"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja"),
    *(
        "LICENSE",
        "USE_POLICY.md",
        "notes.txt",
        "corpus.jsonl",
        "train.py",
        "optimizer.pt",
        "pytorch_model.bin",
        ".env",
    ),
)
_FOLDERS = ("custom_generate", "checkpoint-10", "data", ".git", "experts", "original", "runs")


def stray_name(chance: Random) -> str:
    """A name that is like that of a file of a model, but for a word, a suffix, a case or a letter."""
    name = chance.choice(_NAMES)
    stem, suffix = os.path.splitext(name)
    word = chance.choice(("old", "backup", "with-math", "2", "private", "copy", "tmp"))
    other = chance.choice((".txt", ".json", ".jsonl", ".py", ".pem", ".csv", ".gguf", ".bin"))
    return chance.choice(
        (
            f"{word}.{name}",
            f"{name}.{word}",
            f"{name}~",
            f"{stem}.{word}.{word}{suffix}",
            f"{stem} ({word}){suffix}",
            f"{name} ",
            f".{name}",
            f"{name.replace('e', chr(0x435))}\N{ZERO WIDTH SPACE}",  # with a Cyrillic letter
            f"{word}_flexmoe.py",
            f"{word}.safetensors",
            f"{word}{chance.randrange(1000)}{other}",
        )
    )


def add_stray_files(folder: Path, chance: Random, outside: Path) -> list[str]:
    """Puts one to five stray files into a folder; returns their names.

    Args:
        outside: a folder for the targets of links.
    """
    names: list[str] = []
    for _ in range(chance.randint(1, 5)):
        name = stray_name(chance) if chance.random() < 0.8 else chance.choice(_FOLDERS)
        if not os.path.lexists(folder / name):
            _make(folder / name, chance, outside)
            names.append(name)
    return names


def _make(path: Path, chance: Random, outside: Path) -> None:
    kind = chance.random()
    if path.name in _FOLDERS:
        path.mkdir()
        (path / chance.choice(("generate.py", "model.safetensors", "config.json", "x.jinja"))).write_bytes(MARK)
    elif kind < 0.7:
        path.write_bytes(MARK + chance.randbytes(chance.randrange(100)))
    elif kind < 0.9:
        (outside / "secret").write_bytes(MARK)
        path.symlink_to(outside / "secret")
    elif kind < 0.95:
        path.symlink_to(path.name)
    else:
        os.mkfifo(path)


__all__ = ["MARK", "add_stray_files", "stray_name"]
