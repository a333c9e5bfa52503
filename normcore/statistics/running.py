"""Running statistics: exponential or cumulative averages over batches, in the convention the caller names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from normcore._checks import check_fraction
from normcore.errors import ParameterError, StatisticsError
from normcore.statistics.moments import Moments

Momentum = float | Literal["default"] | None


@dataclass(frozen=True, slots=True)
class Convention:
    """How a framework reads momentum, and which batch variance enters its running variance.

    Attributes:
        momentum: the default.
        is_weight_of_new: whether momentum weighs the new batch, or the value kept.
        correction: 1 where the running variance takes Bessel's variance of the batch, 0 for the biased one.
    """

    momentum: float
    is_weight_of_new: bool
    correction: int

    def weight_of_new(self, momentum: float | Literal["default"]) -> float:
        """The weight of the new batch for a momentum of this convention."""
        value = self.momentum if momentum == "default" else momentum
        check_fraction("momentum", value)
        return value if self.is_weight_of_new else 1.0 - value


CONVENTIONS: Mapping[str, Convention] = MappingProxyType(
    {
        "torch": Convention(momentum=0.1, is_weight_of_new=True, correction=1),
        "onnx": Convention(momentum=0.9, is_weight_of_new=False, correction=0),
        "keras": Convention(momentum=0.99, is_weight_of_new=False, correction=0),
    }
)


def convention_named(name: str) -> Convention:
    """The convention, or ParameterError."""
    if name not in CONVENTIONS:
        raise ParameterError("convention", expected=f"one of {', '.join(CONVENTIONS)}", received=repr(name))
    return CONVENTIONS[name]


def check_momentum(momentum: Momentum, *, convention: str) -> None:
    """Refuse an unknown convention, or a momentum that it cannot take."""
    rule = convention_named(convention)
    if momentum is not None:
        rule.weight_of_new(momentum)


@dataclass(frozen=True, slots=True)
class RunningStatistics:
    """Running mean and variance of shape (C,), and the number of batches in them where it is known (int64 of shape ()).

    They start at mean 0, variance 1 and no batches.
    """

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None = None

    def update(
        self, batch: Moments, *, momentum: Momentum = "default", convention: str = "torch"
    ) -> "RunningStatistics":
        """The statistics after one more batch: r <- (1 - f) r + f b, computed in float64.

        b is the batch mean, and the batch variance with the convention's correction. f follows from momentum; with
        momentum None it is 1 / (batches tracked, this one counted), the plain average over batches.

        Args:
            batch: moments of the batch, C channels. An empty one changes nothing, nor the number of batches.
            momentum: in the convention's sense: torch, weight of the new batch (0.1); onnx and keras, weight of the
                kept value (0.9, 0.99). None: cumulative.
            convention: torch, onnx or keras.

        Returns:
            New statistics of the same datatypes; the old ones are not changed.

        Raises:
            ParameterError: an unknown convention, or a momentum outside [0, 1].
            StatisticsError: momentum None without a number of batches, or a correction that needs more than the one
                value per channel.

        >>> start = RunningStatistics(torch.zeros(1), torch.ones(1))
        >>> start.update(Moments.of(torch.tensor([[1.0], [3.0]])), momentum=0.5)
        RunningStatistics(mean=tensor([1.]), var=tensor([1.5000]), num_batches_tracked=None)
        """
        rule = convention_named(convention)
        weight = self.weight_of_new(momentum, rule)
        if not bool((batch.count > 0).any()):
            return self
        if bool((batch.count <= rule.correction).any()):
            expected = f"more than {rule.correction} value per channel in a batch (convention {convention})"
            raise StatisticsError("batch", expected=expected, received=f"{int(batch.count.min())}")
        return self.moved(batch.mean, batch.var(correction=rule.correction), weight)

    def moved(self, mean: Tensor, var: Tensor, weight: float | Tensor) -> "RunningStatistics":
        """The statistics after one more batch of this mean and corrected variance (C,), float64, and weight."""
        return RunningStatistics(_average(self.mean, mean, weight), _average(self.var, var, weight), self._one_more())

    def moved_by(
        self, moments: Any, weight: float | Tensor, *, count: int, correction: int
    ) -> tuple["RunningStatistics", bool]:
        """The same of arrays of mean and biased variance (2, C), compiled, and whether these are finite."""
        flat, move = _kernels()
        weight, mean, var = float(weight), torch.empty_like(self.mean), torch.empty_like(self.var)
        is_finite = move(flat(self.mean.contiguous()), flat(mean), moments[0], weight, 1.0, 1.0)
        freedom = float(count - correction)
        is_finite &= move(flat(self.var.contiguous()), flat(var), moments[1], weight, float(count), freedom)
        return RunningStatistics(mean, var, self._one_more()), is_finite

    def _one_more(self) -> Tensor | None:
        return None if self.num_batches_tracked is None else self.num_batches_tracked + 1

    def weight_of_new(self, momentum: Momentum, rule: Convention) -> float | Tensor:
        """The weight of the next batch."""
        if momentum is not None:
            return rule.weight_of_new(momentum)
        if self.num_batches_tracked is None:
            expected = "the number of batches so far, with momentum null (cumulative)"
            raise StatisticsError("num_batches_tracked", expected=expected, received="none")
        return 1.0 / (self.num_batches_tracked + 1).to(torch.float64)


@cache
def _kernels() -> tuple[Callable[..., Any], Callable[..., bool]]:
    from normcore._compiled import flat
    from normcore.statistics.moving import move

    return flat, move


def _average(kept: Tensor, new: Tensor, weight: float | Tensor) -> Tensor:
    return (kept.double() * (1.0 - weight) + new * weight).to(kept.dtype)
