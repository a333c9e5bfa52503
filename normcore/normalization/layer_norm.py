"""Layer normalization: every sample standardized over its last axes."""

from collections.abc import Sequence

from torch import Tensor

from normcore._checks import check_eps, check_floating, check_rank, check_shape
from normcore.normalization.method import Method, Output, Parameter, TensorArgument
from normcore.normalization.per_sample import (
    GRAD_INPUT,
    GRAD_OUTPUT,
    MASK,
    Operands,
    PerSampleResult,
    grad_parameter,
    trailing_axes,
)

NORMALIZED_SHAPE = Parameter(
    "normalized_shape",
    "ints",
    None,
    'Sizes of the axes normalized over, which are the last ones of the input, such as "2,3"; null: the last axis.',
    is_nullable=True,
)


def layer_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    grad_output: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    normalized_shape: str | int | Sequence[int] | None = None,
    eps: float = 1e-5,
    out: Tensor | None = None,
) -> PerSampleResult:
    """Layer normalization over the last axes, D values of each sample.

    y = (x - mean) / sqrt(var + eps) * weight + bias
    dx = s * (a - mean(a) - xh * mean(a * xh)), with a = weight * dy, xh = (x - mean) * s, s = (var + eps)^-1/2

    The variance is biased. The output has float32 accuracy whatever the mean (float64 for a float64 input) and is
    rounded once to the input's datatype; D = 1 gives the bias. No argument is changed. The output is differentiable
    in input, weight and bias, to every order.

    Args:
        input: (*, normalized_shape), float16, bfloat16, float32 or float64; it may be empty.
        weight: normalized_shape; 1 where not given.
        bias: normalized_shape; 0 where not given.
        grad_output: gradient of the output, of the input's shape; gives the gradients of input, weight and bias.
        mask: bool, broadcasts against the input; false where a value shall not count in mean and variance.
        normalized_shape: sizes of the last axes, as integers or as text; None: the last axis.
        eps: >= 0; a constant sample with eps 0 gives NaN.
        out: takes the output; of the input's shape, datatype and memory format, in memory of its own, and without
            gradients to be recorded.

    Returns:
        Output, and statistics of shape (*, 1, ...), as gradients of weight and bias float64 for a float64 input, else
        float32.

    Raises:
        DtypeError: a tensor that is not floating, a mask that is not bool, or an out of another datatype or device.
        ShapeError: an input that does not end in normalized_shape, or another tensor that does not fit.
        ParameterError: normalized_shape or eps out of bounds.
        StatisticsError: a mask that leaves a sample without any value.

    >>> import torch
    >>> layer_norm(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), eps=1e-12).output
    tensor([[-1.,  1.],
            [ 0.,  0.]])
    """
    return operands_over_trailing_axes(
        input, weight, bias, grad_output, mask, normalized_shape=normalized_shape, eps=eps, out=out
    ).standardize(PerSampleResult, eps=eps)


def operands_over_trailing_axes(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad_output: Tensor | None,
    mask: Tensor | None,
    *,
    normalized_shape: str | int | Sequence[int] | None,
    eps: float | None,
    out: Tensor | None = None,
) -> Operands:
    check_floating("input", input)
    check_rank("input", input, minimum=1)
    shape = trailing_axes(input, normalized_shape)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_shape(name, tensor, shape, meaning="that which is normalized over")
    if eps is not None:
        check_eps("eps", eps, is_zero_allowed=True)
    outer = input.shape[: input.ndim - len(shape)]
    size = input.shape[input.ndim - len(shape) :].numel()
    return Operands(
        input,
        weight,
        bias,
        grad_output,
        mask,
        view=(outer.numel(), size),
        axes=(1,),
        affine=(size,),
        affine_shape=shape,
        statistics_shape=(*outer, *[1] * len(shape)),
        out=out,
    )


STATISTICS = "(*, 1, ...)"

LAYER_NORM = Method(
    name="layer_norm",
    summary="Standardize every sample over its last axes.",
    formula="y = (x - mean) / sqrt(var + eps) * weight + bias",
    source="Ba, Kiros and Hinton, arXiv 1607.06450; ONNX LayerNormalization-17; torch.nn.LayerNorm",
    tensors=(
        TensorArgument("input", "values to normalize", "(*, normalized_shape)", is_required=True),
        TensorArgument("weight", "scale (gamma); 1 where not given", "normalized_shape"),
        TensorArgument("bias", "shift (beta); 0 where not given", "normalized_shape"),
        GRAD_OUTPUT,
        MASK,
    ),
    parameters=(NORMALIZED_SHAPE, Parameter("eps", "float", 1e-5, "Added to the variance.", minimum=0.0)),
    outputs=(
        Output("output", "(*, normalized_shape)", "normalized values, in the input's datatype"),
        Output("mean", STATISTICS, "mean; none for an empty input"),
        Output("var", STATISTICS, "biased variance; none for an empty input"),
        Output("invstd", STATISTICS, "(var + eps)^-1/2; none for an empty input"),
        GRAD_INPUT,
        grad_parameter("weight", "normalized_shape"),
        grad_parameter("bias", "normalized_shape"),
    ),
    function=layer_norm,
)
