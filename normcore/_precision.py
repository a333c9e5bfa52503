"""Precision decided in one place: the datatype to accumulate in, and a mean held as the sum of two numbers."""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32; also the datatype of every statistic that is returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def split(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A value as its rounding to `dtype`, and what that leaves in float64."""
    rounded = value.to(dtype)
    return rounded, value.double() - rounded.double()


def sum_and_rest(larger: Tensor, smaller: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of two float64, rounded, and exactly what rounding left over (Knuth's TwoSum)."""
    total = larger + smaller
    of_smaller = total - larger
    rest = (larger - (total - of_smaller)) + (smaller - of_smaller)
    return total, rest.masked_fill(~rest.isfinite(), 0.0)
