"""Count, mean and sum of squared deviations per channel: statistics that merge without loss."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from normcore._checks import check_axis, check_counts, check_rank, check_variance
from normcore._precision import sum_and_rest
from normcore._slab import Slab, blocks
from normcore.errors import DtypeError, ShapeError
from normcore.statistics.blocks import add_block, blocks_of
from normcore.statistics.values import check_mask, exact_values


@dataclass(frozen=True, slots=True)
class Moments:
    """Mergeable statistics of a set of values per channel; float64 tensors of shape (C,).

    Attributes:
        count: number of values, whole; 0 where there are none.
        mean: their mean; of no meaning where count is 0.
        m2: sum of their squared deviations from the mean.
        mean_low: what rounding to float64 left over of the mean, so that a chain of merges does not drift or stall.
        m2_low: the same of m2.

    Raises:
        DtypeError: a tensor is not float64.
        ShapeError: the shapes are not one and the same (C,).
        StatisticsError: a count that is no whole number from 0 to 2^53, or a negative m2.

    >>> batch = Moments.of(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    >>> batch.mean, batch.var(correction=1)
    (tensor([2., 5.], dtype=torch.float64), tensor([2., 0.], dtype=torch.float64))
    """

    count: Tensor
    mean: Tensor
    m2: Tensor
    mean_low: Tensor | None = field(default=None, repr=False)
    m2_low: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("count", "mean", "m2", "mean_low", "m2_low"):
            tensor: Tensor | None = getattr(self, name)
            if tensor is None:
                continue
            if tensor.dtype != torch.float64:
                raise DtypeError(name, expected="float64", received=str(tensor.dtype).removeprefix("torch."))
            if tensor.ndim != 1 or tensor.shape != self.count.shape:
                expected = "one shape (C,) for count, mean and m2"
                raise ShapeError(name, expected=expected, received=f"shape {tuple(tensor.shape)}")
        check_counts("count", self.count)
        # NaN is what non-finite data leaves, and has to come through.
        check_variance("m2", self.m2.nan_to_num(nan=0.0))

    @classmethod
    def none(cls, num_features: int, *, device: torch.device | None = None) -> "Moments":
        """Moments of no values: what a merge starts from."""
        nothing = torch.zeros(num_features, dtype=torch.float64, device=device)
        return cls(nothing, nothing, nothing)

    @classmethod
    def of(cls, tensor: Tensor, *, channel_axis: int = 1, mask: Tensor | None = None) -> "Moments":
        """Moments of a tensor over every axis but the channel's, accumulated in float64; the tensor is not changed.

        mean = sum(x) / n,  m2 = sum((x - mean)^2)

        Args:
            tensor: (N, C, *) of any floating, integer or bool datatype; it may be empty.
            channel_axis: the axis of the channels, from the back where negative.
            mask: bool, true where a position is counted; what is not may hold NaN. With the tensor's rank it broadcasts
                to the tensor's shape; with a lower one, to that shape without the channel axis, as in `batch_norm`.

        Returns:
            Moments with n = numel / C for every channel, or what the mask leaves of each.

        Raises:
            DtypeError: the tensor is complex or quantized, or the mask not bool.
            ShapeError: it has fewer than two dimensions, or the mask does not broadcast.
            ParameterError: it has no such axis.
            StatisticsError: integers beyond 2^53, which float64 does not hold.

        >>> Moments.of(torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])).m2
        tensor([0.5000, 4.5000], dtype=torch.float64)
        >>> Moments.of(torch.tensor([[1], [3], [200]]), mask=torch.tensor([True, True, False])).mean
        tensor([2.], dtype=torch.float64)
        """
        check_rank("tensor", tensor, minimum=2)
        axis = check_axis("channel_axis", channel_axis, rank=tensor.ndim)
        values = exact_values("tensor", tensor)
        counted = None if mask is None else check_mask("mask", mask, shape=tensor.shape, channel_axis=axis)
        if tensor.numel() == 0:
            return cls.none(tensor.shape[axis], device=tensor.device)
        with torch.no_grad():
            slab = Slab.of(values, channel_axis=axis)
            if counted is not None:
                return cls._of_counted(slab, slab.seen_alike(counted))
            if values.device.type != "cpu":
                return cls._of_counted(slab, torch.ones_like(slab.values, dtype=torch.bool))
            return cls._of_slab(slab)

    @classmethod
    def of_state(cls, state: Tensor) -> "Moments":
        """Moments as `sums` keeps them: float64 (5, C)."""
        count, mean, m2, mean_low, m2_low = state
        return cls(count, mean, m2, mean_low, m2_low)

    @classmethod
    def _of_slab(cls, slab: Slab) -> "Moments":
        outer, channels, inner = slab.values.shape
        values, taken = slab.values.reshape(-1), 0
        state = torch.zeros(5, channels, dtype=torch.float64)
        for block in blocks_of(outer, channels, inner):
            add_block(values[taken : taken + block.elements], state, block)
            taken += block.elements
        return cls.of_state(state)

    @classmethod
    def _of_counted(cls, slab: Slab, mask: Tensor) -> "Moments":
        parts = []
        for values, counted in zip(blocks(slab.values), blocks(mask), strict=True):
            count = counted.sum((0, 2), dtype=torch.float64)
            kept = values.double().masked_fill(~counted, 0.0)
            mean = kept.sum((0, 2)) / count.clamp_min(1.0)
            parts.append(cls(count, mean, (kept - mean[:, None]).masked_fill(~counted, 0.0).square().sum((0, 2))))
        return parts[0].merge(*parts[1:])

    def merge(self, *others: "Moments") -> "Moments":
        """Moments of the values of all parts together, as Chan, Golub and LeVeque (1979) combine them.

        n = sum(n_i),  mean = sum(n_i mean_i) / n,  m2 = sum(m2_i) + sum(n_i (mean_i - mean)^2)

        Args:
            others: moments of the same number of channels.

        Returns:
            New moments; the order of the parts changes at most the last bits.

        Raises:
            ShapeError: the numbers of channels differ.

        >>> left, right = Moments.of(torch.tensor([[1.0], [3.0]])), Moments.of(torch.tensor([[8.0]]))
        >>> left.merge(right)
        Moments(count=tensor([3.], dtype=torch.float64), mean=tensor([4.], dtype=torch.float64), \
m2=tensor([26.], dtype=torch.float64))
        """
        for other in others:
            if other.count.shape != self.count.shape:
                expected, received = f"{self.count.numel()} channels", f"{other.count.numel()} channels"
                raise ShapeError("others", expected=expected, received=received)
        if not others:
            return self
        parts = [self, *others]
        counts = torch.stack([part.count for part in parts])
        # The usual pair apart: torch takes an argmax over few rows and many columns slowly.
        largest = (counts[1:] > counts[:1]).long() if len(parts) == 2 else counts.argmax(0, keepdim=True)
        is_empty = counts == 0
        means, squares, means_low, squares_low = (
            torch.stack(tensors).masked_fill(is_empty, 0.0)
            for tensors in zip(*(part._sums_and_rests() for part in parts), strict=True)
        )
        count = counts.sum(0)
        # Around the mean of the largest part, so that the digits that all means share are not rounded again.
        center, center_squares = means.gather(0, largest), squares.gather(0, largest)
        distances = (means - center + means_low).masked_fill(is_empty, 0.0)
        shift = (counts / count.clamp_min(1.0) * distances).sum(0, keepdim=True)
        # The square of a distance from no values may overflow, and 0 times that is NaN.
        between = (counts * (distances - shift).square()).masked_fill(is_empty, 0.0).sum(0, keepdim=True)
        rest = (squares.scatter(0, largest, 0.0) + squares_low).sum(0, keepdim=True) + between
        mean, mean_low = sum_and_rest(center, shift)
        m2, m2_low = sum_and_rest(center_squares, rest)
        return Moments(count, mean[0], m2[0].clamp_min(0.0), mean_low[0], m2_low[0])

    def _sums_and_rests(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        zero = torch.zeros_like(self.mean)
        mean_low = zero if self.mean_low is None else self.mean_low
        return self.mean, self.m2, mean_low, zero if self.m2_low is None else self.m2_low

    def is_finite(self) -> bool:
        """Whether mean and variance are numbers in every channel."""
        return bool((self.mean.isfinite() & self.m2.isfinite()).all())

    def var(self, *, correction: int = 0) -> Tensor:
        """The variance m2 / (n - correction), float64 of shape (C,); NaN where n <= correction.

        Args:
            correction: 0 for the biased variance, 1 for Bessel's, as in `torch.var`.

        Returns:
            A new tensor.

        >>> Moments.of(torch.tensor([[1.0], [3.0]])).var()
        tensor([1.], dtype=torch.float64)
        """
        freedom = self.count - correction
        return (self.m2 / freedom).masked_fill(freedom <= 0, torch.nan)
