"""Compiled sweeps over a box of `_sweeps` that sum the values which count: those that a mask has true."""

from typing import Any

import numpy as np

from normcore._compiled import compiled, inlined
from normcore._group_sums import add_exactly, with_rest
from normcore._sweeps import settle
from normcore._values import load

# Counted values that are added up as they are, before their sum is added with what rounding leaves.
_RUN = 64


@compiled
def sum_counted(x: Any, mask: Any, center: Any, sums: Any, sizes: Any, start: int, stop: int) -> None:
    """Count, sum and squares of deviations of counted values around the first of each group, into `sums` (5, B * G).

    Only around given centers where they are not NaN. The last two are what rounding has left of the sum and of the
    squares, so that they do not get worse with the number of values.
    """
    _, rows, groups, channels, positions = sizes
    length = channels * positions
    for cell in range(start * rows * groups, stop * rows * groups):
        group = cell // (rows * groups) * groups + cell % groups
        for begin in range(cell * length, (cell + 1) * length, _RUN):
            count = total = squares = 0.0
            for index in range(begin, min(begin + _RUN, (cell + 1) * length)):
                if mask[index]:
                    value = np.float64(load(x, index))
                    if sums[0, group] + count == 0.0 and np.isnan(center[group]):
                        center[group] = value
                    deviation = value - center[group]
                    count += 1.0
                    total += deviation
                    squares += deviation * deviation
            sums[0, group] += count
            _add(sums, 1, group, total)
            _add(sums, 2, group, squares)


@inlined
def _add(sums: Any, row: int, group: int, term: float) -> None:
    """The rest goes two rows further."""
    sums[row, group], sums[row + 2, group] = add_exactly(sums[row, group], sums[row + 2, group], term)


@compiled
def settle_counted(x: Any, by: Any, center: Any, sums: Any, eps: float, has_mean: bool) -> None:
    """Statistics from what `sum_counted` has found."""
    for group in range(center.size):
        count, total, squares = sums[0, group], sums[1, group], sums[2, group]
        total, squares = with_rest(total, sums[3, group]), with_rest(squares, sums[4, group])
        offset = total / count if has_mean else 0.0
        settle(x, by, group, center[group], offset, squares / count - offset * offset, eps)
