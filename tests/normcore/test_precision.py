"""The accumulation datatype, and values held as two numbers."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normcore._precision import accumulation_dtype, split, two_sum

NUMBERS = st.floats(min_value=-1e30, max_value=1e30, allow_subnormal=False)


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


@given(NUMBERS, NUMBERS)
def test_two_sum_is_exact(augend: float, addend: float) -> None:
    total, error = two_sum(torch.tensor(augend, dtype=torch.float64), torch.tensor(addend, dtype=torch.float64))
    assert Fraction(float(total)) + Fraction(float(error)) == Fraction(augend) + Fraction(addend)


@given(st.floats(min_value=-1e30, max_value=1e30).filter(lambda value: value == 0 or abs(value) > 1e-20))
def test_split_to_float32_keeps_twice_the_digits(value: float) -> None:
    wide = torch.tensor(value, dtype=torch.float64)
    high, low = split(wide, None, torch.float32)
    assert high.dtype == low.dtype == torch.float32
    assert abs(float(high.double() + low.double() - wide)) <= 2.0**-47 * abs(value)


def test_split_takes_the_low_part_along() -> None:
    high, low = split(torch.tensor(1.0).double(), torch.tensor(2.0**-60).double(), torch.float32)
    assert (float(high), float(low)) == (1.0, 2.0**-60)


def test_split_leaves_float64_as_it_is() -> None:
    pair = torch.tensor(1.0).double(), torch.tensor(2.0**-60).double()
    assert split(*pair, torch.float64) == pair
