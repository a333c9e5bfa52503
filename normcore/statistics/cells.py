"""The cells that a histogram counts in: intervals that follow from the smallest and the largest value alone. Compiled.

The bits of a floating number, read as an integer, ascend with its magnitude, and 2^m consecutive ones share an octave's
2^-m part: cells of equally many such integers are logarithmic over octaves and linear within a narrow range. Cells are
aligned to powers of two and only ever grow with the range, so that those of a part lie within those of the whole:
counts of parts add up to the counts of the whole exactly, in any order.

The cells of a row are told by `floor`, the key of the least magnitude that is told from 0, `shift`, for a cell has
2^shift keys, and `first`, the index of the first cell: the smallest value's key, shifted. A state is `Histogram`'s
as arrays, which are changed in place.
"""

from typing import Any

import numpy as np

from normcore._compiled import compiled
from normcore.statistics.histogram import CELLS

# An octave of magnitudes has 2^32 keys: float64's exponent and the first 32 bits of its mantissa.
_OCTAVE_BITS = 32
_DROPPED_BITS = 20
_MAGNITUDE = 2**63 - 1
_INFINITY = 2047 << _OCTAVE_BITS
# Magnitudes so many octaves below the largest share the cell of 0.
_OCTAVES = 24
# With values on both sides of 0, 16 cells an octave: two sides of up to 25 octaves fit.
_BOTH_SIDES_SHIFT = _OCTAVE_BITS - 4


@compiled
def count_values(
    values: Any,
    counted: Any,
    place: int,
    step: int,
    inner: int,
    smallest: Any,
    largest: Any,
    counts: Any,
    non_finite: Any,
) -> None:
    """Count float64 values into a state: every `step`-th of a tensor whose rows have `inner` values side by side.

    The first one is at `place` of the tensor. Only those where `counted` is true; all where it is empty.
    """
    low, high = smallest.copy(), largest.copy()
    rows = smallest.size
    skipped, rest = step // inner, step % inner
    row, offset = place // inner % rows, place % inner
    for index in range(values.size):
        value = values[index] + 0.0  # not a negative zero, whose bits would tell the order of values
        if counted.size == 0 or counted[index]:
            if abs(value) < np.inf:
                low[row], high[row] = min(low[row], value), max(high[row], value)
            else:
                non_finite[row] += 1
        row, offset = _next(row, offset, rows, skipped, rest, inner)
    cells = _widen(smallest, largest, counts, low, high)
    bits = values.view(np.int64)
    row, offset = place // inner % rows, place % inner
    for index in range(values.size):
        if (counted.size == 0 or counted[index]) and abs(values[index]) < np.inf:
            counts[row, (_key(bits[index], cells[row, 0]) >> cells[row, 1]) - cells[row, 2]] += 1
        row, offset = _next(row, offset, rows, skipped, rest, inner)


@compiled
def count_state(other: Any, smallest: Any, largest: Any, counts: Any, non_finite: Any) -> None:
    """Count what another state, of as many rows, has counted."""
    other_smallest, other_largest, other_counts, other_non_finite = other
    low, high = np.minimum(smallest, other_smallest), np.maximum(largest, other_largest)
    cells = _widen(smallest, largest, counts, low, high)
    bits_low, bits_high = other_smallest.view(np.int64), other_largest.view(np.int64)
    for row in range(smallest.size):
        if other_smallest[row] <= other_largest[row]:
            own = _cover(bits_low[row], bits_high[row])
            _move(other_counts[row], own, counts[row], (cells[row, 0], cells[row, 1], cells[row, 2]))
        non_finite[row] += other_non_finite[row]


@compiled
def edges_of(smallest: Any, largest: Any) -> Any:
    """Where cells begin and end, cut to the range of the values, of a single row."""
    floor, shift, first = _cover(smallest.view(np.int64)[0], largest.view(np.int64)[0])
    edges = np.empty(CELLS + 1)
    bits = edges.view(np.int64)
    for cell in range(CELLS + 1):
        key = (first + cell) << shift
        bits[cell] = 0 if key == 0 else min(abs(key) + floor, _INFINITY) << _DROPPED_BITS
        signed = -edges[cell] if key < 0 else edges[cell]
        edges[cell] = max(min(signed, largest[0]), smallest[0])
    return edges


@compiled
def _next(row: int, offset: int, rows: int, skipped: int, rest: int, inner: int) -> Any:
    """A step further: divisions would cost more than the rest of the loop."""
    offset += rest
    row += skipped
    if offset >= inner:
        offset -= inner
        row += 1
    if row >= rows:
        row %= rows
    return row, offset


@compiled
def _widen(smallest: Any, largest: Any, counts: Any, low: Any, high: Any) -> Any:
    """Bring a state to a wider range; its cells (rows, 3): floor, shift and first."""
    cells = np.zeros((smallest.size, 3), np.int64)
    old = np.empty(CELLS, np.int64)
    smallest_bits, largest_bits = smallest.view(np.int64), largest.view(np.int64)
    low_bits, high_bits = low.view(np.int64), high.view(np.int64)
    for row in range(smallest.size):
        if low[row] > high[row]:
            continue
        wide = _cover(low_bits[row], high_bits[row])
        cells[row] = wide
        if smallest[row] <= largest[row]:
            own = _cover(smallest_bits[row], largest_bits[row])
            if own != wide:
                for cell in range(CELLS):  # an array assigned to another brings code for a message, seconds to compile
                    old[cell] = counts[row, cell]
                counts[row] = 0
                _move(old, own, counts[row], wide)
        smallest[row], largest[row] = low[row], high[row]
    return cells


@compiled
def _move(source: Any, own: Any, target: Any, wide: Any) -> None:
    """Add counts in cells to the counts in those of a wider range, within which each lies."""
    own_floor, own_shift, own_first = own
    floor, shift, first = wide
    for cell in range(CELLS):
        if source[cell]:
            index = own_first + cell
            sign = index >> 63
            key = max(((index ^ sign) << own_shift) + own_floor - floor, 0) ^ sign
            target[(key >> shift) - first] += source[cell]


@compiled
def _cover(low_bits: int, high_bits: int) -> Any:
    """Floor, shift and first of the cells of the values from one to the other, which are told by their bits."""
    octave = max(low_bits & _MAGNITUDE, high_bits & _MAGNITUDE) >> (_DROPPED_BITS + _OCTAVE_BITS)
    floor = max(octave - _OCTAVES, 0) << _OCTAVE_BITS
    low, high = _key(low_bits, floor), _key(high_bits, floor)
    shift = 0
    while (high >> shift) - (low >> shift) >= CELLS:
        shift += 1
    if low < 0 <= high:
        shift = _BOTH_SIDES_SHIFT
    return floor, shift, low >> shift


@compiled
def _key(bits: int, floor: int) -> int:
    """The magnitude k for values >= 0, and -1 - k below, which is the complement of k; a negative zero is a zero."""
    magnitude = bits & _MAGNITUDE
    key = max((magnitude >> _DROPPED_BITS) - floor, 0)
    return ~key if bits < 0 and magnitude != 0 else key
