"""Compiled sums of a block of values, merged into the moments of the blocks before it.

`state` is (5, C), float64: count, mean and m2 of `Moments`, and what rounding left over of the latter two. A block's
values lie (outer, channels, inner) in memory. They are summed around the mean so far, or around a first value, and once
more around the mean that this finds where it proves to have been far off.
"""

from typing import Any

import numpy as np

from normcore._compiled import compiled, compiled_sum
from normcore._values import load

COUNT, MEAN, M2, MEAN_LOW, M2_LOW = range(5)
# A loop over fewer values costs more to begin than to run.
_SHORT = 256


@compiled
def merge_block(x: Any, state: Any, outer: int, channels: int, inner: int, first: int) -> None:
    """Merge the moments of a block into those of the channels from `first` on."""
    if inner < _SHORT:
        _add_columns(x, state, outer, channels, inner, first)
        return
    for channel in range(channels):
        center = _center(state, first + channel, np.float64(load(x, channel * inner)))
        total, squares = _sum_runs(x, outer, channels * inner, channel * inner, inner, center)
        count = np.float64(outer * inner)
        if _is_far(count, total, squares):
            center += total / count
            total, squares = _sum_runs(x, outer, channels * inner, channel * inner, inner, center)
        _merge(state, first + channel, count, center, total, squares)


@compiled
def _add_columns(x: Any, state: Any, outer: int, channels: int, inner: int, first: int) -> None:
    """Channels of few values side by side: every column is summed for itself, and those of a channel are joined."""
    count = np.float64(outer * inner)
    centers, sums = np.empty(channels), np.empty((2, channels))
    for channel in range(channels):
        centers[channel] = _center(state, first + channel, np.float64(load(x, channel * inner)))
    _sum_columns(x, outer, inner, centers, sums)
    is_far = False
    for channel in range(channels):
        if _is_far(count, sums[0, channel], sums[1, channel]):
            is_far = True
            centers[channel] += sums[0, channel] / count
    if is_far:
        _sum_columns(x, outer, inner, centers, sums)
    for channel in range(channels):
        _merge(state, first + channel, count, centers[channel], sums[0, channel], sums[1, channel])


@compiled
def _center(state: Any, channel: int, value: float) -> float:
    """What to sum around; not a number that is none, for its NaN would hide what the others are."""
    center = state[MEAN, channel] if state[COUNT, channel] > 0.0 else value
    return center if abs(center) < np.inf else 0.0


@compiled
def _is_far(count: float, total: float, squares: float) -> bool:
    """Whether the center is off by more than a sixth of a deviation, which costs m2 its last digits."""
    return bool(squares < np.inf and squares * count < 32.0 * total * total)


@compiled
def _sum_runs(x: Any, outer: int, stride: int, start: int, length: int, center: float) -> Any:
    total, squares = 0.0, 0.0
    for row in range(outer):
        of_run, squares_of_run = _sum_run(x, start + row * stride, length, center)
        total += of_run
        squares += squares_of_run
    return total, squares


# Unsigned indices count from the front alone: a choice between front and back would keep loops from being vectors.
@compiled_sum
def _sum_run(x: Any, start: Any, length: Any, center: float) -> Any:
    total, squares = 0.0, 0.0
    for index in range(np.uintp(start), np.uintp(start) + np.uintp(length)):
        deviation = load(x, index) - center
        total += deviation
        squares += deviation * deviation
    return total, squares


@compiled_sum
def _sum_columns(x: Any, outer: Any, inner: Any, centers: Any, sums: Any) -> None:
    width = np.uintp(centers.size * inner)
    wide, totals, squares = np.empty(width), np.zeros(width), np.zeros(width)
    for column in range(width):
        wide[column] = centers[column // np.uintp(inner)]
    for row in range(np.uintp(outer)):
        for column in range(width):
            deviation = load(x, row * width + column) - wide[column]
            totals[column] += deviation
            squares[column] += deviation * deviation
    sums[:] = 0.0
    for column in range(width):
        sums[0, column // np.uintp(inner)] += totals[column]
        sums[1, column // np.uintp(inner)] += squares[column]


@compiled
def _merge(state: Any, channel: int, count: float, center: float, total: float, squares: float) -> None:
    """As `Moments.merge` does, for one channel and sums around a center."""
    offset = total / count
    m2 = squares - total * offset
    m2 = 0.0 if m2 < 0.0 else m2
    before = state[COUNT, channel]
    if before == 0.0:
        mean, low, rest = center, offset, 0.0
    else:
        distance = (center - state[MEAN, channel]) + (offset - state[MEAN_LOW, channel])
        share = count / (before + count)
        mean, low = state[MEAN, channel], state[MEAN_LOW, channel] + distance * share
        rest = state[M2_LOW, channel] + distance * distance * (before * share)
    state[COUNT, channel] = before + count
    state[MEAN, channel], state[MEAN_LOW, channel] = _sum_and_rest(mean, low)
    state[M2, channel], state[M2_LOW, channel] = _sum_and_rest(state[M2, channel], m2 + rest)


@compiled
def _sum_and_rest(larger: float, smaller: float) -> Any:
    total = larger + smaller
    of_smaller = total - larger
    rest = (larger - (total - of_smaller)) + (smaller - of_smaller)
    return total, rest if abs(rest) < np.inf else 0.0
