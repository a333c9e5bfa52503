"""Batch normalization: every channel standardized over all other axes."""

from typing import Any

from torch import Tensor

from normcore._checks import check_out
from normcore.errors import ParameterError, StatisticsError
from normcore.normalization.batch_options import NAN_POLICIES, BatchOptions
from normcore.normalization.batch_result import BatchNormResult
from normcore.normalization.batch_view import BatchView
from normcore.normalization.gradients import standardize_by, standardize_over
from normcore.normalization.method import Method, Output, Parameter, TensorArgument
from normcore.statistics.running import CONVENTIONS, Momentum, RunningStatistics


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    grad_output: Tensor | None = None,
    mask: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    training: bool = False,
    momentum: Momentum = "default",
    eps: float = 1e-5,
    convention: str = "torch",
    channel_axis: int = 1,
    nan_policy: str = "propagate",
    inverse: bool = False,
    allow_negative_var: bool = False,
    out: Tensor | None = None,
) -> BatchNormResult:
    """Batch normalization in training or inference.

    y = (x - mean) / sqrt(var + eps) * weight + bias
    dx = s * (a - mean(a) - xh * mean(a * xh)) in training, s * a in inference, with a = weight * dy,
    xh = (x - mean) * s, s = (var + eps)^-1/2; dweight = sum(dy * xh), dbias = sum(dy)

    Training takes mean and biased variance from the batch and returns updated running statistics,
    r <- (1 - f) r + f b, with the batch variance corrected as the convention says (torch: Bessel). Inference takes
    the running statistics, as constants. Data with |mean| >> std loses nothing.

    Sums are accumulated in float64, those of half precision in float32 within blocks of 1024 values; the output is
    rounded once to the input's datatype. No argument is changed but out. The output is differentiable in input, weight
    and bias, to every order; statistics carry no gradient.

    Args:
        input: (N, C, *), float16, bfloat16, float32 or float64. An empty one in training gives an empty output and
            changes no statistics.
        running_mean: (C,), any floating datatype; with running_var.
        running_var: (C,), values >= 0.
        weight: (C,), or for an adaptive norm (N, C) or the input's shape; 1 where not given.
        bias: the weight's shape; 0 where not given.
        grad_output: gradient of the output, of the input's shape; gives the gradients of input, weight and bias.
        mask: bool, true where a position counts in the statistics of the batch; broadcasts to the input's shape
            without the channel axis. Positions that do not count are normalized as all others. Inference counts none.
        num_batches_tracked: batches so far, a single value; training with momentum None needs it.
        training: whether the statistics are the batch's own.
        momentum: in the convention's sense: torch, weight of the new batch (0.1); onnx and keras, weight of the kept
            value (0.9, 0.99). None: cumulative average over batches.
        eps: > 0 in training, >= 0 in inference.
        convention: torch, onnx or keras, for the update of the running statistics.
        channel_axis: axis of the channels, from the back where negative.
        nan_policy: for values that are not finite. propagate: they make their channel NaN, and its running
            statistics for ever; skip_update: such a batch leaves all running statistics as they are; raise.
        inverse: in inference, the way back: x = (y - bias) / weight * sqrt(var + eps) + mean.
        allow_negative_var: whether a running_var that is negative or NaN is taken, as torch takes it: a channel whose
            var + eps is below 0 or NaN comes out as NaN in inference.
        out: takes the output; of the input's shape, datatype and memory format, in memory of its own, and without
            gradients to be recorded; not with inverse.

    Returns:
        Output, statistics and gradients of parameters (float64 for a float64 input, else float32), updated running
        statistics, and the input's gradient.

    Raises:
        DtypeError: a tensor that is not floating, or a mask that is not bool.
        ShapeError: an input of fewer than two dimensions, or another tensor that does not fit it.
        ParameterError: eps, momentum, convention, channel_axis or nan_policy out of bounds; inverse in training, with
            a grad_output, or with a weight of 0.
        StatisticsError: no running statistics in inference, one without the other, a running_var negative or NaN
            where that is not allowed, one value per channel in training, momentum None without num_batches_tracked,
            or, with nan_policy raise, values that are not finite.

    >>> import torch
    >>> result = batch_norm(torch.tensor([[1.0, 7.0], [3.0, 7.0]]), training=True, eps=1e-12)
    >>> result.output, result.var
    (tensor([[-1.,  0.],
            [ 1.,  0.]]), tensor([1., 0.]))
    """
    view = BatchView.of(input, channel_axis=channel_axis)
    options = BatchOptions(training, eps, nan_policy, momentum, convention)
    view.check_grad_output(grad_output)
    running = view.running(running_mean, running_var, num_batches_tracked, allow_negative_var=allow_negative_var)
    if out is not None:
        check_out("out", out, input, weight, bias, grad_output)
    if inverse:
        _check_invertible(weight, grad_output, out, training=training)
        options.check_values(input, None)
        return BatchNormResult(_inverse(view, running, *view.affine(weight, bias), eps=eps))
    counted = view.mask(mask)
    return normalize_batch(view, weight, bias, running, options, grad_output=grad_output, counted=counted, out=out)


