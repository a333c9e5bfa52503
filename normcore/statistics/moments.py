"""Count, mean and sum of squared deviations per channel: statistics that merge without loss."""

from dataclasses import dataclass

import torch
from torch import Tensor

from normcore._checks import check_axis, check_floating, check_rank, check_variance
from normcore._standardize import measure, operand_of
from normcore.errors import DtypeError, ShapeError


@dataclass(frozen=True, slots=True)
class Moments:
    """Mergeable statistics of a set of values per channel; three float64 tensors of shape (C,).

    Attributes:
        count: number of values; 0 where there are none.
        mean: their mean; of no meaning where count is 0.
        m2: sum of their squared deviations from the mean.

    Raises:
        DtypeError: a tensor is not float64.
        ShapeError: the three shapes are not one and the same (C,).
        StatisticsError: a count or m2 is negative, or a count NaN.

    >>> batch = Moments.of(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    >>> batch.mean, batch.var(correction=1)
    (tensor([2., 5.], dtype=torch.float64), tensor([2., 0.], dtype=torch.float64))
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    def __post_init__(self) -> None:
        for name in ("count", "mean", "m2"):
            tensor: Tensor = getattr(self, name)
            if tensor.dtype != torch.float64:
                raise DtypeError(name, expected="float64", received=str(tensor.dtype).removeprefix("torch."))
            if tensor.ndim != 1 or tensor.shape != self.count.shape:
                expected = "one shape (C,) for count, mean and m2"
                raise ShapeError(name, expected=expected, received=f"shape {tuple(tensor.shape)}")
        check_variance("count", self.count)
        # NaN is what non-finite data leaves, and has to come through.
        check_variance("m2", self.m2.nan_to_num(nan=0.0))

    @classmethod
    def of(cls, tensor: Tensor, *, channel_axis: int = 1) -> "Moments":
        """Moments of a tensor over every axis but the channel's, accumulated in float64; the tensor is not changed.

        mean = sum(x) / n,  m2 = sum((x - mean)^2)

        Args:
            tensor: (N, C, *) of any floating datatype; it may be empty.
            channel_axis: the axis of the channels, from the back where negative.

        Returns:
            Moments with n = numel / C for every channel.

        Raises:
            DtypeError: the tensor is not floating.
            ShapeError: it has fewer than two dimensions.
            ParameterError: it has no such axis.

        >>> Moments.of(torch.tensor([[[1.0, 2.0], [3.0, 6.0]]])).m2
        tensor([0.5000, 4.5000], dtype=torch.float64)
        """
        check_floating("tensor", tensor)
        check_rank("tensor", tensor, minimum=2)
        axis = check_axis("channel_axis", channel_axis, rank=tensor.ndim)
        if tensor.numel() == 0:
            nothing = torch.zeros(tensor.shape[axis], dtype=torch.float64, device=tensor.device)
            return cls(nothing, nothing, nothing)
        with torch.no_grad():
            count = tensor.numel() // tensor.shape[axis]
            mean, var = _mean_and_var(tensor, axis)
            return cls(torch.full_like(mean, count), mean, var * count)

    def merge(self, *others: "Moments") -> "Moments":
        """Moments of all the values together (Chan, for any number of parts); empty parts change nothing.

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
        parts = [self, *others]
        counts = torch.stack([part.count for part in parts])
        is_empty = counts == 0
        means = torch.stack([part.mean for part in parts]).masked_fill(is_empty, 0.0)
        squares = torch.stack([part.m2 for part in parts]).masked_fill(is_empty, 0.0)
        count = counts.sum(0)
        shares = counts / count.clamp_min(1.0)
        # Around the mean of the largest part, so that the digits that all means share are not rounded again.
        center = means.gather(0, counts.argmax(0, keepdim=True))
        mean = (center + (shares * (means - center)).sum(0, keepdim=True))[0]
        return Moments(count, mean, squares.sum(0) + (counts * (means - mean).square()).sum(0))

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


def _mean_and_var(tensor: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    # Sums over half precision are made in float32 otherwise.
    tensor = tensor.float() if tensor.itemsize == 2 else tensor
    values = operand_of(tensor, [other for other in range(tensor.ndim) if other != axis])
    if values is not None:
        by, _ = measure(values, eps=0.0)
        return torch.from_numpy(by[2]), torch.from_numpy(by[3])
    wide = tensor.movedim(axis, 0).flatten(1).double()
    deviations = wide - wide[:, :1]
    mean = deviations.mean(1, keepdim=True)
    return (wide[:, :1] + mean).flatten(), (deviations - mean).square().mean(1)
