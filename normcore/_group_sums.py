"""Compiled sums over the cells of a group, of deviations from a center and of their squares."""

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from normcore._compiled import compiled, compiled_sum, inlined
from normcore._values import load

_BLOCK = 1024
# Sums of blocks that are added in turn in float64, before all is rounded too often for values that have its digits.
_FEW = 64


def group_sums(x: Any, start: Any, rows: int, step: int, length: int, center: Any) -> Any:
    """Over cells of a length, every one a step after the other; only in compiled functions."""
    raise NotImplementedError


@overload(group_sums, strict=False, jit_options={"forceinline": True})
def _group_sums(x: Any, start: Any, rows: Any, step: Any, length: Any, center: Any) -> Any:
    if x.dtype != types.float64:
        return lambda x, start, rows, step, length, center: _sums_of_few(x, start, rows, step, length, center)

    def sums(x: Any, start: Any, rows: int, step: int, length: int, center: Any) -> Any:
        if rows > _FEW or length > _FEW * _BLOCK:
            return _sums_of_many(x, start, rows, step, length, center)
        return _sums_of_few(x, start, rows, step, length, center)

    return sums


@compiled
def _sums_of_many(x: Any, start: Any, rows: int, step: int, length: int, center: Any) -> Any:
    total = squares = rest = rest_of_squares = 0.0
    few, part = _FEW if length <= _BLOCK else 1, _FEW * _BLOCK
    for row in range(0, rows, few):
        for first in range(0, length, part):
            at, own_length = start + np.uintp(row * step + first), min(part, length - first)
            sums = _sums_of_few(x, at, min(few, rows - row), step, own_length, center)
            total, rest = add_exactly(total, rest, sums[0])
            squares, rest_of_squares = add_exactly(squares, rest_of_squares, sums[1])
    return with_rest(total, rest), with_rest(squares, rest_of_squares)


@inlined
def _sums_of_few(x: Any, start: Any, rows: int, step: int, length: int, center: Any) -> Any:
    total, squares = 0.0, 0.0
    for row in range(rows):
        cell = row * step
        for block in range(0, length, _BLOCK):
            sums = block_sums(x, start + np.uintp(cell + block), min(_BLOCK, length - block), center)
            total += sums[0]
            squares += sums[1]
    return total, squares


# Unsigned indices count from the front alone: a choice between front and back would keep loops from being vectors. One
# after the other: places apart that are read in turn are not fetched from memory ahead of the loop.
@compiled_sum
def block_sums(x: Any, start: Any, length: int, center: Any) -> Any:
    total, squares = 0.0, 0.0
    for index in range(start, start + np.uintp(length)):
        deviation = np.float64(load(x, index) - center)
        total += deviation
        squares += deviation * deviation
    return total, squares


@inlined
def add_exactly(total: float, rest: float, term: float) -> tuple[float, float]:
    """Knuth's TwoSum: the total with the term, and the rest with what rounding leaves of it."""
    both = total + term
    of_term = both - total
    return both, rest + ((total - (both - of_term)) + (term - of_term))


@inlined
def with_rest(total: float, rest: float) -> float:
    """The whole sum; there is no rest of one that is not finite."""
    return total + rest if np.isfinite(total) else total
