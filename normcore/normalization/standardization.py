"""The one standardize kernel, on tensors without gradient: y = (x - mean) * invstd * weight + bias, and its backward.

The mean is the sum of two numbers, center + offset. x - center is exact where it matters, for x near a large mean, and
what the offset adds is below a deviation: y = (x - center) * scale + (bias - offset * scale) loses no digits. The
shorter y = x * scale + (bias - mean * scale) loses those that x has in common with the mean, so it serves where no mean
is further from 0 than about a deviation.
"""

import torch
from torch import Tensor

from normcore._precision import accumulation_dtype, split
from normcore._slab import Slab, is_adjacent
from normcore.normalization.closed_forms import Statistics, invstd_of, simple_backward, simple_statistics
from normcore.normalization.sweeps import dot_sums, scale_and_shift, scaled_sum
from normcore.statistics.deviations import deviations

# Largest |mean| / sqrt(var + eps) for the short form. The digits it loses are those of float32 (float64), which an
# output in half precision has to spare.
_LARGEST_RATIO = {torch.float64: 2.0, torch.float32: 2.0, torch.float16: 16.0, torch.bfloat16: 64.0}


def own_statistics(
    input: Tensor, *, axes: tuple[int, ...], eps: float, has_mean: bool = True, mask: Tensor | None = None
) -> Statistics:
    """Statistics of the input over `axes`, along which there are values."""
    if mask is not None or not has_mean:
        return simple_statistics(input, axes=axes, eps=eps, has_mean=has_mean, mask=mask)
    kept = tuple(axis for axis in range(input.ndim) if axis not in axes)
    slab = Slab.keeping(input, kept)
    sums = deviations(slab, dtype=accumulation_dtype(input.dtype))
    var = sums.m2 / sums.count
    invstd = invstd_of(var, eps=eps)
    center, offset, var, invstd = map(slab.restore_channels, (sums.center, sums.offset, var, invstd))
    return Statistics(center, offset, var, invstd, eps, axes, sums.count)


def given_statistics(mean: Tensor, var: Tensor, *, dtype: torch.dtype, eps: float) -> Statistics:
    """Given statistics, for an input of `dtype`."""
    center, offset = split(mean, accumulation_dtype(dtype))
    return Statistics(center, offset, var.double(), (var.double() + eps).sqrt().reciprocal(), eps)


def standardize(input: Tensor, by: Statistics, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """A new tensor of the input's shape, datatype and memory format, cast once."""
    scale = by.invstd if weight is None else by.invstd * weight.double()
    shift = -by.offset * scale
    if bias is not None:
        shift = shift + bias.double()
    varying = _varying(input.shape, by.center, scale, shift)
    if len(varying) == input.ndim > 1 or not is_adjacent(input.shape, varying):
        return _standardize_elementwise(input, by, weight, bias)
    slab = Slab.keeping(input, varying)
    # Constant values far from zero have var = 0, and so the larger ratio.
    is_short = bool((by.mean.square() <= _LARGEST_RATIO[input.dtype] ** 2 * by.var).all())
    if is_short:
        shift = shift - by.center * scale
    center = None if is_short else slab.per_channel(by.center)
    scale, shift = (slab.per_channel(term.to(by.center.dtype)) for term in (scale, shift))
    return _laid_out_as(input, slab.restore(scale_and_shift(slab.values, center, scale, shift)))


def backward(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, by: Statistics, *, affine_shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias, the last two of `affine_shape`, which broadcasts against the input.

    Sums of dy and dy * (x - center) per affine parameter and group give everything: dgamma and dbeta, and A = mean(a)
    and B = mean(a * xh) of a = gamma * dy, so that dx = s * (a - A - xh * B) is one more sweep.
    """
    affine = [1] * (input.ndim - len(affine_shape)) + list(affine_shape)
    varying = tuple(axis for axis, size in enumerate(affine) if size != 1 or by.center.shape[axis] != 1)
    if by.mask is not None or input.numel() == 0 or not _has_usual_scale(by):
        grads = simple_backward(grad_output, input, weight, by)
        return grads[0].to(input.dtype), grads[1].sum_to_size(affine_shape), grads[2].sum_to_size(affine_shape)
    if len(varying) == input.ndim or not is_adjacent(input.shape, varying):
        return _backward_elementwise(grad_output, input, weight, by, affine_shape=affine_shape)
    slab = Slab.keeping(input, varying)
    gradients = slab.seen_alike(grad_output.to(input.dtype))
    center = slab.per_channel(by.center)
    grad_sum, dot = map(slab.restore_channels, dot_sums(slab.values, gradients, center))
    dot = (dot - by.offset * grad_sum) * by.invstd
    scale = by.invstd if weight is None else by.invstd * weight.double()
    slope, constant = _corrections(grad_sum * scale, dot * scale, by) if by.axes else (None, None)
    terms = (None if term is None else slab.per_channel(term.to(center.dtype)) for term in (slope, constant))
    scale = slab.per_channel(scale.to(center.dtype))
    grad_input = _laid_out_as(input, slab.restore(scaled_sum(gradients, slab.values, center, scale, *terms)))
    return grad_input, dot.sum_to_size(affine).view(affine_shape), grad_sum.sum_to_size(affine).view(affine_shape)


def _laid_out_as(input: Tensor, values: Tensor) -> Tensor:
    """The values in the input's memory format, which a slab that is a copy has lost."""
    if values.stride() == input.stride():
        return values
    output = torch.empty_like(input)
    return values if output.stride() == values.stride() else output.copy_(values)


def _corrections(grad_sum: Tensor, dot: Tensor, by: Statistics) -> tuple[Tensor, Tensor]:
    """What a group takes from its gradients: slope * (x - center) + constant."""
    slope = -by.invstd * dot.sum(by.axes, keepdim=True) / by.count
    constant = -by.offset * slope
    if by.has_mean:
        constant = constant - grad_sum.sum(by.axes, keepdim=True) / by.count
    return slope, constant


def _varying(shape: torch.Size, *terms: Tensor) -> tuple[int, ...]:
    """The axes along which any of the terms varies."""
    return tuple(axis for axis in range(len(shape)) if any(_size(term, axis - len(shape)) != 1 for term in terms))


def _size(term: Tensor, axis: int) -> int:
    """Size along an axis counted from the back; 1 where a term has none."""
    return term.shape[axis] if -axis <= term.ndim else 1


def _has_usual_scale(by: Statistics) -> bool:
    """Whether products of a few statistics and values stay far from the ends of the datatype."""
    limit = 1e12 if by.center.dtype == torch.float32 else 1e100
    return bool(((by.invstd < limit) & (by.invstd * limit > 1)).all())


def _standardize_elementwise(input: Tensor, by: Statistics, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Where no two values share mean and affine parameters."""
    output = (input.to(by.center.dtype) - by.center).double().sub_(by.offset).mul_(by.invstd)
    if weight is not None:
        output.mul_(weight)
    if bias is not None:
        output.add_(bias)
    return output.to(input.dtype)


def _backward_elementwise(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, by: Statistics, *, affine_shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Where values of a group have affine parameters of their own: those are applied before."""
    values, grads = input.to(by.center.dtype), grad_output.to(by.center.dtype)
    scaled = grads if weight is None else grads * weight.to(grads.dtype)
    grad_input, _, _ = backward(scaled, values, None, by, affine_shape=tuple(by.center.shape))
    normalized = standardize(values, by, None, None)
    grad_weight = normalized.mul_(grads).sum_to_size(affine_shape)
    return grad_input.to(input.dtype), grad_weight, grads.sum_to_size(affine_shape)
