"""Compiled sweeps of a backward, over the boxes of `_sweeps`: sums of dy and dy * xh, and the gradient of the input.

dx = s * (a - mean(a) - xh * mean(a * xh)), a = weight * dy, xh = (x - mean) * s. `means` is (2, B * G), float64:
mean(a) and mean(a * xh), zeros where the statistics are constants. Sums of dy and dy * xh are what gradients of bias
and weight are made of, and those means.
"""

from typing import Any

import numpy as np

from normcore._compiled import (
    as_computed,
    as_read,
    compiled,
    compiled_sum,
    fused,
    inlined,
    load,
    parameters_at,
    read,
    store,
    values_at,
)
from normcore._sweeps import CENTER, INVSTD, OFFSET, parameters_in, standardize_channel, values_in

_BLOCK = 1024


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
    has_mean: bool,
    start: int,
    stop: int,
) -> None:
    """The whole backward of each group while it is in the cache; `sums` as `sum_cells` has them."""
    _, rows, groups, channels, positions = sizes
    x, grad, out = _three_at(kind, x, grad, out, values_in(sizes))
    weight = parameters_at(kind, weight, parameters_in(sizes, per))
    count = rows * channels * positions
    for group in range(start, stop):
        sample = group // groups
        index = group - sample * groups
        total, dot = 0.0, 0.0
        for row in range(sample * rows, (sample + 1) * rows):
            cell, affine = row * groups + index, (row // per * groups + index) * channels
            _sum_cell(x, grad, by, sums, group, cell, channels, positions)
            for channel in range(channels):
                total += weight[affine + channel] * sums[0, cell * channels + channel]
                dot += weight[affine + channel] * sums[1, cell * channels + channel]
        own = _terms(x, by, group, total / count if has_mean else 0.0, dot / count)
        for row in range(sample * rows, (sample + 1) * rows):
            cell, affine = row * groups + index, (row // per * groups + index) * channels
            _combine_cell(x, grad, out, weight, own, cell, affine, channels, positions)


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
    x, grad, target = _three_at(kind, x, grad, out, values_in(sizes))
    for row in range(start, stop):
        for index in range(groups):
            _sum_cell(x, grad, by, sums, row // rows * groups + index, row * groups + index, channels, positions)
            if out is not None:
                for channel in range(index * channels, (index + 1) * channels):
                    standardize_channel(grad, target, terms, row // segment, row, channel, positions)


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
    x, grad, out = _three_at(kind, x, grad, out, values_in(sizes))
    weight = parameters_at(kind, weight, parameters_in(sizes, per))
    for row in range(start, stop):
        for index in range(groups):
            group, affine = row // rows * groups + index, (row // per * groups + index) * channels
            own = _terms(x, by, group, means[0, group], means[1, group])
            _combine_cell(x, grad, out, weight, own, row * groups + index, affine, channels, positions)


@compiled
def gradient_of_vectors(
    kind: Any,
    x: Any,
    grad: Any,
    out: Any,
    weight: Any,
    by: Any,
    means: Any,
    sums: Any,
    sizes: Any,
    steps: Any,
    start: int,
    stop: int,
) -> None:
    """The whole backward of groups of one position per channel, a slot of samples at a time; no gradient without `out`.

    `steps` is (samples per slot, rows of the B * R that share a weight, has_mean). Sums of dy and dy * xh
    over the samples of a slot go into `sums` (2, slots, G * K), and the means that correct the gradient into `means`;
    where `sums` has no slots, `means` are given.
    """
    samples, _, groups, channels, _ = sizes
    height, per, has_mean = steps
    has_sums, has_gradient = sums.shape[1] > 0, out != 0
    x, grad, out = _three_at(kind, x, grad, out, values_in(sizes))
    weight = parameters_at(kind, weight, parameters_in(sizes, per))
    # Converted once, not with every sample.
    wide = weight.astype(sums.dtype)
    for slot in range(start, stop):
        if has_sums:
            sums[:, slot] = 0.0
        for sample in range(slot * height, min((slot + 1) * height, samples)):
            own = sample // per * groups * channels
            for index in range(groups):
                group, first, last = sample * groups + index, index * channels, (index + 1) * channels
                at = np.uintp(group * channels)
                if has_sums:
                    of_bias, of_weight = sums[0, slot, first:last], sums[1, slot, first:last]
                    gamma = wide[own + first : own + last]
                    total, dot = _add_vector(x, grad, at, gamma, of_bias, of_weight, *_computed_terms(x, by, group))
                    means[0, group] = np.float64(total) / channels if has_mean else 0.0
                    means[1, group] = np.float64(dot) / channels
                if has_gradient:
                    center, slope, constant, _ = _terms(x, by, group, means[0, group], means[1, group])
                    invstd = as_read(x, by[INVSTD, group])
                    gamma = weight[own + first : own + last]
                    _combine_vector(x, grad, out, at, gamma, center, invstd, slope, constant)


@inlined
def _three_at(kind: Any, x: Any, grad: Any, out: Any, count: int) -> Any:
    return values_at(kind, x, count), values_at(kind, grad, count), values_at(kind, out, count)


@inlined
def _terms(x: Any, by: Any, group: int, mean: float, dot: float) -> Any:
    """Center, slope and constant of the corrections (x - center) * slope + constant, and invstd."""
    invstd, center = by[INVSTD, group], as_read(x, by[CENTER, group])
    slope = -invstd * invstd * dot
    offset = (by[CENTER, group] - np.float64(center)) + by[OFFSET, group]
    return center, as_read(x, slope), as_read(x, -invstd * mean - offset * slope), invstd


@inlined
def _computed_terms(x: Any, by: Any, group: int) -> Any:
    """Center, invstd and shift of xh = (x - center) * invstd + shift, in the datatype of sums."""
    center, invstd = as_computed(x, by[CENTER, group]), by[INVSTD, group]
    offset = (by[CENTER, group] - np.float64(center)) + by[OFFSET, group]
    return center, as_computed(x, invstd), as_computed(x, -offset * invstd)


@inlined
def _sum_cell(x: Any, grad: Any, by: Any, sums: Any, group: int, cell: int, channels: int, positions: int) -> None:
    center = as_computed(x, by[CENTER, group])
    for channel in range(cell * channels, (cell + 1) * channels):
        total, dot = 0.0, 0.0
        for block in range(0, positions, _BLOCK):
            at = np.uintp(channel * positions + block)
            found = _block_sums(x, grad, at, min(_BLOCK, positions - block), center)
            total += np.float64(found[0])
            dot += np.float64(found[1])
        sums[0, channel] = total
        sums[1, channel] = (dot - by[OFFSET, group] * total) * by[INVSTD, group]


@fused
def _combine_cell(
    x: Any, grad: Any, out: Any, weight: Any, terms: Any, cell: int, affine: int, channels: int, positions: int
) -> None:
    center, slope, constant, invstd = terms
    for channel in range(channels):
        first = np.uintp((cell * channels + channel) * positions)
        scale = as_read(x, invstd * weight[affine + channel])
        for at in range(first, first + np.uintp(positions)):
            store(out, at, read(grad, at) * scale + ((read(x, at) - center) * slope + constant))


@compiled_sum
def _block_sums(x: Any, grad: Any, start: Any, length: int, center: Any) -> Any:
    total, dot = center - center, center - center
    for index in range(start, start + np.uintp(length)):
        value = load(grad, index)
        total += value
        dot += value * (load(x, index) - center)
    return total, dot


@compiled_sum
def _add_vector(
    x: Any, grad: Any, start: Any, weight: Any, of_bias: Any, of_weight: Any, center: Any, invstd: Any, shift: Any
) -> Any:
    total, dot = center - center, center - center
    for channel in range(np.uintp(weight.size)):
        value = load(grad, start + channel)
        standardized = (load(x, start + channel) - center) * invstd + shift
        weighted = value * weight[channel]
        total += weighted
        dot += weighted * standardized
        of_bias[channel] += value
        of_weight[channel] += value * standardized
    return total, dot


@fused
def _combine_vector(
    x: Any, grad: Any, out: Any, start: Any, weight: Any, center: Any, invstd: Any, slope: Any, constant: Any
) -> None:
    for channel in range(np.uintp(weight.size)):
        index = start + channel
        store(
            out, index, read(grad, index) * (weight[channel] * invstd) + ((read(x, index) - center) * slope + constant)
        )
