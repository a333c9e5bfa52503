"""The compiled kernels on tensors of the CPU that are not empty: statistics, and standardize.

Every sum is made in blocks that depend on shapes alone and joined in one order: results do not depend on the number of
threads.
"""

from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from normcore._plan import KINDS, Operand, as_stored, column_sweeps, compiled, sweeps


def given(values: Operand, mean: Tensor, var: Tensor, *, eps: float) -> Any:
    """Statistics (5, B * G) of a given mean and variance; None where they are not one of each group, in order."""
    box = values.box
    if not box.is_kept_in_order or not mean.numel() == var.numel() == box.groups:
        return None
    if mean.dtype is not var.dtype:
        mean, var = mean.double(), var.double()
    rows, mean, var = np.empty((5, box.groups)), as_stored(mean), as_stored(var)
    is_narrow = values.plan.itemsize < 8
    sweeps().fill_given(KINDS[mean.dtype], mean.data_ptr(), var.data_ptr(), rows, eps, is_narrow)
    return rows


def measure(values: Operand, *, eps: float, has_mean: bool = True, mask: Tensor | None = None) -> tuple[Any, Any]:
    """Statistics (5, B * G) as `_sweeps` has them, and the count behind each."""
    by = np.empty((5, values.box.groups))
    if mask is not None:
        return by, _measure_counted(values, by, mask, eps=eps, has_mean=has_mean)
    if values.box.has_columns:
        _measure_columns(values, by, eps=eps, has_mean=has_mean)
    else:
        _measure_groups(values, (values.tensor, None, None, None), by, eps=eps, has_mean=has_mean)
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
    tensors = values.tensor, out, values.parameter(weight, 1.0), values.parameter(bias, 0.0)
    if box.has_columns:
        steps = box.per, values.plan.columns.width
        kernel = column_sweeps().standardize_samples
        values.divide(kernel, box.sizes[0], tensors, by, box.sizes, steps, eps, has_mean)
    else:
        _measure_groups(values, tensors, by, eps=eps, has_mean=has_mean)
    return by, box.count, is_usual(values, by)


def standardize(values: Operand, out: Tensor, weight: Tensor | None, bias: Tensor | None, by: Any) -> bool:
    """The output by statistics (5, B * G); false, and none, where the datatype computed in does not hold the terms."""
    scale, shift = values.parameter(weight, 1.0), values.parameter(bias, 0.0)
    box = values.box
    if box.has_vectors:
        if not is_usual(values, by):
            return False
        tensors = values.tensor, out, scale, shift
        values.divide(sweeps().standardize_vectors, box.rows, tensors, by, box.sizes, box.per)
        return True
    columns = values.plan.columns
    terms = columns.terms(3)
    affine = scale.data_ptr(), shift.data_ptr()
    if not sweeps().fill_terms(values.plan.kind, *affine, by, terms, box.sizes, columns.segment, box.per):
        return False
    if box.has_columns:
        columns.apply(column_sweeps().standardize_columns, values, (out,), terms)
    else:
        arguments = terms, columns.segment, box.sizes[4]
        values.divide(sweeps().standardize_cells, box.rows, (values.tensor, out), *arguments)
    return True


def is_usual(values: Operand, by: Any) -> bool:
    """Whether float32 holds what is computed in it with these statistics."""
    return values.plan.itemsize == 8 or bool(sweeps().are_usual(by))


def rounded(values: Operand, by: Any) -> Any:
    """Statistics whose centers the datatype that sums are made of holds; None where they are not usual."""
    if not is_usual(values, by):
        return None
    return sweeps().with_narrow_centers(by) if values.plan.itemsize == 2 else by


def _measure_groups(
    values: Operand, tensors: tuple[Tensor | None, ...], by: Any, *, eps: float, has_mean: bool
) -> None:
    box = values.box
    values.divide(sweeps().standardize_groups, box.groups, tensors, by, box.sizes, box.per, eps, has_mean)


def _measure_columns(values: Operand, by: Any, *, eps: float, has_mean: bool) -> None:
    box, columns, kernels = values.box, values.plan.group_columns, column_sweeps()
    kind, place = values.plan.kind, values.tensor.data_ptr()
    center = np.zeros((box.sizes[0], columns.width), values.plan.sum_dtype)
    if has_mean:
        kernels.find_centers(kind, place, center, box.width, box.sizes[1])
    state = kernels.FIRST
    while state != kernels.SETTLED:
        near = center.astype(np.float64) if state == kernels.WIDE else center
        sums = columns.sums(values, near)
        state = kernels.settle_columns(kind, place, by, center, sums, box.sizes, eps, has_mean, state)


def _measure_counted(values: Operand, by: Any, mask: Tensor, *, eps: float, has_mean: bool) -> Any:
    samples, array, counted = values.box.sizes[0], compiled().flat(values.tensor), compiled().flat(mask)
    center = np.full(by.shape[1], np.nan if has_mean else 0.0)
    sums = np.empty((5, by.shape[1]))
    for is_last in (False, True):
        sums[:] = 0.0
        arguments = array, counted, center, sums, values.box.sizes
        compiled().divide(_counted_sweeps().sum_counted, samples, array.size, *arguments)
        if is_last or not has_mean or array.itemsize < 8:
            break
        center = center + sums[1] / sums[0]
    _counted_sweeps().settle_counted(array, by, center, sums, eps, has_mean)
    return sums[0]


@cache
def _counted_sweeps() -> ModuleType:
    from normcore import _counted_sweeps

    return _counted_sweeps
