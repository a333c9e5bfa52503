"""The compiled backward on tensors of the CPU that are not empty; sums are made as in `_standardize`."""

from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from torch import Tensor

from normcore._standardize import Columns, Operand, compiled, sweeps

# Slots of samples that sum gradients of weight and bias.
_SLOTS = 32


def gradients(values: Operand, grad: Operand, out: Tensor, weight: Tensor | None, by: Any, *, has_mean: bool) -> Any:
    """Write the gradient of the input; returns the sums (2, Q * G * K) of dy and dy * xh."""
    samples, _, groups, _, _ = values.box.sizes
    if values.has_vectors:
        gamma, means = values.parameter(weight, 1.0), np.empty((2, samples * groups))
        return _vectors(values, grad, compiled().flat(out), gamma, by, means, has_mean=has_mean)
    if values.is_cached:
        return _cached(values, grad, compiled().flat(out), values.parameter(weight, 1.0), by, has_mean=has_mean)
    totals, sums = gradient_sums(values, grad, weight, by)
    means = totals / values.count
    if not has_mean:
        means[0] = 0.0
    input_gradient(values, grad, out, weight, by, means)
    return sums


def frozen_gradients(values: Operand, grad: Operand, out: Tensor, weight: Tensor | None, by: Any) -> Any:
    """The same for statistics that are constants; None, and nothing written, where kernels do not serve."""
    if values.has_vectors:
        return None
    gamma, columns = values.parameter(weight, 1.0), Columns.of(values)
    terms = columns.terms(3)
    sizes, per = values.box.sizes, values.box.per
    if not sweeps().fill_terms(gamma, np.zeros_like(gamma), by, terms, sizes, columns.segment, per):
        return None
    # Nothing of the values is in the gradient.
    terms[::2] = 0.0
    return _per_parameter(values, gamma, _sums(values, grad, by, compiled().flat(out), terms))


def gradient_sums(values: Operand, grad: Operand, weight: Tensor | None, by: Any) -> tuple[Any, Any]:
    """Sums (2, B * G) of a and a * xh, a = weight * dy, and (2, Q * G * K) of dy and dy * xh."""
    samples, _, groups, channels, _ = values.box.sizes
    gamma = values.parameter(weight, 1.0)
    if values.has_vectors:
        means = np.empty((2, samples * groups))
        sums = _vectors(values, grad, values.array[:0], gamma, by, means)
        return means * values.count, sums
    sums = _sums(values, grad, by)
    count, own = sums.shape[1], gamma.reshape(-1, 1, values.box.width)
    weighted = sums.reshape(2, len(own), -1, values.box.width) * own
    totals = weighted.reshape(2, samples, count // samples, groups, channels).sum((2, 4))
    return totals.reshape(2, -1), _per_parameter(values, gamma, sums)


def input_gradient(values: Operand, grad: Operand, out: Tensor, weight: Tensor | None, by: Any, means: Any) -> None:
    """Write the gradient of the input, corrected by means (2, B * G) of a and a * xh."""
    gamma, target = values.parameter(weight, 1.0), compiled().flat(out)
    if values.has_columns:
        columns = Columns.of(values)
        terms = columns.terms(4)
        sizes, segment, per = values.box.sizes, columns.segment, values.box.per
        _column_gradients().fill_gradient_terms(gamma, by, means, terms, sizes, segment, per)
        columns.apply(_column_gradients().gradient_of_columns, grad.array, target, terms)
    elif values.has_vectors:
        _vectors(values, grad, target, gamma, by, means, has_means=True)
    else:
        arguments = values.array, grad.array, target, gamma, by, means, values.box.sizes, values.box.per
        values.divide(_sweeps().gradient_of_cells, values.box.rows, *arguments)


def _cached(values: Operand, grad: Operand, out: Any, gamma: Any, by: Any, *, has_mean: bool) -> Any:
    samples, _, groups, _, _ = values.box.sizes
    width = values.box.width
    arguments = values.array, grad.array, out, gamma, by
    if values.has_columns:
        sums = np.empty((2, samples, width))
        steps = values.box.per, Columns.of(values).width
        values.divide(
            _column_gradients().gradient_of_samples, samples, *arguments, sums, values.box.sizes, steps, has_mean
        )
    else:
        sums = np.empty((2, values.box.rows * width))
        others = values.box.sizes, values.box.per, has_mean
        values.divide(_sweeps().gradient_of_groups, samples * groups, *arguments, sums, *others)
    return _per_parameter(values, gamma, sums)


def _per_parameter(values: Operand, gamma: Any, sums: Any) -> Any:
    """Sums of rows of channels (2, *) as those of each weight (2, Q * G * K)."""
    if sums.size == 2 * gamma.size:
        return sums.reshape(2, -1).astype(float, copy=False)
    width = values.box.width
    return sums.reshape(2, gamma.size // width, -1, width).sum(2, dtype=float).reshape(2, -1)


def _sums(values: Operand, grad: Operand, by: Any, out: Any = None, terms: Any = None) -> Any:
    """Sums of dy and dy * xh, (2, rows, channels); with `out`, dy standardized by the terms goes there."""
    if values.has_columns:
        return _sum_columns(values, grad, by, out, terms)
    sums = np.empty((2, values.box.rows, values.box.width))
    segment = Columns.of(values).segment
    arguments = values.array, grad.array, out, terms, by, sums.reshape(2, -1), values.box.sizes, segment
    values.divide(_sweeps().sum_cells, values.box.rows, *arguments)
    return sums


def _sum_columns(values: Operand, grad: Operand, by: Any, out: Any, terms: Any) -> Any:
    columns = Columns.of(values)
    samples, _, groups, channels, _ = values.box.sizes
    wide = by.reshape(5, samples, groups).repeat(channels, 2).repeat(columns.count // samples, 1)
    center, offset, _, _, invstd = wide
    origin = np.tile(center.astype(values.sum_dtype), (1, columns.repeats))
    total, dot = columns.sums(origin, grad.array, out, terms)
    with np.errstate(all="ignore"):
        return np.stack([total, (dot - offset * total) * invstd])


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
    samples, _, _, _, _ = values.box.sizes
    own = gamma.size // values.box.width
    height = values.box.per if own > 1 else -(-samples // _SLOTS)
    slots = -(-samples // height)
    sums = np.empty((2, 0 if has_means else slots, values.box.width), values.sum_dtype)
    steps = height, values.box.per, has_mean, out.size > 0
    arguments = values.array, grad.array, out, gamma, by, means, sums, values.box.sizes, steps
    values.divide(_sweeps().gradient_of_vectors, slots, *arguments)
    return None if has_means else _per_parameter(values, gamma, sums)


@cache
def _sweeps() -> ModuleType:
    from normcore import _gradient_sweeps

    return _gradient_sweeps


@cache
def _column_gradients() -> ModuleType:
    from normcore import _column_gradients

    return _column_gradients
