"""Group normalization: the channels of every sample standardized in groups."""

from functools import lru_cache

import torch
from torch import Tensor

from normcore._checks import check_eps, check_floating, check_rank
from normcore.errors import ParameterError
from normcore.normalization.gradients import Seen
from normcore.normalization.method import Method, Output, Parameter, TensorArgument
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


def group_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    grad_output: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    num_groups: int = 32,
    eps: float = 1e-5,
    out: Tensor | None = None,
) -> PerSampleResult:
    """Group normalization: statistics over C / G neighbouring channels and all positions of a sample.

    y = (x - mean) / sqrt(var + eps) * weight + bias
    dx = s * (a - mean(a) - xh * mean(a * xh)), with a = weight * dy, xh = (x - mean) * s, s = (var + eps)^-1/2

    The variance is biased. The output has float32 accuracy whatever the mean and the memory format (float64 for a
    float64 input), is rounded once to the input's datatype and keeps the memory format. A group of one value gives the
    bias, and a diagnostic says so; torch refuses it for one sample and gives the bias for more. No argument is
    changed. The output is differentiable in input, weight and bias, to every order.

    Args:
        input: (N, C, *), float16, bfloat16, float32 or float64; it may be empty.
        weight: (C,), or for an adaptive norm (N, C) or the input's shape; 1 where not given.
        bias: the same; of the weight's shape where both are given.
        grad_output: gradient of the output, of the input's shape; gives the gradients of input, weight and bias.
        mask: bool, broadcasts against the input; false where a value shall not count in mean and variance.
        num_groups: G, a divisor of C.
        eps: >= 0; a constant group with eps 0 gives NaN.
        out: takes the output; of the input's shape, datatype and memory format, in memory of its own, and without
            gradients to be recorded.

    Returns:
        Output, and statistics of shape (N, G), as gradients of weight and bias float64 for a float64 input, else
        float32.

    Raises:
        DtypeError: a tensor that is not floating, a mask that is not bool, or an out of another datatype or device.
        ShapeError: an input of fewer than two dimensions, or another tensor that does not fit.
        ParameterError: num_groups or eps out of bounds.
        StatisticsError: a mask that leaves a group without any value.

    >>> import torch
    >>> group_norm(torch.tensor([[1.0, 3.0, 2.0, 8.0]]), num_groups=2, eps=1e-12).output
    tensor([[-1.,  1., -1.,  1.]])
    """
    check_floating("input", input)
    check_rank("input", input, minimum=2)
    channels = input.shape[1]
    _check_num_groups(num_groups, channels=channels)
    affine_shape = check_channel_affine(weight, bias, input=input)
    check_eps("eps", eps, is_zero_allowed=True)
    # No channels are a single group of none, whatever the number that divides them.
    groups = _groups(input.shape, num_groups if channels else 1, affine_shape)
    operands = Operands.of(input, weight, bias, grad_output, mask, groups, out=out)
    return operands.standardize(PerSampleResult, eps=eps)


@lru_cache(1024)
def _groups(sizes: torch.Size, groups: int, affine_shape: tuple[int, ...]) -> Groups:
    samples, size, positions = sizes[0], sizes[1] // groups, sizes[2:].numel()
    rank = len(affine_shape)
    affine = (samples if rank > 1 else 1, groups, size, positions if rank > 2 else 1)
    return Groups(Seen((samples, groups, size, positions), affine), (2, 3), affine_shape, (samples, groups))


def _check_num_groups(num_groups: int, *, channels: int) -> None:
    is_integer = isinstance(num_groups, int) and not isinstance(num_groups, bool)
    if not is_integer or num_groups < 1 or channels % num_groups:
        expected = f"an integer >= 1 that divides the input's {channels} channels"
        raise ParameterError("num_groups", expected=expected, received=repr(num_groups))


GROUP_NORM = Method(
    name="group_norm",
    summary="Standardize the channels of every sample in groups.",
    formula="y = (x - mean) / sqrt(var + eps) * weight + bias",
    source="Wu and He, arXiv 1803.08494; ONNX GroupNormalization-21; torch.nn.GroupNorm",
    tensors=(
        TensorArgument("input", "values to normalize", "(N, C, *)", is_required=True),
        TensorArgument("weight", "scale (gamma); 1 where not given", "(C,), (N, C) or the input's"),
        TensorArgument("bias", "shift (beta); 0 where not given", "the weight's"),
        GRAD_OUTPUT,
        MASK,
    ),
    parameters=(
        Parameter("num_groups", "int", 32, "Number of groups, a divisor of the channels.", minimum=1),
        Parameter("eps", "float", 1e-5, "Added to the variance.", minimum=0.0),
    ),
    outputs=(
        Output("output", "(N, C, *)", "normalized values, in the input's datatype"),
        Output("mean", "(N, G)", "mean; none for an empty input"),
        Output("var", "(N, G)", "biased variance; none for an empty input"),
        Output("invstd", "(N, G)", "(var + eps)^-1/2; none for an empty input"),
        GRAD_INPUT,
        grad_parameter("weight", "(C,), (N, C) or the input's"),
        grad_parameter("bias", "(C,), (N, C) or the input's"),
    ),
    function=group_norm,
)
