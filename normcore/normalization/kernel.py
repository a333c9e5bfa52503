"""The one standardize kernel, on tensors without gradient: y = (x - mean) * invstd * weight + bias, and its backward.

The mean is the sum of two numbers, center + offset. x - center is exact where it matters, for x near a large mean, and
what the offset adds is below a deviation: y = (x - center) * scale + (bias - offset * scale) loses no digits. The
shorter y = x * scale + (bias - mean * scale) loses those that x has in common with the mean, so it serves where no mean
is further from 0 than about a deviation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from normcore._precision import accumulation_dtype, split
from normcore._slab import Slab, is_adjacent
from normcore.normalization.closed_forms import (
    Statistics,
    has_usual_scale,
    invstd_of,
    plain_dtype,
    simple_statistics,
)
from normcore.normalization.sweeps import dot_sums, image_gradients, is_exact_image, scale_and_shift, scaled_sum
from normcore.statistics.deviations import Deviations, deviations, deviations_in_double

# Squares below are lost on float32, which a larger eps hides.
_LEAST_FLOAT32_VAR = 1e-30
_LEAST_HIDING_EPS = 1e-22
# Largest |mean| / sqrt(var + eps) for the short form. The digits it loses are those of float32 (float64), which an
# output in half precision has to spare.
_LARGEST_RATIO = {torch.float64: 2.0, torch.float32: 2.0, torch.float16: 16.0, torch.bfloat16: 64.0}


@torch.no_grad()
def own_statistics(
    input: Tensor, *, axes: tuple[int, ...], eps: float, has_mean: bool = True, mask: Tensor | None = None
) -> Statistics:
    """Statistics of the input over `axes`, along which there are values."""
    if not has_mean:
        return simple_statistics(input, axes=axes, eps=eps, has_mean=False, mask=mask)
    if mask is not None:
        return _counted_statistics(input, axes=axes, eps=eps, mask=mask)
    sums, slab = _deviations(input, axes, eps=eps)
    var = sums.m2 / sums.count
    invstd = invstd_of(var, eps=eps)
    center, offset, var, invstd = map(slab.restore_channels, (sums.center, sums.offset, var, invstd))
    return Statistics(center, offset, var, invstd, eps, axes, sums.count)


def _deviations(input: Tensor, axes: tuple[int, ...], *, eps: float) -> tuple[Deviations, Slab]:
    slab = Slab.keeping(input, tuple(axis for axis in range(input.ndim) if axis not in axes))
    sums = deviations(slab, dtype=accumulation_dtype(input.dtype))
    if eps < _LEAST_HIDING_EPS and sums.center.dtype == torch.float32:
        is_lost = sums.m2 < _LEAST_FLOAT32_VAR * sums.count
        if bool(is_lost.any()):
            sums = deviations_in_double(slab)
    return sums, slab


def _counted_statistics(input: Tensor, *, axes: tuple[int, ...], eps: float, mask: Tensor) -> Statistics:
    """Those of counted positions: the others take a value near the mean, whose part in the sums is known."""
    mask = mask[(None,) * (input.ndim - mask.ndim)]
    values = input.to(accumulation_dtype(input.dtype))
    # The mean around a counted value is exactly that of constant ones.
    counted = torch.where(mask, values, torch.inf).amin(axes, keepdim=True)
    size = torch.Size([input.shape[axis] for axis in axes]).numel()
    repeats = torch.Size([input.shape[axis] for axis in axes if mask.shape[axis] == 1]).numel()
    count = mask.sum(axes, keepdim=True) * repeats
    near = counted + torch.where(mask, values - counted, 0.0).sum(axes, keepdim=True) / count
    if not bool(near.isfinite().all()):
        return simple_statistics(input, axes=axes, eps=eps, has_mean=True, mask=mask)
    sums, slab = _deviations(torch.where(mask, values, near), axes, eps=eps)
    center, total, squares = map(slab.restore_channels, (sums.center, sums.total, sums.squares))
    distance = near.double() - center.double()
    total = total - (size - count) * distance
    offset = total / count
    var = ((squares - (size - count) * distance.square() - total * offset) / count).clamp_min(0.0)
    return Statistics(center, offset, var, invstd_of(var, eps=eps), eps, axes, count, mask)


@torch.no_grad()
def given_statistics(mean: Tensor, var: Tensor, *, dtype: torch.dtype, eps: float) -> Statistics:
    """Given statistics, for an input of `dtype`."""
    center, offset = split(mean, accumulation_dtype(dtype))
    return Statistics(center, offset, var.double(), (var.double() + eps).sqrt().reciprocal(), eps)


@torch.no_grad()
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
    is_short = _is_near_zero(by, input.dtype)
    if is_short:
        shift = shift - by.center * scale
    center = None if is_short else slab.per_channel(by.center)
    scale, shift = (slab.per_channel(term.to(by.center.dtype)) for term in (scale, shift))
    return _laid_out_as(input, slab.restore(scale_and_shift(slab.values, center, scale, shift)))


@torch.no_grad()
def backward(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, by: Statistics, *, affine_shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias; the last two of `affine_shape`, which broadcasts against the input."""
    fused = _fused_backward(grad_output, input, weight, by, affine_shape=affine_shape)
    if fused is not None:
        return fused
    sums = gradient_sums(grad_output, input, weight, by, affine_shape=affine_shape)
    return input_gradient(grad_output, input, weight, by, sums), sums.weight, sums.bias


