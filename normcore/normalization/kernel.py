"""The one standardize kernel, on tensors without gradient: y = (x - mean) * invstd * weight + bias, and its backward.

On the CPU compiled sweeps do it, where the tensor is one of their boxes. Everything else, other devices, odd layouts,
backward with a mask, takes the closed forms in plain torch operations in float64. Nothing here is recorded by autograd.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from normcore import _gradients, _standardize
from normcore._box import Box
from normcore._plan import Operand, compiled, operand_of
from normcore.normalization import closed_forms
from normcore.normalization.closed_forms import Measured, Statistics


class Standardized(NamedTuple):
    """An output of the input's shape and datatype, and the statistics."""

    output: Tensor
    statistics: Statistics


def own_statistics(
    input: Tensor, *, axes: tuple[int, ...], eps: float, has_mean: bool = True, mask: Tensor | None = None
) -> Statistics:
    """Statistics of the input over `axes`, along which there are values."""
    values = operand_of(input, axes)
    if values is None:
        return closed_forms.own_statistics(input, axes=axes, eps=eps, has_mean=has_mean, mask=mask)
    if mask is None:
        rows, count = _standardize.measure(values, eps=eps, has_mean=has_mean)
        return Statistics(Measured(rows, values.box), eps, axes, count, None, has_mean)
    counted = torch.empty_like(values.tensor, dtype=torch.bool).copy_(mask.expand(input.shape))
    rows, counts = _standardize.measure(values, eps=eps, has_mean=has_mean, mask=counted)
    count = values.box.restore_statistics(torch.from_numpy(counts))
    return Statistics(Measured(rows, values.box), eps, axes, count, mask, has_mean)


def standardize_own(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    axes: tuple[int, ...],
    eps: float,
    has_mean: bool = True,
    mask: Tensor | None = None,
    out: Tensor | None = None,
) -> Standardized:
    """The output, in `out` where that is given, and the input's own statistics."""
    values = None if mask is not None else operand_of(input, axes, weight, bias)
    if values is None:
        by = own_statistics(input, axes=axes, eps=eps, has_mean=has_mean, mask=mask)
        return Standardized(standardize(input, by, weight, bias, out=out), by)
    output = _target(values, out)
    rows, count, is_done = _standardize.standardize_own(values, output, weight, bias, eps=eps, has_mean=has_mean)
    by = Statistics(Measured(rows, values.box), eps, axes, count, None, has_mean)
    if not is_done:
        output = _filled(out, closed_forms.standardize(input, by, weight, bias))
    return Standardized(output, by)


def standardize_given(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    mean: Tensor,
    var: Tensor,
    eps: float,
    out: Tensor | None = None,
) -> Standardized:
    """The same by given statistics, constants that broadcast against the input."""
    values = operand_of(input, _shared_axes(input.ndim, mean.shape), weight, bias)
    # Ahead of small tensors, which would split the memory that the last output of its size has left.
    output = None if values is None else _target(values, out)
    rows = None if values is None else _standardize.given(values, mean, var, eps=eps)
    if values is None or output is None or rows is None:
        by = closed_forms.given_statistics(mean, var, eps=eps)
        return Standardized(standardize(input, by, weight, bias, out=out), by)
    by = Statistics(Measured(rows, values.box), eps)
    if not _standardize.standardize(values, output, weight, bias, rows):
        output = _filled(out, closed_forms.standardize(input, by, weight, bias))
    return Standardized(output, by)


