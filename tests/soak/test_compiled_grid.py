"""The machine code of all kernels for an A100 and an H100; a few are in `tests/kernels/test_compiled.py`."""

import pytest

from tests.kernels.compiled import cases, measured


@pytest.mark.parametrize("arch", [80, 90])
def test_machine_code(arch):
    problems = {name: result["broken"] for name, result in measured(arch, quick=False).items()}
    assert problems.keys() == {case.name for case in cases() if arch in case.gpus}
    assert not {name: texts for name, texts in problems.items() if texts}
