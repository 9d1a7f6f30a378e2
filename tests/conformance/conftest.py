"""Arranges transformers' tests as in its repository, and fails a skip that is not listed in `skips.py`.

Environment: TRANSFORMERS_TESTS, the `tests` folder of transformers; CONFORMANCE_SUMMARY, the JSON file for the counts
(not written if it is not set, or if only some tests run).
"""

import atexit
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Generator
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _lay_out_checkout(tests: str | None) -> None:
    """Makes `tests` the package of transformers, beside its sources, where its tests look for them."""
    if not tests or not (Path(tests) / "causal_lm_tester.py").is_file():
        raise pytest.UsageError(
            f"TRANSFORMERS_TESTS={tests or ''} is not the tests folder of transformers: no causal_lm_tester.py. "
            "Run `make conformance TRANSFORMERS_TESTS=DIR`."
        )
    checkout = Path(tempfile.mkdtemp(prefix="flexmoe-conformance-"))
    atexit.register(shutil.rmtree, checkout, ignore_errors=True)
    (checkout / "tests").symlink_to(Path(tests).resolve())
    (checkout / "src").mkdir()
    installed = importlib.util.find_spec("transformers")
    assert installed is not None
    assert installed.origin is not None
    (checkout / "src" / "transformers").symlink_to(Path(installed.origin).parent)
    sys.path.insert(0, str(checkout))


_lay_out_checkout(os.environ.get("TRANSFORMERS_TESTS"))

from skips import CANNOT_APPLY, LEFT_OUT_BY_TRANSFORMERS  # noqa: E402 - found by `pythonpath` in pytest.ini

_seen: dict[str, str] = {}


def _reason(table: dict[str, str], name: str) -> str | None:
    return next((reason for pattern, reason in table.items() if fnmatchcase(name, pattern)), None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    names = {item.name for item in items}
    stale = [
        pattern
        for pattern in (*CANNOT_APPLY, *LEFT_OUT_BY_TRANSFORMERS)
        if not any(fnmatchcase(name, pattern) for name in names)
    ]
    if stale:
        raise pytest.UsageError(f"skips.py has patterns that match no test: {stale}.")
    for item in items:
        if reason := _reason(CANNOT_APPLY, item.name):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not _reason({**CANNOT_APPLY, **LEFT_OUT_BY_TRANSFORMERS}, item.name):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"This skip is not listed in skips.py: {item.name}: {reason}"
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    worst = ("passed", "skipped", "failed")
    before = _seen.get(report.nodeid, "passed")
    _seen[report.nodeid] = max(before, report.outcome, key=worst.index)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    target = os.environ.get("CONFORMANCE_SUMMARY")
    is_partial = (
        session.config.option.keyword
        or session.config.option.markexpr
        or any("::" in arg for arg in session.config.args)
    )
    if not target or is_partial or hasattr(session.config, "workerinput"):
        return
    anchors: dict[str, Counter[str]] = {}
    for nodeid, outcome in _seen.items():
        anchors.setdefault(nodeid.split("::")[1], Counter())[outcome] += 1
    summary = {
        "anchors": {
            name.removeprefix("Test"): {outcome: counts[outcome] for outcome in ("passed", "skipped", "failed")}
            for name, counts in sorted(anchors.items())
        },
        "left_out_by_us": CANNOT_APPLY,
        "transformers": version("transformers"),
        "torch": version("torch"),
    }
    Path(target).write_text(json.dumps(summary, indent=2) + "\n")
