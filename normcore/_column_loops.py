"""Compiled loops over rows of columns: sums of each column, and outputs by terms of each.

`length` is of elements: of whole rows, but for the last. Arrays are apart from each other, or the same value by value.
"""

from typing import Any

import numpy as np

from normcore._compiled import compiled_sum, fused, inlined
from normcore._values import fetch_lines, load, read, store

# Columns of a block, as the compiler likes a loop's length to be given.
_BLOCK = np.uintp(32)


@compiled_sum
def add_rows(x: Any, grad: Any, out: Any, start: Any, length: int, center: Any, total: Any, products: Any) -> None:
    """Four rows together share what is loaded and stored of their columns.

    Several rows that are read in turn are not fetched from memory ahead of the loop: it asks for the next ones itself,
    in their order, a few with each block of columns; and for those of `out`, where something is to be written.
    """
    width = np.uintp(center.size)
    whole = width - width % _BLOCK
    for _ in range(length // center.size // 4):
        ahead = start + width + width + width + width
        for first in range(np.uintp(0), whole, _BLOCK):
            _fetch_rows(x, grad, out, ahead + first + first + first + first, _BLOCK)
            _add_block(x, grad, start, width, first, first + _BLOCK, center, total, products)
        _fetch_rows(x, grad, out, ahead + whole + whole + whole + whole, width - whole)
        _add_block(x, grad, start, width, whole, width, center, total, products)
        start = ahead
    rest = length % (4 * center.size)
    while rest > 0:
        for column in range(np.uintp(min(rest, center.size))):
            a = load(x, start + column) - center[column]
            e = a if grad is None else load(grad, start + column)
            total[column] += e
            products[column] += e * a
        start += width
        rest -= center.size


@fused
def scale_rows(x: Any, y: Any, start: Any, length: int, center: Any, scale: Any, shift: Any) -> None:
    """One row after the other: what several share costs less than that they are not fetched ahead."""
    while length > 0:
        for column in range(np.uintp(min(length, center.size))):
            store(y, start + column, (read(x, start + column) - center[column]) * scale[column] + shift[column])
        start += np.uintp(center.size)
        length -= center.size


@fused
def combine_rows(
    x: Any, grad: Any, out: Any, start: Any, length: int, center: Any, scale: Any, slope: Any, constant: Any
) -> None:
    while length > 0:
        for column in range(np.uintp(min(length, center.size))):
            index = start + column
            correction = (read(x, index) - center[column]) * slope[column] + constant[column]
            store(out, index, read(grad, index) * scale[column] + correction)
        start += np.uintp(center.size)
        length -= center.size


@fused
def scale_and_add_row(
    x: Any,
    grad: Any,
    out: Any,
    start: Any,
    length: int,
    center: Any,
    scale: Any,
    invstd: Any,
    total: Any,
    products: Any,
) -> None:
    """The gradient by given statistics, and what a row adds to sums of dy and dy * xh."""
    for column in range(np.uintp(min(length, center.size))):
        value = read(grad, start + column)
        total[column] += value
        products[column] += value * ((read(x, start + column) - center[column]) * invstd[column])
        store(out, start + column, value * scale[column])


@inlined
def _fetch_rows(x: Any, grad: Any, out: Any, start: Any, columns: Any) -> None:
    if grad is not None or out is not None:
        fetch_lines(x, grad, out, start, columns + columns + columns + columns)


@compiled_sum
def _add_block(
    x: Any, grad: Any, start: Any, width: Any, first_column: Any, stop: Any, center: Any, total: Any, products: Any
) -> None:
    for column in range(first_column, stop):
        first, near = start + column, center[column]
        second, third, fourth = first + width, first + width + width, first + width + width + width
        a, b, c, d = load(x, first) - near, load(x, second) - near, load(x, third) - near, load(x, fourth) - near
        if grad is None:
            total[column] += (a + b) + (c + d)
            products[column] += (a * a + b * b) + (c * c + d * d)
        else:
            e, f, g, h = load(grad, first), load(grad, second), load(grad, third), load(grad, fourth)
            total[column] += (e + f) + (g + h)
            products[column] += (e * a + f * b) + (g * c + h * d)
