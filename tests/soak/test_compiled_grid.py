"""All cases of the kernels for an A100 and an H100; one dtype of them is in `tests/kernels/test_compiled.py`."""

import pytest

from tests.kernels.compiled import cases, measured


@pytest.mark.parametrize("arch", [80, 90])
def test_machine_code(arch):
    broken = {name: found["broken"] for name, found in measured(arch, quick=False).items()}
    assert broken.keys() == {case.name for case in cases() if arch in case.gpus}
    assert not {name: words for name, words in broken.items() if words}
