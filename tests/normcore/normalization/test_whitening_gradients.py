"""Derivatives of whitening: numerical ones, repeated eigenvalues, and the closed form against autograd."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from normcore.errors import NotSupportedError, StatisticsError
from normcore.normalization import whitening

MODES = ["zca", "cholesky", "pca", "iternorm"]
CLOSED_FORM_MODES = MODES[:2]


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _with_repeated_eigenvalues() -> Tensor:
    """(8, 3) values whose covariance is the identity, exactly."""
    signs = [[(-1.0) ** (row >> bit) for bit in range(3)] for row in range(8)]
    return torch.tensor(signs, dtype=torch.float64)


def _output(mode: str) -> Callable[..., Tensor]:
    def output(input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        groups = 2 if input.shape[1] == 4 else 1
        return whitening(input, None, None, weight, bias, mode=mode, groups=groups, training=True, eps=0.1).output

    return output


@pytest.mark.parametrize("mode", MODES)
def test_first_and_second_derivatives(mode: str) -> None:
    operands = [_randn(5, 4, 2), _randn(4, seed=1), _randn(4, seed=2)]
    operands = [operand.requires_grad_() for operand in operands]
    assert torch.autograd.gradcheck(_output(mode), operands)
    assert torch.autograd.gradgradcheck(_output(mode), operands)


@pytest.mark.parametrize("mode", [*CLOSED_FORM_MODES, "iternorm"])
def test_derivatives_are_right_where_eigenvalues_repeat(mode: str) -> None:
    input = _with_repeated_eigenvalues().requires_grad_()
    assert torch.autograd.gradcheck(_output(mode), input)
    assert torch.autograd.gradgradcheck(_output(mode), input)


@pytest.mark.parametrize("mode", CLOSED_FORM_MODES)
def test_third_derivative(mode: str) -> None:
    cotangent, direction = _randn(6, 3, seed=1), _randn(6, 3, seed=2)

    def second(input: Tensor) -> Tensor:
        (first,) = torch.autograd.grad((_output(mode)(input) * cotangent).sum(), input, create_graph=True)
        return torch.autograd.grad((first * direction).sum(), input, create_graph=True)[0]

    assert torch.autograd.gradcheck(second, _randn(6, 3).requires_grad_(), atol=1e-4)


def test_pca_has_no_gradient_where_eigenvalues_repeat() -> None:
    input = _with_repeated_eigenvalues()
    assert torch.allclose(whitening(input, mode="pca", training=True, eps=0.0).output.abs(), torch.ones(8, 3).double())
    with pytest.raises(StatisticsError, match=r"input: expected distinct eigenvalues .* received repeated ones"):
        whitening(input.requires_grad_(), mode="pca", training=True)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("mode", CLOSED_FORM_MODES)
def test_closed_form_equals_autograd(mode: str, training: bool) -> None:
    input, grad_output = _randn(5, 4, 3).requires_grad_(), _randn(5, 4, 3, seed=3)
    weight, bias = _randn(4, seed=1).requires_grad_(), _randn(4, seed=2).requires_grad_()
    matrices = _randn(2, 2, 2, seed=4)
    arguments = (input, _randn(4, seed=5), matrices @ matrices.mT, weight, bias)
    output = whitening(*arguments, mode=mode, groups=2, training=training).output
    expected = torch.autograd.grad(output, (input, weight, bias), grad_output)
    with torch.inference_mode():
        result = whitening(*arguments, grad_output=grad_output, mode=mode, groups=2, training=training)
    gradients = (result.grad_input, result.grad_weight, result.grad_bias)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert gradient is not None
        assert torch.allclose(gradient, reference, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_frozen_gradient_is_at_hand_in_every_mode(mode: str) -> None:
    input, mean, covariance = _randn(5, 3).requires_grad_(), torch.ones(3), torch.diag(torch.tensor([1.0, 2.0, 3.0]))
    grad_output = _randn(5, 3, seed=1)
    result = whitening(input, mean, covariance[None], grad_output=grad_output, mode=mode)
    (expected,) = torch.autograd.grad(result.output, input, grad_output)
    assert result.grad_input is not None
    assert torch.allclose(result.grad_input, expected)


@pytest.mark.parametrize("mode", CLOSED_FORM_MODES)
def test_a_group_of_one_channel_has_the_gradient_of_batch_norm(mode: str) -> None:
    input, grad_output = _randn(7, 2, 3), _randn(7, 2, 3, seed=1)
    leaf = input.clone().requires_grad_()
    output = torch.nn.functional.batch_norm(leaf, None, None, training=True)
    (expected,) = torch.autograd.grad(output, leaf, grad_output)
    result = whitening(input, grad_output=grad_output, mode=mode, groups=2, training=True)
    assert result.grad_input is not None
    assert torch.allclose(result.grad_input, expected, atol=1e-13)


@pytest.mark.parametrize("mode", CLOSED_FORM_MODES)
def test_gradient_is_finite_and_accurate_for_an_ill_conditioned_batch(mode: str) -> None:
    """Whitening undoes scales of the channels: X -> X D gives dX D^-1 (zca: for a covariance that is diagonal)."""
    scales = torch.tensor([1.0, 1e-2, 1e-4], dtype=torch.float64)
    input, grad_output = _with_repeated_eigenvalues(), _randn(8, 3, seed=1)
    expected = whitening(input, grad_output=grad_output, mode="cholesky", training=True, eps=0.0).grad_input
    result = whitening(input * scales, grad_output=grad_output, mode="cholesky", training=True, eps=0.0).grad_input
    assert expected is not None
    assert result is not None
    assert torch.allclose(result * scales, expected, atol=1e-8)
    by_zca = whitening(input * scales, grad_output=grad_output, mode=mode, training=True, eps=0.0).grad_input
    assert by_zca is not None
    assert bool(by_zca.isfinite().all())
    # The whitened values do not change along X -> X (1 + t), so neither does the gradient have a part along X.
    assert float((by_zca * input * scales).sum().abs()) <= 1e-9


@pytest.mark.parametrize("mode", CLOSED_FORM_MODES)
def test_a_large_mean_costs_no_digits(mode: str) -> None:
    """On a grid that float64 holds with and without the mean; the mean itself is rounded by 1e-7."""
    input, grad_output = (_randn(7, 3) * 2**20).round() / 2**20, _randn(7, 3, seed=1)
    near = whitening(input, grad_output=grad_output, mode=mode, training=True)
    far = whitening(input + 2.0**30, grad_output=grad_output, mode=mode, training=True)
    for name in ("output", "grad_input", "grad_weight"):
        assert torch.allclose(getattr(far, name), getattr(near, name), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", CLOSED_FORM_MODES)
def test_gradients_are_rounded_once(mode: str, dtype: torch.dtype) -> None:
    input, grad_output = _randn(30, 4, dtype=dtype), _randn(30, 4, seed=1, dtype=dtype)
    exact = whitening(input.double(), grad_output=grad_output.double(), mode=mode, training=True)
    result = whitening(input, grad_output=grad_output, mode=mode, training=True)
    assert result.grad_input is not None
    assert result.grad_weight is not None
    assert exact.grad_input is not None
    assert exact.grad_weight is not None
    assert torch.equal(result.grad_input, exact.grad_input.to(dtype))
    assert torch.equal(result.grad_weight, exact.grad_weight.float())
    leaf = input.clone().requires_grad_()
    (by_autograd,) = torch.autograd.grad(whitening(leaf, mode=mode, training=True).output, leaf, grad_output)
    assert by_autograd.dtype == dtype
    assert torch.allclose(by_autograd, result.grad_input, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("mode", ["pca", "iternorm"])
def test_grad_output_is_not_supported_in_training_by(mode: str) -> None:
    with pytest.raises(NotSupportedError, match=f"no closed form in training with mode {mode}; use zca or cholesky"):
        whitening(_randn(8, 3), grad_output=_randn(8, 3), mode=mode, training=True)