def normalize_batch(
    view: BatchView,
    weight: Tensor | None,
    bias: Tensor | None,
    running: RunningStatistics | None,
    options: BatchOptions,
    *,
    grad_output: Tensor | None,
    counted: Tensor | None,
    out: Tensor | None = None,
) -> BatchNormResult:
    """Batch norm of operands that are checked, all but weight, bias, the number of values and the statistics."""
    seen = view.check_affine(weight, bias)
    count = view.counted(counted) if options.training else None
    if count == 0:
        return BatchNormResult.empty(view, weight, running=running, grad_output=grad_output)
    options.check_values(view.input, counted)
    updated = None
    if count is None:
        mean, var = _given(running)
        found = standardize_by(view.input, weight, bias, mean=mean, var=var, eps=options.eps, out=out, seen=seen)
    else:
        how: dict[str, Any] = {"axes": view.axes, "eps": options.eps, "mask": counted}
        found = standardize_over(view.input, weight, bias, **how, out=out, seen=seen)
        if running is not None:
            updated = options.updated_by(running, found.statistics, count=count)
    gradients = None if grad_output is None else view.gradients(grad_output, weight, bias, found.statistics)
    return BatchNormResult.of(
        found, view, before=running, updated=updated, gradients=gradients, nan_policy=options.nan_policy
    )


def _given(running: RunningStatistics | None) -> tuple[Tensor, Tensor]:
    if running is None:
        expected = "running statistics in inference (training false)"
        raise StatisticsError("running_mean", expected=expected, received="none")
    return running.mean, running.var


def _check_invertible(weight: Tensor | None, grad_output: Tensor | None, out: Tensor | None, *, training: bool) -> None:
    others = {"training": training, "grad_output": grad_output is not None, "out": out is not None}
    name = next((name for name, is_given in others.items() if is_given), None)
    if name is not None:
        raise ParameterError("inverse", expected=f"false with {name}", received="true")
    if weight is not None and bool((weight == 0).any()):
        zeros = int((weight == 0).sum())
        raise ParameterError("weight", expected="no 0 with inverse: it leaves nothing", received=f"{zeros} zeros")


def _inverse(
    view: BatchView, running: RunningStatistics | None, weight: Tensor | None, bias: Tensor | None, *, eps: float
) -> Tensor:
    mean, var = (view.in_front(own) for own in _given(running))
    scale = (var.double() + eps).sqrt()
    if weight is not None:
        scale = scale / weight.double()
    values = view.input.double()
    if bias is not None:
        values = values - bias
    return (values * scale + mean).to(view.input.dtype)


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
        TensorArgument("weight", "scale (gamma); 1 where not given", "(C,), (N, C) or the input's"),
        TensorArgument("bias", "shift (beta); 0 where not given", "the weight's"),
        TensorArgument("grad_output", "gradient of the output; gives the other gradients", "(N, C, *)"),
        TensorArgument(
            "mask",
            "BOOL, true where a position counts in the batch's statistics; all are normalized",
            "broadcasts to the input's shape without the channel axis",
        ),
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
        Parameter(
            "nan_policy",
            "str",
            "propagate",
            "Values that are not finite make their channel and its running statistics NaN, are refused, or leave all "
            "running statistics as they are.",
            choices=NAN_POLICIES,
        ),
        Parameter(
            "inverse", "bool", False, "In inference, the way back: (y - bias) / weight * sqrt(var + eps) + mean."
        ),
        Parameter(
            "allow_negative_var",
            "bool",
            False,
            "Whether a running_var that is negative or NaN is taken; var + eps below 0 gives NaN in inference.",
        ),
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
        Output("grad_input", "(N, C, *)", "gradient of the input; only with grad_output"),
        Output("grad_weight", "the weight's or (C,)", "gradient of weight, given or not; only with grad_output"),
        Output("grad_bias", "the weight's or (C,)", "gradient of bias, given or not; only with grad_output"),
    ),
    function=batch_norm,
)

# Of methods that are batch norm in training alone.
TRAINING_PARAMETERS = tuple(
    parameter for parameter in BATCH_NORM.parameters if parameter.name not in ("inverse", "allow_negative_var")
)
