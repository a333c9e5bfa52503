"""Mean-variance norm against its formula in long double and its own gradients; axes, scales, refusals, diagnostics."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from normcore.errors import ArgumentError, DtypeError, ParameterError, ShapeError
from normcore.normalization import batch_norm, mean_variance_norm
from tests.normcore.normalization.oracle import LongDouble, exact

AXES = ["0,2,3", "2,3", "1,3", "0,2", "0,1,2,3", "-1", "0"]
# Of an output of unit variance: half a unit in the last place, and what float32 adds.
TOLERANCE = {torch.float16: 2.0**-9 + 1e-6, torch.bfloat16: 2.0**-6 + 1e-6, torch.float32: 1e-6, torch.float64: 1e-14}


def _randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _axes(text: str) -> tuple[int, ...]:
    return tuple(int(axis) for axis in text.split(","))


def _statistics(input: Tensor, axes: tuple[int, ...]) -> tuple[LongDouble, LongDouble]:
    values = exact(input)
    mean: LongDouble = values.mean(axes, keepdims=True)
    mean += (values - mean).mean(axes, keepdims=True)
    return mean, ((values - mean) ** 2).mean(axes, keepdims=True)


def _oracle(input: Tensor, axes: tuple[int, ...], eps: float = 1e-9) -> LongDouble:
    mean, var = _statistics(input, axes)
    divisor: LongDouble = np.sqrt(var) + np.full_like(var, eps)
    output: LongDouble = (exact(input) - mean) / divisor
    return output


def _formula(input: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    return (input - input.mean(axes, keepdim=True)) / (input.var(axes, correction=0, keepdim=True).sqrt() + eps)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("mean", [0.0, 10.0, 1e3])
def test_output_and_statistics_equal_the_formula(mean: float, axes: str, dtype: torch.dtype) -> None:
    input = (_randn(8, 6, 7, 9, dtype=torch.float64) + mean).to(dtype)
    result = mean_variance_norm(input, axes=axes, eps=1e-3)
    expected = _oracle(input, _axes(axes), eps=1e-3)
    is_flat = dtype == torch.bfloat16 and mean == 1e3
    assert result.output.dtype == dtype
    if not is_flat:
        assert np.abs(exact(result.output) - expected).max() <= TOLERANCE[dtype] * max(1.0, np.abs(expected).max() / 6)
    true_mean, true_var = _statistics(input, _axes(axes))
    assert result.mean is not None
    assert result.var is not None
    assert result.invstd is not None
    assert result.mean.shape == result.var.shape == result.invstd.shape == true_mean.shape
    assert result.mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert np.abs(exact(result.mean) - true_mean).max() <= 1e-7 * max(1.0, mean)
    assert np.abs(exact(result.var) - true_var).max() <= 1e-6 * true_var.max()
    assert np.abs(exact(result.invstd) * (np.sqrt(true_var) + 1e-3) - 1).max() <= 1e-6


@pytest.mark.parametrize("mean", [1e4, 1e6])
def test_float32_with_a_mean_far_above_the_deviation(mean: float) -> None:
    input = _randn(4, 3, 20, 20, dtype=torch.float64).add(mean).float()
    error = np.abs(exact(mean_variance_norm(input).output) - _oracle(input, (0, 2, 3))).max()
    assert error <= 1e-6


@pytest.mark.parametrize("scale", [1e19, 1e37, 1e-18, 1e-21, 1e-25])
def test_scale_does_not_matter_without_eps(scale: float) -> None:
    input, grad_output = _randn(4, 3, 5, 5).clamp(-3, 3), _randn(4, 3, 5, 5, seed=1)
    expected = mean_variance_norm(input, grad_output, eps=0.0)
    result = mean_variance_norm(input * scale, grad_output, eps=0.0)
    assert torch.allclose(result.output, expected.output, rtol=0, atol=2e-6)
    assert result.grad_input is not None
    assert expected.grad_input is not None
    assert torch.allclose(result.grad_input.double() * scale, expected.grad_input.double(), rtol=0, atol=2e-6)
    assert result.diagnostics() == {}


def test_eps_is_outside_the_root() -> None:
    input = torch.tensor([[-1.0, 1.0]])
    assert torch.equal(mean_variance_norm(input, axes="1", eps=1.0).output, input / 2)
    inside = batch_norm(input.T, training=True, eps=1.0).output.T
    assert torch.allclose(inside, input / math.sqrt(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-9])
@pytest.mark.parametrize("value", [0.0, 0.1, 7.0, 1e30, -3.3e-12])
def test_equal_values_give_zeros(value: float, eps: float, dtype: torch.dtype) -> None:
    input = torch.full((4, 2, 3, 5), value, dtype=dtype, requires_grad=True)
    result = mean_variance_norm(input, eps=eps)
    assert torch.equal(result.output, torch.zeros_like(input))
    assert result.diagnostics() == {"constant_groups": 2}
    grad_output = _randn(4, 2, 3, 5, dtype=dtype)
    expected = (grad_output - grad_output.mean((0, 2, 3), keepdim=True)) / eps if eps else torch.zeros_like(input)
    (by_autograd,) = torch.autograd.grad(result.output, input, grad_output, create_graph=True)
    closed = mean_variance_norm(input.detach(), grad_output, eps=eps).grad_input
    assert closed is not None
    for gradient in (by_autograd, closed):
        assert torch.allclose(gradient, expected, rtol=1e-5, atol=1e-6 / (eps or 1.0))


@pytest.mark.parametrize("eps", [0.0, 1e-9, 0.5], ids=str)
@pytest.mark.parametrize("axes", AXES)
def test_gradients_of_first_and_second_order(axes: str, eps: float) -> None:
    def output(input: Tensor) -> Tensor:
        return mean_variance_norm(input, axes=axes, eps=eps).output

    def grad_input(input: Tensor, grad_output: Tensor) -> Tensor:
        gradient = mean_variance_norm(input, grad_output, axes=axes, eps=eps).grad_input
        assert gradient is not None
        return gradient

    input = _randn(3, 2, 3, 2, dtype=torch.float64, seed=3).requires_grad_()
    grad_output = _randn(3, 2, 3, 2, dtype=torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(output, input)
    assert torch.autograd.gradgradcheck(output, input)
    assert torch.autograd.gradcheck(grad_input, (input, grad_output))
    (expected,) = torch.autograd.grad(_formula(input, _axes(axes), eps), input, grad_output)
    (by_autograd,) = torch.autograd.grad(output(input), input, grad_output)
    closed = mean_variance_norm(input.detach(), grad_output.detach(), axes=axes, eps=eps).grad_input
    assert closed is not None
    for gradient in (by_autograd, closed):
        assert torch.allclose(gradient, expected, rtol=1e-10, atol=1e-12)


def test_third_derivative_equals_that_of_the_formula_written_in_torch() -> None:
    def third(function: Callable[[Tensor], Tensor]) -> Tensor:
        input = _randn(4, 3, dtype=torch.float64).requires_grad_()
        total = (function(input) * torch.arange(12).reshape(4, 3)).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(total, input, create_graph=True)
            total = gradient.square().sum()
        return gradient

    ours = third(lambda input: mean_variance_norm(input, axes="0", eps=0.1).output)
    assert torch.allclose(ours, third(lambda input: _formula(input, (0,), 0.1)), rtol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradient_in_float32_and_half(dtype: torch.dtype) -> None:
    input, grad_output = _randn(4, 3, 6, 6, dtype=dtype) + 10, _randn(4, 3, 6, 6, dtype=dtype, seed=1)
    exact_gradient = mean_variance_norm(input.double(), grad_output.double()).grad_input
    gradient = mean_variance_norm(input, grad_output).grad_input
    assert exact_gradient is not None
    assert gradient is not None
    assert gradient.dtype == dtype
    rounding = 0.0 if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps
    allowed = exact_gradient.abs() * rounding + 2e-6 * exact_gradient.abs().max()
    assert ((gradient.double() - exact_gradient).abs() <= allowed).all()


@pytest.mark.parametrize("axes", ["0,2,3", "2,3", [-3, -2, -1]], ids=str)
def test_memory_formats_change_nothing(axes: str | Sequence[int]) -> None:
    input, grad_output = _randn(4, 3, 6, 5), _randn(4, 3, 6, 5, seed=1)
    expected = mean_variance_norm(input, grad_output, axes=axes)
    moved = input.contiguous(memory_format=torch.channels_last)
    for grad in (grad_output, grad_output.contiguous(memory_format=torch.channels_last)):
        result = mean_variance_norm(moved, grad, axes=axes)
        assert torch.allclose(result.output, expected.output, atol=1e-6)
        assert result.grad_input is not None
        assert expected.grad_input is not None
        assert torch.allclose(result.grad_input, expected.grad_input, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 1)], ids=str)
def test_an_empty_input_gives_an_empty_output_without_statistics(shape: tuple[int, ...]) -> None:
    result = mean_variance_norm(torch.empty(shape), torch.empty(shape))
    assert result.output.shape == shape
    assert result.grad_input is not None
    assert result.grad_input.shape == shape
    assert (result.mean, result.var, result.invstd) == (None, None, None)
    assert result.diagnostics() == {}


def test_diagnostics_count_groups() -> None:
    input = _randn(4, 3, 2)
    input[:, 0], input[:, 1], input[0, 2, 0] = 5.0, input[:, 1] * 1e-12, math.nan
    result = mean_variance_norm(input, axes="0,2")
    counts = {"constant_groups": 1, "eps_dominated_groups": 1, "non_finite_groups": 1}
    assert result.diagnostics() == counts | {"non_finite_values": 1}
    assert result.output[:, :2].isfinite().all()
    assert result.output[:, 2].isnan().all()


def test_a_variance_beyond_float64_is_not_taken_for_an_output() -> None:
    result = mean_variance_norm(_randn(4, 3, dtype=torch.float64) * 1e200, axes="0")
    assert result.output.isnan().all()
    assert result.diagnostics() == {"non_finite_groups": 3, "few_values_per_group": 4}


def test_no_argument_is_changed_or_shared() -> None:
    input, grad_output = _randn(3, 4, 2, 2), _randn(3, 4, 2, 2, seed=1)
    before = input.clone(), grad_output.clone()
    result = mean_variance_norm(input, grad_output)
    for name in ("output", "mean", "var", "invstd", "grad_input"):
        getattr(result, name).fill_(9)
    assert torch.equal(input, before[0])
    assert torch.equal(grad_output, before[1])


_ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mean_variance_norm(_ONES.int(), axes="0"), DtypeError, "input: .* received int32"),
        (lambda: mean_variance_norm(torch.tensor(1.0), axes="0"), ShapeError, "input: expected at least 1 dimensions"),
        (lambda: mean_variance_norm(_ONES), ParameterError, "axes: expected an integer from -2 to 1 .* received 2"),
        (lambda: mean_variance_norm(_ONES, axes="0,-2"), ParameterError, "axes: expected different axes"),
        (
            lambda: mean_variance_norm(_ONES, axes=""),
            ParameterError,
            "axes: expected an integer, or integers with commas",
        ),
        (lambda: mean_variance_norm(_ONES, axes="0", eps=-1e-9), ParameterError, "eps: expected a finite number >= 0"),
        (lambda: mean_variance_norm(_ONES, torch.ones(3), axes="0"), ShapeError, r"grad_output: .* \(2, 3\)"),
        (lambda: mean_variance_norm(_ONES, _ONES.int(), axes="0"), DtypeError, "grad_output"),
    ],
    ids=["integers", "rank", "default axes", "axis twice", "no axes", "eps", "gradient shape", "gradient dtype"],
)
def test_refusals(call: Callable[[], object], error: type[ArgumentError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
