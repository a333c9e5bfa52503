"""Running statistics of one convention as another keeps them.

What a convention fixes is the meaning of momentum and the correction of the batch variance; both convert exactly where
all batches have one size. The values of other sizes cannot be told apart in a running variance.
"""

from dataclasses import replace
from decimal import Decimal

import torch
from torch import Tensor

from normcore._checks import check_fraction, check_per_channel, check_variance
from normcore.errors import ParameterError, ShapeError, StatisticsError
from normcore.statistics.running import RunningStatistics, convention_named


def convert_momentum(momentum: float, *, source: str, target: str) -> float:
    """The momentum that has the same effect in another convention: itself, or 1 - momentum.

    The difference is taken of the decimal number that Python prints, so that 0.9 becomes 0.1 and back.

    Raises:
        ParameterError: an unknown convention, or a momentum outside [0, 1].

    >>> convert_momentum(0.9, source="onnx", target="torch")
    0.1
    """
    check_fraction("momentum", momentum)
    if convention_named(source).is_weight_of_new == convention_named(target).is_weight_of_new:
        return momentum
    return float(1 - Decimal(repr(momentum)))


def initial_share(momentum: float, *, convention: str, batches: int) -> float:
    """What share of running statistics is still the mean 0 and variance 1 they started from: (1 - f)^batches.

    Raises:
        ParameterError: an unknown convention, a momentum outside [0, 1], or a negative number of batches.

    >>> initial_share(0.5, convention="torch", batches=2)
    0.25
    """
    if type(batches) is not int or batches < 0:
        raise ParameterError("batches", expected="an integer >= 0", received=repr(batches))
    check_fraction("momentum", momentum)
    kept: float = convert_momentum(momentum, source=convention, target="onnx") ** batches
    return kept


def convert_running(
    running: RunningStatistics, *, source: str, target: str, batch_count: int, initial_share: float = 0.0
) -> RunningStatistics:
    """The statistics another convention would have kept over the same batches: its correction of the batch variance.

    var = a + (1 - a) S with a the share of the initial variance 1; S is multiplied by M / (M - 1) towards Bessel's
    correction, and by (M - 1) / M away from it. The mean is the same in all conventions.

    Args:
        running: mean and var of shape (C,); not changed.
        source: torch, onnx or keras: the convention they were kept in.
        target: the one they are wanted in.
        batch_count: M, the values per channel in every batch.
        initial_share: a; 0 where the start has been divided out or has faded (see `initial_share`).

    Returns:
        New statistics of the same datatypes, computed in float64.

    Raises:
        ParameterError: an unknown convention, fewer than two values per batch, a share outside [0, 1].
        StatisticsError: a variance negative, NaN, or less than its initial share.

    >>> kept = RunningStatistics(torch.zeros(1), torch.tensor([2.0]))
    >>> convert_running(kept, source="torch", target="onnx", batch_count=4).var
    tensor([1.5000])
    """
    if type(batch_count) is not int or batch_count < 2:
        raise ParameterError("batch_count", expected="an integer >= 2", received=repr(batch_count))
    check_fraction("initial_share", initial_share)
    check_variance("running_var", running.var)
    gained = convention_named(target).correction - convention_named(source).correction
    if gained == 0:
        return running
    of_batches = running.var.double() - initial_share
    # float32 statistics carry their own rounding.
    if bool((of_batches < -torch.finfo(torch.float32).eps).any()):
        expected = f"at least the initial variance's share of {initial_share:g}"
        raise StatisticsError("running_var", expected=expected, received=f"{float(running.var.min()):g}")
    ratio = (batch_count / (batch_count - 1)) ** gained
    var = initial_share + of_batches.clamp_min(0.0) * ratio
    return replace(running, var=var.to(running.var.dtype))


def running_of_caffe(mean: Tensor, var: Tensor, scale: Tensor) -> RunningStatistics:
    """The statistics in the three blobs of a Caffe BatchNorm layer: blob / scale, and 0 where scale is 0.

    Each batch makes of a blob fraction x blob + statistic, and of scale fraction x scale + 1, so that the quotient has
    nothing of its start. The variance has Bessel's correction.

    Args:
        mean: the first blob, (C,).
        var: the second, (C,).
        scale: the third, a single value.

    Returns:
        New statistics in float64, in torch's convention of the variance; how many batches they hold is not known.

    Raises:
        DtypeError, ShapeError: a blob of another datatype or shape.
        StatisticsError: a scale that is negative or not finite, or a negative variance.

    >>> running_of_caffe(torch.tensor([6.0]), torch.tensor([3.0]), torch.tensor([1.5])).mean
    tensor([4.], dtype=torch.float64)
    """
    if scale.numel() != 1:
        raise ShapeError("scale", expected="a single value", received=f"shape {tuple(scale.shape)}")
    check_per_channel("mean", mean, num_features=mean.numel())
    check_per_channel("var", var, num_features=mean.numel())
    check_variance("var", var)
    divisor = scale.double().reshape(())
    if not bool(divisor.isfinite() & (divisor >= 0)):
        raise StatisticsError("scale", expected="a finite value >= 0", received=f"{float(divisor):g}")
    quotients = (torch.where(divisor == 0, 0.0, blob.double() / divisor) for blob in (mean, var))
    return RunningStatistics(*quotients)
