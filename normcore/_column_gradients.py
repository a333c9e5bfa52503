"""Compiled sweeps of a backward, over the rows of columns of `_column_sweeps`."""

from typing import Any

import numpy as np

from normcore._column_loops import add_rows, combine_rows, scale_and_add_row
from normcore._column_sweeps import joined, parts_in, sum_columns
from normcore._compiled import compiled, inlined
from normcore._sweeps import CENTER, INVSTD, OFFSET, copy, parameters_in, repeat, values_in
from normcore._values import as_computed, as_read, fetch_to_write, parameters_at, three_at
from normcore._vector_sums import FEW

# How far ahead of what is written lines are fetched to be written.
_AHEAD_BYTES = 2**11


@compiled
def gradient_of_samples(
    kind: Any,
    x: Any,
    grad: Any,
    out: Any,
    weight: Any,
    by: Any,
    sums: Any,
    sizes: Any,
    steps: Any,
    has_mean: bool,
    start: int,
    stop: int,
) -> None:
    """The whole backward of each sample; its sums of dy and dy * xh go into `sums` (2, B, G * K)."""
    _, rows, groups, channels, _ = sizes
    per, wide = steps
    width, count = groups * channels, values_in(sizes)
    x, grad, out = three_at(kind, x, grad, out, count)
    weight = parameters_at(kind, weight, parameters_in(sizes, per))
    own, parts = (1, rows, groups, channels, 1), parts_in(x, rows * width, wide)
    center = np.full((1, wide), as_computed(x, 0.0))
    found = np.empty((parts[0], 2, wide))
    terms = np.full((4, 1, wide), as_read(x, 0.0))
    own_by = np.empty((5, groups))
    for sample in range(start, stop):
        first, last = sample * rows * width, (sample + 1) * rows * width
        affine = sample * rows // per * width
        gamma = weight[affine : affine + width]
        copy(by, sample * groups, own_by, 0, groups)
        fill_centers(own_by, center, own, rows)
        sum_columns(kind, x[first:last], grad[first:last], out[first:last], center, found, parts, 0, parts[0])
        own_sums = fill_gradient_terms(kind, found, gamma, own_by, terms, own, rows, rows, has_mean)
        for row in range(2):
            for column in range(width):
                sums[row, sample, column] = own_sums[row, 0, column]
        gradient_of_columns(kind, x[first:last], grad[first:last], out[first:last], terms, parts, 0, parts[0])


@compiled
def fill_centers(by: Any, center: Any, sizes: Any, segment: int) -> None:
    """Centers of the groups for the columns of each segment of rows, repeated to (P, W)."""
    _, rows, groups, channels, _ = sizes
    for own in range(len(center)):
        first = own * segment // rows * groups
        for group in range(groups):
            center[own, group * channels : (group + 1) * channels] = by[CENTER, first + group]
        repeat(center[own], groups * channels)


