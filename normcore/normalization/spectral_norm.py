"""Spectral normalization: a weight divided by the largest singular value of its matrix."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from normcore._checks import check_axis, check_floating, check_rank, check_shape
from normcore._precision import accumulation_dtype
from normcore.errors import ShapeError, StatisticsError
from normcore.normalization.method import JSON, Method, Output, Parameter, ParameterValue, TensorArgument

# What torch makes when a weight is registered.
_FIRST_ITERATIONS = 15


@dataclass(frozen=True, slots=True)
class SpectralNormResult:
    """Outputs of spectral norm; None for what does not apply.

    Attributes:
        output: the input's shape and datatype.
        sigma: what the input was divided by, without gradient; shape ().
        u: left singular vector, the new state; (out,).
        v: right singular vector, the new state; (rest,).
        grad_input: gradient of the input, where grad_output was given.
    """

    output: Tensor
    sigma: Tensor
    u: Tensor
    v: Tensor
    grad_input: Tensor | None = None

    def diagnostics(self) -> dict[str, JSON]:
        """What makes the result questionable: a matrix of zeros, or a sigma that is not finite."""
        if not bool(self.sigma.isfinite()):
            return {"non_finite_sigma": 1}
        return {"zero_matrix": 1} if bool(self.sigma == 0) else {}


def spectral_norm(
    input: Tensor,
    u: Tensor | None = None,
    v: Tensor | None = None,
    grad_output: Tensor | None = None,
    *,
    axis: int = 0,
    iterations: int = 1,
    exact: bool = False,
) -> SpectralNormResult:
    """Spectral normalization of a weight, seen as a matrix W of one row per index of an axis.

    iterations times: u <- W v / ||W v||, v <- W^T u / ||W^T u||;  sigma = u^T W v;  y = W / sigma
    dW = (dy - <dy, y> u v^T) / sigma, with u and v constants

    With iterations = 0, u and v are taken as they are, as a served model does. Where only one is given, the other
    follows from it; where neither is, v starts from a vector that is always the same, and 15 iterations more are made.
    `exact` takes the largest singular value and its vectors from a decomposition in float64, and no state.

    Computed in float32 (float64 inputs: float64), rounded once to the input's datatype; a matrix whose squares would
    leave the datatype is scaled by a power of two. A matrix of zeros gives zeros with gradient 0, and keeps the state.
    No argument is changed: the new state is returned, where torch overwrites it on every access in training. The output
    is differentiable in the input, to every order. This is the norm of the matrix, not that of the convolution.

    Args:
        input: weight, (*), at least one dimension; float16, bfloat16, float32 or float64.
        u: left singular vector, (out,), of length 1; any floating datatype.
        v: right singular vector, (rest,), of length 1; any floating datatype.
        grad_output: gradient of the output, of the input's shape; gives grad_input.
        axis: axis of the rows, from the back where negative.
        iterations: 0 to 1000; with 0, u or v has to be given unless `exact`.
        exact: whether to decompose the matrix.

    Returns:
        Output, sigma, u and v (float64 for a float64 input, else float32) and, with grad_output, the input's gradient.

    Raises:
        DtypeError: a tensor that is not floating.
        ShapeError: an input that is empty or without dimensions, or a tensor whose shape does not fit it.
        ParameterError: axis or iterations out of bounds.
        StatisticsError: iterations 0 without u and v, u or v with `exact`, values that are not finite with `exact`, or
            vectors that give a sigma of 0 for a matrix that is not zero.

    >>> result = spectral_norm(torch.tensor([[4.0, 0.0], [0.0, 2.0]]), exact=True)
    >>> result.output, result.sigma
    (tensor([[1.0000, 0.0000],
            [0.0000, 0.5000]]), tensor(4.))
    """
    check_floating("input", input)
    check_rank("input", input, minimum=1)
    if input.numel() == 0:
        raise ShapeError("input", expected="a matrix that is not empty", received=f"shape {tuple(input.shape)}")
    axis = check_axis("axis", axis, rank=input.ndim)
    options: dict[str, ParameterValue] = {"iterations": iterations, "exact": exact}
    SPECTRAL_NORM.check_parameters(options)
    values = input.to(accumulation_dtype(input.dtype))
    state = _checked_state(_matrix(values, axis), u, v, exact=exact)
    sigma, u, v = _largest(_matrix(values, axis), *state, iterations=iterations, exact=exact)
    scale = 1.0
    if not _is_usual(sigma):
        # What is summed leaves the datatype, or is zero.
        scale = _power_of_two(values)
        values = values / scale
        sigma, u, v = _largest(_matrix(values, axis), *state, iterations=iterations, exact=exact)
    is_zero = bool(sigma == 0)
    if is_zero and bool(values.any()):
        raise StatisticsError("v", expected="u and v with u^T W v other than 0", received="vectors orthogonal to W")
    # A matrix of zeros times 0 is zeros without a slope.
    output = values * 0.0 if is_zero else values / sigma
    result = SpectralNormResult(output.to(input.dtype), (sigma * scale).detach(), u, v)
    if grad_output is None:
        return result
    check_shape("grad_output", grad_output, input.shape, meaning="that of the input")
    grad_values = grad_output.to(values.dtype)
    projection = (grad_values * output).sum()
    slope = torch.outer(projection * u, v).view(values.movedim(axis, 0).shape).movedim(0, axis)
    deviation = grad_values - slope
    grad_input = deviation * 0.0 if is_zero else deviation / (sigma * scale)
    return replace(result, grad_input=grad_input.to(input.dtype))


def _matrix(values: Tensor, axis: int) -> Tensor:
    return values.movedim(axis, 0).flatten(1) if values.ndim > 1 else values[:, None]


def _is_usual(sigma: Tensor) -> bool:
    limit = torch.finfo(sigma.dtype).max ** 0.4
    return bool(1 / limit < abs(float(sigma.detach())) < limit)


def _power_of_two(values: Tensor) -> float:
    """The largest one that is not above the largest value; 1 where that is 0 or not finite."""
    peak = float(values.detach().abs().max())
    return math.ldexp(1.0, math.frexp(peak)[1] - 1) if 0 < peak < math.inf else 1.0


def _largest(
    matrix: Tensor, u: Tensor | None, v: Tensor | None, *, iterations: int, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # Products in half precision would end the iteration three digits early.
    with torch.autocast(matrix.device.type, enabled=False):
        return _decomposed(matrix) if exact else _iterated(matrix, u, v, iterations=iterations)


def _checked_state(
    matrix: Tensor, u: Tensor | None, v: Tensor | None, *, exact: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Copies in the matrix's datatype."""
    state: list[Tensor | None] = []
    for name, vector, size in (("u", u, matrix.shape[0]), ("v", v, matrix.shape[1])):
        if vector is not None:
            check_shape(name, vector, (size,), meaning="that of a singular vector of the input's matrix")
            if exact:
                raise StatisticsError(name, expected="none with exact, which has no state", received="a tensor")
            vector = vector.detach().to(matrix.dtype, copy=True)
        state.append(vector)
    return state[0], state[1]


