"""Checks for finite numbers in bytes: every code of the small formats, and the edges of the large ones."""

import pytest
import torch

from flexmoe.io.finite import PIECE_BYTES, all_finite, bytes_are_finite, cast_finite
from flexmoe.modeling.fingerprint_flexmoe import TORCH_DTYPES, tensor_bytes

EIGHT_BITS = [code for code, dtype in TORCH_DTYPES.items() if dtype.is_floating_point and dtype.itemsize == 1]
SIXTEEN_BITS = ["F16", "BF16"]
LARGE = ["F32", "F64"]


@pytest.mark.parametrize("code", EIGHT_BITS + SIXTEEN_BITS)
def test_every_code_agrees_with_torch(code: str) -> None:
    dtype = TORCH_DTYPES[code]
    integers = torch.arange(1 << (8 * dtype.itemsize), dtype=torch.int32)
    numbers = integers.to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(dtype)
    expected = numbers.float().isfinite().tolist()
    assert any(expected)
    assert not all(expected)
    size = dtype.itemsize
    data = bytes(tensor_bytes(numbers))
    assert [bytes_are_finite(data[i * size : (i + 1) * size], code) for i in range(len(numbers))] == expected


@pytest.mark.parametrize("code", LARGE)
def test_the_edges_of_the_large_formats(code: str) -> None:
    dtype = TORCH_DTYPES[code]
    info = torch.finfo(dtype)
    for value in (0.0, -0.0, 1.0, info.max, info.min, info.tiny, info.tiny / 4):
        assert all_finite(torch.tensor([value], dtype=dtype))
    for value in (float("inf"), float("-inf"), float("nan"), -float("nan")):
        assert not all_finite(torch.tensor([1.0, value], dtype=dtype))


@pytest.mark.parametrize("code", LARGE + SIXTEEN_BITS)
def test_one_number_among_many(code: str) -> None:
    dtype = TORCH_DTYPES[code]
    count = 3 * PIECE_BYTES // dtype.itemsize + 5
    numbers = torch.full((count,), torch.finfo(dtype).max, dtype=dtype)  # whose sum overflows
    assert all_finite(numbers)
    assert all_finite(numbers[:0])
    for place in (0, count // 2, count - 1):
        numbers[place] = float("nan")
        assert not all_finite(numbers)
        assert not all_finite(numbers.view(1, -1).expand(2, -1))
        numbers[place] = 1.0
    assert all_finite(torch.nn.Parameter(numbers))


def test_bytes_that_end_within_a_number_are_refused() -> None:
    with pytest.raises(ValueError, match="buffer size"):
        bytes_are_finite(b"\0" * 7, "F32")


def test_a_cast_that_overflows_is_refused() -> None:
    numbers = torch.tensor([1.0, 70_000.0])
    assert cast_finite(numbers, torch.bfloat16, "x").dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"x holds numbers too large for torch\.float16"):
        cast_finite(numbers, torch.float16, "x")
