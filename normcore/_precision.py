"""Precision decided in one place: the datatype to accumulate in, and sums held as two numbers."""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_and_rest(larger: Tensor, smaller: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of two float64, rounded, and exactly what rounding left over (Knuth's TwoSum)."""
    total = larger + smaller
    of_smaller = total - larger
    rest = (larger - (total - of_smaller)) + (smaller - of_smaller)
    return total, rest.masked_fill(~rest.isfinite(), 0.0)
