"""Local response norm against its formula in long double, torch and its own gradients; windows, ranges, refusals."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from normcore.errors import ArgumentError, DtypeError, ParameterError, ShapeError
from normcore.normalization import local_response_norm
from tests.normcore.normalization.oracle import LongDouble, exact

# Errors as a share of a value (half a unit in its last place) and of the largest value.
TOLERANCE = {
    torch.float16: (2.0**-11, 1e-6),
    torch.bfloat16: (2.0**-8, 1e-6),
    torch.float32: (0.0, 5e-7),
    torch.float64: (0.0, 1e-15),
}


def _randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _windows(channels: int, size: int, window: str) -> list[range]:
    half = (size - 1) // 2
    before, after = {"torch": (size // 2, half), "onnx": (half, size // 2), "symmetric-odd": (half, half)}[window]
    return [range(max(0, c - before), min(channels - 1, c + after) + 1) for c in range(channels)]


def _oracle(
    input: Tensor, *, size: int, alpha: float, beta: float, k: float, window: str, grad_output: Tensor | None = None
) -> LongDouble:
    """The output, or the input's gradient, one channel after the other."""
    values = exact(input)
    windows = _windows(values.shape[1], size, window)
    weight, exponent = np.longdouble(alpha) / size, np.longdouble(beta)
    divisor = np.stack([np.longdouble(k) + weight * (values[:, w] ** 2).sum(1) for w in map(list, windows)], 1)
    if grad_output is None:
        output: LongDouble = values * divisor**-exponent
        return output
    grads = exact(grad_output)
    gradient: LongDouble = grads * divisor**-exponent
    for j, reached in enumerate(windows):
        for c in reached:
            slope = -exponent * divisor[:, j] ** (-exponent - 1) * 2 * weight * values[:, c]
            gradient[:, c] += grads[:, j] * values[:, j] * slope
    return gradient


OPTIONS = [
    {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 2.0},
    {"size": 4, "alpha": 0.3, "beta": 0.5, "k": 1.0},
    {"size": 1, "alpha": 0.5, "beta": 0.6, "k": 0.5},
    {"size": 7, "alpha": 2.0, "beta": 1.3, "k": 0.1},
    {"size": 100, "alpha": 1.0, "beta": 0.75, "k": 1e-8},
    {"size": 2, "alpha": 0.1, "beta": 0.0, "k": 1.0},
    {"size": 3, "alpha": 0.0, "beta": 0.75, "k": 3.0},
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", ["torch", "onnx"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_output_and_gradient_equal_the_formula(options: dict[str, float], window: str, dtype: torch.dtype) -> None:
    input, grad_output = _randn(3, 9, 4, 5, dtype=dtype), _randn(3, 9, 4, 5, dtype=dtype, seed=1)
    result = local_response_norm(input, grad_output, window=window, **options)  # type: ignore[arg-type]  # size is whole
    output = _oracle(input, window=window, **options)  # type: ignore[arg-type]
    gradient = _oracle(input, window=window, grad_output=grad_output, **options)  # type: ignore[arg-type]
    assert result.grad_input is not None
    for computed, expected in ((result.output, output), (result.grad_input, gradient)):
        assert computed.dtype == dtype
        of_value, of_largest = TOLERANCE[dtype]
        magnitude = np.abs(expected)
        assert (np.abs(exact(computed) - expected) <= of_value * magnitude + of_largest * magnitude.max()).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 16, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(2, 8, 5), (2, 8, 3, 5), (2, 8, 3, 2, 2)], ids=str)
