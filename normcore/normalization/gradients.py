"""The standardize family with derivatives of every order, by closed forms.

Batch, layer, instance, group and RMS norm and weight standardization are one function of the axes reduced:

    xh = (x - mean) * s,  s = (var + eps)^-1/2,  y = gamma * xh + beta
    J(v) = s * (v - mean(v) - xh * mean(v * xh))                           (without mean(v) where no mean is taken)
    backward, with a = gamma * dy:  dx = J(a),  dgamma = sum(dy * xh),  dbeta = sum(dy)
    double backward of the cotangents (u, ug, ub) of (dx, dgamma, dbeta), with p = mean(u * xh), q = mean(a * xh) and
    h = mean(u * a) - mean(u) * mean(a) - p * q:
        d(dy) = gamma * J(u) + ug * xh + ub,  d(gamma) = sum(dy * J(u))
        d(x) = -s^2 * h * xh - s * (q * J(u) + p * J(a)) + J(ug * dy)

Uncounted positions (a mask) are normalized, but shape no statistics: the sums of a and a * xh run over all positions,
their corrections reach the counted ones alone. Given statistics are constants: no corrections at all.

How a method uses it: view the input so that statistics are taken over whole `axes`, shape weight and bias so that they
broadcast against that view ((C, 1, 1), (D,), (G, C // G, 1), ...), call `standardize_over` (the statistics are the
input's own) or `standardize_by` (they are given). The output is differentiable to every order in input, weight and
bias. Where there is no autograd, as under torch.inference_mode, `standardize_gradients` gives the same gradients.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from normcore._precision import accumulation_dtype, split


@dataclass(frozen=True, slots=True)
class Statistics:
    """What an input was standardized with; tensors that broadcast against the input, without gradient.

    Attributes:
        center: the mean, rounded to the datatype computed in.
        offset: what the mean has over the center; float64.
        var: biased variance (mean square where no mean is taken); float64.
        invstd: (var + eps)^-1/2; float64.
        axes: those reduced, from the front; none for given statistics.
        count: values behind each statistic.
        mask: true where a position was counted; None where all were.
        has_mean: whether a mean was subtracted.
    """

    center: Tensor
    offset: Tensor
    var: Tensor
    invstd: Tensor
    eps: float
    axes: tuple[int, ...] = ()
    count: int | Tensor = 0
    mask: Tensor | None = None
    has_mean: bool = True

    @property
    def mean(self) -> Tensor:
        return self.center.double() + self.offset


@dataclass(frozen=True, slots=True)
class Standardized:
    """A differentiable output of the input's shape and datatype, and the statistics."""

    output: Tensor
    statistics: Statistics


@dataclass(frozen=True, slots=True)
class Gradients:
    """Gradients of the input, and of weight and bias in the shape asked for."""

    input: Tensor
    weight: Tensor
    bias: Tensor


def standardize_over(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    axes: tuple[int, ...],
    eps: float,
    has_mean: bool = True,
    mask: Tensor | None = None,
) -> Standardized:
    """Standardize by the input's own statistics over `axes`; `has_mean` false is the RMS form.

    Args:
        input: any shape, floating, with values along the axes.
        weight: broadcasts against the input; any floating datatype.
        bias: the same.
        axes: those to reduce, from the front, in increasing order.
        eps: added to the variance.
        has_mean: whether the mean is subtracted.
        mask: bool, broadcasts against the input; true where a position is counted. At least one is, per statistic.
    """
    with torch.no_grad():
        statistics = _statistics(input, axes=axes, eps=eps, has_mean=has_mean, mask=mask)
    return _standardized(input, weight, bias, statistics)


def standardize_by(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    mean: Tensor,
    var: Tensor,
    eps: float,
) -> Standardized:
    """Standardize by given statistics, constants that broadcast against the input."""
    with torch.no_grad():
        center, offset = split(mean, accumulation_dtype(input.dtype))
        var = var.double()
        statistics = Statistics(center, offset, var, (var + eps).rsqrt(), eps)
    return _standardized(input, weight, bias, statistics)


