"""How far the statistics of data lie from frozen ones, in units of the frozen standard deviation.

A batch norm hands on (x - mean) / sqrt(var + eps). With frozen statistics that fit, this has mean 0 and variance 1 in
every channel; with data that have moved, mean d and standard deviation r:

    d = (mean - frozen_mean) / sqrt(frozen_var + eps)      r^2 = (var + eps) / (frozen_var + eps)
"""

import math

import numpy as np
from numpy.typing import NDArray

from normcore.errors import StatisticsError
from normcore.recalibration.layers import Layer
from normcore.recalibration.report import ChannelShift, LayerShift
from normcore.statistics import Moments

Vector = NDArray[np.float64]

_WORST_CHANNELS = 3


def mean_and_var(layer: Layer, moments: Moments) -> tuple[Vector, Vector]:
    """Mean and unbiased variance (torch's convention for running statistics), in float64.

    Raises:
        StatisticsError: fewer than two values per channel.
    """
    count = int(moments.count.min())
    if count < 2:
        expected = "at least 2 values per channel in the data"
        raise StatisticsError(layer.name, expected=expected, received=str(count))
    return moments.mean.numpy(), moments.var(correction=1).numpy()


def shift_of(layer: Layer, moments: Moments) -> LayerShift:
    """Compare the frozen statistics of a layer with those of data. Raises StatisticsError, as `mean_and_var`."""
    mean, var = mean_and_var(layer, moments)
    frozen_mean, frozen_var = (vector.astype(np.float64) for vector in (layer.mean, layer.var))
    with np.errstate(all="ignore"):
        scale = frozen_var + layer.eps
        is_usable = np.isfinite(frozen_mean) & np.isfinite(scale) & (frozen_var >= 0) & (scale > 0)
        mean_shift = np.where(is_usable, (mean - frozen_mean) / np.sqrt(scale), np.nan)
        ratio = np.where(is_usable, (var + layer.eps) / scale, np.nan)
        log_var_ratio = np.log(ratio)
        distance = np.hypot(mean_shift, np.sqrt(ratio) - 1)
    worst = np.argsort(-np.nan_to_num(distance, nan=np.inf), kind="stable")[:_WORST_CHANNELS]
    count = int(moments.count.min())
    return LayerShift(
        normalization=layer.name,
        num_features=layer.mean.size,
        count=count,
        depth=layer.depth,
        distance=_number(np.sqrt(np.mean(np.square(distance)))),
        mean_shift=_largest(mean_shift),
        log_var_ratio=_largest(log_var_ratio),
        noise=math.sqrt(1.5 / count),
        worst_channels=tuple(
            ChannelShift(
                channel=int(channel),
                frozen_mean=_number(frozen_mean[channel]),
                frozen_var=_number(frozen_var[channel]),
                mean=float(mean[channel]),
                var=float(var[channel]),
                mean_shift=_number(mean_shift[channel]),
                log_var_ratio=_number(log_var_ratio[channel]),
                distance=_number(distance[channel]),
            )
            for channel in worst
        ),
    )


def _largest(values: Vector) -> float | None:
    """The value of the largest magnitude; None where one is no number, or there is none."""
    return _number(values[np.argmax(np.abs(values))]) if values.size else None


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


__all__ = ["mean_and_var", "shift_of"]
