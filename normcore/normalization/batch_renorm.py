"""Batch renormalization: batch norm in training, corrected towards the running statistics within bounds."""

from dataclasses import dataclass, replace

from torch import Tensor

from normcore._checks import check_fraction, check_out
from normcore._precision import accumulation_dtype
from normcore.errors import ParameterError, StatisticsError
from normcore.normalization.batch_norm import BATCH_NORM, normalize_batch
from normcore.normalization.batch_options import BatchOptions
from normcore.normalization.batch_result import BatchNormResult
from normcore.normalization.batch_view import BatchView
from normcore.normalization.gradients import Gradients, Statistics, standardize_gradients, standardize_with
from normcore.normalization.kernel import own_statistics
from normcore.normalization.method import JSON, Method, Output, Parameter
from normcore.statistics.running import RunningStatistics


@dataclass(frozen=True)
class BatchRenormResult(BatchNormResult):
    """Outputs of batch renormalization; None for what does not apply.

    Attributes:
        r: factor of the normalized values, in training; (C,).
        d: what is added to them, in training; (C,).
        clipped: channels whose r, and whose d, is at its bound.
    """

    r: Tensor | None = None
    d: Tensor | None = None
    clipped: tuple[int, int] = (0, 0)

    def diagnostics(self) -> dict[str, JSON]:
        """That of batch norm, and the numbers of channels where r or d is cut off at its bound."""
        counts = zip(("r_clipped_channels", "d_clipped_channels"), self.clipped, strict=True)
        return super().diagnostics() | {name: count for name, count in counts if count}


def batch_renorm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    grad_output: Tensor | None = None,
    mask: Tensor | None = None,
    rmax: float = 3.0,
    dmax: float = 5.0,
    training: bool = False,
    momentum: float = 0.01,
    eps: float = 1e-5,
    channel_axis: int = 1,
    nan_policy: str = "propagate",
    out: Tensor | None = None,
) -> BatchRenormResult:
    """Batch renormalization in training or inference.

    y = ((x - mean) / sqrt(var + eps) * r + d) * weight + bias
    r = clip(sqrt(var + eps) / sigma, 1 / rmax, rmax),  d = clip((mean - running_mean) / sigma, -dmax, dmax)

    Mean and biased variance are the batch's, sigma = sqrt(running_var + eps) is that before the update, and r and d
    are constants to the derivatives. rmax 1 with dmax 0 is batch norm in training; without bounds, training gives what
    inference would. Inference is that of batch norm.

    As in the paper, the running deviation moves, not the variance: sigma <- sigma + f (sqrt(var + eps) - sigma). It is
    kept as running_var = sigma^2 - eps, so that the state is that of batch norm. The paper's schedule: rmax 1 and
    dmax 0 for 5000 steps, then linearly to rmax 3 at 40000 steps and dmax 5 at 25000.

    Precision, derivatives and everything else as in `batch_norm`. No argument is changed but out.

    Args:
        input: (N, C, *); an empty one in training gives an empty output and changes no statistics.
        running_mean: (C,).
        running_var: (C,), values >= 0.
        weight: (C,), (N, C) or the input's shape; 1 where not given.
        bias: the weight's shape; 0 where not given.
        grad_output: gradient of the output, of the input's shape; gives the gradients of input, weight and bias.
        mask: bool, as in `batch_norm`.
        rmax: >= 1.
        dmax: >= 0.
        training: whether the batch's own statistics take part.
        momentum: f, weight of the new batch.
        eps: > 0 in training, >= 0 in inference.
        channel_axis: axis of the channels, from the back where negative.
        nan_policy: propagate, raise or skip_update, as in `batch_norm`.
        out: takes the output; of the input's shape, datatype and memory format, in memory of its own, and without
            gradients to be recorded.

    Returns:
        Output, statistics of the batch, updated running statistics, gradients, and r and d of shape (C,).

    Raises:
        DtypeError: a tensor that is not floating, or a mask that is not bool.
        ShapeError: a tensor that does not fit.
        ParameterError: rmax, dmax, eps, momentum, channel_axis or nan_policy out of bounds.
        StatisticsError: a running_var negative or NaN, one value per channel in training, or, with nan_policy raise,
            values that are not finite.

    >>> import torch
    >>> input = torch.tensor([[1.0], [3.0]])
    >>> batch_renorm(input, torch.zeros(1), torch.ones(1), training=True, eps=1e-12).output.flatten()
    tensor([1., 3.])
    """
    _check_bounds(rmax, dmax)
    check_fraction("momentum", momentum)
    options = BatchOptions(training, eps, nan_policy)
    view = BatchView.of(input, channel_axis=channel_axis)
    view.check_affine(weight, bias)
    counted = view.mask(mask)
    view.check_grad_output(grad_output)
    running = view.running(running_mean, running_var, None)
    if out is not None:
        check_out("out", out, input, weight, bias, grad_output)
    if running is None:
        raise StatisticsError("running_mean", expected="running statistics", received="none")
    if not training or view.counted(counted) == 0:
        plain = normalize_batch(view, weight, bias, running, options, grad_output=grad_output, counted=counted, out=out)
        return BatchRenormResult.extending(plain)
    options.check_values(input, counted)
    by = own_statistics(input, axes=view.axes, eps=eps, mask=counted)
    correction = _Correction.of(by, running, rmax=rmax, dmax=dmax)
    corrected = correction.affine(view, weight, bias)
    found = standardize_with(input, *corrected, by, out=out)
    gradients = None
    if grad_output is not None:
        shape = tuple(corrected[0].shape)
        of_affine = standardize_gradients(grad_output, input, corrected[0], by, affine_shape=shape)
        gradients = correction.gradients(view, of_affine, weight, bias)
    is_skipped = options.is_skipped(by.mean, by.var * by.count)
    updated = running if is_skipped else _updated(running, by, momentum=momentum)
    result = BatchNormResult.of(
        found, view, before=running, updated=updated, gradients=gradients, nan_policy=nan_policy
    )
    dtype = accumulation_dtype(input.dtype)
    r, d = correction.r.to(dtype), correction.d.to(dtype)
    return BatchRenormResult.extending(result, r=r, d=d, clipped=correction.clipped)