def standardize(
    input: Tensor, by: Statistics, weight: Tensor | None, bias: Tensor | None, *, out: Tensor | None = None
) -> Tensor:
    """A new tensor, or `out`, of the input's shape, datatype and memory format, cast once."""
    values = operand_of(input, _axes_of(input, by), weight, bias)
    if values is not None:
        output = _target(values, out)
        if _standardize.standardize(values, output, weight, bias, by.rows(values.box)):
            return output
    return _filled(out, closed_forms.standardize(input, by, weight, bias))


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    by: Statistics,
    *,
    affine_shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; the last two of `affine_shape`, which broadcasts against the input.

    They are of a datatype, float32 or float64.
    """
    pair, sums = _pair(grad_output, input, weight, by, affine_shape), None
    if pair is not None:
        of_input = torch.empty_like(input)
        values, grads, rows = pair
        kind = dtype if values.box.has_parameters_of(affine_shape) else torch.float64
        if by.axes:
            sums = _gradients.gradients(values, grads, of_input, weight, rows, has_mean=by.has_mean, dtype=kind)
        else:
            sums = _gradients.frozen_gradients(values, grads, of_input, weight, rows, dtype=kind)
    if pair is None or sums is None:
        found = gradient_sums(grad_output, input, weight, by, affine_shape=affine_shape)
        of_input = input_gradient(grad_output, input, weight, by, found)
        return of_input, found.weight.to(dtype), found.bias.to(dtype)
    of_bias, of_weight = (_as_parameter(own, values.box, affine_shape, dtype) for own in sums)
    return of_input, of_weight, of_bias


@dataclass(frozen=True, slots=True)
class GradientSums:
    """What a backward sums first, in float64.

    Attributes:
        total: sum of a = gamma * dy over the axes that statistics are taken over; broadcasts against the input.
        dot: sum of a * xh over the same.
        weight: gradient of the weight, in the shape asked for.
        bias: gradient of the bias.
    """

    total: Tensor
    dot: Tensor
    weight: Tensor
    bias: Tensor


def gradient_sums(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, by: Statistics, *, affine_shape: tuple[int, ...]
) -> GradientSums:
    """The sums of a backward; `affine_shape` is that of weight and bias, and broadcasts against the input."""
    pair = _pair(grad_output, input, weight, by, affine_shape)
    if pair is None:
        return GradientSums(*closed_forms.gradient_sums(grad_output, input, weight, by, affine_shape=affine_shape))
    values, grads, rows = pair
    totals, sums = _gradients.gradient_sums(values, grads, weight, rows)
    total, dot = (values.box.restore_statistics(torch.from_numpy(own)) for own in totals)
    of_bias, of_weight = (_as_parameter(own, values.box, affine_shape) for own in sums)
    return GradientSums(total, dot, of_weight, of_bias)


@torch.no_grad()
def input_gradient(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, by: Statistics, sums: GradientSums
) -> Tensor:
    """The input's gradient dx = s * (a - mean(a) - xh * mean(a * xh)), in its datatype and memory format."""
    if not by.axes:
        return _frozen_gradient(grad_output, input, weight, by)
    pair = _pair(grad_output, input, weight, by, None)
    if pair is None:
        return closed_forms.input_gradient(grad_output, input, weight, by, total=sums.total, dot=sums.dot)
    values, grads, rows = pair
    means = values.box.statistics(torch.stack((sums.total, sums.dot)) / by.count)
    if not by.has_mean:
        means[0] = 0.0
    output = torch.empty_like(values.tensor)
    _gradients.input_gradient(values, grads, output, weight, rows, means.numpy())
    return output


def _frozen_gradient(grad_output: Tensor, input: Tensor, weight: Tensor | None, by: Statistics) -> Tensor:
    """The gradient s * a where statistics are given: nothing of the input's values is in it."""
    if isinstance(by.found, Measured):
        rows = by.found.rows.copy()
        rows[:3] = 0.0
        scales = Statistics(Measured(rows, by.found.box), by.eps)
    else:
        table = by.table.clone()
        table[:3] = 0.0
        scales = Statistics(table, by.eps)
    if not _holds(input.dtype, grad_output.dtype):
        wide = grad_output.to(torch.promote_types(input.dtype, grad_output.dtype))
        return torch.empty_like(input).copy_(standardize(wide, scales, weight, None))
    return standardize(_laid_out_as(input, grad_output), scales, weight, None)


def _target(values: Operand, out: Tensor | None) -> Tensor:
    return torch.empty_like(values.tensor) if out is None else out


def _filled(out: Tensor | None, output: Tensor) -> Tensor:
    return output if out is None else out.copy_(output)


def _pair(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    by: Statistics,
    affine_shape: tuple[int, ...] | None,
) -> tuple[Operand, Operand, Any] | None:
    """Input and gradient of its output in the same layout, and the statistics; None where kernels do not serve."""
    if by.mask is not None or not _holds(input.dtype, grad_output.dtype):
        return None
    values = operand_of(input, _axes_of(input, by), weight, affine_shape)
    if values is None:
        return None
    rows = by.rows(values.box)
    if values.plan.itemsize == 2:
        rows = rows.copy()
        with np.errstate(over="ignore", invalid="ignore"):
            center = rows[0].astype(np.float32)
            rows[1] += rows[0] - center
        rows[0] = center
    if not _standardize.is_usual(values, rows):
        return None
    grads = _laid_out_as(values.tensor, grad_output)
    return values, Operand(grads, compiled().flat(grads), values.plan), rows


def _axes_of(input: Tensor, by: Statistics) -> tuple[int, ...]:
    """The axes along which values share their statistics."""
    if by.axes:
        return by.axes
    return by.found.box.shared if isinstance(by.found, Measured) else _shared_axes(input.ndim, by.table.shape[1:])


@lru_cache(1024)
def _shared_axes(rank: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The same for statistics of a shape that broadcasts against an input of this rank."""
    missing = rank - len(shape)
    return tuple(axis for axis in range(rank) if axis < missing or shape[axis - missing] == 1)


def _as_parameter(sums: Any, box: Box, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """A gradient of weight or bias in their shape; what varies within the box and not there is summed."""
    if box.has_parameters_of(shape):
        return torch.from_numpy(sums.reshape(shape))
    own = box.restore_parameters(torch.from_numpy(sums).view(-1))
    return own.sum_to_size((1,) * (own.ndim - len(shape)) + shape).reshape(shape).to(dtype)


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a datatype has every number of another one: kernels take gradients in the input's."""
    return dtype is other or torch.promote_types(dtype, other) is dtype


def _laid_out_as(input: Tensor, values: Tensor) -> Tensor:
    """The values, without gradient, in the datatype and memory format of the input."""
    if values.stride() == input.stride() and values.dtype == input.dtype:
        return values
    return torch.empty_like(input).copy_(values.detach())
