"""The backward of the one standardize kernel, on tensors without gradient.

On the CPU compiled sweeps do it, where they do the forward; a backward with a mask and everything else takes the closed
forms in float64. Nothing here is recorded by autograd.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normcore import _gradients, _standardize
from normcore._box import Box
from normcore._plan import Operand, operand_of
from normcore.normalization import closed_forms
from normcore.normalization.closed_forms import Measured, Statistics
from normcore.normalization.kernel import AS_GIVEN, Seen, axes_of, standardize


def backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    by: Statistics,
    *,
    affine_shape: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
    seen: Seen = AS_GIVEN,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; the last two of `affine_shape` and a datatype."""
    front = seen.affine or affine_shape
    pair, sums = _pair(grad_output, input, by, seen.view, front if weight is not None else None, front), None
    if pair is not None:
        of_input = torch.empty_like(input)
        values, grads, rows = pair
        is_own = values.box.has_parameters_of(front)
        shape, kind = (affine_shape, dtype) if is_own else ((values.box.parameters_count,), torch.float64)
        terms = values, grads, of_input, weight, rows
        if by.axes:
            sums = _gradients.gradients(*terms, has_mean=by.has_mean, shape=shape, dtype=kind)
        else:
            sums = _gradients.frozen_gradients(*terms, shape=shape, dtype=kind)
        if is_own and sums is not None:
            return of_input, sums[1], sums[0]
    if pair is None or sums is None:
        viewed = seen.values(grad_output), seen.values(input), seen.parameter(weight), by
        found = gradient_sums(*viewed, affine_shape=front)
        of_input = input_gradient(*viewed, found).reshape(input.shape)
        of_weight, of_bias = found.weight, found.bias
    else:
        of_bias, of_weight = (_as_parameter(own, values.box, front) for own in sums)
    return of_input, of_weight.reshape(affine_shape).to(dtype), of_bias.reshape(affine_shape).to(dtype)


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
    pair = _pair(grad_output, input, by, None, AS_GIVEN.front(weight), affine_shape)
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
    pair = _pair(grad_output, input, by, None, AS_GIVEN.front(weight))
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
        scales = Statistics(Measured(rows, by.found.plan), by.eps)
    else:
        table = by.table.clone()
        table[:3] = 0.0
        scales = Statistics(table, by.eps)
    if not _holds(input.dtype, grad_output.dtype):
        wide = grad_output.to(torch.promote_types(input.dtype, grad_output.dtype))
        return torch.empty_like(input).copy_(standardize(wide, scales, weight, None))
    return standardize(_laid_out_as(input, grad_output), scales, weight, None)


def _pair(
    grad_output: Tensor,
    input: Tensor,
    by: Statistics,
    view: tuple[int, ...] | None,
    *fronts: tuple[int, ...] | None,
) -> tuple[Operand, Tensor, Any] | None:
    """The input, the gradient of its output in the same layout, and the statistics; None where kernels do not serve."""
    if by.mask is not None or not _holds(input.dtype, grad_output.dtype):
        return None
    found = by.found
    if isinstance(found, Measured) and found.plan.serves(input, view, fronts):
        values: Operand | None = Operand(input, found.plan)
    else:
        values = operand_of(input, view, axes_of(input, by, view), *fronts)
    if values is None:
        return None
    rows = by.rows(values.box)
    if not (isinstance(found, Measured) and found.is_usual and found.plan.itemsize == values.plan.itemsize):
        rows = _standardize.rounded(values, rows)
    return None if rows is None else (values, _laid_out_as(values.tensor, grad_output), rows)


def _as_parameter(sums: Tensor, box: Box, shape: tuple[int, ...]) -> Tensor:
    """A gradient of weight or bias in their shape; what varies within the box and not there is summed."""
    if box.has_parameters_of(shape):
        return sums.view(shape)
    own = box.restore_parameters(sums)
    return own.sum_to_size((1,) * (own.ndim - len(shape)) + shape).reshape(shape)


def _holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a datatype has every number of another one: kernels take gradients in the input's."""
    return dtype is other or torch.promote_types(dtype, other) is dtype


def _laid_out_as(input: Tensor, values: Tensor) -> Tensor:
    """The values, without gradient, in the datatype and memory format of the input."""
    if values.stride() == input.stride() and values.dtype == input.dtype and not values.is_neg():
        return values
    return torch.empty_like(input).copy_(values.detach())
