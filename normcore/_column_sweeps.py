"""Compiled sweeps over rows of columns: boxes of one position per channel and more than one row.

Every column is summed for itself; the sums of a group's columns are joined, and the output has one set of parameters
per column. A row may stand for several: the columns are repeated then, up to a width W. Kernels take `parts`: parts of
a segment of rows that share their parameters, elements of a part, and elements of a segment; the elements are of whole
rows but for the last. P is the number of segments.
"""

from typing import Any

import numpy as np

from normcore._column_loops import add_rows, scale_rows
from normcore._compiled import compiled, inlined
from normcore._group_sums import add_exactly, with_rest
from normcore._sweeps import LEAST, MOST, copy, fill_terms, parameters_in, repeat, settle, values_in
from normcore._values import as_computed, as_read, load, parameters_at, store, three_at, values_at

_FEW = 16
# Of a tensor of more bytes than this, a sweep that reads and one that writes take pages in turn: memory is read while
# it is written. What is smaller stays in a cache, and there longer sweeps are faster.
_FAR, _PAGE = 2**23, 2**12
FIRST, AGAIN, WIDE, SETTLED = range(4)
# Rows that are added in turn, four by four, before all is rounded too often for values that have float64's digits.
FEW_ROWS = 128


@compiled
def standardize_samples(
    kind: Any,
    x: Any,
    y: Any,
    weight: Any,
    bias: Any,
    by: Any,
    sizes: Any,
    steps: Any,
    eps: float,
    has_mean: bool,
    start: int,
    stop: int,
) -> None:
    """Find the statistics of each sample's groups, and standardize it while it is in the cache.

    The sums of a sample are made while the one before it is standardized. `steps` is (rows of the B * R that share
    weight and bias, W).
    """
    _, rows, groups, channels, _ = sizes
    per, wide = steps
    x, y, count = values_at(kind, x, values_in(sizes)), values_at(kind, y, values_in(sizes)), parameters_in(sizes, per)
    weight, bias = parameters_at(kind, weight, count), parameters_at(kind, bias, count)
    width = groups * channels
    size = rows * width
    own, parts = (1, rows, groups, channels, 1), parts_in(x, size, wide)
    # The whole rows in a page, in fours as loops take them together.
    step = max(1, _PAGE // (4 * wide * x.itemsize)) * 4 * wide if x.size * x.itemsize > _FAR else size
    center = np.full((1, wide), as_computed(x, 0.0))
    wide_center = np.zeros((1, wide))
    sums = np.empty((parts[0], 2, wide))
    found, terms = np.empty((5, groups)), np.full((3, 1, wide), as_read(x, 0.0))
    for sample in range(start, stop + 1):
        values = x[sample * size :][:size]
        affine = sample * rows // per * width
        if has_mean and sample < stop:
            find_centers(kind, values, center, width, rows)
        _sweep_in_turn(x, y, center, sums, terms, (sample, step, parts), sample > start, sample < stop)
        if sample == stop:
            break
        state = FIRST
        while state != SETTLED:
            if state == AGAIN:
                sum_columns(kind, values, None, None, center, sums, parts, 0, parts[0])
            elif state == WIDE:
                copy(center, 0, wide_center, 0, wide)
                sum_columns(kind, values, None, None, wide_center, sums, parts, 0, parts[0])
            state = settle_columns(kind, values, found, center, sums, own, eps, has_mean, state)
        copy(found, 0, by, sample * groups, groups)
        fill_terms(kind, weight[affine : affine + width], bias[affine : affine + width], found, terms, own, rows, rows)


@inlined
def parts_in(x: Any, elements: int, wide: int) -> Any:
    """The parts of a sample of so many elements, in rows of a width."""
    size = min(elements, FEW_ROWS * wide) if x.itemsize == 8 else elements
    return -(-elements // size), size, elements


@inlined
def _sweep_in_turn(
    x: Any, y: Any, center: Any, sums: Any, terms: Any, place: Any, has_output: bool, has_sums: bool
) -> None:
    """Standardize the sample before one, and make the sums of that; `place` is (sample, elements of a turn, parts)."""
    sample, step, parts = place
    blocks, part, size = parts
    at = np.uintp(sample * size)
    sums[:] = 0.0
    if step >= size:
        for own in range(blocks if has_sums else 0):
            begin, length = at + np.uintp(own * part), min(part, size - own * part)
            add_rows(x, None, y, begin, length, center[0], sums[own, 0], sums[own, 1])
        if has_output:
            scale_rows(x, y, at - np.uintp(size), size, terms[0, 0], terms[1, 0], terms[2, 0])
        return
    for first in range(0, size, step):
        own, length = first // part, min(step, size - first)
        if has_sums:
            add_rows(x, None, None, at, length, center[0], sums[own, 0], sums[own, 1])
        if has_output:
            scale_rows(x, y, at - np.uintp(size), length, terms[0, 0], terms[1, 0], terms[2, 0])
        at += np.uintp(step)


@compiled
def sum_columns(
    kind: Any, x: Any, grad: Any, out: Any, center: Any, sums: Any, parts: Any, start: int, stop: int
) -> None:
    """Sums of deviations from `center` (P, W) and of their squares, into `sums` (parts of all, 2, W).

    With `grad`, sums of it and of its products with the deviations; `out` is fetched into the cache.
    """
    blocks, size, elements = parts
    count = elements * len(center)
    x, grad, target = three_at(kind, x, grad, out, count)
    for part in range(start, stop):
        own, first = part // blocks, part % blocks * size
        at, length = np.uintp(own * elements + first), min(size, elements - first)
        sums[part] = 0.0
        add_rows(x, grad, target, at, length, center[own], sums[part, 0], sums[part, 1])


@compiled
def standardize_columns(kind: Any, x: Any, y: Any, terms: Any, parts: Any, start: int, stop: int) -> None:
    """The output (x - center) * scale + shift; `terms` are those, (3, P, W)."""
    blocks, size, elements = parts
    x, y = values_at(kind, x, elements * terms.shape[1]), values_at(kind, y, elements * terms.shape[1])
    for part in range(start, stop):
        own, first = part // blocks, part % blocks * size
        at, length = np.uintp(own * elements + first), min(size, elements - first)
        scale_rows(x, y, at, length, terms[0, own], terms[1, own], terms[2, own])


@compiled
def joined(sums: Any, segments: int, width: int) -> Any:
    """Sums (parts of all, 2, W) over parts and repeated columns, as (2, P, columns); what rounding leaves is added."""
    blocks = len(sums) // segments
    found = np.zeros((4, segments, width))
    for part in range(len(sums)):
        for index in range(2):
            total, rest = found[index, part // blocks], found[index + 2, part // blocks]
            for first in range(0, sums.shape[2], width):
                _add_columns(sums[part, index, first : first + width], total, rest)
    for index in range(2):
        for own in range(segments):
            total, rest = found[index, own], found[index + 2, own]
            for column in range(np.uintp(width)):
                total[column] = with_rest(total[column], rest[column])
    return found[:2]


@inlined
def _add_columns(terms: Any, total: Any, rest: Any) -> None:
    for column in range(np.uintp(terms.size)):
        total[column], rest[column] = add_exactly(total[column], rest[column], terms[column])


@compiled
def join_rows(kind: Any, sums: Any, first: Any, second: Any, count: int) -> None:
    """Write two sums (2, rows, columns) over as many rows in turn as one of `count` stands for, (count, columns).

    In float64, with what rounding leaves.
    """
    every, width = sums.shape[1] // count, sums.shape[2]
    first, second = values_at(kind, first, count * width), values_at(kind, second, count * width)
    totals = np.empty((4, width))
    for own in range(count):
        totals[:] = 0.0
        for row in range(own * every, (own + 1) * every):
            for index in range(2):
                total, each = totals[index], sums[index, row]
                if first.itemsize == 8:
                    _add_columns(each, total, totals[index + 2])
                else:
                    for column in range(np.uintp(width)):
                        total[column] += each[column]
        for column in range(width):
            store(first, own * width + column, with_rest(totals[0, column], totals[2, column]))
            store(second, own * width + column, with_rest(totals[1, column], totals[3, column]))


@compiled
def find_centers(kind: Any, x: Any, center: Any, width: int, rows: int) -> None:
    """Means of the first values of columns, repeated in (B, W), exactly the value where they are equal."""
    x = values_at(kind, x, len(center) * rows * width)
    few = min(rows, _FEW)
    total = np.empty(width)
    for sample in range(len(center)):
        first = np.uintp(sample * rows * width)
        total[:] = 0.0
        for row in range(1, few):
            at = first + np.uintp(row * width)
            for column in range(np.uintp(width)):
                total[column] += np.float64(load(x, at + column)) - np.float64(load(x, first + column))
        for column in range(np.uintp(width)):
            center[sample, column] = as_computed(x, np.float64(load(x, first + column)) + total[column] / few)
        repeat(center[sample], width)


@compiled
def settle_columns(
    kind: Any, x: Any, by: Any, center: Any, sums: Any, sizes: Any, eps: float, has_mean: bool, state: int
) -> int:
    """Statistics of groups from sums over parts of columns around centers of their own, as `sum_columns` leaves them.

    FIRST: where sums have to be made AGAIN, around centers that it has moved, or in float64 around centers that are
    (WIDE), it says so; those are settled by a call that says in turn how they came about.
    """
    samples, rows, groups, channels, _ = sizes
    x = values_at(kind, x, values_in(sizes))
    found = joined(sums, samples, groups * channels)
    if state == FIRST and has_mean and _correct_centers(x, center, found, rows):
        return AGAIN
    if state != WIDE and not _has_digits(x, found[1], rows):
        return WIDE
    _settle(x, by, center, found, sizes, eps, has_mean)
    return SETTLED


@inlined
def _correct_centers(x: Any, center: Any, sums: Any, rows: int) -> bool:
    """Move the centers to the means for float64 values, and where one was too far off.

    Off by k deviations, the sums of squares are 1 + k * k times those around the mean, and so are their errors. With
    float64 sums of float32 values k may be 10, which takes two of their sixteen digits. Those of half precision are
    within 5 * 2**-24, of a difference, a square and two sums in float32: for k = 1.5 the variance is within 1e-6.
    """
    total, squares = sums
    samples, width = total.shape
    is_off, most = x.itemsize == 8, 2.25 if x.itemsize == 2 else 100.0
    for sample in range(samples):
        for column in range(width):
            is_off |= (1.0 + most) * total[sample, column] ** 2 > most * squares[sample, column] * rows
    if is_off:
        for sample in range(samples):
            for column in range(width):
                moved = np.float64(center[sample, column]) + total[sample, column] / rows
                center[sample, column] = as_computed(x, moved)
            repeat(center[sample], width)
    return bool(is_off)


@inlined
def _has_digits(x: Any, squares: Any, count: int) -> bool:
    """Whether sums of squares are of sizes that the datatype computed in holds; zeros may be of squares too small."""
    has_digits = True
    if x.itemsize == 2:
        for row in range(squares.shape[0]):
            for column in range(squares.shape[1]):
                has_digits &= LEAST * count < squares[row, column] < MOST * count
    return has_digits


@inlined
def _settle(x: Any, by: Any, center: Any, sums: Any, sizes: Any, eps: float, has_mean: bool) -> None:
    total, squares = sums
    samples, rows, groups, channels, _ = sizes
    for group in range(samples * groups):
        sample, first = group // groups, group % groups * channels
        origin = np.float64(center[sample, first])
        mean, m2 = 0.0, 0.0
        for column in range(first, first + channels):
            mean += (np.float64(center[sample, column]) - origin) + total[sample, column] / rows
        mean = mean / channels if has_mean else 0.0
        for column in range(first, first + channels):
            own = total[sample, column] / rows
            distance = (np.float64(center[sample, column]) - origin) + own - mean
            m2 += squares[sample, column]
            if has_mean:
                m2 += rows * (distance * distance - own * own)
        settle(x, by, group, origin, mean, m2 / (rows * channels), eps)
