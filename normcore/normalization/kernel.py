"""The one standardize kernel: statistics of a slab, and y = (x - mean) * invstd * weight + bias with an exact mean.

The mean is the sum of two numbers, center + offset. x - center is exact where it matters, for x near a large mean, and
what the offset adds is below a deviation: y = (x - center) * scale + (bias - offset * scale) loses no digits, where
y = x * scale + (bias - mean * scale) loses those that x has in common with the mean.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from normcore._precision import accumulation_dtype, split
from normcore._slab import Slab, blocks
from normcore.statistics.moments import Moments, deviation_sums


@dataclass(frozen=True, slots=True)
class Standardization:
    """What a slab is standardized with; tensors of shape (C,), float64 but for the center.

    Attributes:
        center: the mean, rounded to the datatype to compute the output in.
        offset: what the mean has over the center.
    """

    center: Tensor
    offset: Tensor
    var: Tensor
    invstd: Tensor

    @property
    def mean(self) -> Tensor:
        return self.center.double() + self.offset


@dataclass(frozen=True, slots=True)
class BatchStandardization(Standardization):
    """The same by the statistics of the batch itself.

    Attributes:
        deviations: x - center in the slab's shape, where it has the datatype of the output and can become it.
    """

    count: int
    moments: Moments
    deviations: Tensor | None


def batch_standardization(slab: Slab, *, eps: float) -> BatchStandardization:
    """Statistics of the slab itself, which is not empty."""
    dtype = accumulation_dtype(slab.values.dtype)
    deviations = torch.empty_like(slab.values) if slab.values.dtype == dtype else None
    sums = deviation_sums(slab, dtype=dtype, deviations=deviations)
    # float32 sums overflow for standard deviations from about 1e15, and lose digits where the shift is poor because
    # the first block is unlike the rest. Comparisons with NaN are false.
    is_reliable = sums.squares.isfinite() & (sums.count * sums.offset.square() <= sums.m2)
    if dtype == torch.float32 and not bool(is_reliable.all()):
        deviations = None
        sums = deviation_sums(slab, dtype=torch.float64)
    moments = sums.moments()
    var = moments.var()
    # A variance beyond float64 would otherwise turn every output into the bias without a trace.
    invstd = _invstd(var, eps=eps).masked_fill(~var.isfinite(), torch.nan)
    return BatchStandardization(sums.shift, sums.offset, var, invstd, slab.count, moments, deviations)


def given_standardization(mean: Tensor, var: Tensor, *, dtype: torch.dtype, eps: float) -> Standardization:
    """Given statistics, for values of `dtype`."""
    center, offset = split(mean, accumulation_dtype(dtype))
    return Standardization(center, offset, var.double(), _invstd(var.double(), eps=eps))


def standardize(slab: Slab, by: Standardization, *, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """A new tensor of the slab's shape, cast once; `by.deviations`, where there are any, are turned into it."""
    scale = by.invstd if weight is None else by.invstd * weight.double()
    shift = -by.offset * scale
    if bias is not None:
        shift = shift + bias.double()
    dtype = by.center.dtype
    center, scale, shift = (term.to(dtype)[:, None] for term in (by.center, scale, shift))
    if isinstance(by, BatchStandardization) and by.deviations is not None:
        for deviation in blocks(by.deviations):
            deviation.mul_(scale).add_(shift)
        return by.deviations
    output = torch.empty_like(slab.values)
    for part, target in zip(blocks(slab.values), blocks(output), strict=True):
        if output.dtype == dtype:
            torch.sub(part, center, out=target).mul_(scale).add_(shift)
        else:
            target.copy_(part.to(dtype).sub_(center).mul_(scale).add_(shift))
    return output


def _invstd(var: Tensor, *, eps: float) -> Tensor:
    return (var + eps).sqrt().reciprocal()