@dataclass(frozen=True, slots=True)
class GradientSums:
    """What a backward sums first; float64 unless the input's values do not share parameters.

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


@torch.no_grad()
def gradient_sums(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, by: Statistics, *, affine_shape: tuple[int, ...]
) -> GradientSums:
    """The sums of a backward; `affine_shape` is that of weight and bias, and broadcasts against the input."""
    affine = (1,) * (input.ndim - len(affine_shape)) + affine_shape
    varying = _varying(input.shape, by.center, torch.empty(affine, device="meta"))
    if not _shares_parameters(input, by, varying):
        return _sums_of_own_parameters(grad_output, input, weight, by, affine_shape=affine_shape)
    slab = Slab.keeping(input, varying)
    gradients = slab.seen_alike(grad_output.to(input.dtype))
    sums = dot_sums(slab.values, gradients, slab.per_channel(by.center))
    total, dot = map(slab.restore_channels, sums)
    dot = (dot - by.offset * total) * by.invstd
    of_weight, of_bias = (term.sum_to_size(affine).view(affine_shape) for term in (dot, total))
    if weight is not None:
        total, dot = total * weight, dot * weight
    if by.axes:
        total, dot = (term.sum(by.axes, keepdim=True) for term in (total, dot))
    return GradientSums(total, dot, of_weight, of_bias)


@torch.no_grad()
def input_gradient(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, by: Statistics, sums: GradientSums
) -> Tensor:
    """The input's gradient dx = s * (a - mean(a) - xh * mean(a * xh)), in its datatype and memory format."""
    scale = by.invstd if weight is None else by.invstd * weight
    varying = _varying(input.shape, by.center, scale)
    if not _shares_parameters(input, by, varying):
        return _gradient_of_own_parameters(grad_output, input, weight, by, sums)
    slab = Slab.keeping(input, varying)
    gradients = slab.seen_alike(grad_output.to(input.dtype))
    slope = constant = None
    is_short = _is_near_zero(by, input.dtype)
    if by.axes:
        slope = -by.invstd.square() * sums.dot / by.count
        constant = -by.offset * slope
        if by.has_mean:
            constant = constant - by.invstd * sums.total / by.count
        if is_short:
            constant = constant - by.center * slope
    terms = (None if term is None else slab.per_channel(term.to(by.center.dtype)) for term in (slope, constant))
    center = None if is_short else slab.per_channel(by.center)
    scale = slab.per_channel(scale.to(by.center.dtype))
    mask = None if by.mask is None else slab.seen_alike(by.mask.expand(input.shape))
    return _laid_out_as(input, slab.restore(scaled_sum(gradients, slab.values, center, scale, *terms, mask=mask)))


