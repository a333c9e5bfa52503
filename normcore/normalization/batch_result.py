"""What batch norm and its kin return."""

from dataclasses import dataclass, field
from typing import Self

from torch import Tensor

from normcore._precision import accumulation_dtype
from normcore.normalization.batch_findings import BatchFindings
from normcore.normalization.batch_view import BatchView
from normcore.normalization.gradients import Gradients, Standardized
from normcore.normalization.method import JSON
from normcore.normalization.standardized_result import StandardizedResult
from normcore.statistics.running import RunningStatistics


@dataclass(frozen=True)
class BatchNormResult(StandardizedResult):
    """Outputs of batch norm; None for what does not apply. Mean, var and invstd are (C,).

    Attributes:
        running: updated, in training, in the datatype of the other statistics.
        before: running statistics before the batch, where there are any.
        nan_policy: how values that are not finite were met.
    """

    running: RunningStatistics | None = None
    before: RunningStatistics | None = field(default=None, repr=False)
    nan_policy: str = field(default="propagate", repr=False)

    @classmethod
    def of(
        cls,
        found: Standardized,
        view: BatchView,
        *,
        before: RunningStatistics | None,
        updated: RunningStatistics | None,
        gradients: Gradients | None,
        nan_policy: str,
    ) -> Self:
        shape, running = (view.num_features,), _as_output(updated, view, is_new=updated is not before)
        return cls(found.output, found.statistics, shape, gradients, view.input, running, before, nan_policy)

    @classmethod
    def empty(
        cls, view: BatchView, weight: Tensor | None, *, running: RunningStatistics | None, grad_output: Tensor | None
    ) -> Self:
        """That of an input without values in training: statistics stay as they are."""
        gradients = None if grad_output is None else view.empty_gradients(weight)
        return cls(view.input.clone(), gradients=gradients, running=_as_output(running, view, is_new=False))

    @property
    def running_mean(self) -> Tensor | None:
        """Updated, in training; (C,)."""
        return None if self.running is None else self.running.mean

    @property
    def running_var(self) -> Tensor | None:
        """Updated, in training; (C,)."""
        return None if self.running is None else self.running.var

    @property
    def num_batches_tracked(self) -> Tensor | None:
        """Updated, in training, where it was given; int64 of shape ()."""
        return None if self.running is None else self.running.num_batches_tracked

    def diagnostics(self) -> dict[str, JSON]:
        """What makes the result questionable, as `BatchFindings.report` says; nothing for what is sound."""
        by, input = self.by, self.input
        if by is None or input is None or self.mean is None or self.var is None or self.invstd is None:
            return {}
        count = int(by.count.min() if isinstance(by.count, Tensor) else by.count) if by.axes else None
        statistics = self.mean, self.var, self.invstd, by.eps
        return BatchFindings(
            input.detach(), self.output.detach(), *statistics, count, self.before, self.nan_policy
        ).report()


def _as_output(running: RunningStatistics | None, view: BatchView, *, is_new: bool) -> RunningStatistics | None:
    """In the datatype that statistics of such an input have; a copy of what is not new."""
    if running is None:
        return None
    dtype = accumulation_dtype(view.input.dtype)
    if is_new and running.mean.dtype == running.var.dtype == dtype:
        return running
    mean, var = running.mean.to(dtype, copy=not is_new), running.var.to(dtype, copy=not is_new)
    return RunningStatistics(mean, var, running.num_batches_tracked)