def test_output_equals_torch(shape: tuple[int, ...], dtype: torch.dtype, size: int) -> None:
    input = _randn(*shape, dtype=dtype) * 3
    output = local_response_norm(input, size=size, alpha=0.1, beta=0.6, k=1.5).output
    expected = functional.local_response_norm(input, size, alpha=0.1, beta=0.6, k=1.5)
    assert torch.allclose(output, expected, rtol=1e-6, atol=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", ["torch", "onnx"])
@pytest.mark.parametrize("size", [4, 5])
def test_alpha_may_be_that_of_the_sum(size: int, window: str, dtype: torch.dtype) -> None:
    input, grad_output = _randn(3, 9, 4, dtype=dtype), _randn(3, 9, 4, dtype=dtype, seed=1)
    options = {"size": size, "beta": 0.75, "k": 2.0, "window": window}
    result = local_response_norm(input, grad_output, alpha=0.3, alpha_scaled_by_size=False, **options)  # type: ignore[arg-type]  # mypy takes all options alike
    output = _oracle(input, alpha=0.3 * size, **options)  # type: ignore[arg-type]  # the same
    gradient = _oracle(input, alpha=0.3 * size, grad_output=grad_output, **options)  # type: ignore[arg-type]  # the same
    assert result.grad_input is not None
    for computed, expected in ((result.output, output), (result.grad_input, gradient)):
        of_value, of_largest = TOLERANCE[dtype]
        magnitude = np.abs(expected)
        assert (np.abs(exact(computed) - expected) <= of_value * magnitude + of_largest * magnitude.max()).all()


def test_a_symmetric_window_is_the_same_in_all_conventions() -> None:
    input = _randn(2, 9, 3)
    found = local_response_norm(input, size=5, alpha=0.5, window="symmetric-odd").output
    expected = _oracle(input, size=5, alpha=0.5, beta=0.75, k=1.0, window="symmetric-odd")
    assert np.abs(exact(found) - expected).max() <= 1e-6
    for window in ("torch", "onnx"):
        assert torch.equal(found, local_response_norm(input, size=5, alpha=0.5, window=window).output)


def test_windows_of_an_even_size_are_mirrored() -> None:
    input = _randn(2, 6, 3)
    torch_output = local_response_norm(input, size=2, alpha=0.1).output
    onnx_output = local_response_norm(input, size=2, alpha=0.1, window="onnx").output
    assert (torch_output - onnx_output).abs().max() > 0.01
    assert torch.allclose(local_response_norm(input.flip(1), size=2, alpha=0.1).output.flip(1), onnx_output)
    odd = local_response_norm(input, size=3).output
    assert torch.equal(odd, local_response_norm(input, size=3, window="onnx").output)


def test_half_in_four_dimensions_which_torch_refuses() -> None:
    input = _randn(2, 8, 3, 3, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError):
        functional.local_response_norm(input, 5)
    assert local_response_norm(input).output.isfinite().all()


def test_half_values_whose_squares_overflow_which_torch_turns_to_zero() -> None:
    input = torch.full((1, 3, 1), 1000.0, dtype=torch.float16)
    assert functional.local_response_norm(input, 3, alpha=1.0).eq(0).all()
    expected = _oracle(input, size=3, alpha=1.0, beta=0.75, k=1.0, window="torch")
    output = local_response_norm(input, size=3, alpha=1.0).output
    assert np.abs(exact(output) - expected).max() <= 2.0**-15


@pytest.mark.parametrize(
    ("scale", "k", "beta"),
    [(1e25, 1.0, 0.5), (1e38, 2.0, 0.5), (1e-25, 0.0, 0.5), (1e-30, 1e-55, 0.5), (1.0, 0.0, 0.5), (1e18, 1.0, 0.75)],
    ids=str,
)
def test_float32_values_whose_squares_leave_float32(scale: float, k: float, beta: float) -> None:
    input, grad_output = _randn(2, 6, 3).clamp(-3, 3) * scale, _randn(2, 6, 3, seed=1)
    options = {"size": 5, "alpha": 0.5, "beta": beta, "k": k}
    result = local_response_norm(input, grad_output, **options)  # type: ignore[arg-type]  # size is whole
    expected = _oracle(input, window="torch", **options)  # type: ignore[arg-type]
    assert np.abs(exact(result.output) / expected - 1).max() < 1e-6
    gradient = _oracle(input, window="torch", grad_output=grad_output, **options)  # type: ignore[arg-type]
    assert result.grad_input is not None
    assert np.abs(exact(result.grad_input) - gradient).max() <= 1e-6 * np.abs(gradient).max()


@pytest.mark.parametrize(
    ("scale", "k"),
    [(1e155, 1.0), (1e300, 2.0), (1e160, 0.0), (1e-170, 0.0), (1e-290, 0.0), (1e-160, 1e-305), (1e150, 1.0)],
)
@pytest.mark.parametrize("beta", [0.75, 0.4])
def test_float64_values_whose_squares_leave_float64(beta: float, scale: float, k: float) -> None:
    options = {"size": 3, "alpha": 0.5, "beta": beta, "k": k}
    scales = torch.tensor([scale, scale, 1.0, scale], dtype=torch.float64)[:, None, None]
    input, grad_output = (_randn(4, 7, 3, dtype=torch.float64, seed=seed) for seed in (0, 1))
    input = input * scales
    result = local_response_norm(input, grad_output, **options)  # type: ignore[arg-type]  # mypy takes all options alike
    expected = _oracle(input, window="torch", **options)  # type: ignore[arg-type]  # the same
    gradient = _oracle(input, window="torch", grad_output=grad_output, **options)  # type: ignore[arg-type]  # the same
    assert result.grad_input is not None
    for own, other in ((result.output, expected), (result.grad_input, gradient)):
        # Where the truth itself is within float64.
        peak = np.abs(other).max((1, 2), keepdims=True)
        errors = np.where((peak > 1e-290) & (peak < 1e300), np.abs(exact(own) - other) / peak, 0.0)
        assert float(errors.max()) <= 1e-13


@pytest.mark.parametrize(
    ("exponent", "beta", "k"),
    [(530, 0.75, 0.0), (530, 0.1, 1.0), (1000, 0.1, 0.0), (800, 0.4, 1.0), (-560, 0.1, 0.0), (-900, 0.05, 0.0)],
)
def test_derivatives_of_float64_values_whose_squares_leave_float64(exponent: int, beta: float, k: float) -> None:
    def derivatives(scales: Tensor, k: float) -> list[Tensor]:
        input, grad, cotangent = (_randn(3, 7, 2, dtype=torch.float64, seed=seed) for seed in range(3))
        input = (input * scales).requires_grad_()
        grad.requires_grad_()
        output = local_response_norm(input, size=3, alpha=0.5, beta=beta, k=k).output
        (first,) = torch.autograd.grad(output, input, grad, create_graph=True)
        return [first.detach(), *torch.autograd.grad(first, (input, grad), cotangent)]

    one = torch.ones(3, 1, 1, dtype=torch.float64)
    scale = 2.0**exponent
    expected = derivatives(one, 0.0)
    # The first and the last sample alone are of that scale; their D is far beyond k.
    found = derivatives(torch.tensor([scale, 1.0, scale], dtype=torch.float64)[:, None, None], k)
    for own, other, order in zip(found, expected, (2 * beta, 2 * beta + 1, 2 * beta), strict=True):
        exact = other[::2] * 2.0 ** (-order * exponent)
        assert float((own[::2] - exact).abs().max()) <= 1e-13 * float(exact.abs().max())
        assert bool(own[1].isfinite().all())
        assert k or torch.equal(own[1], other[1])


@pytest.mark.parametrize(
    ("exponent", "beta", "k"),
    [
        *((exponent, beta, k) for exponent, beta in ((60, 3.0), (80, 2.0), (110, 1.5), (150, 1.2)) for k in (0.0, 1.0)),
        *((exponent, beta, 0.0) for exponent, beta in ((-80, 2.0), (-110, 1.5), (-140, 1.2))),
    ],
)
def test_float64_values_whose_powers_leave_float64(exponent: int, beta: float, k: float) -> None:
    options = {"size": 3, "alpha": 0.5, "beta": beta, "k": k}
    input, grad_output = (_randn(3, 7, 3, dtype=torch.float64, seed=seed) for seed in (0, 1))
    input[:, 2] = 0.0
    plain = local_response_norm(input, grad_output, **options)  # type: ignore[arg-type]  # mypy takes all options alike
    # The second sample alone: those beside it stay what they are.
    input[1] *= 10.0**exponent
    grad_output[1] *= 10.0 ** (beta * exponent)
    result = local_response_norm(input, grad_output, **options)  # type: ignore[arg-type]  # the same
    expected = _oracle(input, window="torch", **options)  # type: ignore[arg-type]  # the same
    gradient = _oracle(input, window="torch", grad_output=grad_output, **options)  # type: ignore[arg-type]  # the same
    assert result.grad_input is not None
    assert plain.grad_input is not None
    pairs = ((result.output, plain.output, expected), (result.grad_input, plain.grad_input, gradient))
    for own, before, other in pairs:
        peak = np.abs(other[1]).max()
        assert np.isfinite(peak)
        assert float(np.abs(exact(own)[1] - other[1]).max() / peak) <= 1e-13
        assert own[::2].equal(before[::2])


def test_without_alpha_values_are_divided_by_k_alone_however_large() -> None:
    input = torch.tensor([[1e200, -3.0]], dtype=torch.float64)
    result = local_response_norm(input, torch.ones_like(input), alpha=0.0, beta=0.5, k=4.0)
    assert result.grad_input is not None
    assert result.output.equal(input / 2)
    assert result.grad_input.equal(torch.full_like(input, 0.5))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_an_output_that_is_recorded_may_be_changed_in_place(memory_format: torch.memory_format) -> None:
    input = _randn(2, 3, 4, 4, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    (expected,) = torch.autograd.grad(local_response_norm(input, alpha=1.0).output.relu().sum(), input)
    (found,) = torch.autograd.grad(local_response_norm(input, alpha=1.0).output.relu_().sum(), input)
    assert found.equal(expected)


def test_a_window_of_zeros_without_k_gives_zeros_with_gradient_zero() -> None:
    input = torch.tensor([[[0.0], [0.0], [0.0], [2.0]]], requires_grad=True)
    result = local_response_norm(input, torch.ones(1, 4, 1), size=3, alpha=3.0, beta=0.5, k=0.0)
    (by_autograd,) = torch.autograd.grad(result.output.sum(), input, create_graph=True)
    assert torch.equal(result.output.flatten(), torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert result.grad_input is not None
    for gradient in (by_autograd, result.grad_input):
        assert torch.equal(gradient.flatten()[:2], torch.zeros(2))
        assert gradient.isfinite().all()


@pytest.mark.parametrize("window", ["torch", "onnx"])
@pytest.mark.parametrize("options", [*OPTIONS[:4], {"size": 4, "alpha": 0.5, "beta": 0.6, "k": 0.0}], ids=str)
def test_gradients_of_first_and_second_order(options: dict[str, float], window: str) -> None:
    def output(input: Tensor) -> Tensor:
        return local_response_norm(input, window=window, **options).output  # type: ignore[arg-type]  # size is whole

    def grad_input(input: Tensor, grad_output: Tensor) -> Tensor:
        gradient = local_response_norm(input, grad_output, window=window, **options).grad_input  # type: ignore[arg-type]
        assert gradient is not None
        return gradient

    input = _randn(2, 5, 3, dtype=torch.float64).requires_grad_()
    grad_output = _randn(2, 5, 3, dtype=torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(output, input)
    assert torch.autograd.gradgradcheck(output, input)
    assert torch.autograd.gradcheck(grad_input, (input, grad_output))
    (by_autograd,) = torch.autograd.grad(output(input), input, grad_output)
    assert torch.allclose(grad_input(input, grad_output), by_autograd, rtol=1e-13, atol=1e-14)


def test_third_derivative_equals_that_of_the_formula_written_in_torch() -> None:
    def formula(input: Tensor) -> Tensor:
        padded = functional.pad(input.square(), (0, 0, 1, 1))
        sums = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
        return input * (1 + 0.5 / 3 * sums) ** -0.75

    def third(function: Callable[[Tensor], Tensor]) -> Tensor:
        input = _randn(2, 4, 2, dtype=torch.float64).requires_grad_()
        total = (function(input) * torch.arange(16).reshape(2, 4, 2)).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(total, input, create_graph=True)
            total = gradient.square().sum()
        return gradient

    ours = third(lambda input: local_response_norm(input, size=3, alpha=0.5).output)
    assert torch.allclose(ours, third(formula), rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(5, 32, 40, 60), (3, 20, 200, 200), (1100, 300)], ids=["samples", "wide", "rank 2"])
def test_blocks_and_memory_formats_change_nothing(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    input, grad_output = _randn(*shape, dtype=dtype), _randn(*shape, dtype=dtype, seed=1)
    result = local_response_norm(input, grad_output, alpha=0.1)
    assert result.grad_input is not None
    last = input[-1:], grad_output[-1:]
    alone = local_response_norm(*last, alpha=0.1)
    assert alone.grad_input is not None
    assert torch.equal(result.output[-1:], alone.output)
    assert torch.equal(result.grad_input[-1:], alone.grad_input)
    moved, moved_grad = (tensor.movedim(1, -1).contiguous().movedim(-1, 1) for tensor in (input, grad_output))
    for grad in (moved_grad, grad_output):
        other = local_response_norm(moved, grad, alpha=0.1)
        assert other.grad_input is not None
        assert other.output.stride() == moved.stride()
        assert torch.allclose(other.output, result.output, atol=3e-7)
        assert torch.allclose(other.grad_input, result.grad_input, atol=3e-7)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 3)], ids=str)
def test_an_empty_input_gives_an_empty_output(shape: tuple[int, ...]) -> None:
    input = torch.empty(shape, requires_grad=True)
    result = local_response_norm(input, torch.empty(shape))
    assert result.output.shape == shape
    assert result.grad_input is not None
    assert result.grad_input.shape == shape
    assert result.diagnostics() == {}


def test_a_window_of_any_size_costs_no_more_than_the_channels() -> None:
    input = _randn(2, 3, 4)
    assert torch.equal(
        local_response_norm(input, size=10**15, alpha=1e15).output,
        local_response_norm(input, size=5, alpha=5.0).output,
    )


def test_values_that_are_not_finite_stay_in_their_windows_and_are_counted() -> None:
    input = torch.ones(1, 6, 2)
    input[0, 0, 0] = math.nan
    result = local_response_norm(input, size=3)
    assert torch.equal(result.output[0, :, 0].isnan(), torch.tensor([True, True, False, False, False, False]))
    assert result.output[0, :, 1].isfinite().all()
    assert result.diagnostics() == {"non_finite_values": 2}


def test_finite_values_with_an_infinite_sum_are_not_questionable() -> None:
    assert local_response_norm(torch.full((1, 4, 2), 3e38), beta=0.0).diagnostics() == {}


def test_no_argument_is_changed_or_shared() -> None:
    input, grad_output = _randn(3, 4, 2), _randn(3, 4, 2, seed=1)
    before = input.clone(), grad_output.clone()
    result = local_response_norm(input, grad_output, size=1)
    assert result.grad_input is not None
    for tensor in (result.output, result.grad_input):
        tensor.fill_(0)
    assert torch.equal(input, before[0])
    assert torch.equal(grad_output, before[1])


_ONES = torch.ones(2, 3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: local_response_norm(_ones_of(torch.int32)), DtypeError, "input: .* received int32"),
        (lambda: local_response_norm(torch.ones(3)), ShapeError, "input: expected at least 2 dimensions"),
        (lambda: local_response_norm(_ONES, size=0), ParameterError, "size: expected an integer >= 1, received 0"),
        (lambda: local_response_norm(_ONES, alpha=-1.0), ParameterError, "alpha: expected a finite number >= 0"),
        (lambda: local_response_norm(_ONES, alpha=math.inf), ParameterError, "alpha"),
        (lambda: local_response_norm(_ONES, beta=-0.5), ParameterError, "beta"),
        (lambda: local_response_norm(_ONES, beta=math.nan), ParameterError, "beta"),
        (lambda: local_response_norm(_ONES, k=-1.0), ParameterError, "k: expected a finite number >= 0"),
        (lambda: local_response_norm(_ONES, alpha=0.0, k=0.0), ParameterError, "k: expected a number > 0 with alpha 0"),
        (lambda: local_response_norm(_ONES, window="keras"), ParameterError, "window: expected one of torch, onnx"),
        (
            lambda: local_response_norm(_ONES, size=4, window="symmetric-odd"),
            ParameterError,
            "size: expected an odd integer with window symmetric-odd, received 4",
        ),
        (
            lambda: local_response_norm(_ONES, alpha_scaled_by_size=1),  # type: ignore[arg-type]  # refused at run time
            ParameterError,
            "alpha_scaled_by_size: expected true or false, received 1",
        ),
        (lambda: local_response_norm(_ONES, torch.ones(2, 3)), ShapeError, r"grad_output: expected shape \(2, 3, 4\)"),
        (lambda: local_response_norm(_ONES, _ones_of(torch.int32)), DtypeError, "grad_output"),
    ],
    ids=[
        "integers",
        "rank",
        "size",
        "alpha",
        "alpha inf",
        "beta",
        "beta nan",
        "k",
        "nothing",
        "window",
        "even",
        "scaled",
        "gradient",
        "grad dtype",
    ],
)
def test_refusals(call: Callable[[], object], error: type[ArgumentError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def _ones_of(dtype: torch.dtype) -> Tensor:
    return _ONES.to(dtype)
