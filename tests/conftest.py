"""Environment variables that must be set before torch and the Hugging Face libraries are imported, and fixtures."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.support.processes import Processes

# The OpenMP runtime and the Hub client read these when they are imported, so they are set at module level.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
if not os.path.exists("/dev/nvidiactl"):
    # Without a GPU, kernels run in Triton's interpreter; Triton reads this when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "FLEXMOE_TESTS_HF_HOME" not in os.environ:
    # Workers of pytest-xdist inherit the folder of the main process.
    os.environ["FLEXMOE_TESTS_HF_HOME"] = tempfile.mkdtemp(prefix="flexmoe-tests-")
    atexit.register(shutil.rmtree, os.environ["FLEXMOE_TESTS_HF_HOME"], ignore_errors=True)
os.environ["HF_HOME"] = os.environ["FLEXMOE_TESTS_HF_HOME"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-promises", action="store_true", help="write the table in docs/compatibility.md")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--write-promises") and not hasattr(config, "workerinput"):
        from tests.support.promises import Recorder

        config.pluginmanager.register(Recorder())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from tests.support.old_versions import expect_known_failures

    expect_known_failures(items)


def pytest_collection_finish() -> None:
    """Exempts what was imported from garbage collection, as libraries that collect often would search all of it."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # some libraries report what is never freed


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    """Two processes of one gloo group; see `tests/support/processes.py`."""
    from tests.support.processes import Processes

    with Processes(2) as group:
        yield group
