"""Compiled sweeps over a box of values: sums of deviations, and y = (x - mean) * invstd * weight + bias.

A box is (B, R, G, K, S) in memory order. Statistics are over R, K and S, one per group (b, g). Weight and bias are
(Q, G, K): one for every `per` rows of the B * R. A cell is the K * S values of a group that lie together.

`by` is (5, B * G), float64: center, offset, mean, var and invstd. center + offset is the mean; center has the datatype
of sums, and offset what that leaves. Outputs are computed around the center in their own precision, to which what that
leaves is added with the bias. Sums are made around a value near the mean, in float64, or for half precision
in float32 within a block and in float64 over blocks; so one sweep finds mean and variance. For float64 values, and
where the value proves to have been far from the mean, a second one sums around the mean that the first has found.

Kernels take a kind and addresses for values, weight and bias, as `_values.values_at` has them; 0 where there is none.
"""

from typing import Any

import numpy as np

from normcore._compiled import compiled, fused, inlined
from normcore._far_output import arrive, piece, send, way_to
from normcore._group_sums import block_sums, group_sums
from normcore._values import as_computed, as_read, load, parameters_at, read, store, values_at

_NEAR = 64
# float32 sums of squares per value beyond these, which bfloat16 reaches, are made in float64.
LEAST, MOST = 1e-25, 1e33
# Scales beyond these leave too little of float32 for their products.
LEAST_SCALE, MOST_SCALE = 1e-15, 1e15
CENTER, OFFSET, MEAN, VAR, INVSTD = range(5)


@compiled
def standardize_groups(
    kind: Any,
    x: Any,
    y: Any,
    weight: Any,
    bias: Any,
    by: Any,
    sizes: Any,
    per: int,
    eps: float,
    has_mean: bool,
    start: int,
    stop: int,
) -> None:
    """Find the statistics of each group, and standardize it while it is in the cache, unless there is no `y`."""
    _, rows, groups, channels, positions = sizes
    has_output = y != 0
    x, y = values_at(kind, x, values_in(sizes)), values_at(kind, y, values_in(sizes))
    count = parameters_in(sizes, per)
    weight, bias = parameters_at(kind, weight, count), parameters_at(kind, bias, count)
    way = way_to(y, channels * positions, positions if positions > 1 else channels)
    is_shared = count == groups * channels
    sample, index = start // groups, start % groups
    for group in range(start, stop):
        first = sample * rows * groups + index
        _measure(x, by, group, first, rows, groups, channels * positions, eps, has_mean)
        if has_output:
            for row in range(sample * rows, (sample + 1) * rows):
                affine = affine_row(row, per, is_shared) * groups + index
                _standardize_cell(x, y, way, weight, bias, by, group, row * groups + index, affine, sizes)
        sample, index = (sample, index + 1) if index + 1 < groups else (sample + 1, 0)
    arrive(way)


@compiled
def standardize_vectors(
    kind: Any, x: Any, y: Any, weight: Any, bias: Any, by: Any, sizes: Any, per: int, start: int, stop: int
) -> None:
    """The same by given statistics, in memory order: from row to row of the B * R."""
    _, rows, groups, channels, _ = sizes
    x, y = values_at(kind, x, values_in(sizes)), values_at(kind, y, values_in(sizes))
    count = parameters_in(sizes, per)
    weight, bias = parameters_at(kind, weight, count), parameters_at(kind, bias, count)
    way = way_to(y, y.size, channels)
    for row in range(start, stop):
        group, affine = row // rows * groups, row // per * groups
        for index in range(groups):
            _standardize_cell(x, y, way, weight, bias, by, group + index, row * groups + index, affine + index, sizes)
    arrive(way)


@inlined
def affine_row(row: int, per: int, is_shared: bool) -> int:
    """The row of weights for a row of the B * R: to divide takes as long as dozens of values."""
    return 0 if is_shared else row // per


@inlined
def values_in(sizes: Any) -> int:
    """Values of a box."""
    samples, rows, groups, channels, positions = sizes
    return int(samples * rows * groups * channels * positions)


