"""Compiled sums of a backward over vectors: of each vector, and of each channel over a few samples.

The first are those of a and a * xh, a = weight * dy, for the gradient of the input; the others those of dy and dy * xh,
for the gradients of weight and bias. All are made in the datatype of outputs first, and where float32 does not hold
them, in float64.
"""

from typing import Any

import numpy as np

from normcore._compiled import compiled, compiled_sum, inlined
from normcore._sweeps import CENTER, INVSTD, OFFSET
from normcore._values import as_read, read

_BLOCK = 1024
# Samples whose sums are made in the datatype of outputs before they are added to others in float64. Of n values in
# float32, a sum in turn is rounded by less than n * 6e-8 of the sum of their magnitudes: 1e-6 of 16, and for 1024 that
# are added in 32 lanes or more 2e-6; with signs as they come it is 1e-7 and less.
FEW = 16


@inlined
def add_vector(
    x: Any, grad: Any, at: Any, weight: Any, affine: Any, few: Any, first: int, channels: int, by: Any, group: int
) -> Any:
    """Sums of a and a * xh of a vector; what it adds to those of its channels goes into `few`."""
    terms = _terms(x, by, group)
    total, dot = 0.0, 0.0
    for block in range(0, channels, _BLOCK):
        near, length = np.uintp(block), np.uintp(min(_BLOCK, channels - block))
        found = _add_block(x, grad, at + near, weight, affine + near, few, np.uintp(first) + near, length, terms)
        own_total, own_dot = np.float64(found[0]), np.float64(found[1])
        if not np.isfinite(own_total + own_dot):
            own_total, own_dot = _wide_sums(x, grad, at + near, weight, affine + near, length, terms)
        total += own_total
        dot += own_dot
    return total, dot


@inlined
def move_sums(
    x: Any, grad: Any, by: Any, few: Any, sums: Any, slot: int, samples: tuple[int, int], is_first: bool
) -> None:
    """Add what samples from one to another have added up to the sums of their slot, and start anew."""
    is_finite = True
    for index in range(2):
        for column in range(np.uintp(few.shape[1])):
            sums[index, slot, column] = 0.0 if is_first else sums[index, slot, column]
            is_finite &= np.isfinite(few[index, column])
    if x.itemsize < 8 and not is_finite:
        _add_again(x, grad, by, few, sums, slot, samples)
    for index in range(2):
        for column in range(np.uintp(few.shape[1])):
            sums[index, slot, column] += few[index, column]
            few[index, column] = 0.0


@compiled
def _add_again(x: Any, grad: Any, by: Any, few: Any, sums: Any, slot: int, samples: tuple[int, int]) -> None:
    """Sum in float64 what is not finite in `few`, and leave nothing of it there."""
    width = few.shape[1]
    channels = x.size // by.shape[1]
    wide = np.zeros(few.shape)
    for group in range(samples[0] * width // channels, samples[1] * width // channels):
        center, invstd, shift = _terms(x, by, group)
        first = group * channels % width
        for channel in range(channels):
            value = np.float64(read(grad, group * channels + channel))
            wide[0, first + channel] += value
            wide[1, first + channel] += value * ((read(x, group * channels + channel) - center) * invstd + shift)
    for index in range(2):
        for column in range(width):
            if not np.isfinite(few[index, column]):
                sums[index, slot, column] += wide[index, column]
                few[index, column] = 0.0


@inlined
def _terms(x: Any, by: Any, group: int) -> Any:
    """Center, factor and shift of xh = (x - center) * invstd + shift."""
    center, invstd = as_read(x, by[CENTER, group]), by[INVSTD, group]
    offset = (by[CENTER, group] - np.float64(center)) + by[OFFSET, group]
    return center, as_read(x, invstd), as_read(x, -offset * invstd)


@inlined
def _wide_sums(x: Any, grad: Any, start: Any, weight: Any, affine: Any, length: Any, terms: Any) -> Any:
    """The sums of a block where float32 does not hold them."""
    center, invstd, shift = terms
    total, dot = 0.0, 0.0
    for column in range(length):
        weighted = np.float64(read(grad, start + column)) * weight[affine + column]
        total += weighted
        dot += weighted * ((read(x, start + column) - center) * invstd + shift)
    return total, dot


@compiled_sum
def _add_block(
    x: Any, grad: Any, start: Any, weight: Any, affine: Any, few: Any, first: Any, length: Any, terms: Any
) -> Any:
    center, invstd, shift = terms
    total, dot = center - center, center - center
    for column in range(length):
        value = read(grad, start + column)
        standardized = (read(x, start + column) - center) * invstd + shift
        weighted = value * weight[affine + column]
        total += weighted
        dot += weighted * standardized
        few[0, first + column] += value
        few[1, first + column] += value * standardized
    return total, dot
