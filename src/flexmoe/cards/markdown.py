"""Untrusted text as Markdown: escaped, so that it renders as text and nothing else.

Text from manifests and configs is untrusted. By CommonMark and GitHub's extensions, the escaped text has no markup of
its own: no tables, links, mentions, images, emphasis, formulas, entities or HTML.

Does not cover front matter, which a YAML writer escapes (`flexmoe.cards.rendering`).
"""

from __future__ import annotations

import re
from typing import Any

MAX_CELL = 200
"""Characters of a table cell."""

_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
# Invisible characters: of no width, or changing the direction of the text that follows.
_INVISIBLE = re.compile(
    "[\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_PIECE = re.compile(r"[^\s`|<>\\]+|[`|<>\\]")
# GitHub's Markdown links these or makes mentions of them even if escaped, but not in code.
_LINKED = re.compile(r"://|www\.|@", re.IGNORECASE)
_PUNCTUATION = ".,;:!?'\"()[]"
# `&` where an entity may begin; `_` unless it is inside a word.
_MARKUP = re.compile(r"[\\`*\[\]|~$<]|&(?=[#A-Za-z])|(?<![^\W_])_|_(?![^\W_])")
_ENTITIES = {"<": "&lt;", "&": "&amp;"}
_BLOCK_START = re.compile(r"^([0-9]*)([-+=#>.)])")  # begins a heading, a list, a quote or a rule


def plain_line(value: Any) -> str:
    """Text on one line without control and invisible characters, not escaped yet; "" for None."""
    return " ".join(_CONTROLS.sub(" ", _INVISIBLE.sub("", "" if value is None else str(value))).split())


def one_line(value: Any) -> str:
    """Text as a line of Markdown, for a table cell or within a paragraph; addresses become code.

    At the beginning of a line it may still start a heading or a list.
    """
    return _PIECE.sub(_escape_piece, plain_line(value))


def table_cell(value: Any) -> str:
    """Text as in `one_line`, of at most `MAX_CELL` characters before escaping."""
    return one_line(shortened(plain_line(value)))


def code(value: Any) -> str:
    """Text as inline code, which is also valid in a table; "" for None."""
    # inside code nothing can be escaped, so replace
    text = shortened(plain_line(value)).replace("`", "'").replace("|", "¦")
    return f"`{text}`" if text else ""


def quote(text: str) -> str:
    """Text of any length as a block quote, none of whose lines can start another block."""
    lines = [one_line(line) for line in text.strip().splitlines()]
    return "\n".join(f"> {_BLOCK_START.sub(_escape_start, line)}".rstrip() for line in lines)


def shortened(text: str) -> str:
    """The text, or its first `MAX_CELL - 1` characters and an ellipsis."""
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 1] + "…"


def _escape_piece(piece: re.Match[str]) -> str:
    word: str = piece[0]
    if not _LINKED.search(word):
        return _MARKUP.sub(_escape, word)
    address = word.strip(_PUNCTUATION)
    before, _, after = word.partition(address)
    return f"{_MARKUP.sub(_escape, before)}`{address}`{_MARKUP.sub(_escape, after)}"


def _escape(match: re.Match[str]) -> str:
    return _ENTITIES.get(match[0], f"\\{match[0]}")


def _escape_start(match: re.Match[str]) -> str:
    return f"{match[1]}\\{match[2]}"


__all__ = ["MAX_CELL", "code", "one_line", "plain_line", "quote", "shortened", "table_cell"]
