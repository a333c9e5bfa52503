"""Local response normalization: every value divided by the energy of the channels around it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normcore._checks import check_floating, check_out, check_rank, check_shape
from normcore._precision import accumulation_dtype
from normcore._slab import Slab, blocks
from normcore.errors import ParameterError
from normcore.normalization.channel_response import Response, window_sums
from normcore.normalization.method import JSON, Method, Output, Parameter, ParameterValue, TensorArgument

_WINDOWS = ("torch", "onnx", "symmetric-odd")
# Between this and its inverse, powers of D up to 1 + beta leave float32 room for their products.
_FLOAT32_POWER = 1e30
# Squares of values of this size, over it, are far from the ends of float64.
_UNIT = 2.0**600
_LEAST_DIVISOR = 1e-290


@dataclass(frozen=True, slots=True)
class LocalResponseNormResult:
    """Outputs of local response normalization; None for what does not apply.

    Attributes:
        output: the input's shape, datatype and memory format.
        grad_input: gradient of the input, where grad_output was given.
    """

    output: Tensor
    grad_input: Tensor | None = None

    def diagnostics(self) -> dict[str, JSON]:
        """What makes the result questionable: the number of values that are not finite."""
        # A sum is much cheaper than the count, and finite only where all values are.
        if bool(self.output.detach().sum(dtype=accumulation_dtype(self.output.dtype)).isfinite()):
            return {}
        count = int((~self.output.isfinite()).sum())
        return {"non_finite_values": count} if count else {}


def local_response_norm(
    input: Tensor,
    grad_output: Tensor | None = None,
    *,
    size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    window: str = "torch",
    alpha_scaled_by_size: bool = True,
    out: Tensor | None = None,
) -> LocalResponseNormResult:
    """Local response normalization over windows of neighbouring channels.

    D_c = k + alpha / size * sum(x_j^2 for j in the window of c),  y = x * D^-beta
    dx = dy * D^-beta - 2 alpha beta / size * x * sum(dy_j x_j D_j^(-beta - 1) for all j whose window has c)

    The window of c runs from c - size // 2 to c + (size - 1) // 2 (torch), or from c - (size - 1) // 2 to c + size // 2
    (onnx): the same for an odd size, mirrored for an even one, which symmetric-odd refuses. Beyond the first and the
    last channel there are zeros, and the sum is divided by the size there too.

    Computed in float32 (float64 inputs, and float32 ones whose powers leave the datatype: float64; where squares leave
    float64, values are scaled by a power of two), rounded once to the input's datatype. No argument is changed but
    out. The output is differentiable in the input, to every order.

    Args:
        input: (N, C, *), float16, bfloat16, float32 or float64; it may be empty.
        grad_output: gradient of the output, of the input's shape; gives grad_input.
        size: channels in a window, >= 1; it may exceed their number.
        alpha: >= 0.
        beta: >= 0.
        k: >= 0, and > 0 where alpha is 0; with 0, a window of zeros gives 0, with gradient 0.
        window: torch, onnx or symmetric-odd.
        alpha_scaled_by_size: whether alpha is divided by the size; TensorFlow and the AlexNet paper do not divide.
        out: takes the output; of the input's shape, datatype and memory format, in memory of its own, and without
            gradients to be recorded.

    Returns:
        Output and, with grad_output, the input's gradient.

    Raises:
        DtypeError: a tensor that is not floating.
        ShapeError: an input of fewer than two dimensions, or a grad_output that is not of its shape.
        ParameterError: size, alpha, beta, k or window out of bounds, alpha and k both 0, or an even size with
            symmetric-odd.

    >>> input = torch.tensor([[3.0, 4.0, 0.0]])
    >>> local_response_norm(input, size=2, alpha=2.0, beta=0.5, k=0.0).output
    tensor([[1.0000, 0.8000, 0.0000]])
    >>> local_response_norm(input, size=2, alpha=2.0, beta=0.5, k=0.0, window="onnx").output
    tensor([[0.6000, 1.0000, 0.0000]])
    """
    check_floating("input", input)
    check_rank("input", input, minimum=2)
    options: dict[str, ParameterValue] = {"size": size, "alpha": alpha, "beta": beta, "k": k, "window": window}
    LOCAL_RESPONSE_NORM.check_parameters(options | {"alpha_scaled_by_size": alpha_scaled_by_size})
    if window == "symmetric-odd" and size % 2 == 0:
        raise ParameterError("size", expected="an odd integer with window symmetric-odd", received=repr(size))
    before = size // 2 if window == "torch" else (size - 1) // 2
    reach = max(input.shape[1] - 1, 0)
    scale = alpha / size if alpha_scaled_by_size else alpha
    if scale == k == 0:
        raise ParameterError("k", expected="a number > 0 with alpha 0, which leaves nothing else", received=repr(k))
    response = Response(min(before, reach), min(size - 1 - before, reach), scale, beta, k)
    if out is None:
        output: Tensor = _LocalResponse.apply(input, response)  # type: ignore[no-untyped-call]  # torch's has no types
    else:
        check_out("out", out, input, grad_output)
        output = _response(input, response, out)
    if grad_output is None:
        return LocalResponseNormResult(output)
    check_shape("grad_output", grad_output, input.shape, meaning="that of the input")
    return LocalResponseNormResult(output, _gradient(input, grad_output, response))


class _LocalResponse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, response: Response) -> Tensor:
        ctx.save_for_backward(input)
        ctx.response = response
        return _response(input, response)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (input,) = ctx.saved_tensors
        return _gradient(input, grad_outputs[0], ctx.response), None


def _response(input: Tensor, response: Response, out: Tensor | None = None) -> Tensor:
    slab, output = Slab.of(input, channel_axis=1), torch.empty_like(input) if out is None else out
    values = slab.seen_alike(output)
    for part, target in zip(blocks(slab.values), blocks(values), strict=True):
        target.copy_(_output(*_with_divisor(part, response), response))
    # An input with gaps is not seen as it lies, and the view of the output was a copy.
    return output if values.data_ptr() == output.data_ptr() else output.copy_(slab.restore(values))


def _gradient(input: Tensor, grad_output: Tensor, response: Response) -> Tensor:
    if torch.is_grad_enabled() and (input.requires_grad or grad_output.requires_grad):
        return _differentiable_gradient(input, grad_output, response)
    slab = Slab.of(input, channel_axis=1)
    grad_values = slab.seen_alike(grad_output)
    gradient = torch.empty_like(slab.values)
    for part, grad_part, target in zip(blocks(slab.values), blocks(grad_values), blocks(gradient), strict=True):
        values, divisor = _with_divisor(part, response)
        target.copy_(_input_gradient(values, divisor, grad_part.to(values.dtype), response))
    return slab.restore(gradient)


def _output(values: Tensor, divisor: Tensor, response: Response) -> Tensor:
    """The values times D^-beta; where D leaves float64, found from values over a power of two."""
    output = response.output(values, divisor)
    for unit, is_beyond in _beyond_float64(divisor):
        scaled, smaller = response.over(unit), values / unit
        found = scaled.output(smaller, scaled.divisor(smaller))
        output = torch.where(is_beyond, _times_power(found, unit, 1 - 2 * response.beta), output)
    return output


def _input_gradient(values: Tensor, divisor: Tensor, grad_output: Tensor, response: Response) -> Tensor:
    beyond = list(_beyond_float64(divisor.detach()))
    if not beyond:
        return response.gradient(values, grad_output, divisor)
    of_zeros = torch.zeros_like(divisor, dtype=torch.bool)
    gradient = response.gradient_without(sum((mask for _, mask in beyond), of_zeros), values, grad_output, divisor)
    for unit, is_beyond in beyond:
        scaled, smaller = response.over(unit), values / unit
        # Infinite are only values of other windows.
        smaller = smaller.masked_fill(smaller.isinf(), 0.0)
        found = scaled.gradient_without(~is_beyond, smaller, grad_output, scaled.divisor(smaller))
        # Where any of the windows that have the channel is of usual size, it outweighs the others.
        usual = window_sums((~is_beyond).double(), before=response.after, after=response.before)
        gradient = torch.where(usual == 0, _times_power(found, unit, -2 * response.beta), gradient)
    return gradient


def _beyond_float64(divisor: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Units of values whose squares leave float64, and where they do."""
    if divisor.dtype != torch.float64 or not divisor.numel():
        return
    least, most = torch.aminmax(divisor)
    if bool(most == torch.inf):
        yield _UNIT, divisor == torch.inf
    if bool(least < _LEAST_DIVISOR):
        yield 1 / _UNIT, divisor < _LEAST_DIVISOR