def _fused_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, by: Statistics, *, affine_shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """By torch's batch norm, which sums images in vectors; None where that is not exact enough, or no image."""
    kept = tuple(axis for axis in range(input.ndim) if axis not in by.axes)
    affine = (1,) * (input.ndim - len(affine_shape)) + affine_shape
    if (
        not by.axes
        or not by.has_mean
        or by.mask is not None
        or affine != tuple(by.center.shape)
        or not _shares_parameters(input, by, kept)
    ):
        return None
    slab = Slab.keeping(input, kept)
    if not is_exact_image(slab) or not _is_near_zero(by, torch.float32):
        return None
    gradients = slab.seen_alike(grad_output.to(input.dtype))
    mean, invstd = (slab.per_channel(term.to(by.center.dtype)) for term in (by.mean, by.invstd))
    weight = None if weight is None else slab.per_channel(weight.to(by.center.dtype))
    of_input, of_weight, of_bias = image_gradients(slab.values, gradients, weight, mean, invstd)
    return _laid_out_as(input, slab.restore(of_input)), of_weight.view(affine_shape), of_bias.view(affine_shape)


def _is_near_zero(by: Statistics, dtype: torch.dtype) -> bool:
    """Whether mean * scale may be taken out of the values' own digits; not of constant values, whose var is 0."""
    return bool((by.mean.square() <= _LARGEST_RATIO[dtype] ** 2 * by.var).all())


def _shares_parameters(input: Tensor, by: Statistics, varying: tuple[int, ...]) -> bool:
    """Whether slabs serve: values along some axes share all parameters, which are of usual sizes."""
    is_shared = len(varying) < input.ndim and is_adjacent(input.shape, varying)
    return is_shared and input.numel() > 0 and has_usual_scale(by)


def _sums_of_own_parameters(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, by: Statistics, *, affine_shape: tuple[int, ...]
) -> GradientSums:
    grads = grad_output.to(plain_dtype(by))
    terms = grads * _normalized(input, by), grads
    of_weight, of_bias = (term.sum_to_size(affine_shape) for term in terms)
    dot, total = terms if weight is None else (term * weight.to(grads.dtype) for term in terms)
    if by.axes:
        total, dot = (term.sum(by.axes, keepdim=True) for term in (total, dot))
    return GradientSums(total, dot, of_weight, of_bias)


def _gradient_of_own_parameters(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, by: Statistics, sums: GradientSums
) -> Tensor:
    gradient = grad_output.to(plain_dtype(by))
    if weight is not None:
        gradient = gradient * weight.to(gradient.dtype)
    if by.axes:
        corrections = _normalized(input, by) * (sums.dot / by.count).to(gradient.dtype)
        if by.has_mean:
            corrections += (sums.total / by.count).to(gradient.dtype)
        if by.mask is not None:
            corrections.masked_fill_(~by.mask, 0.0)
        gradient = gradient - corrections
    return _laid_out_as(input, (gradient * by.invstd.to(gradient.dtype)).to(input.dtype))


def _normalized(input: Tensor, by: Statistics) -> Tensor:
    dtype = plain_dtype(by)
    return (input.to(dtype) - by.center).sub_(by.offset.to(dtype)).mul_(by.invstd.to(dtype))


def _laid_out_as(input: Tensor, values: Tensor) -> Tensor:
    """The values in the input's memory format, which a slab that is a copy has lost."""
    if values.stride() == input.stride():
        return values
    output = torch.empty_like(input)
    return values if output.stride() == values.stride() else output.copy_(values)


def _varying(shape: torch.Size, *terms: Tensor) -> tuple[int, ...]:
    """The axes along which any of the terms varies."""
    return tuple(axis for axis in range(len(shape)) if any(_size(term, axis - len(shape)) != 1 for term in terms))


def _size(term: Tensor, axis: int) -> int:
    """Size along an axis counted from the back; 1 where a term has none."""
    return term.shape[axis] if -axis <= term.ndim else 1


def _standardize_elementwise(input: Tensor, by: Statistics, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Where no two values share mean and affine parameters."""
    output = (input.to(by.center.dtype) - by.center).double().sub_(by.offset).mul_(by.invstd)
    if weight is not None:
        output.mul_(weight)
    if bias is not None:
        output.add_(bias)
    return output.to(input.dtype)
