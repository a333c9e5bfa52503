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
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normcore._box import Box
from normcore._plan import Plan


class Measured(NamedTuple):
    """Statistics as compiled kernels have them: float64 rows (5, B * G), and the plan of what they are of.

    `is_usual` where kernels are known to hold their scales and centers.
    """

    rows: Any
    plan: Plan
    is_usual: bool = False

    @property
    def box(self) -> Box:
        return self.plan.box


@dataclass(frozen=True)
class Statistics:
    """What an input was standardized with; float64 tensors that broadcast against the input, without gradient.

    Attributes:
        found: the table, or what it is made of at the first use.
        axes: those reduced, from the front; none for given statistics.
        count: values behind each statistic.
        mask: true where a position was counted; None where all were.
        has_mean: whether a mean was subtracted.
    """

    found: Tensor | Measured
    eps: float
    axes: tuple[int, ...] = ()
    count: int | Tensor = 0
    mask: Tensor | None = None
    has_mean: bool = True

    @staticmethod
    def table_of(center: Tensor, offset: Tensor, var: Tensor, invstd: Tensor) -> Tensor:
        return torch.stack((center, offset, center + offset, var, invstd))

    @cached_property
    def table(self) -> Tensor:
        """The properties below, stacked in front of their axes."""
        if isinstance(self.found, Measured):
            return self.found.box.restore_statistics(torch.from_numpy(self.found.rows))
        return self.found

    def rows(self, box: Box) -> Any:
        """The same as (5, B * G) for compiled kernels, of a box of the input."""
        if isinstance(self.found, Measured) and self.found.box.kept == box.kept:
            return self.found.rows
        return box.statistics(self.table).numpy()

    @property
    def center(self) -> Tensor:
        """The mean."""
        return self.table[0]

    @property
    def offset(self) -> Tensor:
        """What the mean has over the center, for the digits of a mean that float64 has not."""
        return self.table[1]

    @property
    def mean(self) -> Tensor:
        return self.table[2]

    @property
    def var(self) -> Tensor:
        """Biased variance (mean square where no mean is taken)."""
        return self.table[3]

    @property
    def invstd(self) -> Tensor:
        """(var + eps)^-1/2."""
        return self.table[4]

    def summary(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Copies of mean, var and invstd in a shape and a datatype."""
        return self.table[2:].to(dtype, copy=True).reshape(3, *shape).unbind()


def invstd_of(var: Tensor, *, eps: float) -> Tensor:
    # A variance beyond float64 would otherwise turn every output into the bias without a trace.
    return (var + eps).sqrt().reciprocal().masked_fill(~var.isfinite(), torch.nan)


@torch.no_grad()
def given_statistics(mean: Tensor, var: Tensor, *, eps: float) -> Statistics:
    """Given statistics, constants that broadcast against the input."""
    center, own = mean.double(), var.double()
    return Statistics(Statistics.table_of(center, torch.zeros_like(center), own, (own + eps).sqrt().reciprocal()), eps)


@torch.no_grad()
def own_statistics(
    input: Tensor, *, axes: tuple[int, ...], eps: float, has_mean: bool, mask: Tensor | None
) -> Statistics:
    """Statistics of the input; sums around a value that counts, then around the mean."""
    values = input.double()
    shape = [1 if axis in axes else size for axis, size in enumerate(input.shape)]
    count: int | Tensor = input.numel() // torch.Size(shape).numel()
    if mask is not None:
        count = mask.expand(input.shape).sum(axes, keepdim=True)
        values = values.masked_fill(~mask, torch.nan)
    center = torch.zeros(shape, dtype=torch.float64, device=input.device)
    offset = center
    if has_mean:
        near = values if mask is None else values.nan_to_num(nan=torch.inf)
        for axis in axes:
            near = near.amin(axis, keepdim=True) if mask is not None else near.narrow(axis, 0, 1)
        center = near + _counted_sum(values - near, axes, mask) / count
        offset = _counted_sum(values - center, axes, mask) / count
    var = _counted_sum((values - center - offset).square(), axes, mask) / count
    table = Statistics.table_of(center, offset, var, invstd_of(var, eps=eps))
    return Statistics(table, eps, axes, count, mask, has_mean)


def _counted_sum(values: Tensor, axes: tuple[int, ...], mask: Tensor | None) -> Tensor:
    return (values if mask is None else torch.where(mask, values, 0.0)).sum(axes, keepdim=True)


@torch.no_grad()
def standardize(input: Tensor, by: Statistics, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """(x - mean) * invstd * weight + bias, in the input's datatype and memory format."""
    output = _normalized(input, by)
    if weight is not None:
        output = output * weight
    if bias is not None:
        output = output + bias
    return torch.empty_like(input).copy_(output)


@torch.no_grad()
def gradient_sums(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, by: Statistics, *, affine_shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of a = weight * dy and of a * xh where statistics are shared, and the gradients of weight and bias."""
    grads = grad_output.double()
    terms = grads, grads * _normalized(without_uncounted(input, by), by)
    of_bias, of_weight = (term.sum_to_size(affine_shape) for term in terms)
    total, dot = terms if weight is None else (term * weight for term in terms)
    if by.axes:
        total, dot = (term.sum(by.axes, keepdim=True) for term in (total, dot))
    return total, dot, of_weight, of_bias


@torch.no_grad()
def input_gradient(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, by: Statistics, *, total: Tensor, dot: Tensor
) -> Tensor:
    """The gradient s * (a - mean(a) - xh * mean(a * xh)), in the input's datatype and memory format."""
    gradient = grad_output.double() if weight is None else grad_output.double() * weight
    corrections = _normalized(without_uncounted(input, by), by) * (dot / by.count)
    if by.has_mean:
        corrections = corrections + total / by.count
    if by.mask is not None:
        corrections = corrections.masked_fill(~by.mask, 0.0)
    return torch.empty_like(input).copy_((gradient - corrections) * by.invstd)


def without_uncounted(input: Tensor, by: Statistics) -> Tensor:
    """The input with what is not finite and not counted as the mean, so that it leaves no trace in gradients."""
    if by.mask is None:
        return input
    return torch.where(by.mask | input.isfinite(), input, by.mean.to(input.dtype))


def _normalized(input: Tensor, by: Statistics) -> Tensor:
    return (input.double() - by.center - by.offset) * by.invstd


def as_functions(input: Tensor, statistics: Statistics) -> Statistics:
    """The same statistics as functions of the input; the center stays a constant."""
    if not statistics.axes:
        return statistics
    deviations = without_uncounted(input, statistics).double() - statistics.center
    offset = statistics.offset
    if statistics.has_mean:
        offset = _mean(deviations, statistics, is_masked=True)
    var = _mean((deviations - offset).square(), statistics, is_masked=True)
    table = Statistics.table_of(statistics.center, offset, var, (var + statistics.eps).rsqrt())
    return replace(statistics, found=table)


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
    of_input, of_weight, of_bias = (0.0 if grad is None else grad.double() for grad in cotangents)
    assert isinstance(of_input, Tensor)
    grad_output = grad_output.double()
    gamma = 1.0 if weight is None else weight.double()
    normalized = _normalized(without_uncounted(input, statistics), statistics)
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
