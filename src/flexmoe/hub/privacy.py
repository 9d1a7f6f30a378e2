"""Finds private text: e-mail addresses, access tokens, private keys, local paths.

For cards, manifests and other short texts, before they are uploaded. Detection is by patterns, with false positives
and false negatives. Does not cover training data, or text that a model has memorised.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_WORD_BEFORE = r"(?<![A-Za-z0-9_])"
_KINDS: dict[str, re.Pattern[str]] = {
    "an e-mail address": re.compile(
        r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])", re.ASCII
    ),
    "an access token": re.compile(
        _WORD_BEFORE + r"(?:hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|gh[opsur]_[A-Za-z0-9]{30,}|github_pat_\w{30,}"
        r"|glpat-[\w-]{20,}|sk-[A-Za-z0-9_-]{20,}|AKIA[0-9A-Z]{16}|AIza[\w-]{35}|xox[abprs]-[\w-]{10,}|pypi-[\w-]{40,}"
        r"|npm_[A-Za-z0-9]{36}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})",
        re.ASCII,
    ),
    "a private key": re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
    "a local path": re.compile(
        r"(?<![\w/.~-])(?:/(?:home|Users|root|mnt|media|scratch|data|tmp|var|work|workspace|private|gpfs|lustre|nfs)"
        r"/[\w.~-][^\s\"'`)>\]]*|~/[\w.][^\s\"'`)>\]]*|[A-Za-z]:\\[^\s\"'`)>\]]+|\\\\[\w.-]+\\[^\s\"'`)>\]]+"
        r"|file://[^\s\"'`)>\]]+)",
        re.ASCII,
    ),
}


@dataclass(frozen=True)
class Discovery:
    """A match in a text: its kind, file, line (from 1), and beginning."""

    kind: str
    file: str
    line: int
    excerpt: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.kind} ({self.excerpt})"


def scan(text: str, file: str) -> Iterator[Discovery]:
    """Yields the matches in `text`, line by line; of tokens and keys, only the first characters are kept."""
    for number, line in enumerate(text.splitlines(), 1):
        for kind, pattern in _KINDS.items():
            for match in pattern.finditer(line):
                secret = kind in ("an access token", "a private key")
                yield Discovery(kind, file, number, f"{match[0][:8]}..." if secret else match[0][:100])


__all__ = ["Discovery", "scan"]
