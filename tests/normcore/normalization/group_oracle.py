"""Layer, RMS, group and instance norm written from their formula in numpy's long double; no code of normcore's."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

LongDouble = NDArray[np.longdouble]
MANTISSA_BITS = {torch.float16: 10, torch.bfloat16: 7}
SMALLEST_EXPONENT = {torch.float16: -14, torch.bfloat16: -126}


@dataclass(frozen=True, slots=True)
class Groups:
    """Standardized values in the input's shape, and statistics with one entry per group."""

    normalized: LongDouble
    mean: LongDouble
    var: LongDouble


def exact(tensor: torch.Tensor) -> LongDouble:
    return tensor.detach().to(torch.float64).numpy().astype(np.longdouble)


def over_last(
    input: torch.Tensor, count: int, *, eps: float, has_mean: bool = True, mask: torch.Tensor | None = None
) -> Groups:
    """Groups of the last `count` values in a row of the contiguous input."""
    rows = exact(input.contiguous()).reshape(-1, count)
    counted = np.ones(rows.shape, bool) if mask is None else mask.expand(input.shape).numpy().reshape(rows.shape)
    number = counted.sum(1, keepdims=True).astype(np.longdouble)

    def mean_of(values: LongDouble) -> LongDouble:
        total: LongDouble = np.where(counted, values, np.longdouble(0)).sum(1, keepdims=True) / number
        return total

    mean = np.zeros((len(rows), 1), np.longdouble)
    if has_mean:
        mean = mean_of(rows)
        # Long double rounds too.
        mean = mean + mean_of(rows - mean)
    var = mean_of((rows - mean) ** 2)
    normalized = (rows - mean) / np.sqrt(var + np.longdouble(eps))
    return Groups(normalized.reshape(tuple(input.shape)), mean.ravel(), var.ravel())


def groups(input: torch.Tensor, num_groups: int, *, eps: float, mask: torch.Tensor | None = None) -> Groups:
    """Group norm of (N, C, *)."""
    count = input.shape[1] // num_groups * input.shape[2:].numel()
    return over_last(input, count, eps=eps, mask=mask)


def affine(normalized: LongDouble, weight: torch.Tensor, bias: torch.Tensor, *, shape: tuple[int, ...]) -> LongDouble:
    result: LongDouble = normalized * exact(weight).reshape(shape) + exact(bias).reshape(shape)
    return result


def beyond_rounding(output: torch.Tensor, expected: LongDouble) -> float:
    """The largest error that the rounding of half precision to the nearest does not explain."""
    error = np.abs(exact(output) - expected)
    if output.dtype in MANTISSA_BITS:
        _, exponent = np.frexp(np.abs(expected).astype(np.float64))
        exponent = np.maximum(exponent - 1, SMALLEST_EXPONENT[output.dtype])
        error = error - np.ldexp(0.5, exponent - MANTISSA_BITS[output.dtype])
    return float(error.max())