def _times_power(values: Tensor, unit: float, exponent: float) -> Tensor:
    """In halves, since the power alone may leave float64; zeros stay."""
    half = math.exp2(min(max(math.log2(unit) * exponent / 2, -1e3), 1e3))
    return values * half * half


def _differentiable_gradient(input: Tensor, grad_output: Tensor, response: Response) -> Tensor:
    """The same for derivatives of higher order, whole and in float64."""
    shape = (*input.shape[:2], input.shape[2:].numel())
    values, grad_values = input.double().reshape(shape), grad_output.double().reshape(shape)
    gradient = _input_gradient(values, response.divisor(values), grad_values, response)
    return gradient.reshape(input.shape).to(input.dtype)


def _with_divisor(part: Tensor, response: Response) -> tuple[Tensor, Tensor]:
    """The values and D, in float64 where their powers do not fit float32."""
    values = part.to(accumulation_dtype(part.dtype))
    most = _FLOAT32_POWER ** (1 / (1 + response.beta))
    if values.dtype != torch.float64 and response.k * most >= 1 and values.numel():
        divisor = response.divisor(values)
        if bool(divisor.amax() < most):
            return values, divisor
    values = values.double()
    return values, response.divisor(values)


LOCAL_RESPONSE_NORM = Method(
    name="local_response_norm",
    summary="Divide every value by the energy of the channels around it.",
    formula="y = x * (k + scale * sum of x^2 over the window of channels)^-beta, scale = alpha / size (or alpha)",
    source="Krizhevsky et al. 2012; torch.nn.LocalResponseNorm; ONNX LRN-13",
    tensors=(
        TensorArgument("input", "values to normalize", "(N, C, *)", is_required=True),
        TensorArgument("grad_output", "gradient of the output; gives grad_input", "(N, C, *), as the input"),
    ),
    parameters=(
        Parameter("size", "int", 5, "Channels in a window.", minimum=1),
        Parameter("alpha", "float", 1e-4, "Weight of the window's mean square.", minimum=0.0),
        Parameter("beta", "float", 0.75, "Exponent.", minimum=0.0),
        Parameter("k", "float", 1.0, "Added to the weighted mean square; above 0 where alpha is 0.", minimum=0.0),
        Parameter(
            "window",
            "str",
            "torch",
            "Where the window of an even size reaches one channel further: torch back, onnx forth; symmetric-odd "
            "refuses even sizes.",
            choices=_WINDOWS,
        ),
        Parameter(
            "alpha_scaled_by_size", "bool", True, "Whether alpha is divided by the size; TensorFlow does not divide."
        ),
    ),
    outputs=(
        Output("output", "(N, C, *), as the input", "normalized values, in the input's datatype"),
        Output("grad_input", "(N, C, *), as the input", "gradient of the input; only with grad_output"),
    ),
    function=local_response_norm,
)