@compiled
def gradient_by_given(
    kind: Any, x: Any, grad: Any, out: Any, terms: Any, sums: Any, parts: Any, start: int, stop: int
) -> None:
    """The gradient dy * scale by statistics that are constants; `terms` are center, scale, ..., invstd, (4, P, W).

    Sums of dy and dy * (x - center) * invstd over each part go into `sums` (parts of all, 2, W), made as `_vector_sums`
    makes those of samples.
    """
    blocks, size, elements = parts
    x, grad, out = three_at(kind, x, grad, out, elements * terms.shape[1])
    few = np.zeros((2, terms.shape[2]), terms.dtype)
    for part in range(start, stop):
        own, first = part // blocks, part % blocks * size
        at, length = np.uintp(own * elements + first), min(size, elements - first)
        center, scale, invstd = terms[0, own], terms[1, own], terms[3, own]
        sums[part] = 0.0
        rows = -(-length // center.size)
        for row in range(rows):
            done = row * center.size
            start_of_row = at + np.uintp(done)
            fetch_to_write(out, start_of_row + np.uintp(_AHEAD_BYTES // out.itemsize), np.uintp(center.size))
            scale_and_add_row(x, grad, out, start_of_row, length - done, center, scale, invstd, few[0], few[1])
            if (row + 1) % FEW == 0 or row + 1 == rows:
                _move(few, sums[part])
        if not _is_finite(sums[part]):
            sums[part] = 0.0
            add_rows(x, grad, None, at, length, center, sums[part, 0], sums[part, 1])
            for column in range(center.size):
                sums[part, 1, column] *= invstd[column]


@inlined
def _move(few: Any, sums: Any) -> None:
    """Add sums of a few rows to those in float64, and start anew."""
    for index in range(2):
        for column in range(np.uintp(few.shape[1])):
            sums[index, column] += few[index, column]
            few[index, column] = 0.0


@inlined
def _is_finite(sums: Any) -> bool:
    """Whether all are numbers: they are not either where float32 does not hold those of a few rows."""
    total = 0.0
    for index in range(2):
        for column in range(np.uintp(sums.shape[1])):
            total += sums[index, column] - sums[index, column]
    return total == 0.0


@compiled
def standardized_sums(sums: Any, by: Any, sizes: Any, segment: int, is_scaled: bool) -> Any:
    """Sums (2, P, columns) of dy and dy * xh from those over parts of dy and dy * (x - center), times invstd or not."""
    samples, rows, groups, channels, _ = sizes
    found = joined(sums, samples * rows // segment, groups * channels)
    for own in range(found.shape[1]):
        first = own * segment // rows * groups
        for group in range(groups):
            invstd = by[INVSTD, first + group]
            for column in range(group * channels, (group + 1) * channels):
                if not is_scaled:
                    found[1, own, column] *= invstd
                found[1, own, column] -= by[OFFSET, first + group] * invstd * found[0, own, column]
    return found


@compiled
def weighted_means(kind: Any, sums: Any, weight: Any, sizes: Any, per: int, has_mean: bool) -> Any:
    """Means (2, B * G) of a and a * xh from sums (2, rows, columns) of dy and dy * xh; 0 for the first without mean."""
    samples, every, groups, channels, positions = sizes
    _, count, width = sums.shape
    parameters = parameters_in(sizes, per)
    weight = parameters_at(kind, weight, parameters)
    means = np.zeros((2, samples * groups))
    for row in range(count):
        first, sample = row * parameters // (count * width) * width, row * samples // count
        for group in range(groups):
            for column in range(group * channels, (group + 1) * channels):
                means[0, sample * groups + group] += weight[first + column] * sums[0, row, column]
                means[1, sample * groups + group] += weight[first + column] * sums[1, row, column]
    for group in range(samples * groups):
        means[0, group] = means[0, group] / (every * channels * positions) if has_mean else 0.0
        means[1, group] /= every * channels * positions
    return means


@compiled
def gradient_of_columns(kind: Any, x: Any, grad: Any, out: Any, terms: Any, parts: Any, start: int, stop: int) -> None:
    """The gradient dy * scale + (x - center) * slope + constant; `terms` are center, scale, ..., (4, P, W)."""
    blocks, size, elements = parts
    count = elements * terms.shape[1]
    x, grad, out = three_at(kind, x, grad, out, count)
    for part in range(start, stop):
        own, first = part // blocks, part % blocks * size
        at, length = np.uintp(own * elements + first), min(size, elements - first)
        combine_rows(x, grad, out, at, length, terms[0, own], terms[1, own], terms[2, own], terms[3, own])


@compiled
def fill_gradient_terms(
    kind: Any, sums: Any, weight: Any, by: Any, terms: Any, sizes: Any, segment: int, per: int, has_mean: bool
) -> Any:
    """Terms for `gradient_of_columns` from sums over parts, and the sums (2, P, columns) of dy and dy * xh."""
    found = standardized_sums(sums, by, sizes, segment, False)
    means = weighted_means(kind, found, weight, sizes, per, has_mean)
    fill_terms_by(kind, weight, by, means, terms, sizes, segment, per)
    return found


@compiled
def fill_terms_by(kind: Any, weight: Any, by: Any, means: Any, terms: Any, sizes: Any, segment: int, per: int) -> None:
    """Terms for `gradient_of_columns` by means (2, B * G) of a and a * xh, the columns repeated to its width."""
    _, rows, groups, channels, _ = sizes
    weight = parameters_at(kind, weight, parameters_in(sizes, per))
    width = groups * channels
    for own in range(terms.shape[1]):
        affine, first = own * segment // per * width, own * segment // rows * groups
        for group in range(first, first + groups):
            invstd = by[INVSTD, group]
            slope = -invstd * invstd * means[1, group]
            for column in range((group - first) * channels, (group - first + 1) * channels):
                terms[0, own, column] = by[CENTER, group]
                terms[1, own, column] = invstd * weight[affine + column]
                terms[2, own, column] = slope
                offset = (by[CENTER, group] - terms[0, own, column]) + by[OFFSET, group]
                terms[3, own, column] = -invstd * means[0, group] - offset * slope
        for term in range(4):
            repeat(terms[term, own], width)
