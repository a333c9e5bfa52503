"""The one standardize kernel: statistics of a slab, and y = (x - mean) * invstd * weight + bias with an exact mean."""

from dataclasses import dataclass

import torch
from torch import Tensor

from normcore._precision import accumulation_dtype, split, two_sum
from normcore._slab import Slab, blocks
from normcore.statistics.moments import Moments, deviation_sums


@dataclass(frozen=True, slots=True)
class Standardization:
    """What a slab is standardized with; float64 tensors of shape (C,), the mean being `mean + mean_low`.

    Attributes:
        dtype: the datatype to compute the output in.
    """

    mean: Tensor
    mean_low: Tensor | None
    var: Tensor
    invstd: Tensor
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class BatchStandardization(Standardization):
    """The same by the statistics of the batch itself, whose moments it holds."""

    count: int
    moments: Moments


def batch_standardization(slab: Slab, *, eps: float) -> BatchStandardization:
    """Statistics of the slab itself, which is not empty."""
    sums = deviation_sums(slab, dtype=accumulation_dtype(slab.values.dtype))
    # float32 sums overflow for standard deviations from about 1e15, and lose digits where the shift is poor because
    # the first block is unlike the rest. Comparisons with NaN are false.
    is_reliable = sums.squares.isfinite() & (sums.count * sums.offset.square() <= 4 * sums.m2)
    dtype = accumulation_dtype(slab.values.dtype)
    if not bool(is_reliable.all()):
        dtype = torch.float64
        sums = deviation_sums(slab, dtype=dtype)
    moments = sums.moments()
    mean, mean_low = two_sum(sums.shift, sums.offset)
    var = moments.var()
    # A variance beyond float64 would otherwise turn every output into the bias without a trace.
    invstd = _invstd(var, eps=eps).masked_fill(~var.isfinite(), torch.nan)
    return BatchStandardization(mean, mean_low, var, invstd, dtype, slab.count, moments)


def given_standardization(mean: Tensor, var: Tensor, *, dtype: torch.dtype, eps: float) -> Standardization:
    """Given statistics, for values of `dtype`."""
    wide_var = var.double()
    return Standardization(mean.double(), None, wide_var, _invstd(wide_var, eps=eps), accumulation_dtype(dtype))


def standardize(slab: Slab, by: Standardization, *, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """A new tensor of the slab's shape: y = ((x - hi) - lo) * (weight * invstd) + bias, cast once.

    x - hi is exact where it matters (x near a large mean), so that no digits of the deviation are lost; lo * scale,
    below a rounding of x, goes into the shift and costs nothing.
    """
    scale = by.invstd if weight is None else by.invstd * weight.double()
    high, low = split(by.mean, by.mean_low, by.dtype)
    shift = -low.double() * scale
    if bias is not None:
        shift = shift + bias.double()
    scale, shift, high = (term.to(by.dtype)[:, None] for term in (scale, shift, high))
    output = torch.empty_like(slab.values)
    if output.dtype == by.dtype:
        for part, target in zip(blocks(slab.values), blocks(output), strict=True):
            torch.sub(part, high, out=target).mul_(scale).add_(shift)
    else:
        for part, target in zip(blocks(slab.values), blocks(output), strict=True):
            target.copy_(part.to(by.dtype).sub_(high).mul_(scale).add_(shift))
    return output


def _invstd(var: Tensor, *, eps: float) -> Tensor:
    return (var + eps).sqrt().reciprocal()
