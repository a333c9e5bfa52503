"""Batch normalization: every channel standardized over all other axes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from normcore._checks import (
    check_axis,
    check_batch_count,
    check_eps,
    check_floating,
    check_per_channel,
    check_rank,
    check_variance,
)
from normcore._precision import accumulation_dtype
from normcore._slab import Slab
from normcore.errors import StatisticsError
from normcore.normalization.kernel import (
    BatchStandardization,
    Standardization,
    batch_standardization,
    given_standardization,
    standardize,
)
from normcore.normalization.method import JSON, Method, Output, Parameter, TensorArgument
from normcore.statistics.running import CONVENTIONS, Momentum, RunningStatistics, check_momentum

_FEW_VALUES = 8


@dataclass(frozen=True, slots=True)
class BatchNormResult:
    """Outputs of batch norm; None for what does not apply.

    Attributes:
        output: the input's shape, datatype and memory format.
        mean: mean that was subtracted; (C,).
        var: biased variance that was divided by; (C,).
        invstd: (var + eps)^-1/2; (C,).
        running_mean: updated, in training; (C,).
        running_var: updated, in training; (C,).
        num_batches_tracked: updated, in training, where it was given; int64 of shape ().
        count: values per channel, where the statistics are the batch's own.
    """

    output: Tensor
    mean: Tensor | None = None
    var: Tensor | None = None
    invstd: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    count: int | None = None

    def diagnostics(self) -> dict[str, JSON]:
        """What makes the result questionable: numbers of channels, or the few values that each has."""
        if self.mean is None or self.var is None or self.invstd is None:
            return {}
        findings: dict[str, JSON] = {}
        if self.count is not None and self.count < _FEW_VALUES:
            findings["few_values_per_channel"] = self.count
        is_finite = self.mean.isfinite() & self.var.isfinite() & self.invstd.isfinite()
        is_constant = self.var == 0
        flags = {
            "constant_channels": is_constant & (self.count is not None),
            # var < eps, without eps: var / (var + eps) is below a half.
            "eps_dominated_channels": self.var * self.invstd.square() < 0.5,
            "non_finite_channels": ~is_finite,
        }
        counts = {name: int(flag.sum()) for name, flag in flags.items()}
        return findings | {name: count for name, count in counts.items() if count}


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    num_batches_tracked: Tensor | None = None,
    training: bool = False,
    momentum: Momentum = "default",
    eps: float = 1e-5,
    convention: str = "torch",
    channel_axis: int = 1,
) -> BatchNormResult:
    """Batch normalization in training or inference.

    y = (x - mean) / sqrt(var + eps) * weight + bias

    Training takes mean and biased variance from the batch and returns updated running statistics,
    r <- (1 - f) r + f b, with the batch variance corrected as the convention says (torch: Bessel). Inference takes
    the running statistics. The mean is held as the sum of two numbers, so that data with |mean| >> std loses nothing.

    Sums are accumulated in float32 within a cache block and in float64 over blocks (float64 inputs: in float64
    throughout); the output is rounded once to the input's datatype. No argument is changed. Outputs carry no gradient.

    Args:
        input: (N, C, *), float16, bfloat16, float32 or float64. An empty one in training gives an empty output and
            changes no statistics.
        running_mean: (C,), any floating datatype; with running_var.
        running_var: (C,), values >= 0.
        weight: (C,); 1 where not given.
        bias: (C,); 0 where not given.
        num_batches_tracked: batches so far, a single value; training with momentum None needs it.
        training: whether the statistics are the batch's own.
        momentum: in the convention's sense: torch, weight of the new batch (0.1); onnx and keras, weight of the kept
            value (0.9, 0.99). None: cumulative average over batches.
        eps: > 0 in training, >= 0 in inference.
        convention: torch, onnx or keras, for the update of the running statistics.
        channel_axis: axis of the channels, from the back where negative.

    Returns:
        Output, statistics (float64 for a float64 input, else float32) and updated running statistics.

    Raises:
        DtypeError: a tensor that is not floating.
        ShapeError: an input of fewer than two dimensions, or a tensor that is not one value per channel.
        ParameterError: eps, momentum, convention or channel_axis out of bounds.
        StatisticsError: no running statistics in inference, one without the other, a running_var negative or NaN,
            one value per channel in training, or momentum None without num_batches_tracked.

    >>> result = batch_norm(torch.tensor([[1.0, 7.0], [3.0, 7.0]]), training=True, eps=1e-12)
    >>> result.output, result.var
    (tensor([[-1.,  0.],
            [ 1.,  0.]]), tensor([1., 0.]))
    """
    num_features = _check_tensors(input, weight, bias, channel_axis=channel_axis)
    check_eps("eps", eps, is_zero_allowed=not training)
    check_momentum(momentum, convention=convention)
    running = _running_statistics(running_mean, running_var, num_batches_tracked, num_features=num_features)
    with torch.no_grad():
        slab = Slab.of(input, channel_axis=channel_axis % input.ndim)
        if training and input.numel() == 0:
            return _result(input.clone(), None, running)
        by = _of_batch(slab, input, eps=eps) if training else _of_running(running, input, eps=eps)
        if running is not None and isinstance(by, BatchStandardization):
            updated = running.update(by.moments, momentum=momentum, convention=convention)
        else:
            updated = None
        return _result(slab.restore(standardize(slab, by, weight=weight, bias=bias)), by, updated)


def _check_tensors(input: Tensor, weight: Tensor | None, bias: Tensor | None, *, channel_axis: int) -> int:
    """The number of channels of an input that can be normalized."""
    check_floating("input", input)
    check_rank("input", input, minimum=2)
    num_features = input.shape[check_axis("channel_axis", channel_axis, rank=input.ndim)]
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_per_channel(name, tensor, num_features=num_features)
    return num_features


def _running_statistics(
    mean: Tensor | None, var: Tensor | None, num_batches_tracked: Tensor | None, *, num_features: int
) -> RunningStatistics | None:
    if mean is None and var is None:
        return None
    if mean is None or var is None:
        missing, present = ("running_mean", "running_var") if mean is None else ("running_var", "running_mean")
        raise StatisticsError(missing, expected=f"to be given together with {present}", received="none")
    check_per_channel("running_mean", mean, num_features=num_features)
    check_per_channel("running_var", var, num_features=num_features)
    check_variance("running_var", var)
    if num_batches_tracked is not None:
        check_batch_count("num_batches_tracked", num_batches_tracked)
        num_batches_tracked = num_batches_tracked.to(torch.int64).reshape(())
    return RunningStatistics(mean, var, num_batches_tracked)


def _of_batch(slab: Slab, input: Tensor, *, eps: float) -> BatchStandardization:
    if slab.count == 1:
        expected = "more than 1 value per channel when training"
        raise StatisticsError("input", expected=expected, received=f"shape {tuple(input.shape)}")
    return batch_standardization(slab, eps=eps)


def _of_running(running: RunningStatistics | None, input: Tensor, *, eps: float) -> Standardization:
    if running is None:
        expected = "running statistics in inference (training false)"
        raise StatisticsError("running_mean", expected=expected, received="none")
    return given_standardization(running.mean, running.var, dtype=input.dtype, eps=eps)


def _result(output: Tensor, by: Standardization | None, running: RunningStatistics | None) -> BatchNormResult:
    """The outputs that apply, every statistic in the datatype that statistics of such an input have."""
    dtype = accumulation_dtype(output.dtype)
    result = BatchNormResult(output)
    if by is not None:
        mean, var, invstd = (statistic.to(dtype, copy=True) for statistic in (by.mean, by.var, by.invstd))
        result = replace(result, mean=mean, var=var, invstd=invstd)
    if isinstance(by, BatchStandardization):
        result = replace(result, count=by.count)
    if running is not None:
        mean, var = running.mean.to(dtype, copy=True), running.var.to(dtype, copy=True)
        tracked = running.num_batches_tracked
        result = replace(result, running_mean=mean, running_var=var, num_batches_tracked=tracked)
    return result


BATCH_NORM = Method(
    name="batch_norm",
    summary="Standardize every channel over all other axes, by the batch's statistics or by running ones.",
    formula="y = (x - mean) / sqrt(var + eps) * weight + bias",
    source="Ioffe and Szegedy 2015, arXiv:1502.03167; conventions of torch.nn.BatchNorm2d, ONNX "
    "BatchNormalization-15 and keras.layers.BatchNormalization",
    tensors=(
        TensorArgument("input", "values to normalize", "(N, C, *)", is_required=True),
        TensorArgument("running_mean", "running mean; needed in inference", "(C,)"),
        TensorArgument("running_var", "running variance; needed in inference", "(C,)"),
        TensorArgument("weight", "scale (gamma); 1 where not given", "(C,)"),
        TensorArgument("bias", "shift (beta); 0 where not given", "(C,)"),
        TensorArgument("num_batches_tracked", "batches so far; needed in training with momentum null", "()"),
    ),
    parameters=(
        Parameter("training", "bool", False, "Normalize by the batch's statistics and update the running ones."),
        Parameter(
            "momentum",
            "float",
            CONVENTIONS["torch"].momentum,
            "In the convention's sense: torch, weight of the new batch (0.1 where not given); onnx and keras, weight "
            "of the kept value (0.9 and 0.99 where not given). null: cumulative average over batches.",
            is_nullable=True,
            minimum=0.0,
            maximum=1.0,
        ),
        Parameter("eps", "float", 1e-5, "Added to the variance; above 0 in training.", minimum=0.0),
        Parameter(
            "convention",
            "str",
            "torch",
            "How running statistics are updated: torch takes Bessel's variance of the batch, onnx and keras the "
            "biased one.",
            choices=tuple(CONVENTIONS),
        ),
        Parameter("channel_axis", "int", 1, "Axis of the channels; a negative one counts from the back."),
    ),
    outputs=(
        Output("output", "(N, C, *)", "normalized values, in the input's datatype"),
        Output("mean", "(C,)", "mean that was subtracted; none for an empty batch in training"),
        Output("var", "(C,)", "biased variance that was divided by; none for an empty batch in training"),
        Output("invstd", "(C,)", "(var + eps)^-1/2; none for an empty batch in training"),
        Output("running_mean", "(C,)", "updated running mean; only in training with running statistics"),
        Output("running_var", "(C,)", "updated running variance; only in training with running statistics"),
        Output(
            "num_batches_tracked", "()", "updated number of batches; only in training with running statistics and it"
        ),
    ),
    function=batch_norm,
)
