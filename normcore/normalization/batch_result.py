"""What batch norm and its kin return, and how they meet values that are not finite."""

from dataclasses import dataclass, field, replace
from typing import Self

from torch import Tensor

from normcore._precision import accumulation_dtype
from normcore.errors import ParameterError, StatisticsError
from normcore.normalization.batch_findings import BatchFindings
from normcore.normalization.batch_view import BatchView
from normcore.normalization.gradients import Gradients, Standardized
from normcore.normalization.method import JSON
from normcore.statistics.moments import Moments
from normcore.statistics.running import Momentum, RunningStatistics

NAN_POLICIES = ("propagate", "raise", "skip_update")


@dataclass(frozen=True, slots=True)
class BatchNormResult:
    """Outputs of batch norm; None for what does not apply.

    Attributes:
        output: the input's shape, datatype and memory format; differentiable to every order.
        mean: mean that was subtracted; (C,).
        var: biased variance that was divided by; (C,).
        invstd: (var + eps)^-1/2; (C,).
        running_mean: updated, in training; (C,).
        running_var: updated, in training; (C,).
        num_batches_tracked: updated, in training, where it was given; int64 of shape ().
        grad_input: gradient of the input, where grad_output was given; so are the next two.
        grad_weight: the weight's shape, (C,) where there is none.
        grad_bias: the same.
        findings: what diagnostics look at.
    """

    output: Tensor
    mean: Tensor | None = None
    var: Tensor | None = None
    invstd: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    grad_input: Tensor | None = None
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    findings: BatchFindings | None = field(default=None, repr=False)

    @classmethod
    def of(cls, found: Standardized, view: BatchView, *, running: RunningStatistics | None, nan_policy: str) -> Self:
        """Output and statistics in the datatype that statistics of such an input have."""
        by = found.statistics
        dtype = accumulation_dtype(view.input.dtype)
        mean, var, invstd = by.summary((view.num_features,), dtype)
        count = int(by.count.min() if isinstance(by.count, Tensor) else by.count) if by.axes else None
        output = found.output.detach()
        findings = BatchFindings(view.input.detach(), output, mean, var, invstd, by.eps, count, running, nan_policy)
        return cls(found.output, mean, var, invstd, findings=findings)

    @classmethod
    def empty(
        cls, view: BatchView, weight: Tensor | None, *, running: RunningStatistics | None, grad_output: Tensor | None
    ) -> Self:
        """That of an input without values in training: statistics stay as they are."""
        result = cls(view.input.clone())
        if running is not None:
            result = result.with_running(running)
        return result if grad_output is None else result.with_gradients(view.empty_gradients(weight))

    def with_running(self, running: RunningStatistics) -> Self:
        dtype = accumulation_dtype(self.output.dtype)
        mean, var = running.mean.to(dtype, copy=True), running.var.to(dtype, copy=True)
        return replace(self, running_mean=mean, running_var=var, num_batches_tracked=running.num_batches_tracked)

    def with_gradients(self, gradients: Gradients) -> Self:
        return replace(self, grad_input=gradients.input, grad_weight=gradients.weight, grad_bias=gradients.bias)

    def diagnostics(self) -> dict[str, JSON]:
        """What makes the result questionable, as `BatchFindings.report` says; nothing for what is sound."""
        return {} if self.findings is None else self.findings.report()


def check_nan_policy(nan_policy: str) -> None:
    if nan_policy not in NAN_POLICIES:
        raise ParameterError("nan_policy", expected=f"one of {', '.join(NAN_POLICIES)}", received=repr(nan_policy))


def refuse_non_finite(input: Tensor, mask: Tensor | None) -> None:
    """Refuse an input with values that are not finite and count; a sweep over it."""
    is_refused = ~input.isfinite() if mask is None else ~input.isfinite() & mask
    refused = int(is_refused.sum())
    if refused:
        expected = "finite values (nan_policy raise)"
        raise StatisticsError("input", expected=expected, received=f"{refused} that are not finite")


def update_running(
    running: RunningStatistics, batch: Moments, *, momentum: Momentum, convention: str, nan_policy: str
) -> RunningStatistics:
    """Running statistics after the batch; as they were where it is not finite and the policy skips such updates."""
    if nan_policy == "skip_update" and not batch.is_finite():
        return running
    return running.update(batch, momentum=momentum, convention=convention)
