"""Compiled sweeps of a backward, over the boxes of `_sweeps`: sums of dy and dy * xh, and the gradient of the input.

dx = s * (a - mean(a) - xh * mean(a * xh)), a = weight * dy, xh = (x - mean) * s. `means` is (2, B * G), float64:
mean(a) and mean(a * xh), zeros where the statistics are constants. Sums of dy and dy * xh are what gradients of bias
and weight are made of, and those means.
"""

from typing import Any

import numpy as np

from normcore._compiled import compiled, compiled_sum, fused, inlined
from normcore._far_output import arrive, piece, send, way_to
from normcore._sweeps import CENTER, INVSTD, OFFSET, affine_row, parameters_in, standardize_channel, values_in
from normcore._values import as_computed, as_read, fetch_lines, load, parameters_at, read, store, three_at

_BLOCK = 1024
# Values that are fetched at once.
_AHEAD = 1024


@compiled
def gradient_of_groups(
    kind: Any,
    x: Any,
    grad: Any,
    out: Any,
    weight: Any,
    by: Any,
    sums: Any,
    sizes: Any,
    per: int,
    block: int,
    has_mean: bool,
    start: int,
    stop: int,
) -> None:
    """The whole backward of each block of groups while it is in the cache; `sums` as `sum_cells` has them.

    Groups that lie side by side are read together: of each row of a sample, the cells of the whole block.
    """
    _, rows, groups, channels, positions = sizes
    x, grad, out = three_at(kind, x, grad, out, values_in(sizes))
    weight = parameters_at(kind, weight, parameters_in(sizes, per))
    count = rows * channels * positions
    way = way_to(out, block * channels * positions, positions)
    is_shared = weight.size == groups * channels
    terms = np.empty((block, 4))
    group = start
    while group < stop:
        sample, index = group // groups, group % groups
        width = min(block, stop - group, groups - index)
        for row in range(sample * rows, (sample + 1) * rows):
            for own in range(width):
                _sum_cell(x, grad, by, sums, group + own, row * groups + index + own, channels, positions)
        for own in range(width):
            total, dot = 0.0, 0.0
            for row in range(sample * rows, (sample + 1) * rows):
                cell, affine = row * groups + index + own, affine_row(row, per, is_shared) * groups + index + own
                for channel in range(channels):
                    total += weight[affine * channels + channel] * sums[0, cell * channels + channel]
                    dot += weight[affine * channels + channel] * sums[1, cell * channels + channel]
            found = correction_terms(x, by, group + own, total / count if has_mean else 0.0, dot / count)
            terms[own, 0], terms[own, 1], terms[own, 2], terms[own, 3] = found
        for row in range(sample * rows, (sample + 1) * rows):
            for own in range(width):
                cell, affine = row * groups + index + own, affine_row(row, per, is_shared) * groups + index + own
                near, slope, constant = as_read(x, terms[own, 0]), as_read(x, terms[own, 1]), as_read(x, terms[own, 2])
                of_group = near, slope, constant, terms[own, 3]
                _combine_cell(x, grad, out, way, weight, of_group, cell, affine * channels, channels, positions)
        group += width
    arrive(way)


@compiled
def gradient_of_lone_cells(
    kind: Any,
    x: Any,
    grad: Any,
    out: Any,
    weight: Any,
    by: Any,
    sums: Any,
    sizes: Any,
    per: int,
    has_mean: bool,
    start: int,
    stop: int,
) -> None:
    """The same for groups of one cell of one channel, of which there may be many: nothing is kept but in registers.

    One kernel for both would take a twelfth longer for groups of several cells.
    """
    _, _, groups, _, positions = sizes
    x, grad, out = three_at(kind, x, grad, out, values_in(sizes))
    weight = parameters_at(kind, weight, parameters_in(sizes, per))
    way, part, is_shared = way_to(out, positions, positions), 1.0 / positions, weight.size == groups
    sample, index = start // groups, start % groups
    for group in range(start, stop):
        total, dot = _cell_sums(x, grad, by, group, group, positions)
        sums[0, group] = total
        sums[1, group] = dot
        affine = affine_row(sample, per, is_shared) * groups + index
        share = weight[affine] * part
        _fetch_next(x, grad, out, way, group + 1, positions)
        own = correction_terms(x, by, group, share * total if has_mean else 0.0, share * dot)
        _combine_cell(x, grad, out, way, weight, own, group, affine, 1, positions)
        sample, index = (sample, index + 1) if index + 1 < groups else (sample + 1, 0)
    arrive(way)


