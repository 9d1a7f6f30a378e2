"""Text that every machine with the demo's dependencies has: documentation, Python, Unicode tables, mathematics, C++.

Each kind of text is a function that yields documents in a fixed order, from the Python standard library, from packages
that FlexMoE depends on and, for "english" only, from the descriptions of all installed packages. Nothing is
downloaded. The text depends on the installed versions, which are part of the cache key of the corpus
(`installed_versions`).

Does not cover splitting, deduplication and sizes (`corpus`).
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import platform
import re
import sysconfig
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flexmoe.demo.worked_problems import worked_problems

MAX_DOCUMENT_CHARACTERS = 4_000
MIN_DOCUMENT_CHARACTERS = 400

# Packages with much documentation that are installed with the demo; only their docstrings are read.
_DOCSTRING_PACKAGES = (
    "numpy",
    "torch",
    "transformers",
    "pandas",
    "networkx",
    "datasets",
    "huggingface_hub",
    "accelerate",
    "sklearn",
    "scipy",
)
# Folders that are not used as Python source: tables, tests (not installed everywhere), and pydoc_data (used as
# English).
_NOT_SOURCE = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "__pycache__",
    "_bundled",
}
# 6,000 generated headers of torch that are nearly alike.
_GENERATED_HEADERS = {"ops", "nvfuser"}


_COUNTED_NAMES = ("CJK ", "HANGUL SYLLABLE", "TANGUT", "NUSHU", "KHITAN", "VARIATION", "EGYPTIAN", "ANATOLIAN")
_CATEGORIES = {
    "Lu": "uppercase letter",
    "Ll": "lowercase letter",
    "Lt": "titlecase letter",
    "Lm": "modifier letter",
    "Lo": "letter",
    "Mn": "nonspacing mark",
    "Mc": "spacing mark",
    "Nd": "decimal digit",
    "Nl": "letter number",
    "No": "number",
    "Pd": "dash",
    "Ps": "opening bracket",
    "Pe": "closing bracket",
    "Po": "punctuation",
    "Sc": "currency sign",
    "Sk": "modifier symbol",
    "Sm": "mathematical symbol",
    "So": "symbol",
}


@dataclass(frozen=True)
class Document:
    """A text, and the name of its file; documents from one file stay in one split."""

    name: str
    text: str


SOURCES: dict[str, Callable[[int], Iterator[Document]]] = {}


def source(kind: str) -> Callable[[Callable[[int], Iterator[Document]]], Callable[[int], Iterator[Document]]]:
    """Registers a kind of text: a function that yields documents for a given number of characters."""

    def register(function: Callable[[int], Iterator[Document]]) -> Callable[[int], Iterator[Document]]:
        SOURCES[kind] = function
        return function

    return register


def read_source(kind: str, characters: int) -> list[Document]:
    """Documents of one kind, about `characters` in total, each of MIN_ to MAX_DOCUMENT_CHARACTERS.

    Raises:
        ValueError: the kind is unknown, or this machine has no such text.
    """
    if kind not in SOURCES:
        raise ValueError(f"no text of kind {kind!r}; use one of {sorted(SOURCES)}")
    documents, total = [], 0
    for document in SOURCES[kind](characters):
        text = document.text.strip()[:MAX_DOCUMENT_CHARACTERS]
        if len(text) < MIN_DOCUMENT_CHARACTERS:
            continue
        documents.append(Document(document.name, text))
        total += len(text)
        if total >= characters:
            break
    if not documents:
        raise ValueError(f"found no text of kind {kind!r} on this machine; leave it out of --owners (owners=)")
    return documents


def installed_versions() -> dict[str, str]:
    """The versions of Python and of all installed packages, by name."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {"python": platform.python_version(), **dict(sorted(found.items()))}


@source("english")
def english(characters: int) -> Iterator[Document]:
    """Python's help topics, the descriptions of all installed packages, and the prose of docstrings."""
    from pydoc_data.topics import topics

    texts = {f"help: {name}": text for name, text in topics.items()}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata
        texts[f"description: {metadata['Name']}"] = str(metadata.json.get("description"))
    for name in in_hash_order(texts):
        yield from _parts(name, without_examples(texts[name]))
    files = _python_files(_DOCSTRING_PACKAGES)
    for name in in_hash_order(files):
        yield from _parts(f"docstrings: {name}", "\n\n".join(_docstrings(files[name])))


