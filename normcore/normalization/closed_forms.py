"""The closed forms of the standardize family in plain arithmetic, differentiable to every order.

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
"""

from dataclasses import dataclass, replace

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


def invstd_of(var: Tensor, *, eps: float) -> Tensor:
    # A variance beyond float64 would otherwise turn every output into the bias without a trace.
    return (var + eps).sqrt().reciprocal().masked_fill(~var.isfinite(), torch.nan)


def has_usual_scale(by: Statistics) -> bool:
    """Whether products of a few statistics and values stay far from the ends of the datatype."""
    limit = 1e12 if by.center.dtype == torch.float32 else 1e100
    return bool(((by.invstd < limit) & (by.invstd * limit > 1)).all())


def plain_dtype(by: Statistics) -> torch.dtype:
    """The datatype for arithmetic that takes no care: float64 where the usual one might overflow."""
    return by.center.dtype if has_usual_scale(by) else torch.float64


def simple_statistics(
    input: Tensor, *, axes: tuple[int, ...], eps: float, has_mean: bool, mask: Tensor | None
) -> Statistics:
    values = input.double()
    counted = values if mask is None else values.masked_fill(~mask, 0.0)
    count: int | Tensor
    if mask is None:
        count = torch.Size([input.shape[axis] for axis in axes]).numel()
    else:
        count = mask.expand(input.shape).sum(axes, keepdim=True)
    shape = [1 if axis in axes else size for axis, size in enumerate(input.shape)]
    zero = torch.zeros(shape, dtype=torch.float64, device=input.device)
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
    return Statistics(center, offset, var, invstd_of(var, eps=eps), eps, axes, count, mask, has_mean)


def as_functions(input: Tensor, statistics: Statistics) -> Statistics:
    """The same statistics as functions of the input; the center stays a constant."""
    if not statistics.axes:
        return statistics
    deviations = input.to(plain_dtype(statistics)) - statistics.center
    offset = statistics.offset.to(deviations.dtype)
    if statistics.has_mean:
        offset = _mean(deviations, statistics, is_masked=True)
    var = _mean((deviations - offset).square(), statistics, is_masked=True)
    return replace(statistics, offset=offset, var=var, invstd=(var + statistics.eps).rsqrt())


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


def double_backward(
    cotangents: tuple[Tensor | None, ...],
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    statistics: Statistics,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of grad_output and input, and the terms to sum for that of weight; differentiable."""
    dtype = plain_dtype(statistics)
    of_input, of_weight, of_bias = (0.0 if grad is None else grad.to(dtype) for grad in cotangents)
    assert isinstance(of_input, Tensor)
    grad_output = grad_output.to(dtype)
    gamma = 1.0 if weight is None else weight.to(dtype)
    statistics = replace(statistics, offset=statistics.offset.to(dtype), invstd=statistics.invstd.to(dtype))
    normalized = (input.to(dtype) - statistics.center - statistics.offset) * statistics.invstd
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
