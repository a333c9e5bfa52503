"""Weight normalization: the direction of every row of a weight, times a length of its own."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from normcore._checks import check_axis, check_floating, check_rank, check_shape
from normcore._precision import accumulation_dtype
from normcore.errors import ShapeError
from normcore.normalization.method import JSON, Method, Output, Parameter, TensorArgument
from normcore.normalization.vector_norm import Norm


@dataclass(frozen=True, slots=True)
class WeightNormResult:
    """Outputs of weight norm; None for what does not apply.

    Attributes:
        output: the weight; the input's shape and datatype.
        norm: norms of the rows of the input, without gradient; the input's shape with 1 along all axes but `axis`.
        grad_input: gradient of the input, where grad_output was given.
        grad_g: gradient of g, where grad_output and g were given; g's shape and datatype.
    """

    output: Tensor
    norm: Tensor
    grad_input: Tensor | None = None
    grad_g: Tensor | None = None

    def diagnostics(self) -> dict[str, JSON]:
        """What makes the result questionable: numbers of rows."""
        flags = {"zero_rows": self.norm == 0, "non_finite_norms": ~self.norm.isfinite()}
        counts = {name: int(flag.sum()) for name, flag in flags.items()}
        return {name: count for name, count in counts.items() if count}


def weight_norm(
    input: Tensor,
    g: Tensor | None = None,
    grad_output: Tensor | None = None,
    *,
    axis: int | None = 0,
    log_g: bool = False,
) -> WeightNormResult:
    """Weight normalization.

    w = g * v / ||v||, and 0 for a row of zeros
    dg = <dw, v> / ||v||,  dv = (g / ||v||) * (dw - <dw, v / ||v||> v / ||v||);  both 0 for a row of zeros

    The Euclidean norm is taken over all axes but one, or over all. Sums and products are float64, rounded once to the
    input's datatype, and rows of float64 are scaled by a power of two where their norm would overflow or underflow. No
    argument is changed. The output is differentiable in the input and g, to every order. torch gives NaN
    for a row of zeros, and takes its axis -1 for all axes.

    Args:
        input: direction v, (*), at least one dimension; float16, bfloat16, float32 or float64.
        g: lengths of the rows, one per index of the axis (a single one where axis is None): (C,), or the shape that
            broadcasts against the input; 1 where not given. `norm` of an existing weight, with that weight as input,
            gives back the weight.
        grad_output: gradient of the output, of the input's shape; gives grad_input, and grad_g where g is given.
        axis: axis that is kept, from the back where negative; None: one norm for all.
        log_g: whether g holds the logarithms of the lengths.

    Returns:
        Output, norms (float64 for a float64 input, else float32) and, with grad_output, gradients.

    Raises:
        DtypeError: a tensor that is not floating.
        ShapeError: an input without dimensions, a g that is not one length per row, or a grad_output that is not of
            the input's shape.
        ParameterError: an axis that the input has not.

    >>> weight_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([10.0, 1.0])).output
    tensor([[6., 8.],
            [0., 0.]])
    """
    check_floating("input", input)
    check_rank("input", input, minimum=1)
    kept = None if axis is None else check_axis("axis", axis, rank=input.ndim)
    if grad_output is not None:
        check_shape("grad_output", grad_output, input.shape, meaning="that of the input")
    # An axis more, of one value, so that there is one to sum over where the input has no other than the one kept.
    values = input[:, None] if input.ndim == 1 else input
    axes = tuple(other for other in range(values.ndim) if other != kept)
    rows = tuple(size if index == kept else 1 for index, size in enumerate(input.shape))
    norm = Norm(2, axes)
    length = None if g is None else _length(g, rows, dtype=accumulation_dtype(input.dtype), log_g=log_g)
    factor = None if length is None else length.reshape(*rows, *[1] * (values.ndim - input.ndim))
    output, norms = norm.divide(values, factor)
    result = WeightNormResult(output.reshape(input.shape), norms.reshape(rows))
    if grad_output is None:
        return result
    grad_input, grad_length = norm.gradients(grad_output.reshape(values.shape), values, factor)
    grad_g = None
    if g is not None and length is not None and grad_length is not None:
        grad_length = grad_length.reshape(rows)
        grad_g = (grad_length * length if log_g else grad_length).reshape(g.shape).to(g.dtype)
    return replace(result, grad_input=grad_input.reshape(input.shape), grad_g=grad_g)


def _length(g: Tensor, rows: tuple[int, ...], *, dtype: torch.dtype, log_g: bool) -> Tensor:
    """One length per row, in the shape of the norms."""
    check_floating("g", g)
    count = math.prod(rows)
    if tuple(g.shape) not in ((count,), rows) and not (g.numel() == count == 1):
        expected = f"shape ({count},) or {rows}, one length per row"
        raise ShapeError("g", expected=expected, received=f"shape {tuple(g.shape)}")
    length = g.to(dtype).reshape(rows)
    return length.exp() if log_g else length


WEIGHT_NORM = Method(
    name="weight_norm",
    summary="Give the direction of every row of a weight a length of its own.",
    formula="w = g * v / ||v||, 0 for a row of zeros",
    source="Salimans and Kingma 2016, arXiv:1602.07868; torch.nn.utils.parametrizations.weight_norm",
    tensors=(
        TensorArgument("input", "direction v", "(*)", is_required=True),
        TensorArgument(
            "g", "lengths of the rows, or their logarithms; 1 where not given", "(C,), or 1 along the others"
        ),
        TensorArgument("grad_output", "gradient of the output; gives grad_input and grad_g", "(*), as the input"),
    ),
    parameters=(
        Parameter(
            "axis",
            "int",
            0,
            "Axis of the rows, from the back where negative; null: one norm for all.",
            is_nullable=True,
        ),
        Parameter("log_g", "bool", False, "Whether g holds the logarithms of the lengths."),
    ),
    outputs=(
        Output("output", "(*), as the input", "the weight, in the input's datatype"),
        Output("norm", "(*), 1 along all axes but the one", "norms of the rows of the input"),
        Output("grad_input", "(*), as the input", "gradient of the input; only with grad_output"),
        Output("grad_g", "as g", "gradient of g; only with grad_output and g"),
    ),
    function=weight_norm,
)
