"""Instance normalization: every channel of every sample standardized over its positions."""

from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from normcore._checks import check_eps, check_floating, check_fraction, check_per_channel, check_rank, check_variance
from normcore._precision import accumulation_dtype
from normcore.errors import StatisticsError
from normcore.normalization.batch_findings import distance_to_running
from normcore.normalization.gradients import Seen
from normcore.normalization.method import JSON, Method, Output, Parameter, TensorArgument
from normcore.normalization.per_sample import (
    GRAD_INPUT,
    GRAD_OUTPUT,
    MASK,
    Groups,
    Operands,
    PerSampleResult,
    check_channel_affine,
    grad_parameter,
)
from normcore.statistics.running import CONVENTIONS, RunningStatistics


@dataclass(frozen=True)
class InstanceNormResult(PerSampleResult):
    """Outputs of instance norm; mean, var and invstd are (N, C), or (C,) where running statistics were used.

    Attributes:
        running_mean: updated, in training, where it was given; (C,).
        running_var: updated, in training, where it was given; (C,).
        before: running statistics before the input, in training, where they were given.
    """

    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    before: RunningStatistics | None = field(default=None, repr=False)

    def updating(self, running: RunningStatistics, *, momentum: float) -> "InstanceNormResult":
        """With running statistics after this input, in the datatype that statistics of such an input have."""
        dtype, batch = accumulation_dtype(self.output.dtype), self._batch
        updated = running if batch is None else running.moved(*batch, momentum)
        mean, var = (statistic.to(dtype, copy=True) for statistic in (updated.mean, updated.var))
        return replace(self, running_mean=mean, running_var=var, before=running)

    @property
    def _batch(self) -> tuple[Tensor, Tensor] | None:
        """Averages over samples of the mean and of Bessel's variance."""
        if self.mean is None or self.var is None or self.count is None:
            return None
        count = torch.as_tensor(self.count, dtype=torch.float64, device=self.var.device)
        return self.mean.double().mean(0), (self.var.double() * count / (count - 1)).mean(0)

    def diagnostics(self) -> dict[str, JSON]:
        """Those of the groups, and in training the distance to the running statistics, as in batch norm."""
        findings = super().diagnostics()
        if self.before is None or self._batch is None or self.by is None:
            return findings
        return findings | distance_to_running(*self._batch, self.before, eps=self.by.eps)


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    grad_output: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float = CONVENTIONS["torch"].momentum,
    eps: float = 1e-5,
    out: Tensor | None = None,
) -> InstanceNormResult:
    """Instance normalization: statistics over the positions of each channel of each sample.

    y = (x - mean) / sqrt(var + eps) * weight + bias
    dx = s * (a - mean(a) - xh * mean(a * xh)), with a = weight * dy, xh = (x - mean) * s, s = (var + eps)^-1/2

    Running statistics are used where they are given and training is false; then dx = weight * s * dy. In training
    they are updated as torch does it, r <- (1 - momentum) r + momentum b, b the mean over samples of the mean and of
    Bessel's variance. In all other cases there is no state.

    The variance that is divided by is biased. The output has float32 accuracy whatever the mean and the memory format
    (float64 for a float64 input), is rounded once to the input's datatype and keeps the memory format, which torch
    loses. No argument is changed. The output is differentiable in input, weight and bias, to every order.

    Args:
        input: (N, C, *), float16, bfloat16, float32 or float64. An empty one changes no statistics.
        running_mean: (C,), any floating datatype; with running_var.
        running_var: (C,), values >= 0.
        weight: (C,), or for an adaptive norm (N, C) or the input's shape; 1 where not given.
        bias: the same; of the weight's shape where both are given.
        grad_output: gradient of the output, of the input's shape; gives the gradients of input, weight and bias.
        mask: bool, broadcasts against the input; false where a value shall not count in mean and variance of the
            input's own. Running statistics heed none.
        training: whether the statistics are the input's own although running statistics are given.
        momentum: weight of the new batch, from 0 to 1.
        eps: >= 0; a constant channel with eps 0 gives NaN.
        out: takes the output; of the input's shape, datatype and memory format, in memory of its own, and without
            gradients to be recorded.

    Returns:
        Output, statistics and updated running statistics, as gradients of weight and bias float64 for a float64 input,
        else float32.

    Raises:
        DtypeError: a tensor that is not floating, a mask that is not bool, or an out of another datatype or device.
        ShapeError: an input of fewer than two dimensions, or another tensor that does not fit.
        ParameterError: eps or momentum out of bounds.
        StatisticsError: one running statistic without the other, a running_var negative or NaN, or own statistics of
            a channel with only one value that counts.

    >>> instance_norm(torch.tensor([[[1.0, 3.0], [2.0, 8.0]]]), eps=1e-12).output
    tensor([[[-1.,  1.],
             [-1.,  1.]]])
    """
    check_floating("input", input)
    check_rank("input", input, minimum=2)
    channels = input.shape[1]
    affine_shape = check_channel_affine(weight, bias, input=input)
    check_eps("eps", eps, is_zero_allowed=True)
    check_fraction("momentum", momentum)
    running = _running_statistics(running_mean, running_var, num_features=channels)
    is_own = training or running is None
    groups = _groups(input.shape, affine_shape, is_own=is_own)
    operands = Operands.of(input, weight, bias, grad_output, mask, groups, out=out)
    if running is not None and not training:
        return operands.standardize_by(InstanceNormResult, running.mean, running.var, eps=eps)
    _check_several_values(operands)
    found = operands.standardize(InstanceNormResult, eps=eps)
    return found if running is None else found.updating(running, momentum=momentum)


