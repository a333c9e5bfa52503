"""Precision decided in one place: the datatype to accumulate in, and a mean held as the sum of two numbers."""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32; also the datatype of every statistic that is returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def two_sum(augend: Tensor, addend: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded sum and its exact rounding error (Knuth), for finite operands of one datatype."""
    total = augend + addend
    addend_part = total - augend
    error = (augend - (total - addend_part)) + (addend - addend_part)
    return total, error


def split(high: Tensor, low: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A float64 value `high + low` as two numbers of `dtype` that keep twice its digits."""
    rest = torch.zeros_like(high) if low is None else low
    if dtype == torch.float64:
        return high, rest
    rounded = high.to(dtype)
    return rounded, ((high - rounded.double()) + rest).to(dtype)
