"""Weight norm against its formula in long double, torch and its own gradients; zero rows, scales, refusals."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from normcore.errors import ArgumentError, DtypeError, ParameterError, ShapeError
from normcore.normalization import weight_norm
from tests.normcore.normalization.oracle import LongDouble, exact

SHAPES = [(6,), (4, 6), (4, 3, 5), (4, 3, 2, 5), (2, 3, 2, 2, 2)]


def _randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _lengths(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linspace(-2, 3, count, dtype=torch.float64).to(dtype)


def _count(input: Tensor, axis: int | None) -> int:
    return 1 if axis is None else input.shape[axis]


def _oracle(input: Tensor, g: Tensor, *, axis: int | None, log_g: bool) -> LongDouble:
    values, lengths = exact(input), exact(g)
    others = tuple(other for other in range(input.ndim) if axis is None or other != axis % input.ndim)
    norm = np.sqrt((values**2).sum(others, keepdims=True)) if others else np.abs(values)
    output: LongDouble = (np.exp(lengths) if log_g else lengths).reshape(norm.shape) * values / norm
    return output


@pytest.mark.parametrize("log_g", [False, True], ids=["g", "log g"])
@pytest.mark.parametrize("axis", [0, -1, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_equals_the_formula(shape: tuple[int, ...], dtype: torch.dtype, axis: int | None, log_g: bool) -> None:
    input = _randn(*shape, dtype=dtype)
    g = _lengths(_count(input, axis), torch.float32 if dtype != torch.float64 else dtype)
    output = weight_norm(input, g, axis=axis, log_g=log_g).output
    expected = _oracle(input, g, axis=axis, log_g=log_g)
    assert output.dtype == dtype
    rounding = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 0.0, torch.float64: 0.0}[dtype]
    allowed = np.abs(expected) * (rounding + (1e-15 if dtype == torch.float64 else 6e-7)) + 2.0**-25 * (rounding > 0)
    assert (np.abs(exact(output) - expected) <= allowed).all()


@pytest.mark.parametrize("dim", [0, 1, 2, None], ids=str)
def test_output_and_gradients_equal_torch(dim: int | None) -> None:
    input = _randn(4, 3, 5, dtype=torch.float64).requires_grad_()
    shape = () if dim is None else tuple(size if axis == dim else 1 for axis, size in enumerate(input.shape))
    g = _lengths(_count(input, dim), torch.float64).reshape(shape).requires_grad_()
    grad_output = _randn(4, 3, 5, dtype=torch.float64, seed=1)
    # In torch -1 stands for all axes.
    expected = torch._weight_norm(input, g, -1 if dim is None else dim)
    result = weight_norm(input, g, grad_output, axis=dim)
    assert torch.allclose(result.output, expected, rtol=1e-14)
    of_input, of_g = torch.autograd.grad(expected, (input, g), grad_output)
    assert result.grad_input is not None
    assert result.grad_g is not None
    assert result.grad_g.shape == g.shape
    assert torch.allclose(result.grad_input, of_input, rtol=1e-12, atol=1e-14)
    assert torch.allclose(result.grad_g, of_g, rtol=1e-12, atol=1e-14)


def test_axis_minus_1_is_the_last_one_and_not_all_as_in_torch() -> None:
    input, g = _randn(4, 3), _lengths(3)
    assert torch.equal(weight_norm(input, g, axis=-1).output, weight_norm(input, g, axis=1).output)


@pytest.mark.parametrize("axis", [0, 1, None], ids=str)
def test_norm_as_g_gives_back_the_weight(axis: int | None) -> None:
    input = _randn(4, 3, 5, dtype=torch.float64)
    norm = weight_norm(input, axis=axis).norm
    assert torch.allclose(weight_norm(input, norm, axis=axis).output, input, rtol=1e-15)
    assert torch.allclose(weight_norm(input, norm.log(), axis=axis, log_g=True).output, input, rtol=1e-14)
    assert torch.allclose(weight_norm(input * 7, norm, axis=axis).output, input, rtol=1e-14)


def test_without_g_rows_have_length_1() -> None:
    result = weight_norm(_randn(4, 3, dtype=torch.float64), torch.ones(4), _randn(4, 3, dtype=torch.float64))
    alone = weight_norm(_randn(4, 3, dtype=torch.float64), grad_output=_randn(4, 3, dtype=torch.float64))
    assert torch.allclose(alone.output, result.output, rtol=1e-15)
    assert alone.grad_g is None
    assert alone.grad_input is not None
    assert result.grad_input is not None
    assert torch.allclose(alone.grad_input, result.grad_input, rtol=1e-14, atol=1e-15)
    assert torch.allclose(torch.linalg.vector_norm(alone.output, dim=1), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("log_g", [False, True], ids=["g", "log g"])
@pytest.mark.parametrize("axis", [0, 1, -1, None], ids=str)
def test_gradients_of_first_and_second_order(axis: int | None, log_g: bool) -> None:
    def output(input: Tensor, g: Tensor) -> Tensor:
        return weight_norm(input, g, axis=axis, log_g=log_g).output

    def gradients(input: Tensor, g: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        result = weight_norm(input, g, grad_output, axis=axis, log_g=log_g)
        assert result.grad_input is not None
        assert result.grad_g is not None
        return result.grad_input, result.grad_g

    input = _randn(3, 4, 2, dtype=torch.float64).requires_grad_()
    g = _lengths(_count(input, axis), torch.float64).requires_grad_()
    grad_output = _randn(3, 4, 2, dtype=torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(output, (input, g))
    assert torch.autograd.gradgradcheck(output, (input, g))
    assert torch.autograd.gradcheck(gradients, (input, g, grad_output))
    by_autograd = torch.autograd.grad(output(input, g), (input, g), grad_output)
    for closed, expected in zip(gradients(input, g, grad_output), by_autograd, strict=True):
        assert torch.allclose(closed, expected, rtol=1e-13, atol=1e-14)


def test_a_row_of_zeros_gives_zeros_with_gradients_zero_where_torch_gives_nan() -> None:
    input = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    g = torch.tensor([2.0, 5.0], requires_grad=True)
    assert torch._weight_norm(input, g[:, None], 0)[0].isnan().all()
    result = weight_norm(input, g, torch.ones(2, 2))
    assert torch.allclose(result.output, torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    by_autograd = torch.autograd.grad(result.output.sum(), (input, g))
    for gradients in (by_autograd, (result.grad_input, result.grad_g)):
        for gradient in gradients:
            assert gradient is not None
            assert gradient[0].eq(0).all()
            assert gradient.isfinite().all()
    assert result.diagnostics() == {"zero_rows": 1}


@pytest.mark.parametrize("scale", [1e30, 1e-30], ids=str)
def test_scale_of_a_row_does_not_matter(scale: float) -> None:
    input, g, grad_output = _randn(3, 5), _lengths(3), _randn(3, 5, seed=1)
    expected = weight_norm(input.double(), g, grad_output)
    result = weight_norm(input * scale, g, grad_output)
    assert torch.allclose(result.output.double(), expected.output, atol=1e-6)
    assert result.grad_input is not None
    assert result.grad_g is not None
    assert expected.grad_input is not None
    assert expected.grad_g is not None
    assert torch.allclose(result.grad_input.double() * scale, expected.grad_input, atol=2e-6)
    assert torch.allclose(result.grad_g, expected.grad_g, atol=2e-6)


def test_half_with_values_whose_squares_overflow() -> None:
    input = torch.full((2, 4), 6e4, dtype=torch.float16)
    result = weight_norm(input, torch.tensor([1.0, 2.0], dtype=torch.float16), torch.ones_like(input))
    assert torch.equal(result.output, torch.tensor([[0.5] * 4, [1.0] * 4], dtype=torch.float16))
    assert result.grad_g is not None
    assert torch.equal(result.grad_g, torch.tensor([2.0, 2.0], dtype=torch.float16))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_an_empty_input_gives_an_empty_output(shape: tuple[int, ...]) -> None:
    result = weight_norm(torch.empty(shape), torch.ones(shape[0]), torch.empty(shape))
    assert result.output.shape == shape
    assert result.grad_input is not None
    assert result.grad_input.shape == shape
    assert result.grad_g is not None
    assert torch.equal(result.grad_g, torch.zeros(shape[0]))


def test_non_finite_values_stay_in_their_row() -> None:
    result = weight_norm(torch.tensor([[math.nan, 1.0], [3.0, 4.0]]))
    assert result.output[0].isnan().all()
    assert torch.allclose(result.output[1], torch.tensor([0.6, 0.8]))
    assert result.diagnostics() == {"non_finite_norms": 1}


def test_no_argument_is_changed_or_shared() -> None:
    arguments = [_randn(3, 4), torch.ones(3), _randn(3, 4, seed=1)]
    before = [argument.clone() for argument in arguments]
    result = weight_norm(*arguments)
    for name in ("output", "norm", "grad_input", "grad_g"):
        getattr(result, name).fill_(9)
    for argument, original in zip(arguments, before, strict=True):
        assert torch.equal(argument, original)


_ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: weight_norm(_ONES.int()), DtypeError, "input: .* received int32"),
        (lambda: weight_norm(torch.tensor(1.0)), ShapeError, "input: expected at least 1 dimensions"),
        (lambda: weight_norm(_ONES, axis=2), ParameterError, "axis: .* received 2"),
        (
            lambda: weight_norm(_ONES, torch.ones(3)),
            ShapeError,
            r"g: expected shape \(2,\) or \(2, 1\), one length per",
        ),
        (lambda: weight_norm(_ONES, torch.ones(2), axis=None), ShapeError, r"g: expected shape \(1,\) or \(1, 1\)"),
        (lambda: weight_norm(_ONES, torch.ones(2).int()), DtypeError, "g: .* received int32"),
        (lambda: weight_norm(_ONES, None, torch.ones(3)), ShapeError, r"grad_output: .* \(2, 3\)"),
        (lambda: weight_norm(_ONES, None, _ONES.bool()), DtypeError, "grad_output"),
    ],
    ids=["integers", "rank", "axis", "g shape", "g whole", "g dtype", "gradient shape", "gradient dtype"],
)
def test_refusals(call: Callable[[], object], error: type[ArgumentError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
