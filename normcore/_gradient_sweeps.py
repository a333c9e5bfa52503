"""Compiled sweeps of a backward, over the boxes of `_sweeps`: sums of dy and dy * xh, and the gradient of the input.

dx = s * (a - mean(a) - xh * mean(a * xh)), a = weight * dy, xh = (x - mean) * s. `means` is (2, B * G), float64:
mean(a) and mean(a * xh), zeros where the statistics are constants. Sums of dy and dy * xh are what gradients of bias
and weight are made of, and those means.
"""

from typing import Any

import numpy as np

from normcore._compiled import as_computed, as_read, compiled, compiled_sum, fused, load, read, store
from normcore._sweeps import CENTER, INVSTD, OFFSET

_BLOCK = 1024
_ROWS = 16


@compiled
def sum_cells(x: Any, grad: Any, by: Any, sums: Any, sizes: Any, start: int, stop: int) -> None:
    """Sums of dy and dy * xh over positions, into `sums` (2, B * R * G * K), from row to row of the B * R."""
    _, rows, groups, channels, positions = sizes
    for row in range(start, stop):
        for index in range(groups):
            group, cell = row // rows * groups + index, row * groups + index
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
def gradient_of_cells(
    x: Any, grad: Any, out: Any, weight: Any, by: Any, means: Any, sizes: Any, per: int, start: int, stop: int
) -> None:
    """The gradient of the input from given means, from row to row of the B * R."""
    _, rows, groups, channels, positions = sizes
    for row in range(start, stop):
        for index in range(groups):
            group, cell = row // rows * groups + index, row * groups + index
            center, slope, constant = _terms(x, by, means, group)
            affine = (row // per * groups + index) * channels
            for channel in range(channels):
                first = np.uintp((cell * channels + channel) * positions)
                scale = as_read(x, by[INVSTD, group] * weight[affine + channel])
                for at in range(first, first + np.uintp(positions)):
                    store(out, at, read(grad, at) * scale + ((read(x, at) - center) * slope + constant))


@compiled
def gradient_of_vectors(
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
    """The whole backward of groups of one position per channel, a slot of samples at a time.

    `steps` is (samples per slot, rows of the B * R that share a weight, has_mean, has_means, has_gradient). Sums of dy
    and dy * xh over the samples of a slot go into `sums` (2, slots, G * K), where that has slots; the means that
    correct the gradient into `means`, unless it has them.
    """
    samples, rows, groups, channels, _ = sizes
    height, per, has_mean, has_means, has_gradient = steps
    has_sums = sums.shape[1] > 0
    for slot in range(start, stop):
        if has_sums:
            sums[:, slot] = 0.0
        for sample in range(slot * height, min((slot + 1) * height, samples)):
            own = sample * rows // per * groups * channels
            for index in range(groups):
                group, affine = sample * groups + index, own + index * channels
                gamma = weight[affine : affine + channels]
                first = (sample * rows * groups + index) * channels
                if not has_means:
                    center = as_computed(x, by[CENTER, group])
                    total, dot = 0.0, 0.0
                    for row in range(rows):
                        at = np.uintp(first + row * groups * channels)
                        found = _weighted_sums(x, grad, at, gamma, center)
                        total += np.float64(found[0])
                        dot += np.float64(found[1])
                    means[0, group] = total / (rows * channels) if has_mean else 0.0
                    dot = (dot - by[OFFSET, group] * total) * by[INVSTD, group]
                    means[1, group] = dot / (rows * channels)
                center, slope, constant = _terms(x, by, means, group)
                invstd = as_read(x, by[INVSTD, group])
                offset = as_read(x, (by[CENTER, group] - np.float64(center)) + by[OFFSET, group])
                for row in range(rows):
                    at = np.uintp(first + row * groups * channels)
                    if has_sums:
                        of_bias = sums[0, slot, index * channels : (index + 1) * channels]
                        of_weight = sums[1, slot, index * channels : (index + 1) * channels]
                        _add_vector(x, grad, at, of_bias, of_weight, center, offset, invstd)
                    if has_gradient:
                        _combine_vector(x, grad, out, at, gamma, center, invstd, slope, constant)


@compiled
def sum_gradient_columns(x: Any, grad: Any, center: Any, sums: Any, parts: Any, start: int, stop: int) -> None:
    """Sums of dy and dy * (x - center) over rows of columns, as `sum_columns` has it."""
    width = center.shape[1]
    blocks, size, elements = parts
    total, dot = np.empty_like(center[0]), np.empty_like(center[0])
    for part in range(start, stop):
        own, first = part // blocks, part % blocks * size
        sums[part] = 0.0
        for at in range(first, min(first + size, elements), _ROWS * width):
            total[:] = 0.0
            dot[:] = 0.0
            length = min(_ROWS * width, min(first + size, elements) - at)
            _add_rows(x, grad, np.uintp(own * elements + at), length, center[own], total, dot)
            for column in range(width):
                sums[part, 0, column] += total[column]
                sums[part, 1, column] += dot[column]


@compiled
def fill_columns(weight: Any, by: Any, means: Any, terms: Any, sizes: Any, segment: int, per: int) -> None:
    """Terms for `gradient_of_columns`, the columns repeated to its width."""
    _, rows, groups, channels, _ = sizes
    width = groups * channels
    for own in range(terms.shape[1]):
        affine, first = own * segment // per * width, own * segment // rows * groups
        for column in range(terms.shape[2]):
            channel = column % width
            group = first + channel // channels
            invstd = by[INVSTD, group]
            slope = -invstd * invstd * means[1, group]
            terms[0, own, column] = by[CENTER, group]
            terms[1, own, column] = invstd * weight[affine + channel]
            terms[2, own, column] = slope
            offset = (by[CENTER, group] - terms[0, own, column]) + by[OFFSET, group]
            terms[3, own, column] = -invstd * means[0, group] - offset * slope


@compiled
def gradient_of_columns(x: Any, grad: Any, out: Any, terms: Any, elements: int, start: int, stop: int) -> None:
    """The gradient dy * scale + (x - center) * slope + constant; `terms` are center, scale, ..., (4, P, W)."""
    width = terms.shape[2]
    rows = -(-elements // width)
    for row in range(start, stop):
        own, at = row // rows, row % rows * width
        length = min(width, elements - at)
        first = np.uintp(own * elements + at)
        _combine_columns(x, grad, out, first, length, terms[0, own], terms[1, own], terms[2, own], terms[3, own])


@compiled
def _terms(x: Any, by: Any, means: Any, group: int) -> Any:
    """Center, slope and constant of the corrections (x - center) * slope + constant."""
    invstd, center = by[INVSTD, group], as_read(x, by[CENTER, group])
    slope = -invstd * invstd * means[1, group]
    offset = (by[CENTER, group] - np.float64(center)) + by[OFFSET, group]
    return center, as_read(x, slope), as_read(x, -invstd * means[0, group] - offset * slope)


@compiled_sum
def _block_sums(x: Any, grad: Any, start: Any, length: int, center: Any) -> Any:
    total, dot = center - center, center - center
    for index in range(start, start + np.uintp(length)):
        value = load(grad, index)
        total += value
        dot += value * (load(x, index) - center)
    return total, dot


@compiled_sum
def _weighted_sums(x: Any, grad: Any, start: Any, weight: Any, center: Any) -> Any:
    total, dot = center - center, center - center
    for channel in range(np.uintp(weight.size)):
        value = load(grad, start + channel) * weight[channel]
        total += value
        dot += value * (load(x, start + channel) - center)
    return total, dot


@fused
def _add_vector(
    x: Any, grad: Any, start: Any, of_bias: Any, of_weight: Any, center: Any, offset: Any, invstd: Any
) -> None:
    for channel in range(np.uintp(of_bias.size)):
        value = read(grad, start + channel)
        of_bias[channel] += value
        of_weight[channel] += value * (((read(x, start + channel) - center) - offset) * invstd)


@fused
def _combine_vector(
    x: Any, grad: Any, out: Any, start: Any, weight: Any, center: Any, invstd: Any, slope: Any, constant: Any
) -> None:
    for channel in range(np.uintp(weight.size)):
        index = start + channel
        store(
            out, index, read(grad, index) * (weight[channel] * invstd) + ((read(x, index) - center) * slope + constant)
        )


@compiled_sum
def _add_rows(x: Any, grad: Any, start: Any, length: int, center: Any, total: Any, dot: Any) -> None:
    width = np.uintp(center.size)
    for _ in range(length // center.size // 2):
        for column in range(width):
            first, second = start + column, start + column + width
            a, b = load(grad, first), load(grad, second)
            total[column] += a + b
            dot[column] += a * (load(x, first) - center[column]) + b * (load(x, second) - center[column])
        start += width + width
    rest = length % (2 * center.size)
    while rest > 0:
        for column in range(np.uintp(min(rest, center.size))):
            a = load(grad, start + column)
            total[column] += a
            dot[column] += a * (load(x, start + column) - center[column])
        start += width
        rest -= center.size


@fused
def _combine_columns(
    x: Any,
    grad: Any,
    out: Any,
    start: Any,
    length: int,
    center: Any,
    scale: Any,
    slope: Any,
    constant: Any,
) -> None:
    for column in range(np.uintp(length)):
        index = start + column
        correction = (read(x, index) - center[column]) * slope[column] + constant[column]
        store(out, index, read(grad, index) * scale[column] + correction)
