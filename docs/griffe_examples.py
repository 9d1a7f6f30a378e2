"""A griffe extension: indented statements below `Example:` become a fenced block, which the site shows as code.

Does not cover examples that are fenced already (`tests/test_docstring_examples.py` describes both forms).
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

SECTION = re.compile(r"^Example:\n((?:    .*\n|\n)+)", re.M)


class FencedExamples(griffe.Extension):
    """Fences the examples of docstrings while griffe loads them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Changes the docstring of a module, class, function or attribute."""
        if obj.docstring is not None and "Example:" in obj.docstring.value:
            obj.docstring.value = SECTION.sub(_fenced, obj.docstring.value + "\n")


def _fenced(match: re.Match[str]) -> str:
    if "```" in match[1]:
        return match[0]
    code = textwrap.dedent(match[1]).strip("\n")
    block = textwrap.indent(f"```python\n{code}\n```", "    ")
    return f"Example:\n{block}\n\n"
