"""RMS normalization: every sample divided by its root mean square over its last axes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normcore._checks import check_floating
from normcore._precision import accumulation_dtype
from normcore.normalization.layer_norm import AFFINE, NORMALIZED_SHAPE, STATISTICS, operands_over_trailing_axes
from normcore.normalization.method import JSON, Method, Output, Parameter, TensorArgument
from normcore.normalization.per_sample import (
    GRAD_INPUT,
    GRAD_OUTPUT,
    MASK,
    PerSampleResult,
    grad_parameter,
)


@dataclass(frozen=True)
class RmsNormResult(PerSampleResult):
    """Outputs of RMS norm; None for what does not apply, as the mean."""

    @property
    def mean_square(self) -> Tensor | None:
        """Mean of the squares of each sample."""
        return self.var

    @property
    def count(self) -> None:
        """Not counted: a mean square of few values, or of one, is sound."""
        return

    def diagnostics(self) -> dict[str, JSON]:
        """What makes the result questionable: numbers of groups (samples)."""
        findings = super().diagnostics()
        if self.var is not None and bool((self.var == 0).any()):
            findings["zero_groups"] = int((self.var == 0).sum())
        return findings


def rms_norm(
    input: Tensor,
    weight: Tensor | None = None,
    grad_output: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    normalized_shape: str | int | Sequence[int] | None = None,
    eps: float | None = None,
    weight_plus_one: bool = False,
    cast_before_scale: bool = False,
    out: Tensor | None = None,
) -> RmsNormResult:
    """RMS normalization over the last axes, D values of each sample.

    y = x / sqrt(mean(x^2) + eps) * weight
    dx = s * (a - xh * mean(a * xh)), with a = weight * dy, xh = x * s, s = (mean(x^2) + eps)^-1/2

    Squares are summed in float64, and of half precision in float32 within blocks where that holds them; the output is
    rounded once to the input's datatype, unless cast_before_scale. No argument is changed but out. The output is
    differentiable in input and weight, to every order.

    Language models have variants: Gemma multiplies by 1 + weight, Llama rounds x / sqrt(...) to the input's datatype
    before it multiplies. Derivatives are those without that rounding.

    Args:
        input: (*, normalized_shape), float16, bfloat16, float32 or float64; it may be empty.
        weight: normalized_shape, or for an adaptive norm as many axes as the input and broadcast against it; without it
            nothing is multiplied by.
        grad_output: gradient of the output, of the input's shape; gives the gradients of input and weight.
        mask: bool, broadcasts against the input; false where a value shall not count in the mean square.
        normalized_shape: sizes of the last axes, as integers or as text; None: the last axis.
        eps: >= 0; None: the machine epsilon of the datatype computed in, 1.19e-7, or 2.22e-16 for a float64 input, as
            torch has it. ONNX has 1e-5. A sample of zeros with eps 0 gives NaN.
        weight_plus_one: whether the factor is 1 + weight.
        cast_before_scale: whether values are rounded to the input's datatype before and after they are multiplied.
        out: takes the output; of the input's shape, datatype and memory format, in memory of its own, and without
            gradients to be recorded.

    Returns:
        Output, and statistics of shape (*, 1, ...), as the gradient of the weight float64 for a float64 input, else
        float32.

    Raises:
        DtypeError: a tensor that is not floating, a mask that is not bool, or an out of another datatype or device.
        ShapeError: an input that does not end in normalized_shape, or another tensor that does not fit.
        ParameterError: normalized_shape or eps out of bounds.
        StatisticsError: a mask that leaves a sample without any value.

    >>> rms_norm(torch.tensor([[1.0, 7.0], [0.0, 0.0]])).output
    tensor([[0.2000, 1.4000],
            [0.0000, 0.0000]])
    """
    if weight_plus_one and weight is not None:
        check_floating("weight", weight)
        weight = weight.double() + 1.0
    operands = operands_over_trailing_axes(
        input, weight, None, grad_output, mask, normalized_shape=normalized_shape, eps=eps, out=out
    )
    added = torch.finfo(accumulation_dtype(input.dtype)).eps if eps is None else eps
    return operands.standardize(RmsNormResult, eps=added, has_mean=False, is_cast_first=cast_before_scale)


RMS_NORM = Method(
    name="rms_norm",
    summary="Divide every sample by its root mean square over its last axes.",
    formula="y = x / sqrt(mean(x^2) + eps) * weight",
    source="Zhang and Sennrich, arXiv 1910.07467; ONNX RMSNormalization-23; torch.nn.RMSNorm",
    tensors=(
        TensorArgument("input", "values to normalize", "(*, normalized_shape)", is_required=True),
        TensorArgument("weight", "scale (gamma); 1 where not given", AFFINE),
        GRAD_OUTPUT,
        MASK,
    ),
    parameters=(
        NORMALIZED_SHAPE,
        Parameter(
            "eps",
            "float",
            None,
            "Added to the mean square; null: machine epsilon of the datatype computed in.",
            is_nullable=True,
            minimum=0.0,
        ),
        Parameter("weight_plus_one", "bool", False, "Whether the factor is 1 + weight, as in Gemma."),
        Parameter(
            "cast_before_scale",
            "bool",
            False,
            "Whether values are rounded to the input's datatype before they are multiplied, as in Llama.",
        ),
    ),
    outputs=(
        Output("output", "(*, normalized_shape)", "normalized values, in the input's datatype"),
        Output("mean_square", STATISTICS, "mean of the squares; none for an empty input"),
        Output("invstd", STATISTICS, "(mean_square + eps)^-1/2; none for an empty input"),
        GRAD_INPUT,
        grad_parameter("weight", "the weight's or normalized_shape"),
    ),
    function=rms_norm,
)
