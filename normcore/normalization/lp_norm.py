"""Lp normalization: every vector along an axis divided by its norm."""

from dataclasses import dataclass

import torch
from torch import Tensor

from normcore._checks import check_axis, check_eps, check_floating, check_out, check_rank, check_shape
from normcore._precision import accumulation_dtype
from normcore.errors import ParameterError
from normcore.normalization.method import JSON, Method, Output, Parameter, TensorArgument
from normcore.normalization.vector_norm import Norm

_ORDERS = ("1", "2", "inf")


@dataclass(frozen=True, slots=True)
class LpNormResult:
    """Outputs of Lp normalization; None for what does not apply.

    Attributes:
        output: the input's shape and datatype.
        norm: norms of the vectors, without gradient; the input's shape with 1 along the axis.
        grad_input: gradient of the input, where grad_output was given.
        eps: the bound that was put below the norms.
    """

    output: Tensor
    norm: Tensor
    grad_input: Tensor | None = None
    eps: float = 0.0

    def diagnostics(self) -> dict[str, JSON]:
        """What makes the result questionable: numbers of vectors."""
        flags = {
            "zero_vectors": self.norm == 0,
            "eps_dominated_vectors": (self.norm < self.eps) & (self.norm > 0),
            "non_finite_norms": ~self.norm.isfinite(),
        }
        counts = {name: int(flag.sum()) for name, flag in flags.items()}
        return {name: count for name, count in counts.items() if count}


def lp_norm(
    input: Tensor,
    grad_output: Tensor | None = None,
    *,
    p: str | float = "2",
    axis: int = -1,
    eps: float = 0.0,
    out: Tensor | None = None,
) -> LpNormResult:
    """Lp normalization along one axis.

    y = x / max(||x||_p, eps), and 0 where x is a vector of zeros
    dx = (dy - <dy, y> sign(x) |y|^(p - 1)) / ||x||_p;  dy / eps where ||x||_p < eps, and 0 where x is zero

    Sums and quotients are float64, rounded once to the input's datatype, and float64 vectors are scaled by a power of
    two where their norm would overflow or underflow: every finite vector that is not zero comes out with norm 1. No
    argument is changed but out. The output is differentiable in the input, to every order.

    torch.nn.functional.normalize has axis 1 and eps 1e-12 by default; ONNX LpNormalization has axis -1 and no eps.

    Args:
        input: (*), at least one dimension; float16, bfloat16, float32 or float64; it may be empty.
        grad_output: gradient of the output, of the input's shape; gives grad_input.
        p: 1, 2 or infinity, as a number or as text ("inf").
        axis: axis of the vectors, from the back where negative.
        eps: >= 0, and finite in the datatype of the norms.
        out: takes the output; of the input's shape, datatype and memory format, in memory of its own, and without
            gradients to be recorded.

    Returns:
        Output, norms (float64 for a float64 input, else float32) and, with grad_output, the input's gradient.

    Raises:
        DtypeError: a tensor that is not floating.
        ShapeError: an input without dimensions, or a grad_output that is not of its shape.
        ParameterError: p, axis or eps out of bounds.

    >>> import torch
    >>> lp_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).output
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """
    check_floating("input", input)
    check_rank("input", input, minimum=1)
    norm = Norm(_order(p), (check_axis("axis", axis, rank=input.ndim),), eps)
    _check_bound(eps, input)
    if out is not None:
        check_out("out", out, input, grad_output)
    output, norms = norm.divide(input, out=out)
    if grad_output is None:
        return LpNormResult(output, norms, None, eps)
    check_shape("grad_output", grad_output, input.shape, meaning="that of the input")
    grad_input, _ = norm.gradients(grad_output, input)
    return LpNormResult(output, norms, grad_input, eps)


def _check_bound(eps: float, input: Tensor) -> None:
    """Refuse what the norms cannot be compared with in their own datatype."""
    check_eps("eps", eps, is_zero_allowed=True)
    largest = torch.finfo(accumulation_dtype(input.dtype)).max
    if eps > largest:
        expected = f"at most {largest:g} for an input of this datatype"
        raise ParameterError("eps", expected=expected, received=repr(eps))


def _order(p: str | float) -> float:
    for order in _ORDERS:
        # A bool equals a number.
        if not isinstance(p, bool) and p in (order, float(order)):
            return float(order)
    raise ParameterError("p", expected=f"one of {', '.join(_ORDERS)}", received=repr(p))


LP_NORM = Method(
    name="lp_norm",
    summary="Divide every vector along an axis by its norm.",
    formula="y = x / max(||x||_p, eps), 0 for a vector of zeros",
    source="ONNX LpNormalization-22; torch.nn.functional.normalize",
    tensors=(
        TensorArgument("input", "values to normalize", "(*)", is_required=True),
        TensorArgument("grad_output", "gradient of the output; gives grad_input", "(*), as the input"),
    ),
    parameters=(
        Parameter("p", "str", "2", "Order of the norm.", choices=_ORDERS),
        Parameter("axis", "int", -1, "Axis of the vectors; a negative one counts from the back."),
        Parameter("eps", "float", 0.0, "The least that is divided by; torch has 1e-12.", minimum=0.0),
    ),
    outputs=(
        Output("output", "(*), as the input", "normalized values, in the input's datatype"),
        Output("norm", "(*), 1 along the axis", "norms of the vectors"),
        Output("grad_input", "(*), as the input", "gradient of the input; only with grad_output"),
    ),
    function=lp_norm,
)