def _updated(running: RunningStatistics, by: Statistics, *, momentum: float) -> RunningStatistics:
    """Running mean and deviation after one more batch, the deviation as the variance that batch norm takes."""
    mean, std = by.mean.flatten(), by.invstd.flatten().reciprocal()
    kept_std = (running.var.double() + by.eps).sqrt()
    new_mean = running.mean.double() + momentum * (mean - running.mean.double())
    new_std = kept_std + momentum * (std - kept_std)
    var = (new_std.square() - by.eps).clamp_min(0.0)
    return RunningStatistics(new_mean.to(running.mean.dtype), var.to(running.var.dtype))


def _check_bounds(rmax: float, dmax: float) -> None:
    for name, value, least in (("rmax", rmax, 1.0), ("dmax", dmax, 0.0)):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not value >= least:
            raise ParameterError(name, expected=f"a number >= {least:g}", received=repr(value))


@dataclass(frozen=True, slots=True)
class _Correction:
    """r and d of shape (C,), float64, and how many of each are cut off at their bound."""

    r: Tensor
    d: Tensor
    clipped: tuple[int, int]

    @classmethod
    def of(cls, by: Statistics, running: RunningStatistics, *, rmax: float, dmax: float) -> "_Correction":
        std = (running.var.double() + by.eps).sqrt()
        r = (by.invstd.flatten() * std).reciprocal()
        d = (by.mean.flatten() - running.mean.double()) / std
        clipped = int(((r > rmax) | (r < 1.0 / rmax)).sum()), int((d.abs() > dmax).sum())
        return cls(r.clamp(1.0 / rmax, rmax), d.clamp(-dmax, dmax), clipped)

    def affine(self, view: BatchView, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weight and bias of the batch norm that this is, weight * r and bias + weight * d, in front of the input."""
        given = weight if weight is not None else bias
        scale, shift = self._against(view, given)
        if weight is not None:
            scale, shift = weight * scale, weight * shift
        elif given is not None:
            scale = scale.expand(given.shape)
        found = view.affine(scale, shift if bias is None else shift + bias)
        assert found[0] is not None
        assert found[1] is not None
        return found[0], found[1]

    def gradients(self, view: BatchView, of_affine: Gradients, weight: Tensor | None, bias: Tensor | None) -> Gradients:
        """Those of weight and bias, for those of `affine`."""
        given = weight if weight is not None else bias
        shape = self.r.shape if given is None else given.shape
        of_scale, of_shift = of_affine.weight.view(shape), of_affine.bias.view(shape)
        r, d = self._against(view, given)
        return Gradients(of_affine.input, (of_scale * r + of_shift * d).to(of_scale.dtype), of_shift)

    def _against(self, view: BatchView, given: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both in a shape that broadcasts against a weight or bias."""
        if given is None or given.shape != view.input.shape:
            return self.r, self.d
        return view.in_front(self.r), view.in_front(self.d)


_TENSORS = [
    replace(tensor, is_required=tensor.name in ("input", "running_mean", "running_var"))
    for tensor in BATCH_NORM.tensors
    if tensor.name != "num_batches_tracked"
]
_PARAMETERS = [
    parameter
    for parameter in BATCH_NORM.parameters
    if parameter.name in ("training", "eps", "channel_axis", "nan_policy")
]

BATCH_RENORM = Method(
    name="batch_renorm",
    summary="Batch norm whose training is corrected, within bounds, towards what inference will give.",
    formula="y = ((x - mean) / sqrt(var + eps) * r + d) * weight + bias, r = clip(sqrt(var + eps) / sigma, 1/rmax, "
    "rmax), d = clip((mean - running_mean) / sigma, -dmax, dmax), sigma = sqrt(running_var + eps)",
    source="Ioffe 2017, arXiv:1702.03275",
    tensors=tuple(_TENSORS),
    parameters=(
        *_PARAMETERS,
        Parameter("momentum", "float", 0.01, "Weight of the new batch.", minimum=0.0, maximum=1.0),
        Parameter("rmax", "float", 3.0, "Bound of r, and 1 / rmax the lower one; 1: r is 1.", minimum=1.0),
        Parameter("dmax", "float", 5.0, "Bound of |d|; 0: d is 0.", minimum=0.0),
    ),
    outputs=(
        *(output for output in BATCH_NORM.outputs if output.name != "num_batches_tracked"),
        Output("r", "(C,)", "factor towards the running deviation; only in training"),
        Output("d", "(C,)", "shift towards the running mean; only in training"),
    ),
    function=batch_renorm,
)
