"""The accumulation datatype, and values held as two numbers."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normcore._precision import accumulation_dtype, split


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_accumulation_is_at_least_float32(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert accumulation_dtype(dtype) == expected


@given(st.floats(min_value=-1e30, max_value=1e30).filter(lambda value: value == 0 or abs(value) > 1e-20))
def test_split_into_float32_loses_nothing(value: float) -> None:
    center, offset = split(torch.tensor(value, dtype=torch.float64), torch.float32)
    assert center.dtype == torch.float32
    assert abs(float(offset)) <= 2.0**-24 * abs(value)
    assert Fraction(float(center)) + Fraction(float(offset)) == Fraction(value)


def test_split_into_its_own_datatype_leaves_nothing() -> None:
    center, offset = split(torch.tensor(0.1), torch.float32)
    assert (float(center), float(offset)) == (float(torch.tensor(0.1)), 0.0)
    assert offset.dtype == torch.float64
