"""What makes the result of a batch norm questionable, in numbers; only what is."""

from dataclasses import dataclass

import torch
from torch import Tensor

from normcore.normalization.method import JSON
from normcore.normalization.value_findings import FEW_VALUES, tails, unresolved
from normcore.statistics.running import RunningStatistics

_NOTABLE_DISTANCE = 3.0
_NOTABLE_RATIO = 10.0


@dataclass(frozen=True, slots=True)
class BatchFindings:
    """A result to be looked at.

    Attributes:
        mean: that was subtracted; this and the next two are (C,).
        count: values per channel; None where the statistics are given.
        running: those before the batch, where there are any.
        nan_policy: how non-finite values were met.
    """

    input: Tensor
    output: Tensor
    mean: Tensor
    var: Tensor
    invstd: Tensor
    eps: float
    count: int | None
    running: RunningStatistics | None
    nan_policy: str

    def report(self) -> dict[str, JSON]:
        """Few values, questionable channels, values that are not finite, distance to the running statistics, tails.

        few_values_per_channel: the count, below 8. constant_channels, eps_dominated_channels (var < eps),
        unresolved_channels (a deviation is less than two steps of the input's datatype), non_finite_channels: numbers
        of channels. non_finite_values: their number, and nan_policy. running_mean_distance: the farthest batch mean in
        running deviations, above 3. running_var_ratio: the largest ratio of the two variances, above 10.
        share_beyond_4_before and _after: shares of values of the input and the output beyond |4|, where the output's
        is above 1 %; of a sample, for large inputs.
        """
        if not self.output.numel():
            return {}
        return {
            **self._few_values(),
            **self._channels(),
            **self._non_finite(),
            **self._distance_to_running(),
            **tails(self.input, self.output),
        }

    def _few_values(self) -> dict[str, JSON]:
        if self.count is None or self.count >= FEW_VALUES:
            return {}
        return {"few_values_per_channel": self.count}

    def _channels(self) -> dict[str, JSON]:
        flags = {
            "constant_channels": (self.var == 0) & (self.count is not None),
            # var < eps, without eps: var / (var + eps) is below a half.
            "eps_dominated_channels": self.var * self.invstd.square() < 0.5,
            "unresolved_channels": unresolved(self.mean, self.var, self.input.dtype) & (self.count is not None),
            "non_finite_channels": ~(self.mean.isfinite() & self.var.isfinite() & self.invstd.isfinite()),
        }
        counts = {name: int(flag.sum()) for name, flag in flags.items()}
        return {name: count for name, count in counts.items() if count}

    def _non_finite(self) -> dict[str, JSON]:
        # A sum is one quick sweep; overflow of the sum alone costs one more, and finds nothing.
        if bool(self.input.sum().isfinite()):
            return {}
        values = int((~self.input.isfinite()).sum())
        return {"non_finite_values": values, "nan_policy": self.nan_policy} if values else {}

    def _distance_to_running(self) -> dict[str, JSON]:
        if self.count is None or self.running is None:
            return {}
        return distance_to_running(self.mean, self.var, self.running, eps=self.eps)


def distance_to_running(mean: Tensor, var: Tensor, running: RunningStatistics, *, eps: float) -> dict[str, JSON]:
    """How far the statistics (C,) of a batch are from the running ones, where that is notable."""
    expected = running.var + eps
    distance = ((mean - running.mean).abs() / expected.sqrt()).nan_to_num(posinf=0.0).amax()
    ratio = (var + eps) / expected
    ratio = torch.maximum(ratio, ratio.reciprocal()).nan_to_num(posinf=0.0).amax()
    found: dict[str, JSON] = {}
    if float(distance) > _NOTABLE_DISTANCE:
        found["running_mean_distance"] = float(distance)
    if float(ratio) > _NOTABLE_RATIO:
        found["running_var_ratio"] = float(ratio)
    return found
