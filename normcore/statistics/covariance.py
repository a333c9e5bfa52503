"""Covariance of the channels of a group: of a batch, and averaged over batches."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from normcore._checks import check_batch_count, check_per_channel, check_shape
from normcore.errors import StatisticsError
from normcore.statistics.running import Momentum, convention_named

_ASYMMETRY = 1e-4


@dataclass(frozen=True, slots=True)
class GroupCovariance:
    """Values about a mean, and the covariance they have or are held to have; float64, d channels in a group.

    The mean is center + offset, so that digits which values and mean share are not rounded away.

    Attributes:
        deviations: values - center; (groups, d, count).
        center: (groups, d, 1).
        offset: what the mean has over the center; (groups, d, 1).
        covariance: biased; (groups, d, d).
    """

    deviations: Tensor
    center: Tensor
    offset: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, values: Tensor) -> "GroupCovariance":
        """The values' own; differentiable with respect to them. Their memory is taken over for the deviations.

        cov = sum((x - mean) (x - mean)^T) / n

        >>> GroupCovariance.of(torch.tensor([[[1.0, 3.0], [4.0, 0.0]]]).double()).covariance
        tensor([[[ 1., -2.],
                 [-2.,  4.]]], dtype=torch.float64)
        """
        center = values.detach().mean(-1, keepdim=True)
        deviations = _deviations(values, center)
        offset = deviations.mean(-1, keepdim=True)
        covariance = deviations @ deviations.mT / values.shape[-1] - offset @ offset.mT
        return cls(deviations, center, offset, covariance)

    @property
    def mean(self) -> Tensor:
        """Of shape (C,), a constant."""
        return (self.center + self.offset).detach().flatten()


@dataclass(frozen=True, slots=True)
class RunningCovariance:
    """Running mean (C,) and covariance (groups, d, d), and the number of batches in them where it is known."""

    mean: Tensor
    covariance: Tensor
    num_batches_tracked: Tensor | None = None

    @classmethod
    def checked(
        cls, mean: Tensor | None, covariance: Tensor | None, tracked: Tensor | None, *, shape: tuple[int, int]
    ) -> "RunningCovariance | None":
        """A caller's statistics as constants, None where there are none; `shape` is groups and channels in each.

        Raises:
            DtypeError: a tensor that is not floating.
            ShapeError: a tensor of another shape.
            StatisticsError: one without the other, a covariance that is not finite or not symmetric, a number of
                batches that is none.
        """
        if mean is None and covariance is None:
            return None
        if mean is None or covariance is None:
            names = ("running_mean", "running_covariance")
            missing, present = names if mean is None else names[::-1]
            raise StatisticsError(missing, expected=f"to be given together with {present}", received="none")
        check_per_channel("running_mean", mean, num_features=math.prod(shape))
        _check_covariance("running_covariance", covariance, shape=(*shape, shape[1]))
        if tracked is not None:
            check_batch_count("num_batches_tracked", tracked)
            tracked = tracked.to(torch.int64).reshape(())
        return cls(mean.detach(), covariance.detach(), tracked)

    def about(self, values: Tensor) -> GroupCovariance:
        """The values (groups, d, count) about this mean, held to have this covariance; their memory is taken over."""
        center = self.mean.double().reshape(*values.shape[:2], 1)
        covariance = self.covariance.double()
        symmetric = (covariance + covariance.mT) / 2
        return GroupCovariance(_deviations(values, center), center, torch.zeros_like(center), symmetric)

    def weight_of_new(self, momentum: Momentum, *, convention: str) -> float | Tensor:
        """The weight of the next batch: the convention's reading of momentum, or 1 / batches where it is None.

        Raises:
            ParameterError: an unknown convention, or a momentum outside [0, 1].
            StatisticsError: momentum None without a number of batches.
        """
        rule = convention_named(convention)
        if momentum is not None:
            return rule.weight_of_new(momentum)
        if self.num_batches_tracked is None:
            expected = "the number of batches so far, with momentum null (cumulative)"
            raise StatisticsError("num_batches_tracked", expected=expected, received="none")
        return 1.0 / (self.num_batches_tracked + 1).to(torch.float64)

    def update(self, batch: GroupCovariance, *, momentum: Momentum, convention: str) -> "RunningCovariance":
        """The statistics after one more batch: r <- (1 - f) r + f b, computed and returned in float64.

        The covariance of the batch is taken with the convention's correction, n / (n - 1) for torch.
        """
        weight = self.weight_of_new(momentum, convention=convention)
        count = batch.deviations.shape[-1]
        corrected = batch.covariance * (count / (count - convention_named(convention).correction))
        mean = self.mean.double() * (1.0 - weight) + batch.mean * weight
        covariance = self.covariance.double() * (1.0 - weight) + corrected * weight
        tracked = None if self.num_batches_tracked is None else self.num_batches_tracked + 1
        return RunningCovariance(mean, covariance, tracked)


def _deviations(values: Tensor, center: Tensor) -> Tensor:
    # New memory for as many float64 costs more than all arithmetic on them but the products.
    return values - center if values.requires_grad else values.sub_(center)


def _check_covariance(argument: str, covariance: Tensor, *, shape: tuple[int, int, int]) -> None:
    check_shape(argument, covariance, shape, meaning="a covariance per group")
    if not bool(covariance.isfinite().all()):
        raise StatisticsError(argument, expected="finite values", received="NaN or infinity")
    asymmetry = (covariance - covariance.mT).abs().amax((1, 2))
    if bool((asymmetry > _ASYMMETRY * covariance.abs().amax((1, 2))).any()):
        received = f"differences of {float(asymmetry.max()):g}"
        raise StatisticsError(argument, expected="symmetric matrices", received=received)