@compiled
def sum_cells(
    kind: Any,
    x: Any,
    grad: Any,
    out: Any,
    terms: Any,
    by: Any,
    sums: Any,
    sizes: Any,
    segment: int,
    start: int,
    stop: int,
) -> None:
    """Sums of dy and dy * xh over positions, into `sums` (2, B * R * G * K), from row to row of the B * R.

    With `out`, what `standardize_cells` makes of dy goes there, cell by cell, while it is in the cache.
    """
    _, rows, groups, channels, positions = sizes
    x, grad, target = three_at(kind, x, grad, out, values_in(sizes))
    if out is not None:
        way = way_to(target, channels * positions, positions)
    for row in range(start, stop):
        for index in range(groups):
            _sum_cell(x, grad, by, sums, row // rows * groups + index, row * groups + index, channels, positions)
            if out is not None:
                for channel in range(index * channels, (index + 1) * channels):
                    standardize_channel(grad, target, way, terms, row // segment, row, channel, positions)
    if out is not None:
        arrive(way)


@compiled
def gradient_of_cells(
    kind: Any,
    x: Any,
    grad: Any,
    out: Any,
    weight: Any,
    by: Any,
    means: Any,
    sizes: Any,
    per: int,
    start: int,
    stop: int,
) -> None:
    """The gradient of the input from given means, from row to row of the B * R."""
    _, rows, groups, channels, positions = sizes
    x, grad, out = three_at(kind, x, grad, out, values_in(sizes))
    weight = parameters_at(kind, weight, parameters_in(sizes, per))
    way = way_to(out, out.size, positions)
    for row in range(start, stop):
        for index in range(groups):
            group, affine = row // rows * groups + index, (row // per * groups + index) * channels
            own = correction_terms(x, by, group, means[0, group], means[1, group])
            _combine_cell(x, grad, out, way, weight, own, row * groups + index, affine, channels, positions)
    arrive(way)


@inlined
def correction_terms(x: Any, by: Any, group: int, mean: float, dot: float) -> Any:
    """Center, slope and constant of the corrections (x - center) * slope + constant, and invstd."""
    invstd, center = by[INVSTD, group], as_read(x, by[CENTER, group])
    slope = -invstd * invstd * dot
    offset = (by[CENTER, group] - np.float64(center)) + by[OFFSET, group]
    return center, as_read(x, slope), as_read(x, -invstd * mean - offset * slope), invstd


@inlined
def _sum_cell(x: Any, grad: Any, by: Any, sums: Any, group: int, cell: int, channels: int, positions: int) -> None:
    for channel in range(cell * channels, (cell + 1) * channels):
        sums[0, channel], sums[1, channel] = _cell_sums(x, grad, by, group, channel, positions)


@inlined
def _cell_sums(x: Any, grad: Any, by: Any, group: int, channel: int, positions: int) -> Any:
    """Sums of dy and dy * xh of a channel of a cell."""
    center = as_computed(x, by[CENTER, group])
    total, dot = 0.0, 0.0
    for block in range(0, positions, _BLOCK):
        at = np.uintp(channel * positions + block)
        found = _block_sums(x, grad, at, min(_BLOCK, positions - block), center)
        total += np.float64(found[0])
        dot += np.float64(found[1])
    return total, (dot - by[OFFSET, group] * total) * by[INVSTD, group]


@fused
def _combine_cell(
    x: Any,
    grad: Any,
    out: Any,
    way: Any,
    weight: Any,
    terms: Any,
    cell: int,
    affine: int,
    channels: int,
    positions: int,
) -> None:
    center, slope, constant, invstd = terms
    at = np.uintp(cell * channels * positions)
    for channel in range(channels):
        end = at + np.uintp(positions)
        scale = as_read(x, invstd * weight[affine + channel])
        while at < end:
            length, place = piece(way, at, end)
            for index in range(at, at + length):
                correction = (read(x, index) - center) * slope + constant
                store(way[0], place + (index - at), read(grad, index) * scale + correction)
            send(way, out, at, length)
            at += length


@inlined
def _fetch_next(x: Any, grad: Any, out: Any, way: Any, cell: int, length: int) -> None:
    """Have the next cell fetched from memory while this one is computed: left alone, it is not until it is read."""
    if way[1] == np.uintp(0):
        fetch_lines(x, grad, out, np.uintp(cell * length), np.uintp(min(length, _AHEAD)))


# In float64: where dy is nearly constant, next to nothing is left of a sum of dy * xh.
@compiled_sum
def _block_sums(x: Any, grad: Any, start: Any, length: int, center: Any) -> Any:
    total, dot = center - center, center - center
    for index in range(start, start + np.uintp(length)):
        value = load(grad, index)
        total += value
        dot += value * (load(x, index) - center)
    return total, dot
