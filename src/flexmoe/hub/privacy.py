r"""Finds private text before an upload: e-mail addresses, access tokens, private keys, local paths.

Tokens and keys are found by MongoDB's Kingfisher (some 500 rules; it works offline, and no secret is tried out), and
by the rules here, which also cover what its rules leave out: halves of a pair, keys without their end, passwords in
URLs. Addresses and paths are found by the rules here. Text is read as its reader will see it: in its encoding, also
UTF-16 and UTF-32, and with the escapes of JSON (`\u0040`, `\/`, `\n`) resolved, up to two levels deep.

Detection has false positives and false negatives. Does not cover training data, text that a model has memorised, or
addresses and paths that are compressed or encoded in base64.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from flexmoe.io.folders import read_regular_file
from flexmoe.io.tensors import TensorFile

EMAIL, TOKEN, KEY, PASSWORD = "an e-mail address", "an access token", "a private key", "a password in a URL"
PATH = "a local path"
SECRETS = frozenset({TOKEN, KEY, PASSWORD})

MAX_SCANNED_BYTES = 256 << 20  # of a file: the largest open tokenizers have 35 MB

# Each rule is a literal, which is searched for, and a pattern, which is tried where the literal begins.
_START = r"(?<![A-Za-z0-9_])"
_TOKENS = {
    "hf_": r"hf_[A-Za-z0-9]{20,}",
    "api_org_": r"api_org_[A-Za-z0-9]{20,}",
    **{f"gh{letter}_": rf"gh{letter}_[A-Za-z0-9]{{30,}}" for letter in "opsur"},
    "github_pat_": r"github_pat_\w{30,}",
    "glpat-": r"glpat-[\w-]{20,}",
    "sk-": r"sk-[A-Za-z0-9_-]{20,}",
    "AKIA": r"AKIA[0-9A-Z]{16}",
    "ASIA": r"ASIA[0-9A-Z]{16}",
    "aws_secret_access_key": r"aws_secret_access_key\W{1,5}[A-Za-z0-9+/]{40}",
    "AccountKey": r"AccountKey=[A-Za-z0-9+/]{40,}",
    "AIza": r"AIza[\w-]{35}",
    "ya29.": r"ya29\.[\w-]{20,}",
    **{f"xox{letter}-": rf"xox{letter}-[\w-]{{10,}}" for letter in "abeprs"},
    "pypi-": r"pypi-[\w-]{40,}",
    "npm_": r"npm_[A-Za-z0-9]{36}",
    "ntn_": r"ntn_[A-Za-z0-9]{40,}",
    "tskey-": r"tskey-[a-z]+-[\w-]{20,}",
    "eyJ": r"eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",  # JSON Web Token
}
_TELEGRAM = r"(?<=\d{8}):AA[\w-]{33}"
_PASSWORD = r"(?<=[a-z0-9])://[^\s/:@\"'`<>{}\[\]$]{1,100}:[^\s/:@\"'`<>{}\[\]$]{1,100}@[\w.-]+"
_KEYS = {
    "-BEGIN": r"-BEGIN (?:[A-Z0-9]{1,20} ){0,4}PRIVATE KEY(?: BLOCK)?-{4,5}",
    "- BEGIN": r"- BEGIN (?:[A-Z0-9]{1,20} ){0,4}PRIVATE KEY -{4,5}",
    "PuTTY-User-Key-File-": r"PuTTY-User-Key-File-\d",
}
# Folders that all machines have; those with people's files; the first parts of paths in URLs, and examples.
_COMMON = "bin|boot|dev|etc|lib(?:32|64|exec)?|proc|sbin|sys|usr"
_OF_PEOPLE = "home|Users|root|mnt|media|srv|opt|data|tmp|var|work|workspace|scratch"
_OF_URLS = r"api|v\d+|r|u|chat|completions|docs|download|html|javascript|dist|pub|path|your|some"
_REST = r"[^\s\"'`<>)\]|\\]*"
_WINDOWS_REST = r"[^\s\"'`<>)\]|]*"
_DRIVES = (":\\", ":/")  # the letter of the drive is before the literal
_SCHEMES = ("file", "smb", "nfs", "afp", "hdfs", "abfs", "abfss", "wasb", "wasbs", "dbfs", "sftp")
_PATHS = {
    # At least two folders deep, or three if the first is a letter. Not a link, a tag, or part of an expression.
    "/": r"(?<![\w/.~<})\\*+?-])(?<!\]\()(?<!href=[\"'])(?<!src=[\"'])"
    rf"/(?!(?:{_COMMON}|{_OF_URLS})/)(?!\S*/v\d+/(?:chat|completions|embeddings|messages|models|responses)\b)"
    rf"(?:(?:{_OF_PEOPLE})/\w"
    rf"|(?:[^\W\d][\w.~@+-]+|[A-Za-z](?=/[\w.-]{{2,}}/))(?:/[\w.~@+=%-]+)*/[\w.~@+=%-]{{2,}}){_REST}",
    "~/": rf"(?<![\w/.~-])~/\w{_REST}",
    _DRIVES[0]: rf"(?<=[A-Za-z])(?<![A-Za-z0-9_\\][A-Za-z]):\\{{1,2}}[\w$.~-]{{2,}}{_WINDOWS_REST}",  # C:\x
    _DRIVES[1]: rf"(?<=[A-Za-z])(?<![A-Za-z0-9_\\][A-Za-z]):/[\w$.~-]{{2,}}/{_WINDOWS_REST}",  # C:/x/y
    "\\\\": rf"(?<![\w\\])\\\\[\w.-]{{2,}}\\(?!\\)[\w$.-]{{2,}}{_WINDOWS_REST}",  # \\server\share
    **{f"{scheme}:/": rf"(?<!\w){scheme}:/{{1,3}}[\w.$~-]{_REST}" for scheme in _SCHEMES},
}
_RULES = [
    *((TOKEN, literal, re.compile(_START + pattern, re.ASCII)) for literal, pattern in _TOKENS.items()),
    (TOKEN, ":AA", re.compile(_TELEGRAM, re.ASCII)),
    (PASSWORD, "://", re.compile(_PASSWORD)),
    *((KEY, literal, re.compile(pattern)) for literal, pattern in _KEYS.items()),
    *((PATH, literal, re.compile(pattern)) for literal, pattern in _PATHS.items()),
]
# A top-level domain has no digits; the rest of an address may be in any script (RFC 6531).
_DOMAIN = re.compile(r"(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.){1,8}(?:[^\W\d_]{2,24}|xn--[a-z0-9-]{2,59})(?![\w-])")
_LOCAL_PART = re.compile(r"[^\W_][\w.+'-]{0,63}\Z")
_NO_PERSON = frozenset({"git"})  # git@host: a way to write a repository's URL

_ESCAPES = re.compile(r"\\(?:u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|([\"\\/bfnrt]))")
# A line feed becomes a carriage return: it separates words, and the numbers of lines stay those of the file.
_ESCAPED = {"b": " ", "f": " ", "n": "\r", "r": "\r", "t": "\t"}
_JSON_SUFFIXES = (".json", ".jsonl", ".sig")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]+")
_SPACES_OF_TOKENIZERS = "ĠĊĉ▁"  # how a space, a line feed and a tab are written inside of a token


@dataclass(frozen=True)
class Discovery:
    """Text that looks private: its kind, file and line (from 1), its beginning, and the rule that found it."""

    kind: str
    file: str
    line: int
    excerpt: str
    rule: str = ""

    def __str__(self) -> str:
        rule = f"; rule {self.rule}" if self.rule else ""
        return f"{self.file}, line {self.line}: {self.kind} ({self.excerpt}{rule})"


@dataclass(frozen=True)
class _Match:
    kind: str
    start: int
    text: str
    rule: str = ""


def scan_file(path: Path, name: str, *, is_vocabulary: bool = False) -> list[Discovery]:
    """What looks private in a file: of safetensors in the header, of other files in all of it.

    Args:
        path: the file.
        name: its name in messages.
        is_vocabulary: it belongs to a tokenizer, whose tokens write spaces in their own way.

    Raises:
        ValueError: the file is larger than `MAX_SCANNED_BYTES`, or not a valid safetensors file.
        ImportError: the scanner is not installed.
    """
    if name.endswith(".safetensors"):
        with TensorFile(path) as file:
            return list(scan(decode(file.header[8:]), name, is_json=True))
    text = decode(read_regular_file(path, max_bytes=MAX_SCANNED_BYTES))
    return list(scan(text, name, is_json=name.endswith(_JSON_SUFFIXES), is_vocabulary=is_vocabulary))


def scan(text: str, file: str, *, is_json: bool = False, is_vocabulary: bool = False) -> Iterator[Discovery]:
    """Yields what looks private in a text; of tokens and keys, the excerpt has the first characters only.

    Args:
        file: its name in the results.
        is_json: only the text without its escapes is read.
        is_vocabulary: as in `scan_file`.
    """
    seen: set[tuple[str, int]] = set()
    for reading in _readings(_CONTROL.sub(" ", text), is_json):
        for mark in _SPACES_OF_TOKENIZERS if is_vocabulary else "":
            reading = reading.replace(mark, " ")
        found = []
        for match in _apart(_matches(reading)):
            line = reading.count("\n", 0, match.start) + 1
            if (match.kind, line) not in seen:
                found.append(Discovery(match.kind, file, line, _excerpt(match), match.rule))
        yield from found
        seen |= {(discovery.kind, discovery.line) for discovery in found}


def decode(data: bytes) -> str:
    """The text of a file: in UTF-8, or in UTF-16 or UTF-32 by its byte order mark or its zero bytes."""
    for mark, encoding in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if data.startswith(mark):
            return data.decode(encoding, errors="replace")
    start = data[:4096]
    even, odd = start[::2].count(0), start[1::2].count(0)
    if max(even, odd) > len(start) // 5 and min(even, odd) <= len(start) // 50:
        return data.decode("utf-16-le" if odd > even else "utf-16-be", errors="replace")
    return data.decode("utf-8", errors="replace")


def _readings(text: str, is_json: bool) -> Iterator[str]:
    """The text as it is, unless it is JSON, and without its escapes, as long as there are any."""
    if not is_json:
        yield text
    for level in range(2):
        unescaped = _ESCAPES.sub(_unescape, text)
        if unescaped != text:
            text = unescaped.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # joins surrogates
        elif not (is_json and level == 0):
            return
        yield text


def _unescape(match: re.Match[str]) -> str:
    code, byte, letter = match.groups()
    if letter:
        return _ESCAPED.get(letter, letter)
    character = chr(int(code or byte, 16))
    return "\r" if character == "\n" else character


def _apart(matches: Iterable[_Match]) -> Iterator[_Match]:
    """The matches in order, without those inside of another: a password in a URL looks like part of an address."""
    end = -1
    for match in sorted(matches, key=lambda match: (match.start, -len(match.text))):
        if match.start >= end:
            yield match
            end = match.start + len(match.text)


def _matches(text: str) -> Iterator[_Match]:
    for kind, literal, pattern in _RULES:
        for at in _positions(text, literal):
            if match := pattern.match(text, at):
                start = at - 1 if literal in _DRIVES else at
                yield _Match(kind, start, text[start : match.end()])
    yield from _secrets(text)
    for at in _positions(text, "@"):
        domain = _DOMAIN.match(text, at + 1)
        local = _LOCAL_PART.search(text, max(0, at - 64), at) if domain else None
        if domain and local and local[0] not in _NO_PERSON:
            yield _Match(EMAIL, local.start(), f"{local[0]}@{domain[0]}")


def _positions(text: str, literal: str) -> Iterator[int]:
    at = text.find(literal)
    while at >= 0:
        yield at
        at = text.find(literal, at + 1)


def _secrets(text: str) -> Iterator[_Match]:
    data = text.encode("utf-8", "replace")
    for found in _scanner()(data):
        if found.visible:
            kind = KEY if "PRIVATE KEY" in found.secret else TOKEN
            start = len(data[: found.location["start_offset"]].decode("utf-8", "ignore"))
            yield _Match(kind, start, found.secret, found.rule_id)


@cache
def _scanner() -> Callable[[bytes], list[Any]]:
    """Kingfisher's scan of bytes; its rules are compiled once per machine (10 s) and then read from a cache (1 s)."""
    try:
        from kingfisher_sdk import Scanner
    except ImportError as error:
        raise ImportError(
            f"Files are scanned for access tokens before they are pushed, and the scanner is not installed ({error}). "
            "Install it: pip install kingfisher-secret-scanner. It has no build for some systems; push from another "
            "one then."
        ) from error
    return Scanner().scan


def _excerpt(match: _Match) -> str:
    text = match.text
    return f"{text[: min(8, len(text) // 4)]}..." if match.kind in SECRETS else text[:100]


__all__ = ["PATH", "SECRETS", "Discovery", "decode", "scan", "scan_file"]
