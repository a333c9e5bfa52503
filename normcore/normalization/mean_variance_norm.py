"""Mean-variance normalization: values centred and divided by standard deviation plus eps, over any axes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from normcore._checks import check_axes, check_eps, check_floating, check_out, check_rank, check_shape
from normcore._precision import accumulation_dtype
from normcore._slab import Slab
from normcore.normalization.closed_forms import Statistics
from normcore.normalization.kernel import own_statistics, standardize
from normcore.normalization.method import JSON, Method, Output, Parameter, TensorArgument
from normcore.normalization.value_findings import FEW_VALUES, tails, unresolved


@dataclass(frozen=True, slots=True)
class MeanVarianceNormResult:
    """Outputs of mean-variance normalization; None for what does not apply.

    Attributes:
        output: the input's shape and datatype.
        mean: mean that was subtracted; the input's shape with 1 along the axes.
        var: biased variance; the same shape.
        invstd: 1 / (sqrt(var) + eps); the same shape.
        grad_input: gradient of the input, where grad_output was given.
        eps: what was added to the standard deviations.
        input: what was normalized, for diagnostics.
    """

    output: Tensor
    mean: Tensor | None = None
    var: Tensor | None = None
    invstd: Tensor | None = None
    grad_input: Tensor | None = None
    eps: float = 0.0
    input: Tensor | None = field(default=None, repr=False)

    def diagnostics(self) -> dict[str, JSON]:
        """What makes the result questionable: numbers of groups of values that share a mean."""
        if self.mean is None or self.var is None or self.invstd is None or self.input is None:
            return {}
        flags = {
            # A variance may be too small for its datatype, and the deviations sound.
            "constant_groups": self.var == 0 if self.eps else self.invstd == 0,
            "eps_dominated_groups": (self.var > 0) & (self.var.sqrt() < self.eps),
            "unresolved_groups": unresolved(self.mean, self.var, self.output.dtype),
            "non_finite_groups": ~(self.mean.isfinite() & self.invstd.isfinite()),
        }
        counts = {name: int(flag.sum()) for name, flag in flags.items()}
        findings: dict[str, JSON] = {name: count for name, count in counts.items() if count}
        if (values := self.input.numel() // self.mean.numel()) < FEW_VALUES:
            findings["few_values_per_group"] = values
        if counts["non_finite_groups"] and (values := int((~self.input.isfinite()).sum())):
            findings["non_finite_values"] = values
        return findings | tails(self.input, self.output.detach())


def mean_variance_norm(
    input: Tensor,
    grad_output: Tensor | None = None,
    *,
    axes: str | int | Sequence[int] = "0,2,3",
    eps: float = 1e-9,
    out: Tensor | None = None,
) -> MeanVarianceNormResult:
    """Mean-variance normalization over the given axes.

    y = (x - mean) / (sqrt(var) + eps), and 0 where all values are equal
    dx = (dy - mean(dy)) / (sqrt(var) + eps) - y mean(dy y) / sqrt(var)

    The variance is biased, and eps is added outside the root, as in ONNX MeanVarianceNormalization; batch norm and its
    kin add it inside. Sums are accumulated as in batch norm, and the output is rounded once to the input's datatype. No
    argument is changed but out. The output is differentiable in the input, to every order; values that are all equal
    count as having no slope of the deviation.

    Args:
        input: (*), float16, bfloat16, float32 or float64; it may be empty.
        grad_output: gradient of the output, of the input's shape; gives grad_input.
        axes: those to reduce, from the back where negative, as a sequence or as text such as "0,2,3".
        eps: >= 0.
        out: takes the output; of the input's shape, datatype and memory format, in memory of its own, and without
            gradients to be recorded.

    Returns:
        Output, statistics (float64 for a float64 input, else float32; none for an empty input) and, with grad_output,
        the input's gradient.

    Raises:
        DtypeError: a tensor that is not floating.
        ShapeError: an input without dimensions, or a grad_output that is not of its shape.
        ParameterError: axes that the input has not, an axis twice, or eps out of bounds.

    >>> mean_variance_norm(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), axes=[1]).output
    tensor([[-1.,  1.],
            [ 0.,  0.]])
    """
    check_floating("input", input)
    check_rank("input", input, minimum=1)
    reduced = check_axes("axes", axes, rank=input.ndim)
    kept = tuple(axis for axis in range(input.ndim) if axis not in reduced)
    check_eps("eps", eps, is_zero_allowed=True)
    if grad_output is not None:
        check_shape("grad_output", grad_output, input.shape, meaning="that of the input")
    if out is not None:
        check_out("out", out, input, grad_output)
    if input.numel() == 0:
        return MeanVarianceNormResult(input.clone(), grad_input=None if grad_output is None else grad_output.clone())
    by = _statistics(input, reduced, eps=eps)
    if out is None:
        output: Tensor = _Normalize.apply(input, kept, by, eps)  # type: ignore[no-untyped-call]  # torch has no types
    else:
        output = standardize(input, by, None, None, out=out)
    grad_input = None if grad_output is None else _gradient(input, grad_output, kept, by, eps=eps)
    dtype = accumulation_dtype(input.dtype)
    mean, var, invstd = by.summary(by.mean.shape, dtype)
    return MeanVarianceNormResult(output, mean, var, invstd, grad_input, eps, input.detach())


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, kept: tuple[int, ...], by: Statistics, eps: float) -> Tensor:
        ctx.save_for_backward(input)
        ctx.kept, ctx.by, ctx.eps = kept, by, eps
        return standardize(input, by, None, None)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (input,) = ctx.saved_tensors
        return _gradient(input, grad_outputs[0], ctx.kept, ctx.by, eps=ctx.eps), None, None, None


@torch.no_grad()
def _statistics(input: Tensor, axes: tuple[int, ...], *, eps: float) -> Statistics:
    by = own_statistics(input, axes=axes, eps=0.0)
    by.invstd.copy_(_inverse(by.var.sqrt() + eps).masked_fill_(~by.var.isfinite(), torch.nan))
    return by


def _gradient(input: Tensor, grad_output: Tensor, kept: tuple[int, ...], by: Statistics, *, eps: float) -> Tensor:
    is_differentiable = torch.is_grad_enabled() and (input.requires_grad or grad_output.requires_grad)
    # Derivatives of higher order need the statistics as functions of the input, and take float64 for all of it.
    dtype = torch.float64 if is_differentiable else accumulation_dtype(input.dtype)
    slab = Slab.keeping(input.to(dtype), kept)
    grad = slab.seen_alike(grad_output.to(dtype))
    if is_differentiable:
        # Around the first value, so that values that are all equal deviate by nothing.
        shifted = slab.values - slab.values[:1, :, :1].detach()
        deviations = shifted - shifted.mean((0, 2), keepdim=True)
        std = _root(deviations.square().mean((0, 2), keepdim=True))
        inverse = _inverse(std + eps)
        output = deviations * inverse
    else:
        output = slab.seen_alike(standardize(input.to(dtype), by, None, None))
        std, inverse = (slab.per_channel(values).to(dtype)[:, None] for values in (by.var.sqrt(), by.invstd))
    projection = (grad * output).mean((0, 2), keepdim=True) * _inverse(std)
    gradient = (grad - grad.mean((0, 2), keepdim=True)) * inverse - output * projection
    return slab.restore(gradient).to(input.dtype)


def _inverse(values: Tensor) -> Tensor:
    """1 / values, and 0 with gradient 0 for 0."""
    is_zero = values == 0
    return values.masked_fill(is_zero, 1.0).reciprocal().masked_fill(is_zero, 0.0)


def _root(values: Tensor) -> Tensor:
    """The square root, with gradient 0 at 0."""
    is_zero = values == 0
    return values.masked_fill(is_zero, 1.0).sqrt().masked_fill(is_zero, 0.0)


MEAN_VARIANCE_NORM = Method(
    name="mean_variance_norm",
    summary="Centre values and divide them by their standard deviation plus eps, over any axes.",
    formula="y = (x - mean) / (sqrt(var) + eps)",
    source="ONNX MeanVarianceNormalization-13",
    tensors=(
        TensorArgument("input", "values to normalize", "(*)", is_required=True),
        TensorArgument("grad_output", "gradient of the output; gives grad_input", "(*), as the input"),
    ),
    parameters=(
        Parameter("axes", "ints", "0,2,3", "Axes to reduce, such as 0,2,3; negative ones count from the back."),
        Parameter("eps", "float", 1e-9, "Added to the standard deviation, outside the root.", minimum=0.0),
    ),
    outputs=(
        Output("output", "(*), as the input", "normalized values, in the input's datatype"),
        Output("mean", "(*), 1 along the axes", "mean that was subtracted; none for an empty input"),
        Output("var", "(*), 1 along the axes", "biased variance; none for an empty input"),
        Output("invstd", "(*), 1 along the axes", "1 / (sqrt(var) + eps); none for an empty input"),
        Output("grad_input", "(*), as the input", "gradient of the input; only with grad_output"),
    ),
    function=mean_variance_norm,
)
