"""Hooks of mkdocs: files outside of docs/ become pages of the site, and links to them lead to those pages.

They are written for readers of the repository: README.md links to `docs/hub.md`, which links to `../README.md`.
Does not cover the API reference, which is mkdocstrings' part.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "CITATION.cff": "citation.md",
    "examples": "examples/index.md",
}
"""Path in the repository -> page of the site."""

EXAMPLES = {f"examples/{path.name}": "examples/index.md" for path in (ROOT / "examples").glob("*.py")}


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of `PAGES`."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=_content(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links between files of the repository at pages of the site."""
    site = page.file.src_uri
    place = next((path for path, at in PAGES.items() if at == site), f"docs/{site}")

    def target(match: re.Match[str]) -> str:
        link, anchor = match[1], match[2] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(place), link))
        at = {**PAGES, **EXAMPLES}.get(path) or path.removeprefix("docs/")
        return f"]({posixpath.relpath(at, posixpath.dirname(site) or '.')}{anchor})"

    return re.sub(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)", target, markdown)


def _content(path: Path) -> str:
    """Markdown as it is; a folder of scripts, or another file, as code."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    if path.is_dir():
        scripts = [f"## {script.stem}\n\n{_fenced(script, 'python')}" for script in sorted(path.glob("*.py"))]
        return "\n".join(["# Examples\n\nThe test suite runs each of these scripts.\n", *scripts])
    return f"# {path.name}\n\n{_fenced(path, 'yaml')}"


def _fenced(path: Path, language: str) -> str:
    return f"```{language}\n{path.read_text(encoding='utf-8')}```\n"
