"""Compiled sweeps over rows of columns: boxes of one position per channel, and few channels side by side in a group.

Every column is summed for itself; the sums of a group's columns are joined, and the output has one set of parameters
per column. A row may stand for several: the columns are repeated then, so that loops are worth their start.
"""

from typing import Any

import numpy as np

from normcore._compiled import as_computed, compiled, compiled_sum, fused, load, read, store
from normcore._sweeps import LEAST, MOST, settle

_FEW = 16
# Rows that are summed in the datatype computed in.
_ROWS = 16


@compiled
def sum_columns(x: Any, center: Any, sums: Any, parts: Any, start: int, stop: int) -> None:
    """Sums of deviations and of their squares over rows of W columns, into `sums` (parts, 2, W).

    `center` is (P, W), and `parts` is (parts, elements of a part, elements) of each of P; elements are of whole rows
    but for the last.
    """
    width = center.shape[1]
    blocks, size, elements = parts
    total, squares = np.empty_like(center[0]), np.empty_like(center[0])
    for part in range(start, stop):
        own, first = part // blocks, part % blocks * size
        sums[part] = 0.0
        for at in range(first, min(first + size, elements), _ROWS * width):
            total[:] = 0.0
            squares[:] = 0.0
            length = min(_ROWS * width, min(first + size, elements) - at)
            _add_rows(x, np.uintp(own * elements + at), length, center[own], total, squares)
            for column in range(width):
                sums[part, 0, column] += total[column]
                sums[part, 1, column] += squares[column]


@compiled
def standardize_columns(x: Any, y: Any, terms: Any, elements: int, start: int, stop: int) -> None:
    """The output (x - center) * scale + shift; `terms` are those, (3, P, W), by rows of so many elements."""
    width = terms.shape[2]
    rows = -(-elements // width)
    for row in range(start, stop):
        own, at = row // rows, row % rows * width
        length = min(width, elements - at)
        _scale_columns(x, y, np.uintp(own * elements + at), length, terms[0, own], terms[1, own], terms[2, own])


@compiled
def find_centers(x: Any, center: Any, rows: int) -> None:
    """Means of the first values of columns (B, W), exactly the value where they are equal."""
    samples, width = center.shape
    for sample in range(samples):
        for column in range(width):
            first = sample * rows * width + column
            origin = np.float64(load(x, first))
            total = 0.0
            for row in range(1, min(rows, _FEW)):
                total += np.float64(load(x, first + row * width)) - origin
            center[sample, column] = np.float64(as_computed(x, origin + total / min(rows, _FEW)))


@compiled
def correct_centers(x: Any, center: Any, sums: Any, rows: int) -> bool:
    """Move the centers to the means for float64 values, and where one was further off than a deviation."""
    total, squares = sums
    is_off = x.itemsize == 8
    for sample in range(len(center)):
        for column in range(center.shape[1]):
            is_off |= 2.0 * total[sample, column] ** 2 > squares[sample, column] * rows
    if is_off:
        for sample in range(len(center)):
            for column in range(center.shape[1]):
                moved = center[sample, column] + total[sample, column] / rows
                center[sample, column] = np.float64(as_computed(x, moved))
    return bool(is_off)


@compiled
def has_digits(x: Any, squares: Any, count: int) -> bool:
    """Whether sums of squares are of sizes that the datatype computed in holds; zeros may be of squares too small."""
    if x.itemsize != 2:
        return True
    for row in squares:
        for value in row:
            if not LEAST * count < value < MOST * count:
                return False
    return True


@compiled
def settle_columns(x: Any, by: Any, center: Any, sums: Any, sizes: Any, eps: float, has_mean: bool) -> None:
    """Statistics of groups from the sums of their columns, which are (2, B, W) and around centers of their own."""
    total, squares = sums
    samples, rows, groups, channels, _ = sizes
    for group in range(samples * groups):
        sample, first = group // groups, group % groups * channels
        origin = center[sample, first]
        mean, m2 = 0.0, 0.0
        for column in range(first, first + channels):
            mean += (center[sample, column] - origin) + total[sample, column] / rows
        mean = mean / channels if has_mean else 0.0
        for column in range(first, first + channels):
            own = total[sample, column] / rows
            distance = (center[sample, column] - origin) + own - mean
            m2 += squares[sample, column]
            if has_mean:
                m2 += rows * (distance * distance - own * own)
        settle(x, by, group, origin, mean, m2 / (rows * channels), eps)


@compiled_sum
def _add_rows(x: Any, start: Any, length: int, center: Any, total: Any, squares: Any) -> None:
    width = np.uintp(center.size)
    for _ in range(length // center.size // 4):
        for column in range(width):
            first = start + column
            a, b = load(x, first) - center[column], load(x, first + width) - center[column]
            c, d = (
                load(x, first + width + width) - center[column],
                load(x, first + width + width + width) - center[column],
            )
            total[column] += (a + b) + (c + d)
            squares[column] += (a * a + b * b) + (c * c + d * d)
        start += width + width + width + width
    rest = length % (4 * center.size)
    while rest > 0:
        for column in range(np.uintp(min(rest, center.size))):
            a = load(x, start + column) - center[column]
            total[column] += a
            squares[column] += a * a
        start += width
        rest -= center.size


@fused
def _scale_columns(x: Any, y: Any, start: Any, length: int, center: Any, scale: Any, shift: Any) -> None:
    for column in range(np.uintp(length)):
        value = (read(x, start + column) - center[column]) * scale[column] + shift[column]
        store(y, start + column, value)
