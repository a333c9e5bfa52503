"""The compiled kernels on tensors of the CPU that are not empty: statistics, and standardize.

Every sum is made in blocks that depend on shapes alone and joined in one order: results do not depend on the number of
threads.
"""

from typing import Any

import numpy as np
from torch import Tensor

from normcore._plan import Operand, column_sweeps, compiled, sweeps


def given(values: Operand, mean: Tensor, var: Tensor, *, eps: float) -> Any:
    """Statistics (5, B * G) of a given mean and variance; None where they are not one of each group, in order."""
    box = values.box
    if not box.is_kept_in_order or not mean.numel() == var.numel() == box.groups:
        return None
    rows = np.empty((5, box.groups))
    sweeps().fill_given(*(compiled().flat(term.contiguous()) for term in (mean, var)), rows, eps)
    return rows


def measure(values: Operand, *, eps: float, has_mean: bool = True, mask: Tensor | None = None) -> tuple[Any, Any]:
    """Statistics (5, B * G) as `_sweeps` has them, and the count behind each."""
    samples, _, groups, _, _ = values.box.sizes
    by = np.empty((5, samples * groups))
    if mask is not None:
        return by, _measure_counted(values, by, compiled().flat(mask), eps=eps, has_mean=has_mean)
    if values.box.has_columns:
        _measure_columns(values, by, eps=eps, has_mean=has_mean)
    else:
        nothing = np.empty(0, values.plan.dtype)
        _measure_groups(values, values.array[:0], nothing, nothing, by, eps=eps, has_mean=has_mean)
    return by, values.box.count


def standardize_own(
    values: Operand, out: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, has_mean: bool
) -> tuple[Any, int, bool]:
    """Statistics as `measure` gives them, and the output by them, as `standardize` gives it."""
    box = values.box
    if not values.plan.is_cached:
        by, count = measure(values, eps=eps, has_mean=has_mean)
        return by, count, standardize(values, out, weight, bias, by)
    by = np.empty((5, box.groups))
    affine = values.parameter(weight, 1.0), values.parameter(bias, 0.0)
    if box.has_columns:
        steps = box.per, values.plan.columns.width
        arguments = values.array, compiled().flat(out), *affine, by, box.sizes, steps, eps, has_mean
        values.divide(column_sweeps().standardize_samples, box.sizes[0], *arguments)
    else:
        _measure_groups(values, compiled().flat(out), *affine, by, eps=eps, has_mean=has_mean)
    return by, box.count, is_usual(values, by)


def standardize(values: Operand, out: Tensor, weight: Tensor | None, bias: Tensor | None, by: Any) -> bool:
    """The output by statistics (5, B * G); false, and none, where the datatype computed in does not hold the terms."""
    scale, shift, target = values.parameter(weight, 1.0), values.parameter(bias, 0.0), compiled().flat(out)
    box = values.box
    if box.has_vectors:
        if not is_usual(values, by):
            return False
        affine = scale, shift, by, box.sizes, box.per
        values.divide(sweeps().standardize_vectors, box.rows, values.array, target, *affine)
        return True
    columns = values.plan.columns
    terms = columns.terms(3)
    if not sweeps().fill_terms(scale, shift, by, terms, box.sizes, columns.segment, box.per):
        return False
    if box.has_columns:
        columns.apply(column_sweeps().standardize_columns, values, target, terms)
    else:
        kernel = sweeps().standardize_cells
        values.divide(kernel, box.rows, values.array, target, terms, columns.segment, box.sizes[4])
    return True


def is_usual(values: Operand, by: Any) -> bool:
    """Whether float32 holds what is computed in it with these statistics."""
    return values.plan.itemsize == 8 or bool(sweeps().are_usual(by))


def _measure_groups(values: Operand, out: Any, weight: Any, bias: Any, by: Any, *, eps: float, has_mean: bool) -> None:
    box = values.box
    arguments = values.array, out, weight, bias, by, box.sizes, box.per, eps, has_mean
    values.divide(sweeps().standardize_groups, box.groups, *arguments)


def _measure_columns(values: Operand, by: Any, *, eps: float, has_mean: bool) -> None:
    samples, rows, _, _, _ = values.box.sizes
    columns = values.plan.group_columns
    center = np.zeros((samples, columns.width), values.plan.sum_dtype)
    if has_mean:
        column_sweeps().find_centers(values.array, center, values.box.width, rows)
    sums = columns.sums(values, center)
    if has_mean and column_sweeps().correct_centers(values.array, center, sums, rows):
        sums = columns.sums(values, center)
    if not column_sweeps().has_digits(values.array, sums[1], rows):
        sums = columns.sums(values, center.astype(np.float64))
    column_sweeps().settle_columns(values.array, by, center, sums, values.box.sizes, eps, has_mean)


def _measure_counted(values: Operand, by: Any, mask: Any, *, eps: float, has_mean: bool) -> Any:
    samples = values.box.sizes[0]
    center = np.full(by.shape[1], np.nan if has_mean else 0.0)
    sums = np.empty((5, by.shape[1]))
    for is_last in (False, True):
        sums[:] = 0.0
        values.divide(sweeps().sum_counted, samples, values.array, mask, center, sums, values.box.sizes)
        if is_last or not has_mean or values.array.itemsize < 8:
            break
        center = center + sums[1] / sums[0]
    sweeps().settle_counted(values.array, by, center, sums, eps, has_mean)
    return sums[0]
