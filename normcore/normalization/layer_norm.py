"""Layer normalization: every sample standardized over its last axes."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from normcore._checks import check_eps, check_floating, check_rank
from normcore.errors import ShapeError
from normcore.normalization.gradients import AS_GIVEN, Seen
from normcore.normalization.method import Method, Output, Parameter, TensorArgument
from normcore.normalization.per_sample import (
    GRAD_INPUT,
    GRAD_OUTPUT,
    MASK,
    Groups,
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
        weight: normalized_shape, or for an adaptive norm as many axes as the input and broadcast against it, such as
            (N, 1, D) for those of each sample; 1 where not given.
        bias: the same; of the weight's shape where both are given. 0 where not given.
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
    affine_shape = _affine_shape(weight, bias, input=input, shape=shape)
    if eps is not None:
        check_eps("eps", eps, is_zero_allowed=True)
    groups = _groups(input.shape, len(shape), affine_shape)
    return Operands.of(input, weight, bias, grad_output, mask, groups, out=out)


@lru_cache(1024)
def _groups(sizes: torch.Size, count: int, affine_shape: tuple[int, ...]) -> Groups:
    """Groups over the last axes, `count` of them."""
    rank = len(sizes) - count
    outer, shape = sizes[:rank], sizes[rank:]
    statistics_shape = (*outer, *[1] * count)
    if affine_shape != shape:
        return Groups(AS_GIVEN, tuple(range(rank, len(sizes))), affine_shape, statistics_shape)
    size = shape.numel()
    return Groups(Seen((outer.numel(), size), (size,)), (1,), affine_shape, statistics_shape)


def _affine_shape(
    weight: Tensor | None, bias: Tensor | None, *, input: Tensor, shape: tuple[int, ...]
) -> tuple[int, ...]:
    """The one shape of weight and bias: the normalized one, or of the input's rank and broadcast against it."""
    own: tuple[int, ...] | None = None
    for name, term in (("weight", weight), ("bias", bias)):
        if term is None:
            continue
        check_floating(name, term)
        if own is not None and term.shape != own:
            raise ShapeError(name, expected=f"the weight's shape {own}", received=f"shape {tuple(term.shape)}")
        if term.shape == shape:
            own = shape
            continue
        sizes = zip(term.shape, input.shape, strict=False)
        if term.ndim != input.ndim or any(size not in (1, whole) for size, whole in sizes):
            expected = f"shape {shape}, that which is normalized over, or for an adaptive norm {input.ndim} axes that "
            expected += f"broadcast against {tuple(input.shape)}"
            raise ShapeError(name, expected=expected, received=f"shape {tuple(term.shape)}")
        own = tuple(term.shape)
    return shape if own is None else own


STATISTICS = "(*, 1, ...)"
AFFINE = "normalized_shape, or the input's number of axes and broadcast against it"

LAYER_NORM = Method(
    name="layer_norm",
    summary="Standardize every sample over its last axes.",
    formula="y = (x - mean) / sqrt(var + eps) * weight + bias",
    source="Ba, Kiros and Hinton, arXiv 1607.06450; ONNX LayerNormalization-17; torch.nn.LayerNorm",
    tensors=(
        TensorArgument("input", "values to normalize", "(*, normalized_shape)", is_required=True),
        TensorArgument("weight", "scale (gamma); 1 where not given", AFFINE),
        TensorArgument("bias", "shift (beta); 0 where not given", "the weight's, or as one"),
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
        grad_parameter("weight", "the weight's or normalized_shape"),
        grad_parameter("bias", "the weight's or normalized_shape"),
    ),
    function=layer_norm,
)
