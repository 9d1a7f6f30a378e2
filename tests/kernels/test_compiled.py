"""The machine code of the kernels for an H100: no spills, loads of 16 bytes, instructions of the tensor cores.

One kernel of each operator that compiles quickly; all kernels and dtypes, and an A100, in
`tests/soak/test_compiled_grid.py`.
"""

import pytest

from tests.kernels.compiled import Case, cases, measured


@pytest.fixture(scope="module")
def found():
    return measured(90, quick=True)


@pytest.mark.parametrize(
    "case", [case for case in cases() if case.quick and 90 in case.gpus], ids=lambda case: case.name
)
def test_machine_code(case, found):
    assert found[case.name]["broken"] == []


GOOD = {"registers": 64, "stack": 0, "shared": 0, "loads": {"16": 9, "4": 4}, "products": ["mma.sync"]}


@pytest.mark.parametrize(
    "change",
    [
        {"registers": 65},
        {"stack": 8},
        {"shared": 1 << 20},
        {"loads": {"16": 8, "4": 4}},
        {"loads": {}},
        {"products": []},
    ],
)
def test_each_requirement_can_fail(change):
    case = Case("x", "", {}, {}, max_registers=64, wide_share=0.9, products={90: "mma.sync"})
    assert case.failures(90, GOOD) == []
    assert len(case.failures(90, GOOD | change)) == 1
