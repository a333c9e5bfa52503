"""Sums of deviations from a value near the mean: what mean and variance are taken from, in one sweep over a slab."""

from dataclasses import dataclass

import torch
from torch import Tensor

from normcore._slab import Slab, blocks

# So many values per channel, from all over the slab, tell where to sum squares around.
_SAMPLES = 32


@dataclass(frozen=True, slots=True)
class Deviations:
    """Sums per channel of d and d^2, d = x - center; tensors of shape (C,), float64 but for the center.

    Attributes:
        center: near the mean, in the datatype summed in; exactly the value of a constant channel.
    """

    count: int
    center: Tensor
    total: Tensor
    squares: Tensor

    @property
    def offset(self) -> Tensor:
        """What the mean has over the center."""
        return self.total / self.count

    @property
    def mean(self) -> Tensor:
        return self.center.double() + self.offset

    @property
    def m2(self) -> Tensor:
        """Sum of squared deviations from the mean."""
        return (self.squares - self.total.square() / self.count).clamp_min(0.0)

    def is_reliable(self) -> bool:
        """Whether m2 is finite and keeps its digits: no center is off by more than a deviation."""
        is_close = self.squares * self.count >= 2 * self.total.square()
        return bool((is_close & self.squares.isfinite()).all())


def deviations(slab: Slab, *, dtype: torch.dtype) -> Deviations:
    """Sum in `dtype` within a block and in float64 over blocks; the slab is not empty.

    Squares are of values around a sample's mean, or around 0 where no mean is further from it than a deviation. Where
    that proves to be wrong, they are summed once more around the mean, and where float32 overflows, in float64.
    """
    sums = _sums(slab, _shift(slab.values, dtype), dtype=dtype)
    if sums.is_reliable():
        return sums
    if bool(sums.squares.isfinite().all()):
        return _sums(slab, sums.mean.to(dtype), dtype=dtype)
    return deviations_in_double(slab) if dtype == torch.float32 else sums


def deviations_in_double(slab: Slab) -> Deviations:
    """The same with sums in float64, around a center in float32."""
    sums = deviations(slab, dtype=torch.float64)
    center = sums.mean.to(torch.float32)
    rest = sums.offset + (sums.center - center.double())
    return Deviations(sums.count, center, rest * sums.count, sums.m2 + sums.count * rest.square())


def _shift(values: Tensor, dtype: torch.dtype) -> Tensor | None:
    """About the mean, and exactly the value where a channel is constant; None where 0 is as good."""
    outer, _, inner = values.shape
    columns = min(inner, 4)
    samples = values[:: -(-outer * columns // _SAMPLES), :, :: -(-inner // columns)].to(dtype)
    first = samples[:1, :, :1]
    shift = first + (samples - first).mean((0, 2), keepdim=True)
    spread = (samples - shift).square_().mean((0, 2))
    shift = shift.flatten()
    return None if bool((2 * shift.square() <= spread).all()) else shift


def _sums(slab: Slab, center: Tensor | None, *, dtype: torch.dtype) -> Deviations:
    parts = blocks(slab.values)
    buffer = torch.empty_like(parts[0], dtype=dtype)
    totals, squares = [], []
    for part in parts:
        scratch = buffer[: part.shape[0], :, : part.shape[2]]
        deviation = _deviation(part, center, scratch)
        totals.append(_sum(deviation))
        squares.append(_sum(torch.mul(deviation, deviation, out=scratch)))
    if center is None:
        center = torch.zeros_like(totals[0], dtype=dtype)
    total, square = (torch.stack(sums).sum(0, dtype=torch.float64) for sums in (totals, squares))
    return Deviations(slab.count, center, total, square)


def _sum(values: Tensor) -> Tensor:
    if values.shape[2] == 1:
        return values.sum((0, 2))
    # torch sums in pairs along one axis; over two at once it may add up all values of a channel in sequence.
    return values.sum(2).sum(0, dtype=torch.float64)


def _deviation(values: Tensor, center: Tensor | None, scratch: Tensor) -> Tensor:
    if values.dtype == scratch.dtype:
        return values if center is None else torch.sub(values, center[:, None], out=scratch)
    # A subtraction that converts as it goes is several times slower than the two steps.
    scratch.copy_(values)
    return scratch if center is None else scratch.sub_(center[:, None])
