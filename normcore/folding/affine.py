"""Batch norm at inference time as what it is: one multiplication and one addition per channel.

    y = (x - mean) / sqrt(var + eps) * weight + bias = scale x + shift
    scale = weight / sqrt(var + eps)        shift = bias - mean scale

All in float64: the caller rounds once, when the result is stored.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normcore.errors import StatisticsError

Vector = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Affine:
    """y = scale x + shift per channel, both of shape (C,)."""

    scale: Vector
    shift: Vector

    @property
    def is_shifting(self) -> bool:
        return bool(self.shift.any())

    @property
    def is_uniform(self) -> bool:
        """Whether every channel has the same map, so that it does not matter which axis the channels lie on."""
        return all(bool((vector == vector[:1]).all()) for vector in (self.scale, self.shift))

    def after(self, first: "Affine") -> "Affine":
        """The map that applies `first`, then this one."""
        return Affine(self.scale * first.scale, self.scale * first.shift + self.shift)

    def take(self, channels: Any) -> "Affine":
        """The map of the channels at these indices, in their order."""
        return Affine(self.scale[channels], self.shift[channels])


def identity(channels: int) -> Affine:
    """The map that changes nothing."""
    return Affine(np.ones(channels), np.zeros(channels))


def affine_of(weight: NDArray[Any], bias: NDArray[Any], mean: NDArray[Any], var: NDArray[Any], *, eps: float) -> Affine:
    """Scale and shift of a batch norm with frozen statistics, in float64.

    Args:
        weight: gamma, of shape (C,); any floating datatype, as the other three.
        bias: beta, of shape (C,).
        mean: running mean, of shape (C,).
        var: running variance, of shape (C,).
        eps: what is added to the variance.

    Returns:
        New arrays; nothing is mutated.

    Raises:
        StatisticsError: a value is NaN or infinite, a variance is negative, or var + eps is zero.

    >>> ones = np.ones(1)
    >>> affine_of(2 * ones, ones, 3 * ones, 4 * ones, eps=0.0)
    Affine(scale=array([1.]), shift=array([-2.]))
    """
    named = {"weight": weight, "bias": bias, "mean": mean, "var": var}
    exact = {name: np.asarray(vector, np.float64) for name, vector in named.items()}
    for name, vector in exact.items():
        _check(name, np.isfinite(vector), vector, expected="finite values")
    _check("var", exact["var"] >= 0, exact["var"], expected="variances of at least 0")
    total = exact["var"] + eps
    _check("var + eps", np.isfinite(total) & (total > 0), total, expected="positive values")
    scale = exact["weight"] / np.sqrt(total)
    return Affine(scale, exact["bias"] - exact["mean"] * scale)


def _check(name: str, is_valid: NDArray[np.bool_], vector: Vector, *, expected: str) -> None:
    if not is_valid.all():
        channel = int(np.argmin(is_valid))
        raise StatisticsError(name, expected=expected, received=f"{vector.reshape(-1)[channel]} in channel {channel}")


__all__ = ["Affine", "Vector", "affine_of", "identity"]
