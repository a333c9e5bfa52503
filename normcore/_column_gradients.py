"""Compiled sweeps of a backward, over the rows of columns of `_column_sweeps`."""

from typing import Any

import numpy as np

from normcore._column_loops import combine_rows
from normcore._column_sweeps import join_sums, sum_columns
from normcore._compiled import as_computed, as_read, compiled
from normcore._sweeps import CENTER, INVSTD, OFFSET, copy, repeat


@compiled
def gradient_of_samples(
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
    width = groups * channels
    own, parts = (1, rows, groups, channels, 1), (1, rows * width, rows * width)
    center = np.full((1, wide), as_computed(x, 0.0))
    found, joined, means = np.empty((1, 2, wide)), np.empty((2, 1, width)), np.empty((2, groups))
    terms = np.full((4, 1, wide), as_read(x, 0.0))
    own_by = np.empty((5, groups))
    for sample in range(start, stop):
        first, last = sample * rows * width, (sample + 1) * rows * width
        affine = sample * rows // per * width
        gamma = weight[affine : affine + width]
        copy(by, sample * groups, own_by, 0, groups)
        fill_centers(own_by, center, own, rows)
        sum_columns(x[first:last], grad[first:last], out[first:last], None, center, found, parts, 0, 1)
        join_sums(found, joined, 1)
        settle_sums(joined, own_by, own, rows)
        means[:] = 0.0
        add_weighted(joined, gamma, means, own)
        if not has_mean:
            means[0] = 0.0
        means /= rows * channels
        for row in range(2):
            for column in range(width):
                sums[row, sample, column] = joined[row, 0, column]
        fill_gradient_terms(gamma, own_by, means, terms, own, rows, rows)
        gradient_of_columns(x[first:last], grad[first:last], out[first:last], terms, parts, 0, 1)


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
def settle_sums(sums: Any, by: Any, sizes: Any, segment: int) -> None:
    """Sums (2, P, columns) of dy and dy * (x - center) as those of dy and dy * xh."""
    _, rows, groups, channels, _ = sizes
    for own in range(sums.shape[1]):
        first = own * segment // rows * groups
        for group in range(groups):
            for column in range(group * channels, (group + 1) * channels):
                sums[1, own, column] -= by[OFFSET, first + group] * sums[0, own, column]
                sums[1, own, column] *= by[INVSTD, first + group]


@compiled
def add_weighted(sums: Any, weight: Any, totals: Any, sizes: Any) -> None:
    """Add sums (2, rows, columns), each times its weight, over rows and channels to those of groups (2, B * G)."""
    samples, _, groups, channels, _ = sizes
    _, count, width = sums.shape
    for row in range(count):
        first, sample = row * weight.size // (count * width) * width, row * samples // count
        for group in range(groups):
            for column in range(group * channels, (group + 1) * channels):
                totals[0, sample * groups + group] += weight[first + column] * sums[0, row, column]
                totals[1, sample * groups + group] += weight[first + column] * sums[1, row, column]


@compiled
def gradient_of_columns(x: Any, grad: Any, out: Any, terms: Any, parts: Any, start: int, stop: int) -> None:
    """The gradient dy * scale + (x - center) * slope + constant; `terms` are center, scale, ..., (4, P, W)."""
    blocks, size, elements = parts
    for part in range(start, stop):
        own, first = part // blocks, part % blocks * size
        at, length = np.uintp(own * elements + first), min(size, elements - first)
        combine_rows(x, grad, out, at, length, terms[0, own], terms[1, own], terms[2, own], terms[3, own])


@compiled
def fill_gradient_terms(weight: Any, by: Any, means: Any, terms: Any, sizes: Any, segment: int, per: int) -> None:
    """Terms for `gradient_of_columns`, the columns repeated to its width."""
    _, rows, groups, channels, _ = sizes
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