@source("math")
def mathematics(characters: int) -> Iterator[Document]:
    """Worked problems computed by sympy (about 800 characters each)."""
    for i, text in enumerate(worked_problems(characters // 780)):
        yield Document(f"sheet {i}", text)


@source("code")
def python_source(characters: int) -> Iterator[Document]:
    """Modules of the Python standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {
        str(p.relative_to(root)): p for p in root.rglob("*.py") if not _NOT_SOURCE & set(p.relative_to(root).parts)
    }
    for name in in_hash_order(name for name in files if not name.startswith("_sysconfigdata")):
        yield Document(name, _read(files[name]))


@source("unicode")
def character_tables(characters: int) -> Iterator[Document]:
    """Python's Unicode character database, sixteen consecutive characters per document."""
    assigned = [chr(code) for code in range(0xA0, 0x20000) if _has_own_name(chr(code))]
    documents = {assigned[i]: assigned[i : i + 16] for i in range(0, len(assigned), 16)}
    for first in in_hash_order(documents):
        group = documents[first]
        yield Document(f"U+{ord(group[0]):04X}", "\n".join(map(_character_entry, group)))


@source("cpp")
def cpp_headers(characters: int) -> Iterator[Document]:
    """The C++ headers of torch."""
    root = _package_folder("torch") / "include"
    files = {
        str(p.relative_to(root)): p
        for p in root.rglob("*.h")
        if not _GENERATED_HEADERS & set(p.relative_to(root).parts)
    }
    for name in in_hash_order(files):
        yield Document(name, _header_body(_read(files[name])))


def without_examples(text: str) -> str:
    """Removes doctests, fenced and deeply indented code, badges, images and HTML tags from documentation."""
    text = re.sub(r"^(```|~~~).*?^\1\s*$", "", text, flags=re.M | re.S)
    text = re.sub(r"<[^>\n]{3,}>|!\[[^\]]*\]\([^)]*\)|\[!\[.*", "", text)
    kept = [
        line
        for line in text.splitlines()
        if not re.match(r"\s*(>>>|\.\.\. |\$ |In \[)|\.\. (image|code|\|)|    {4,}\S", line)
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept))


def _has_own_name(character: str) -> bool:
    """Whether the character has an individual name, unlike `CJK UNIFIED IDEOGRAPH-4E00`."""
    name = unicodedata.name(character, "")
    return bool(name) and not name.startswith(_COUNTED_NAMES)


def _character_entry(character: str) -> str:
    """`U+00C4 Ä LATIN CAPITAL LETTER A WITH DIAERESIS: uppercase letter, L, from U+0041 U+0308, lowercase U+00E4`."""
    category = unicodedata.category(character)
    parts = [_CATEGORIES.get(category, category), unicodedata.bidirectional(character)]
    if decomposition := unicodedata.decomposition(character):
        parts.append("from " + re.sub(r"\b([0-9A-F]{4,})\b", r"U+\1", decomposition))
    for case, other in (("lowercase", character.lower()), ("uppercase", character.upper())):
        if other != character and len(other) == 1:
            parts.append(f"{case} U+{ord(other):04X}")
    if (value := unicodedata.numeric(character, None)) is not None:
        parts.append(f"value {value:g}")
    return f"U+{ord(character):04X} {character} {unicodedata.name(character)}: {', '.join(parts)}"


def _docstrings(path: Path) -> Iterator[str]:
    """The prose of the long docstrings in a file."""
    text = _read(path)
    quoted = sum(len(part) for part in text.split('"""')[1::2])
    if quoted < max(3 * MIN_DOCUMENT_CHARACTERS, len(text) // 4):
        return  # parsing is slow, and this file has few docstrings
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # such as a template, or Python 2
        return
    nodes: list[ast.AST] = [tree]
    for node in nodes:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            raw = ast.get_docstring(node, clean=False)
            if raw and len(raw) >= 300:
                yield without_examples(inspect.cleandoc(raw))
        if isinstance(node, (ast.Module, ast.ClassDef)):
            nodes.extend(node.body)


def _parts(name: str, text: str) -> Iterator[Document]:
    """Splits a long text at line ends into up to four documents."""
    for _ in range(3):
        if len(text) <= MAX_DOCUMENT_CHARACTERS:
            break
        cut = text.rfind("\n", MAX_DOCUMENT_CHARACTERS // 2, MAX_DOCUMENT_CHARACTERS) + 1 or MAX_DOCUMENT_CHARACTERS
        yield Document(name, text[:cut])
        text = text[cut:]
    yield Document(name, text)


def _header_body(text: str) -> str:
    """A C++ header without its license and include guard, which thousands of headers share."""
    text = re.sub(
        r"\A#if !defined\(TORCH_STABLE_ONLY\)[^\n]*\n|#else\n#error \"This file should not be included.*\Z",
        "",
        text,
        flags=re.S,
    )
    return re.sub(r"\A\s*(/\*.*?\*/\s*|(?://[^\n]*\n\s*)+)+", "", text, flags=re.S)


def _python_files(packages: tuple[str, ...]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for package in packages:
        if importlib.util.find_spec(package) is not None:
            folder = _package_folder(package)
            found = (p for p in folder.rglob("*.py") if not {"tests", "testing", "__pycache__"} & set(p.parts))
            files |= {f"{package}/{p.relative_to(folder)}": p for p in found}
    return files


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"the demo needs the package {package!r}, which is not installed")
    return Path(spec.origin).parent


def in_hash_order(names: Iterable[str]) -> list[str]:
    """A fixed pseudo-random order, independent of the file system."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore")
