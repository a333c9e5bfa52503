"""What callers of batch norm and its kin choose, and what follows from it for the running statistics."""

from dataclasses import dataclass

from torch import Tensor

from normcore._checks import check_eps
from normcore.errors import ParameterError, StatisticsError
from normcore.normalization.closed_forms import Measured, Statistics
from normcore.statistics.running import Momentum, RunningStatistics, check_momentum, convention_named

NAN_POLICIES = ("propagate", "raise", "skip_update")


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """Options as `batch_norm` describes them, checked."""

    training: bool
    eps: float
    nan_policy: str
    momentum: Momentum = "default"
    convention: str = "torch"

    def __post_init__(self) -> None:
        check_eps("eps", self.eps, is_zero_allowed=not self.training)
        check_momentum(self.momentum, convention=self.convention)
        if self.nan_policy not in NAN_POLICIES:
            expected = f"one of {', '.join(NAN_POLICIES)}"
            raise ParameterError("nan_policy", expected=expected, received=repr(self.nan_policy))

    def check_values(self, input: Tensor, mask: Tensor | None) -> None:
        """Refuse values that are not finite and count, where the policy says so; a sweep over the input."""
        if self.nan_policy != "raise":
            return
        is_refused = ~input.isfinite() if mask is None else ~input.isfinite() & mask
        refused = int(is_refused.sum())
        if refused:
            expected = "finite values (nan_policy raise)"
            raise StatisticsError("input", expected=expected, received=f"{refused} that are not finite")

    def is_skipped(self, mean: Tensor, m2: Tensor) -> bool:
        """Whether a batch of these moments leaves the running statistics as they are."""
        return self.nan_policy == "skip_update" and not bool((mean.isfinite() & m2.isfinite()).all())

    def updated(
        self, running: RunningStatistics, *, mean: Tensor, m2: Tensor, count: int | Tensor
    ) -> RunningStatistics:
        """Running statistics after a batch of these moments, of two or more values per channel."""
        if self.is_skipped(mean, m2):
            return running
        rule = convention_named(self.convention)
        return running.moved(mean, m2 / (count - rule.correction), running.weight_of_new(self.momentum, rule))

    def updated_by(self, running: RunningStatistics, batch: Statistics, *, count: int) -> RunningStatistics:
        """The same after a batch with these statistics."""
        found = batch.found
        if not isinstance(found, Measured) or not (running.mean.is_cpu and running.var.is_cpu):
            mean, var = batch.mean.flatten(), batch.var.flatten()
            return self.updated(running, mean=mean, m2=var * count, count=count)
        rule = convention_named(self.convention)
        weight = running.weight_of_new(self.momentum, rule)
        moved, is_finite = running.moved_by(found.rows[2:4], weight, count=count, correction=rule.correction)
        return running if self.nan_policy == "skip_update" and not is_finite else moved
