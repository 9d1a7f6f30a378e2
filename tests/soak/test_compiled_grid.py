"""All cases of the kernels for an A100 and an H100; one dtype of them is in `tests/kernels/test_compiled.py`."""

import pytest

from tests.kernels.compiled import cases, measured


@pytest.mark.parametrize("arch", [80, 90])
def test_machine_code(arch):
    found = measured(arch, quick=False)
    failures = {case.name: case.failures(arch, found[case.name]) for case in cases() if arch in case.gpus}
    assert not {name: words for name, words in failures.items() if words}