def standardize_gradients(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, statistics: Statistics, *, affine_shape: tuple[int, ...]
) -> Gradients:
    """The closed-form backward, without autograd.

    Args:
        grad_output: shape of the input.
        input: what was standardized.
        weight: that of the forward.
        statistics: of the forward's result.
        affine_shape: shape of the gradients of weight and bias; broadcasts against the input, and is the weight's
            where there is one.

    Returns:
        The input's gradient in its datatype, the others in the datatype computed in.
    """
    with torch.no_grad():
        terms = _backward(grad_output, input, weight, statistics)
        weight_term, bias_term = (term.sum_to_size(affine_shape) for term in terms[1:])
        dtype = accumulation_dtype(input.dtype)
        return Gradients(terms[0].to(input.dtype), weight_term.to(dtype), bias_term.to(dtype))


def _standardized(input: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics) -> Standardized:
    # Function.apply has no types in torch.
    output: Tensor = _Standardize.apply(input, weight, bias, statistics)  # type: ignore[no-untyped-call]
    return Standardized(output, statistics)


class _Standardize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics) -> Tensor:
        ctx.save_for_backward(input, weight, bias)
        ctx.statistics = statistics
        scale = statistics.invstd if weight is None else statistics.invstd * weight.double()
        output = (input.double() - statistics.center - statistics.offset) * scale
        if bias is not None:
            output = output + bias.double()
        return output.to(input.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias = ctx.saved_tensors
        gradients = _StandardizeBackward.apply(  # type: ignore[no-untyped-call]  # no types in torch
            grads[0], input, weight, bias, ctx.statistics
        )
        return (*gradients, None)


class _StandardizeBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad_output: Tensor, input: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(grad_output, input, weight)
        ctx.statistics = statistics
        grad_input, grad_weight, grad_bias = _backward(grad_output, input, weight, statistics)
        return grad_input.to(input.dtype), _like(grad_weight, weight), _like(grad_bias, bias)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_output, input, weight = ctx.saved_tensors
        statistics = ctx.statistics
        if torch.is_grad_enabled():
            # For third and higher derivatives, mean and invstd have to be functions of the input here.
            statistics = _differentiable(input, statistics)
        grads = _double_backward(cotangents, grad_output, input, weight, statistics)
        return (
            *(_like(grad, like) for grad, like in zip(grads, (grad_output, input, weight), strict=True)),
            None,
            None,
        )


def _statistics(input: Tensor, *, axes: tuple[int, ...], eps: float, has_mean: bool, mask: Tensor | None) -> Statistics:
    values = input.double()
    counted = values if mask is None else values.masked_fill(~mask, 0.0)
    count: int | Tensor
    if mask is None:
        count = torch.Size([input.shape[axis] for axis in axes]).numel()
    else:
        count = mask.expand(input.shape).sum(axes, keepdim=True)
    zero = torch.zeros([1 if axis in axes else size for axis, size in enumerate(input.shape)], dtype=torch.float64)
    center, offset = split(counted.sum(axes, keepdim=True) / count, accumulation_dtype(input.dtype))
    if not has_mean:
        center, offset = zero.to(center.dtype), zero
    deviations = values - center
    if mask is not None:
        deviations = deviations.masked_fill(~mask, 0.0)
    if has_mean:
        offset = deviations.sum(axes, keepdim=True) / count
    deviations = deviations - offset
    if mask is not None:
        deviations = deviations.masked_fill(~mask, 0.0)
    var = deviations.square().sum(axes, keepdim=True) / count
    return Statistics(center, offset, var, (var + eps).rsqrt(), eps, axes, count, mask, has_mean)


def _differentiable(input: Tensor, statistics: Statistics) -> Statistics:
    """The same statistics as functions of the input; the center stays a constant."""
    if not statistics.axes:
        return statistics
    deviations = input.double() - statistics.center
    offset = _mean(deviations, statistics, is_masked=True) if statistics.has_mean else statistics.offset
    var = _mean((deviations - offset).square(), statistics, is_masked=True)
    return replace(statistics, offset=offset, var=var, invstd=(var + statistics.eps).rsqrt())


def _normalized(input: Tensor, statistics: Statistics) -> Tensor:
    return (input.double() - statistics.center - statistics.offset) * statistics.invstd


def _mean(values: Tensor, statistics: Statistics, *, is_masked: bool) -> Tensor:
    """Sum over all positions, or over the counted ones alone, over the number of counted ones."""
    if is_masked and statistics.mask is not None:
        values = torch.where(statistics.mask, values, 0.0)
    return values.sum(statistics.axes, keepdim=True) / statistics.count


def _corrections(values: Tensor, normalized: Tensor, statistics: Statistics, *, is_masked: bool) -> Tensor:
    """mean(v) + xh * mean(v * xh)."""
    terms = normalized * _mean(values * normalized, statistics, is_masked=is_masked)
    return terms + _mean(values, statistics, is_masked=is_masked) if statistics.has_mean else terms


def _project(values: Tensor, normalized: Tensor, statistics: Statistics) -> Tensor:
    """J(v): the cotangent of x for a cotangent v of xh."""
    if not statistics.axes:
        return statistics.invstd * values
    corrections = _corrections(values, normalized, statistics, is_masked=False)
    if statistics.mask is not None:
        corrections = torch.where(statistics.mask, corrections, 0.0)
    return statistics.invstd * (values - corrections)


def _adjoint(values: Tensor, normalized: Tensor, statistics: Statistics) -> Tensor:
    """The adjoint of J, which is J itself where all positions are counted."""
    if not statistics.axes:
        return statistics.invstd * values
    return statistics.invstd * (values - _corrections(values, normalized, statistics, is_masked=True))


def _backward(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, statistics: Statistics
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and the terms to sum for dgamma and dbeta."""
    grad_output = grad_output.double()
    normalized = _normalized(input, statistics)
    scaled = grad_output if weight is None else grad_output * weight.double()
    return _project(scaled, normalized, statistics), grad_output * normalized, grad_output


def _double_backward(
    cotangents: tuple[Tensor | None, ...],
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    statistics: Statistics,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of grad_output and input, and the terms to sum for that of weight; differentiable."""
    of_input, of_weight, of_bias = (0.0 if grad is None else grad.double() for grad in cotangents)
    assert isinstance(of_input, Tensor)
    grad_output = grad_output.double()
    gamma = 1.0 if weight is None else weight.double()
    normalized = _normalized(input, statistics)
    adjoint = _adjoint(of_input, normalized, statistics)
    grad_input = _project(of_weight * grad_output, normalized, statistics)
    if statistics.axes:
        scaled = gamma * grad_output
        p = _mean(of_input * normalized, statistics, is_masked=True)
        q = _mean(scaled * normalized, statistics, is_masked=False)
        h = _mean(of_input * scaled, statistics, is_masked=False) - p * q
        if statistics.has_mean:
            h = h - _mean(scaled, statistics, is_masked=False) * _mean(of_input, statistics, is_masked=True)
        counted, own = of_input, statistics.invstd.square() * h * normalized
        if statistics.mask is not None:
            counted, own = torch.where(statistics.mask, of_input, 0.0), torch.where(statistics.mask, own, 0.0)
        both = q * _project(counted, normalized, statistics) + p * _project(scaled, normalized, statistics)
        grad_input = grad_input - own - statistics.invstd * both
    return gamma * adjoint + of_weight * normalized + of_bias, grad_input, grad_output * adjoint


def _like(grad: Tensor, like: Tensor | None) -> Tensor | None:
    return None if like is None else grad.sum_to_size(like.shape).to(like.dtype)
