"""The compiled backward on tensors of the CPU that are not empty; sums are made as in `_standardize`."""

from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normcore._plan import KINDS, Operand, column_sweeps, sweeps

# Slots of samples that sum gradients of weight and bias: so many, or fewer of so many elements.
_SLOTS, _SLOT_ELEMENTS = 32, 2**14


def gradients(
    values: Operand,
    grad: Tensor,
    out: Tensor,
    weight: Tensor | None,
    by: Any,
    *,
    has_mean: bool,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Write the gradient of the input; returns the sums of dy and dy * xh as gradients of a bias and a weight.

    They are of a shape of Q * G * K values, and of any datatype.
    """
    box, gamma, found = values.box, values.parameter(weight, 1.0), _parameters(shape, dtype)
    if box.has_vectors:
        sums = _vectors(values, grad, out, gamma, by, np.empty((2, box.groups)), has_mean=has_mean)
    elif values.plan.block:
        sums = _cached(values, grad, out, gamma, by, has_mean=has_mean)
    elif box.has_columns:
        sums = _columns(values, grad, out, gamma, by, has_mean=has_mean)
    else:
        sums = _sums(values, grad, by)
        means = _means(values, gamma, sums, has_mean=has_mean)
        _gradient_of_cells(values, grad, out, gamma, by, means)
    return _per_parameter(values, sums, found)


def frozen_gradients(
    values: Operand,
    grad: Tensor,
    out: Tensor,
    weight: Tensor | None,
    by: Any,
    *,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor] | None:
    """The same for statistics that are constants; None, and nothing written, where kernels do not serve."""
    box, columns = values.box, values.plan.columns
    if box.has_vectors:
        return None
    terms = columns.terms(4 if box.has_columns else 3)
    gamma, found = values.parameter(weight, 1.0), _parameters(shape, dtype)
    # Its shift is one that is not used.
    place = gamma.data_ptr()
    if not sweeps().fill_terms(values.plan.kind, place, place, by, terms, box.sizes, columns.segment, box.per):
        return None
    if box.has_columns:
        parts = columns.room_for_sums()
        arguments = terms, parts, columns.parts
        values.divide(_column_gradients().gradient_by_given, len(parts), (values.tensor, grad, out), *arguments)
        sums = _column_gradients().standardized_sums(parts, by, box.sizes, columns.segment, True)
    else:
        # Nothing of the values is in the gradient.
        terms[::2] = 0.0
        sums = _sums_of_cells(values, (values.tensor, grad, out), (terms,), by)
    return _per_parameter(values, sums, found)


def gradient_sums(values: Operand, grad: Tensor, weight: Tensor | None, by: Any) -> tuple[Any, tuple[Tensor, Tensor]]:
    """Sums (2, B * G) of a and a * xh, a = weight * dy, and those of dy and dy * xh, both (Q * G * K,)."""
    box, gamma = values.box, values.parameter(weight, 1.0)
    if box.has_vectors:
        means = np.empty((2, box.groups))
        sums = _vectors(values, grad, None, gamma, by, means)
    else:
        sums = _sums(values, grad, by)
        means = _means(values, gamma, sums)
    return means * box.count, _per_parameter(values, sums, _parameters((box.parameters_count,), torch.float64))


def input_gradient(values: Operand, grad: Tensor, out: Tensor, weight: Tensor | None, by: Any, means: Any) -> None:
    """Write the gradient of the input, corrected by means (2, B * G) of a and a * xh."""
    gamma, box = values.parameter(weight, 1.0), values.box
    if box.has_columns:
        columns = values.plan.columns
        terms = columns.terms(4)
        arguments = values.plan.kind, gamma.data_ptr(), by, means, terms
        _column_gradients().fill_terms_by(*arguments, box.sizes, columns.segment, box.per)
        columns.apply(_column_gradients().gradient_of_columns, values, (grad, out), terms)
    elif box.has_vectors:
        _vectors(values, grad, out, gamma, by, means, has_means=True)
    else:
        _gradient_of_cells(values, grad, out, gamma, by, means)


def _gradient_of_cells(values: Operand, grad: Tensor, out: Tensor, gamma: Tensor, by: Any, means: Any) -> None:
    box, tensors = values.box, (values.tensor, grad, out, gamma)
    values.divide(_sweeps().gradient_of_cells, box.rows, tensors, by, means, box.sizes, box.per)


def _cached(values: Operand, grad: Tensor, out: Tensor, gamma: Tensor, by: Any, *, has_mean: bool) -> Any:
    box, tensors = values.box, (values.tensor, grad, out, gamma)
    if box.has_columns:
        sums = np.empty((2, box.sizes[0], box.width))
        steps = box.per, values.plan.columns.width
        kernel = _column_gradients().gradient_of_samples
        values.divide(kernel, box.sizes[0], tensors, by, sums, box.sizes, steps, has_mean)
    else:
        sums = np.empty((2, box.rows, box.width))
        is_lone = box.sizes[1] == box.sizes[3] == 1
        arguments = by, sums.reshape(2, -1), box.sizes, box.per
        if is_lone:
            values.divide(_sweeps().gradient_of_lone_cells, box.groups, tensors, *arguments, has_mean)
        else:
            kernel = _sweeps().gradient_of_groups
            values.divide(kernel, box.groups, tensors, *arguments, values.plan.block, has_mean)
    return sums


def _columns(values: Operand, grad: Tensor, out: Tensor, gamma: Tensor, by: Any, *, has_mean: bool) -> Any:
    box, columns, kernels = values.box, values.plan.columns, _column_gradients()
    terms = columns.terms(4)
    arguments = gamma.data_ptr(), by, terms, box.sizes, columns.segment, box.per, has_mean
    sums = kernels.fill_gradient_terms(values.plan.kind, _parts_of_sums(values, grad, by), *arguments)
    columns.apply(kernels.gradient_of_columns, values, (grad, out), terms)
    return sums


def _means(values: Operand, gamma: Tensor, sums: Any, *, has_mean: bool = True) -> Any:
    """Means (2, B * G) of a and a * xh from sums of dy and dy * xh."""
    box = values.box
    arguments = values.plan.kind, sums, gamma.data_ptr(), box.sizes, box.per, has_mean
    return _column_gradients().weighted_means(*arguments)


def _parameters(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for the gradients of bias and weight; made ahead of sweeps, which drive what makes it out of the caches."""
    first = torch.empty(shape, dtype=dtype)
    return first, torch.empty_like(first)


def _per_parameter(values: Operand, sums: Any, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Two sums (2, *, G * K) of rows of channels as those of each weight."""
    first, second = found
    count = values.box.parameters_count // values.box.width
    column_sweeps().join_rows(KINDS[first.dtype], sums, first.data_ptr(), second.data_ptr(), count)
    return found


def _sums(values: Operand, grad: Tensor, by: Any) -> Any:
    """Sums of dy and dy * xh, (2, rows, channels)."""
    if not values.box.has_columns:
        return _sums_of_cells(values, (values.tensor, grad), (None, None), by)
    sums, segment = _parts_of_sums(values, grad, by), values.plan.columns.segment
    return _column_gradients().standardized_sums(sums, by, values.box.sizes, segment, False)


def _sums_of_cells(values: Operand, tensors: tuple[Tensor, ...], others: tuple[Any, ...], by: Any) -> Any:
    box = values.box
    sums = np.empty((2, box.rows, box.width))
    arguments = *others, by, sums.reshape(2, -1), box.sizes, values.plan.columns.segment
    values.divide(_sweeps().sum_cells, box.rows, tensors, *arguments)
    return sums


def _parts_of_sums(values: Operand, grad: Tensor, by: Any) -> Any:
    """Sums of dy and dy * (x - center) over parts of columns."""
    columns = values.plan.columns
    center = np.empty((columns.count, columns.width), values.plan.sum_dtype)
    _column_gradients().fill_centers(by, center, values.box.sizes, columns.segment)
    return columns.sums(values, center, grad)


def _vectors(
    values: Operand,
    grad: Tensor,
    out: Tensor | None,
    gamma: Tensor,
    by: Any,
    means: Any,
    *,
    has_mean: bool = True,
    has_means: bool = False,
) -> Any:
    box = values.box
    samples = box.sizes[0]
    height = max(-(-samples // _SLOTS), min(samples, -(-_SLOT_ELEMENTS // box.width)))
    height = box.per if box.parameters_count > box.width else height
    slots = -(-samples // height)
    sums = np.empty((2, 0 if has_means else slots, box.width))
    tensors, steps = (values.tensor, grad, out, gamma), (height, box.per, has_mean)
    values.divide(_vector_gradients().gradient_of_vectors, slots, tensors, by, means, sums, box.sizes, steps)
    return sums


@cache
def _sweeps() -> ModuleType:
    from normcore import _gradient_sweeps

    return _gradient_sweeps


@cache
def _column_gradients() -> ModuleType:
    from normcore import _column_gradients

    return _column_gradients


@cache
def _vector_gradients() -> ModuleType:
    from normcore import _vector_gradients

    return _vector_gradients