def _decomposed(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular value, and its vectors without gradient."""
    if not bool(matrix.isfinite().all()):
        raise StatisticsError("input", expected="finite values with exact", received="NaN or infinity")
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    u, v = (vector.detach().to(matrix.dtype) for vector in (left[:, 0], right[0]))
    return values[0].to(matrix.dtype), u, v


def _iterated(matrix: Tensor, u: Tensor | None, v: Tensor | None, *, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """u^T W v, and u and v after the iterations."""
    constant = matrix.detach()
    if u is None and v is None:
        if iterations == 0:
            raise StatisticsError("u", expected="u or v with iterations 0", received="none")
        iterations += _FIRST_ITERATIONS
    if v is None:
        v = _start(matrix, axis=1)
        v = v if u is None else _unit(constant.T @ u, otherwise=v)
    if u is None:
        u = _unit(constant @ v, otherwise=_start(matrix, axis=0))
    product = None
    for _ in range(iterations):
        u = _unit(constant @ v, otherwise=u)
        product = matrix.T @ u
        v = _unit(product.detach(), otherwise=v)
    return torch.dot(matrix.T @ u if product is None else product, v), u, v


def _start(matrix: Tensor, *, axis: int) -> Tensor:
    """A unit vector that is always the same; random, so that it is orthogonal to no singular vector."""
    generator = torch.Generator().manual_seed(axis)
    vector = torch.randn(matrix.shape[axis], generator=generator, dtype=torch.float64)
    unit: Tensor = vector / torch.linalg.vector_norm(vector)
    return unit.to(matrix.device, matrix.dtype)


def _unit(vector: Tensor, *, otherwise: Tensor) -> Tensor:
    """The vector with length 1; the other one where it has no direction, so that the state survives."""
    norm = torch.linalg.vector_norm(vector, dtype=torch.float64)
    return vector / norm if 0 < float(norm) < math.inf else otherwise


SPECTRAL_NORM = Method(
    name="spectral_norm",
    summary="Divide a weight by the largest singular value of its matrix.",
    formula="y = W / sigma, sigma = u^T W v",
    source="Miyato et al. 2018, arXiv:1802.05957; torch.nn.utils.parametrizations.spectral_norm",
    tensors=(
        TensorArgument("input", "weight, one row per index of the axis", "(*)", is_required=True),
        TensorArgument("u", "left singular vector: the state before", "(out,)"),
        TensorArgument("v", "right singular vector: the state before", "(rest,)"),
        TensorArgument("grad_output", "gradient of the output; gives grad_input", "(*), as the input"),
    ),
    parameters=(
        Parameter("axis", "int", 0, "Axis of the rows; a negative one counts from the back."),
        Parameter(
            "iterations",
            "int",
            1,
            "Steps of the power iteration; 0 takes u and v as they are.",
            minimum=0,
            maximum=1000,
        ),
        Parameter("exact", "bool", False, "Decompose the matrix instead; takes no state."),
    ),
    outputs=(
        Output("output", "(*), as the input", "the weight over sigma, in the input's datatype"),
        Output("sigma", "()", "what the input was divided by"),
        Output("u", "(out,)", "left singular vector: the state after"),
        Output("v", "(rest,)", "right singular vector: the state after"),
        Output("grad_input", "(*), as the input", "gradient of the input; only with grad_output"),
    ),
    function=spectral_norm,
)
