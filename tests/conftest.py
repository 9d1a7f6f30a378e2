"""What a test run needs before torch and the Hugging Face libraries are imported: few threads, caches of its own."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.processes import Processes

# Read once, when the OpenMP runtime and the Hub client are imported: hence at module level, before any other import.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
if not os.path.exists("/dev/nvidiactl"):
    # Kernels run in Triton's interpreter where there is no GPU; read when Triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "FLEXMOE_TESTS_HF_HOME" not in os.environ:
    # A worker of pytest-xdist inherits the folder of the process that started it.
    os.environ["FLEXMOE_TESTS_HF_HOME"] = tempfile.mkdtemp(prefix="flexmoe-tests-")
    atexit.register(shutil.rmtree, os.environ["FLEXMOE_TESTS_HF_HOME"], ignore_errors=True)
os.environ["HF_HOME"] = os.environ["FLEXMOE_TESTS_HF_HOME"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    from tests.old_versions import expect_known_failures

    expect_known_failures(items)


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    """Two processes of one gloo group; see `tests/processes.py`."""
    from tests.processes import Processes

    with Processes(2) as group:
        yield group
