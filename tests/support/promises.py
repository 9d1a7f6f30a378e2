"""The table in docs/compatibility.md: what was asked of which entry point or library, with the result of its tests.

A test with `@pytest.mark.promise(entry, asked, result)` is a row. `pytest -m promise --write-promises` runs these
tests and writes the table; `tests/test_docs.py` checks that it has the rows of the code.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
START, END = "<!-- promises -->", "<!-- end of promises -->"


@dataclass(frozen=True, order=True)
class Promise:
    """A row of the table."""

    entry: str
    asked: str
    result: str
    test: str

    def cells(self) -> str:
        """The row in Markdown."""
        return f"| {self.entry} | {self.asked} | {self.result} | `{self.test}` |"


def promises_in_code(folder: Path = ROOT / "tests") -> list[Promise]:
    """The promises in the decorators of all tests, sorted."""
    return sorted(promise for path in folder.rglob("test_*.py") for promise in _in_file(path))


def _in_file(path: Path) -> Iterator[Promise]:
    text = path.read_text(encoding="utf-8")
    if "mark.promise(" not in text:
        return
    for node in ast.walk(ast.parse(text)):
        for decorator in getattr(node, "decorator_list", ()):
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.promise":
                entry, asked, result = (ast.literal_eval(argument) for argument in decorator.args)
                name = node.name if isinstance(node, ast.FunctionDef | ast.ClassDef) else ""
                yield Promise(entry, asked, result, f"{path.relative_to(ROOT)}::{name}")


def rows_on_page() -> list[str]:
    """The rows of the table on the page, without its head."""
    table = PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]
    return [line for line in table.splitlines() if line.startswith("| ")][1:]


def write_page(rows: list[str]) -> None:
    """Writes the table into the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(START)
    after = rest.partition(END)[2]
    head = ["| Entry point or library | Asked | Result | Test |", "|---|---|---|---|"]
    PAGE.write_text("\n".join([before + START, "", *head, *rows, "", END + after]), encoding="utf-8")


@dataclass
class Recorder:
    """A pytest plugin that writes the table after a run in which all tests of a promise passed."""

    failed: set[str] = field(default_factory=set)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Notes what did not pass."""
        if not report.passed:
            self.failed.add(report.nodeid.partition("[")[0])

    def pytest_sessionfinish(self) -> None:
        """Writes the page. A row whose test failed or was skipped says so."""
        rows = []
        for promise in promises_in_code():
            broken = any(_is_of(test, promise.test) for test in self.failed)
            result = f"{promise.result} (did not pass)" if broken else promise.result
            rows.append(Promise(promise.entry, promise.asked, result, promise.test).cells())
        write_page(rows)


def _is_of(node_id: str, test: str) -> bool:
    path, _, name = test.partition("::")
    return node_id.startswith(f"{path}::") and name in node_id.split("::")
