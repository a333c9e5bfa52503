"""What whitening gives, and what makes it questionable."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from normcore._precision import accumulation_dtype
from normcore._slab import Slab
from normcore.normalization.batch_findings import BatchFindings
from normcore.normalization.group_transform import Gradients, GroupTransform, ungrouped
from normcore.normalization.method import JSON
from normcore.statistics.covariance import RunningCovariance
from normcore.statistics.running import RunningStatistics

_RESIDUAL_OF_PARTIAL = 0.01


@dataclass(frozen=True, slots=True)
class WhiteningResult:
    """Outputs of whitening; None for what does not apply. Only `output` carries a gradient.

    Attributes:
        output: the input's shape, datatype and memory format.
        mean: mean that was subtracted; (C,).
        covariance: biased covariance within each group, without eps; (groups, d, d), d = C / groups.
        whitening_matrix: W; (groups, d, d).
        running_mean: updated, in training; (C,).
        running_covariance: updated, in training; (groups, d, d).
        num_batches_tracked: updated, in training, where it was given; int64 of shape ().
        grad_input: of the input's shape and datatype, where grad_output was given.
        grad_weight: (C,), where grad_output was given.
        grad_bias: (C,), where grad_output was given.
        eps: what was added to the covariance's diagonal.
        count: values per channel, where the statistics are the batch's own.
        residual: the largest |W (covariance + eps I) W^T - I|, in mode iternorm.
        findings: what diagnostics look at beside the groups.
    """

    output: Tensor
    mean: Tensor | None = None
    covariance: Tensor | None = None
    whitening_matrix: Tensor | None = None
    running_mean: Tensor | None = None
    running_covariance: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    grad_input: Tensor | None = None
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    eps: float = 0.0
    count: int | None = None
    residual: Tensor | None = None
    findings: BatchFindings | None = field(default=None, repr=False)

    def diagnostics(self) -> dict[str, JSON]:
        """What makes the result questionable: too few values, numbers of groups or channels, or partial whitening."""
        if self.covariance is None or self.whitening_matrix is None:
            return {}
        findings = {} if self.findings is None else self.findings.report()
        # The deviations of M values span M - 1 dimensions at most; eps alone fills the others.
        if self.count is not None and self.count <= self.covariance.shape[-1]:
            findings["few_values_per_group"] = self.count
        counts = {
            "eps_dominated_directions": self._eps_dominated_directions(self.whitening_matrix.nan_to_num()),
            "non_finite_groups": int((~self.whitening_matrix.isfinite()).flatten(1).any(1).sum()),
        }
        if self.residual is not None and bool(self.residual > _RESIDUAL_OF_PARTIAL):
            findings["whitening_residual"] = float(self.residual)
        return findings | {name: count for name, count in counts.items() if count}

    def _eps_dominated_directions(self, matrix: Tensor) -> int:
        """How many have a variance below eps: a singular value s of W leaves the output a variance of 1 - eps s^2."""
        # The sum of all eps s^2 says at little cost that most groups have none.
        is_suspect = self.eps * matrix.square().sum((1, 2)) > 0.5
        singular_values = torch.linalg.svdvals(matrix[is_suspect])
        return int((self.eps * singular_values.square() > 0.5).sum())

    @classmethod
    def of(
        cls, output: Tensor, transform: GroupTransform, mode: str, *, eps: float, count: int | None
    ) -> "WhiteningResult":
        """Statistics in the datatype that those of such an output have."""
        covariance, matrix = transform.by.covariance, transform.root.matrix
        residual = None
        if mode == "iternorm":
            identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
            residual = (matrix @ (covariance + eps * identity) @ matrix.mT - identity).abs().max()
        dtype = accumulation_dtype(output.dtype)
        mean, covariance, matrix = (value.to(dtype, copy=True) for value in (transform.by.mean, covariance, matrix))
        return cls(output, mean, covariance, matrix, eps=eps, count=count, residual=residual)

    def looked_at(self, input: Tensor, running: RunningCovariance | None) -> "WhiteningResult":
        """With what the channels, each by itself, say: their variances are the diagonal of the covariance."""
        if self.mean is None or self.covariance is None:
            return self
        var = self.covariance.diagonal(dim1=1, dim2=2).flatten()
        before = None
        if running is not None:
            before = RunningStatistics(running.mean, running.covariance.diagonal(dim1=1, dim2=2).flatten())
        invstd = (var + self.eps).rsqrt()
        output = self.output.detach()
        findings = BatchFindings(
            input.detach(), output, self.mean, var, invstd, self.eps, self.count, before, "propagate"
        )
        return replace(self, findings=findings)

    @classmethod
    def of_nothing(cls, input: Tensor, running: RunningCovariance | None, *, has_gradients: bool) -> "WhiteningResult":
        """Of an empty batch, which changes no statistics."""
        result = cls(input.clone())
        if running is not None:
            result = result.with_running(running, running)
        if has_gradients:
            nothing = torch.zeros(input.shape[1], dtype=accumulation_dtype(input.dtype), device=input.device)
            grad_input = torch.empty_like(input, requires_grad=False)
            result = replace(result, grad_input=grad_input, grad_weight=nothing, grad_bias=nothing.clone())
        return result

    def with_running(self, updated: RunningCovariance, given: RunningCovariance) -> "WhiteningResult":
        """Float64 where they were given so: ill-conditioned statistics do not survive rounding to float32."""
        least = accumulation_dtype(self.output.dtype)
        return replace(
            self,
            running_mean=updated.mean.to(torch.promote_types(least, given.mean.dtype), copy=True),
            running_covariance=updated.covariance.to(torch.promote_types(least, given.covariance.dtype), copy=True),
            num_batches_tracked=None if updated.num_batches_tracked is None else updated.num_batches_tracked.clone(),
        )

    def with_gradients(self, gradients: Gradients, slab: Slab) -> "WhiteningResult":
        """That of the input in its shape and datatype, the others in the datatype of statistics."""
        dtype = accumulation_dtype(slab.values.dtype)
        return replace(
            self,
            grad_input=slab.restore(ungrouped(gradients.values, like=slab.values)),
            grad_weight=gradients.weight.to(dtype),
            grad_bias=gradients.bias.to(dtype),
        )
