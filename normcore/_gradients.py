"""The compiled backward on tensors of the CPU that are not empty; sums are made as in `_standardize`."""

from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normcore._plan import Operand, column_sweeps, compiled, sweeps

# Slots of samples that sum gradients of weight and bias: so many, or fewer of so many elements.
_SLOTS, _SLOT_ELEMENTS = 32, 2**14


def gradients(
    values: Operand,
    grad: Operand,
    out: Tensor,
    weight: Tensor | None,
    by: Any,
    *,
    has_mean: bool,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """Write the gradient of the input; returns the sums (2, Q, G * K) of dy and dy * xh, in float32 or float64."""
    box = values.box
    if box.has_vectors:
        gamma, means = values.parameter(weight, 1.0), np.empty((2, box.groups))
        sums = _vectors(values, grad, compiled().flat(out), gamma, by, means, has_mean=has_mean)
    elif values.plan.is_cached:
        gamma, target = values.parameter(weight, 1.0), compiled().flat(out)
        sums = _cached(values, grad, target, gamma, by, has_mean=has_mean)
    else:
        sums = _sums(values, grad, by)
        means = _totals(values, weight, sums) / box.count
        if not has_mean:
            means[0] = 0.0
        input_gradient(values, grad, out, weight, by, means)
    return _per_parameter(values, sums, dtype)


def frozen_gradients(
    values: Operand,
    grad: Operand,
    out: Tensor,
    weight: Tensor | None,
    by: Any,
    *,
    dtype: torch.dtype = torch.float64,
) -> Any:
    """The same for statistics that are constants; None, and nothing written, where kernels do not serve."""
    box, columns = values.box, values.plan.columns
    if box.has_vectors:
        return None
    gamma, terms = values.parameter(weight, 1.0), columns.terms(3)
    # Its shift is one that is not used.
    if not sweeps().fill_terms(gamma, gamma, by, terms, box.sizes, columns.segment, box.per):
        return None
    # Nothing of the values is in the gradient.
    terms[::2] = 0.0
    return _per_parameter(values, _sums(values, grad, by, compiled().flat(out), terms), dtype)


def gradient_sums(values: Operand, grad: Operand, weight: Tensor | None, by: Any) -> tuple[Any, Any]:
    """Sums (2, B * G) of a and a * xh, a = weight * dy, and (2, Q, G * K) of dy and dy * xh."""
    box = values.box
    if box.has_vectors:
        means = np.empty((2, box.groups))
        sums = _vectors(values, grad, values.array[:0], values.parameter(weight, 1.0), by, means)
        return means * box.count, _per_parameter(values, sums)
    sums = _sums(values, grad, by)
    return _totals(values, weight, sums), _per_parameter(values, sums)


def input_gradient(values: Operand, grad: Operand, out: Tensor, weight: Tensor | None, by: Any, means: Any) -> None:
    """Write the gradient of the input, corrected by means (2, B * G) of a and a * xh."""
    gamma, target, box = values.parameter(weight, 1.0), compiled().flat(out), values.box
    if box.has_columns:
        columns = values.plan.columns
        terms = columns.terms(4)
        _column_gradients().fill_gradient_terms(gamma, by, means, terms, box.sizes, columns.segment, box.per)
        columns.apply(_column_gradients().gradient_of_columns, values, grad.array, target, terms)
    elif box.has_vectors:
        _vectors(values, grad, target, gamma, by, means, has_means=True)
    else:
        arguments = values.array, grad.array, target, gamma, by, means, box.sizes, box.per
        values.divide(_sweeps().gradient_of_cells, box.rows, *arguments)


def _cached(values: Operand, grad: Operand, out: Any, gamma: Any, by: Any, *, has_mean: bool) -> Any:
    box, arguments = values.box, (values.array, grad.array, out, gamma, by)
    if box.has_columns:
        sums = np.empty((2, box.sizes[0], box.width))
        steps = box.per, values.plan.columns.width
        kernel = _column_gradients().gradient_of_samples
        values.divide(kernel, box.sizes[0], *arguments, sums, box.sizes, steps, has_mean)
    else:
        sums = np.empty((2, box.rows * box.width))
        values.divide(_sweeps().gradient_of_groups, box.groups, *arguments, sums, box.sizes, box.per, has_mean)
    return sums


def _totals(values: Operand, weight: Tensor | None, sums: Any) -> Any:
    """Sums (2, B * G) of a and a * xh from those of dy and dy * xh."""
    totals = np.zeros((2, values.box.groups))
    _column_gradients().add_weighted(sums, values.parameter(weight, 1.0), totals, values.box.sizes)
    return totals


def _per_parameter(values: Operand, sums: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Sums (2, *, G * K) of rows of channels as those of each weight (2, Q, G * K)."""
    width, kind = values.box.width, np.float32 if dtype is torch.float32 else np.float64
    found = np.empty((2, values.box.parameters_count // width, width), kind)
    column_sweeps().join_rows(sums.reshape(2, -1, width), found)
    return found


def _sums(values: Operand, grad: Operand, by: Any, out: Any = None, terms: Any = None) -> Any:
    """Sums of dy and dy * xh, (2, rows, channels); with `out`, dy standardized by the terms goes there."""
    box, columns = values.box, values.plan.columns
    if box.has_columns:
        center = np.empty((columns.count, columns.width), values.plan.sum_dtype)
        _column_gradients().fill_centers(by, center, box.sizes, columns.segment)
        sums = columns.sums(values, center, grad.array, out, terms)
        _column_gradients().settle_sums(sums, by, box.sizes, columns.segment)
        return sums
    sums = np.empty((2, box.rows * box.width))
    arguments = values.array, grad.array, out, terms, by, sums, box.sizes, columns.segment
    values.divide(_sweeps().sum_cells, box.rows, *arguments)
    return sums.reshape(2, box.rows, box.width)


def _vectors(
    values: Operand,
    grad: Operand,
    out: Any,
    gamma: Any,
    by: Any,
    means: Any,
    *,
    has_mean: bool = True,
    has_means: bool = False,
) -> Any:
    box = values.box
    samples = box.sizes[0]
    height = max(-(-samples // _SLOTS), min(samples, -(-_SLOT_ELEMENTS // box.width)))
    height = box.per if gamma.size > box.width else height
    slots = -(-samples // height)
    sums = np.empty((2, 0 if has_means else slots, box.width), values.plan.sum_dtype)
    steps = height, box.per, has_mean, out.size > 0
    arguments = values.array, grad.array, out, gamma, by, means, sums, box.sizes, steps
    values.divide(_sweeps().gradient_of_vectors, slots, *arguments)
    return sums


@cache
def _sweeps() -> ModuleType:
    from normcore import _gradient_sweeps

    return _gradient_sweeps


@cache
def _column_gradients() -> ModuleType:
    from normcore import _column_gradients

    return _column_gradients