@inlined
def parameters_in(sizes: Any, per: int) -> int:
    """Values of a weight or bias, Q * G * K."""
    samples, rows, groups, channels, _ = sizes
    return int(samples * rows // per * groups * channels)


@compiled
def are_usual(by: Any) -> bool:
    """Whether every scale is within the bounds, or no number."""
    is_usual = True
    for group in range(by.shape[1]):
        is_usual &= _is_usual(by[INVSTD, group])
    return is_usual


@inlined
def _is_usual(scale: float) -> bool:
    return not (scale < LEAST_SCALE or scale > MOST_SCALE)


@compiled
def with_narrow_centers(by: Any) -> Any:
    """The same statistics around centers that float32 holds."""
    rows = by.copy()
    for group in range(by.shape[1]):
        rows[CENTER, group] = np.float32(by[CENTER, group])
        rows[OFFSET, group] += by[CENTER, group] - rows[CENTER, group]
    return rows


@compiled
def fill_given(kind: Any, mean: Any, var: Any, by: Any, eps: float, is_narrow: bool) -> None:
    """Statistics of a mean and a variance of any one datatype, around centers that float32 holds where `is_narrow`."""
    mean, var = values_at(kind, mean, by.shape[1]), values_at(kind, var, by.shape[1])
    for group in range(by.shape[1]):
        by[MEAN, group] = load(mean, group)
        is_held = is_narrow and abs(by[MEAN, group]) < MOST
        by[CENTER, group] = np.float32(by[MEAN, group]) if is_held else by[MEAN, group]
        by[OFFSET, group] = by[MEAN, group] - by[CENTER, group]
        by[VAR, group] = load(var, group)
        by[INVSTD, group] = 1.0 / np.sqrt(by[VAR, group] + eps)


@compiled
def fill_terms(kind: Any, weight: Any, bias: Any, by: Any, terms: Any, sizes: Any, segment: int, per: int) -> bool:
    """Center, scale and shift, (3, P, W), of the channels of a segment of rows, repeated to the width W.

    Of four terms the last is invstd. Whether their datatype holds the scales in full, with weights and without.
    """
    _, rows, groups, channels, _ = sizes
    width, count = groups * channels, parameters_in(sizes, per)
    weight, bias = parameters_at(kind, weight, count), parameters_at(kind, bias, count)
    is_usual = True
    for own in range(terms.shape[1]):
        affine, first = own * segment // per * width, own * segment // rows * groups
        for group in range(first, first + groups):
            is_usual &= terms.itemsize == 8 or _is_usual(by[INVSTD, group])
            for column in range((group - first) * channels, (group - first + 1) * channels):
                scale = by[INVSTD, group] * weight[affine + column]
                terms[0, own, column] = by[CENTER, group]
                terms[1, own, column] = scale
                offset = (by[CENTER, group] - terms[0, own, column]) + by[OFFSET, group]
                terms[2, own, column] = bias[affine + column] - offset * scale
                if len(terms) > 3:
                    terms[3, own, column] = by[INVSTD, group]
                is_usual &= terms.itemsize == 8 or scale == 0.0 or _is_usual(abs(scale))
        for term in range(len(terms)):
            repeat(terms[term, own], width)
    return is_usual


@inlined
def copy(source: Any, first: int, target: Any, start: int, width: int) -> None:
    """Columns of all rows into those of others. To assign arrays would compile a second's worth of checks."""
    for row in range(len(source)):
        for column in range(width):
            target[row, start + column] = source[row, first + column]


@compiled
def repeat(row: Any, width: int) -> None:
    """Fill a row of columns with its first ones, again and again."""
    for column in range(np.uintp(width), np.uintp(row.size)):
        row[column] = row[column - np.uintp(width)]


@compiled
def standardize_cells(
    kind: Any, x: Any, y: Any, terms: Any, segment: int, positions: int, start: int, stop: int
) -> None:
    """The output (x - center) * scale + shift, from row to row; `terms` are those of (3, segments, channels)."""
    count = segment * terms.shape[1] * terms.shape[2] * positions
    x, y = values_at(kind, x, count), values_at(kind, y, count)
    way = way_to(y, y.size, positions)
    for row in range(start, stop):
        for channel in range(terms.shape[2]):
            standardize_channel(x, y, way, terms, row // segment, row, channel, positions)
    arrive(way)


@inlined
def standardize_channel(x: Any, y: Any, way: Any, terms: Any, own: int, row: int, channel: int, positions: int) -> None:
    """The same for a channel of a row, by the terms of its own segment."""
    at = np.uintp((row * terms.shape[2] + channel) * positions)
    _standardize_run(x, y, way, at, positions, terms[0, own, channel], terms[1, own, channel], terms[2, own, channel])


@fused
def _standardize_run(x: Any, y: Any, way: Any, at: Any, positions: int, center: Any, scale: Any, shift: Any) -> None:
    end = at + np.uintp(positions)
    while at < end:
        length, place = piece(way, at, end)
        for index in range(length):
            store(way[0], place + index, (read(x, at + index) - center) * scale + shift)
        send(way, y, at, length)
        at += length


@inlined
def settle(x: Any, by: Any, group: int, center: float, offset: float, var: float, eps: float) -> None:
    """Write statistics; NaN for a variance beyond float64, which would make every output the bias without a trace."""
    var = 0.0 if var < 0.0 else var
    rounded = np.float64(as_computed(x, center + offset))
    by[CENTER, group] = rounded
    by[OFFSET, group] = (center - rounded) + offset
    by[MEAN, group] = center + offset
    by[VAR, group] = var
    by[INVSTD, group] = 1.0 / np.sqrt(var + eps) if var < np.inf else np.nan


@inlined
def _measure(
    x: Any, by: Any, group: int, first: int, rows: int, groups: int, length: int, eps: float, has_mean: bool
) -> None:
    count = rows * length
    center, start, step = 0.0, np.uintp(first * length), groups * length
    if has_mean:
        origin = np.float64(load(x, start))
        near = min(length, _NEAR)
        center = np.float64(as_computed(x, origin + block_sums(x, start, near, origin)[0] / near))
    total, squares = group_sums(x, start, rows, step, length, as_computed(x, center))
    if has_mean and (x.itemsize == 8 or 2.0 * total * total > squares * count):
        center = np.float64(as_computed(x, center + total / count))
        total, squares = group_sums(x, start, rows, step, length, as_computed(x, center))
    if x.itemsize == 2 and not LEAST * count < squares < MOST * count:  # zeros may be of squares too small
        total, squares = group_sums(x, start, rows, step, length, np.float64(center))
    offset = total / count if has_mean else 0.0
    settle(x, by, group, center, offset, squares / count - offset * offset, eps)


@fused
def _standardize_cell(
    x: Any, y: Any, way: Any, weight: Any, bias: Any, by: Any, group: int, cell: int, affine: int, sizes: Any
) -> None:
    _, _, _, channels, positions = sizes
    affine *= channels
    center, invstd = np.float64(as_read(x, by[CENTER, group])), by[INVSTD, group]
    offset = (by[CENTER, group] - center) + by[OFFSET, group]
    start = np.uintp(cell * channels * positions)
    if positions == 1:
        near, own, rest = as_read(x, center), as_read(x, invstd), as_read(x, -offset * invstd)
        first = np.uintp(affine)
        end = start + np.uintp(channels)
        while start < end:
            length, place = piece(way, start, end)
            for index in range(length):
                value = (read(x, start + index) - near) * own + rest
                store(way[0], place + index, value * weight[first + index] + bias[first + index])
            send(way, y, start, length)
            start += length
            first += length
        return
    for channel in range(channels):
        scale = invstd * weight[affine + channel]
        near, own, shift = as_read(x, center), as_read(x, scale), as_read(x, bias[affine + channel] - offset * scale)
        _standardize_run(x, y, way, start, positions, near, own, shift)
        start += np.uintp(positions)