@lru_cache(1024)
def _groups(sizes: torch.Size, affine_shape: tuple[int, ...], *, is_own: bool) -> Groups:
    samples, channels, positions, rank = sizes[0], sizes[1], sizes[2:].numel(), len(affine_shape)
    affine = (samples if rank > 1 else 1, channels, positions if rank > 2 else 1)
    statistics_shape = (samples, channels) if is_own else (channels,)
    return Groups(Seen((samples, channels, positions), affine, (channels, 1)), (2,), affine_shape, statistics_shape)


def _running_statistics(mean: Tensor | None, var: Tensor | None, *, num_features: int) -> RunningStatistics | None:
    if mean is None and var is None:
        return None
    if mean is None or var is None:
        missing, present = ("running_mean", "running_var") if mean is None else ("running_var", "running_mean")
        raise StatisticsError(missing, expected=f"to be given together with {present}", received="none")
    check_per_channel("running_mean", mean, num_features=num_features)
    check_per_channel("running_var", var, num_features=num_features)
    check_variance("running_var", var)
    return RunningStatistics(mean, var)


def _check_several_values(operands: Operands) -> None:
    input, mask = operands.input, operands.mask
    if input.numel() == 0:
        return
    if operands.input.shape[2:].numel() == 1:
        expected = "more than 1 position per channel for statistics of its own"
        raise StatisticsError("input", expected=expected, received=f"shape {tuple(input.shape)}")
    if mask is not None:
        fewest = int(operands.groups.seen.values(mask.expand(input.shape)).sum(-1).min())
        if fewest < 2:
            expected = "more than 1 position that counts in every channel"
            raise StatisticsError("mask", expected=expected, received=str(fewest))


INSTANCE_NORM = Method(
    name="instance_norm",
    summary="Standardize every channel of every sample over its positions.",
    formula="y = (x - mean) / sqrt(var + eps) * weight + bias",
    source="Ulyanov, Vedaldi and Lempitsky, arXiv 1607.08022; ONNX InstanceNormalization-22; torch.nn.InstanceNorm",
    tensors=(
        TensorArgument("input", "values to normalize", "(N, C, *)", is_required=True),
        TensorArgument("running_mean", "running mean; used in inference, updated in training", "(C,)"),
        TensorArgument("running_var", "running variance, with running_mean", "(C,)"),
        TensorArgument("weight", "scale (gamma); 1 where not given", "(C,), (N, C) or the input's"),
        TensorArgument("bias", "shift (beta); 0 where not given", "the weight's"),
        GRAD_OUTPUT,
        MASK,
    ),
    parameters=(
        Parameter(
            "training",
            "bool",
            False,
            "Whether statistics are the input's own although running statistics are given, which are then updated.",
        ),
        Parameter(
            "momentum",
            "float",
            CONVENTIONS["torch"].momentum,
            "Weight of the new batch in the running statistics.",
            minimum=0.0,
            maximum=1.0,
        ),
        Parameter("eps", "float", 1e-5, "Added to the variance.", minimum=0.0),
    ),
    outputs=(
        Output("output", "(N, C, *)", "normalized values, in the input's datatype"),
        Output("mean", "(N, C) or (C,)", "mean that was subtracted; none for an empty input"),
        Output("var", "(N, C) or (C,)", "biased variance that was divided by; none for an empty input"),
        Output("invstd", "(N, C) or (C,)", "(var + eps)^-1/2; none for an empty input"),
        Output("running_mean", "(C,)", "updated running mean; only in training with running statistics"),
        Output("running_var", "(C,)", "updated running variance; only in training with running statistics"),
        GRAD_INPUT,
        grad_parameter("weight", "(C,), (N, C) or the input's"),
        grad_parameter("bias", "(C,), (N, C) or the input's"),
    ),
    function=instance_norm,
)
