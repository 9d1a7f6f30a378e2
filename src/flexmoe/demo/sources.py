"""Real text that lies on every machine with the demo's dependencies: documentation, Python source, C++ headers, maths.

Each kind is a function that returns documents in a fixed order, found in the running interpreter's own library and in
the packages FlexMoE depends on. Nothing is downloaded. What is found depends on the installed versions, so the corpus
is keyed by them (`installed_versions`).

Does not cover: splitting, deduplication and sizes (`corpus`).
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .worked_problems import worked_problems

MAX_DOCUMENT_CHARACTERS = 5_000
MIN_DOCUMENT_CHARACTERS = 400

# Installed with every FlexMoE, and rich in prose. A fixed list: the corpus should not change with unrelated packages.
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
# Tables rather than code; pydoc_data is the English documentation itself; tests are not installed everywhere.
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
# 6,000 generated stubs that say one thing; the rest of torch's headers is written by people.
_GENERATED_HEADERS = {"ops", "nvfuser"}


@dataclass(frozen=True)
class Document:
    """One text, and the name of the file it is (a part of): parts of one file are never split apart."""

    name: str
    text: str


SOURCES: dict[str, Callable[[int], Iterator[Document]]] = {}


def source(kind: str) -> Callable[[Callable[[int], Iterator[Document]]], Callable[[int], Iterator[Document]]]:
    """Registers a kind of text: a function of a character budget that yields documents until it is spent."""

    def register(function: Callable[[int], Iterator[Document]]) -> Callable[[int], Iterator[Document]]:
        SOURCES[kind] = function
        return function

    return register


def read_source(kind: str, characters: int) -> list[Document]:
    """Documents of one kind, about `characters` in all; ValueError if the kind is unknown or this machine has none."""
    if kind not in SOURCES:
        raise ValueError(f"no text of kind {kind!r}; this demo knows {sorted(SOURCES)}")
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
        raise ValueError(f"found no text of kind {kind!r} on this machine; leave it out of --owners")
    return documents


def installed_versions() -> dict[str, str]:
    """Name -> version of everything the corpus can be read from."""
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {"python": platform.python_version(), **dict(sorted(found.items()))}


@source("english")
def english(characters: int) -> Iterator[Document]:
    """Python's own help topics, package descriptions, and the prose of docstrings."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"help: {name}", without_examples(topics[name]))
    for distribution in sorted(importlib.metadata.distributions(), key=lambda d: d.metadata["Name"].lower()):
        for part in _parts(without_examples(str(distribution.metadata.json.get("description", "")))):
            yield Document(f"description: {distribution.metadata['Name']}", part)
    for path, name in _in_hash_order(_python_files(_DOCSTRING_PACKAGES)):
        prose = "\n\n".join(_docstrings(path))
        if prose:
            yield Document(f"docstrings: {name}", prose)


@source("math")
def mathematics(characters: int) -> Iterator[Document]:
    """Worked problems computed by sympy (some 800 characters each)."""
    for i, text in enumerate(worked_problems(characters // 780)):
        yield Document(f"sheet {i}", text)


@source("code")
def python_source(characters: int) -> Iterator[Document]:
    """Modules of the Python standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        (p, str(p.relative_to(root))) for p in root.rglob("*.py") if not _NOT_SOURCE & set(p.relative_to(root).parts)
    ]
    for path, name in _in_hash_order([f for f in files if not f[1].startswith("_sysconfigdata")]):
        for part in _parts(_read(path)):
            yield Document(name, part)


@source("cpp")
def cpp_headers(characters: int) -> Iterator[Document]:
    """C++ headers of torch."""
    root = _package_folder("torch") / "include"
    files = [
        (p, str(p.relative_to(root)))
        for p in root.rglob("*.h")
        if not _GENERATED_HEADERS & set(p.relative_to(root).parts)
    ]
    for path, name in _in_hash_order(files):
        for part in _parts(_header_body(_read(path))):
            yield Document(name, part)


def without_examples(text: str) -> str:
    """The prose of a documentation text: no doctests, fenced or deeply indented code, badges, pictures, HTML tags."""
    text = re.sub(r"^(```|~~~).*?^\1\s*$", "", text, flags=re.M | re.S)
    text = re.sub(r"<[^>\n]{3,}>|!\[[^\]]*\]\([^)]*\)|\[!\[.*", "", text)
    kept = [
        line
        for line in text.splitlines()
        if not re.match(r"\s*(>>>|\.\.\. |\$ |In \[)|\.\. (image|code|\|)|    {4,}\S", line)
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept))


def _docstrings(path: Path) -> Iterator[str]:
    """The prose of the longer docstrings of one file."""
    text = _read(path)
    quoted = sum(len(part) for part in text.split('"""')[1::2])
    if quoted < max(3 * MIN_DOCUMENT_CHARACTERS, len(text) // 4):
        return  # parsing is the slow part, and this file has little to say
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):  # a package may ship a template or a Python 2 file
        return
    nodes: list[ast.AST] = [tree]
    for node in nodes:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            raw = ast.get_docstring(node, clean=False)
            if raw and len(raw) >= 300:
                yield without_examples(inspect.cleandoc(raw))
        if isinstance(node, (ast.Module, ast.ClassDef)):
            nodes.extend(node.body)


def _parts(text: str) -> Iterator[str]:
    """A long file as documents of at most MAX_DOCUMENT_CHARACTERS, the first two only, cut at line ends."""
    for _ in range(2):
        if len(text) <= MAX_DOCUMENT_CHARACTERS:
            yield text
            return
        cut = text.rfind("\n", MAX_DOCUMENT_CHARACTERS // 2, MAX_DOCUMENT_CHARACTERS) + 1 or MAX_DOCUMENT_CHARACTERS
        yield text[:cut]
        text = text[cut:]


def _header_body(text: str) -> str:
    """A C++ header without the licence and the include guard around it: the same lines in thousands of them."""
    text = re.sub(
        r"\A#if !defined\(TORCH_STABLE_ONLY\)[^\n]*\n|#else\n#error \"This file should not be included.*\Z",
        "",
        text,
        flags=re.S,
    )
    return re.sub(r"\A\s*(/\*.*?\*/\s*|(?://[^\n]*\n\s*)+)+", "", text, flags=re.S)


def _python_files(packages: tuple[str, ...]) -> list[tuple[Path, str]]:
    files = []
    for package in packages:
        if importlib.util.find_spec(package) is not None:
            folder = _package_folder(package)
            found = (p for p in folder.rglob("*.py") if not {"tests", "testing", "__pycache__"} & set(p.parts))
            files += [(p, f"{package}/{p.relative_to(folder)}") for p in found]
    return files


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ValueError(f"the demo reads text from the package {package!r}, which is not installed")
    return Path(spec.origin).parent


def _in_hash_order(files: list[tuple[Path, str]]) -> list[tuple[Path, str]]:
    """A fixed order that mixes folders, whatever order the file system lists them in."""
    return sorted(files, key=lambda f: hashlib.sha256(f[1].encode()).digest())


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="ignore")
