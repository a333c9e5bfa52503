"""Lp norm against mpmath, torch and its own gradients; extreme scales, zero vectors, refusals and diagnostics."""

import math
from collections.abc import Callable

import mpmath  # type: ignore[import-untyped]  # it ships no types
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from normcore.errors import ArgumentError, DtypeError, ParameterError, ShapeError
from normcore.normalization import lp_norm

ORDERS: list[str | float] = [1, 2, math.inf]
HALF_ULP_AT_1 = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2e-7, torch.float64: 4e-16}


def _randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _oracle(vector: Tensor, p: str | float) -> list[mpmath.mpf]:
    """The formula at 60 digits, for one vector."""
    with mpmath.workdps(60):
        values = [mpmath.mpf(value) for value in vector.double().tolist()]
        magnitudes = [abs(value) for value in values]
        norm = max(magnitudes) if float(p) == math.inf else mpmath.fsum(m ** int(p) for m in magnitudes)
        norm = mpmath.sqrt(norm) if float(p) == 2 else norm
        return [value / norm if norm else mpmath.mpf(0) for value in values]


@pytest.mark.parametrize("p", ORDERS, ids=str)
@pytest.mark.parametrize("dtype", HALF_ULP_AT_1, ids=str)
def test_output_equals_the_formula_at_60_digits(dtype: torch.dtype, p: float) -> None:
    input = _randn(5, 301, dtype=dtype)
    output = lp_norm(input, p=p).output
    assert output.dtype == dtype
    for vector, result in zip(input, output, strict=True):
        expected = _oracle(vector, p)
        error = max(abs(mpmath.mpf(value) - true) for value, true in zip(result.tolist(), expected, strict=True))
        assert error <= HALF_ULP_AT_1[dtype]


@pytest.mark.parametrize("p", ORDERS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e20),
        (torch.float32, 2e38),
        (torch.float32, 1e-30),
        (torch.float32, 3e-21),
        (torch.float64, 1e200),
        (torch.float64, 1e-200),
        (torch.float64, 1e-160),
        (torch.float16, 2e4),
        (torch.bfloat16, 1e38),
    ],
    ids=str,
)
def test_scale_of_a_vector_does_not_matter(dtype: torch.dtype, scale: float, p: float) -> None:
    input = (_randn(3, 50).clamp(-1.5, 1.5).double() * scale).to(dtype)
    input[1] = _randn(50, dtype=dtype)
    output = lp_norm(input, p=p).output
    for vector, result in zip(input, output, strict=True):
        expected = torch.tensor([float(value) for value in _oracle(vector, p)], dtype=torch.float64)
        assert torch.allclose(result.double(), expected, rtol=0, atol=HALF_ULP_AT_1[dtype])


def test_torch_differs_where_squares_leave_the_datatype() -> None:
    huge, tiny = torch.full((1, 4), 1e20), torch.full((1, 4), 1e-30)
    assert functional.normalize(huge).eq(0).all()
    assert functional.normalize(tiny).lt(1e-17).all()
    assert lp_norm(huge).output.eq(0.5).all()
    assert lp_norm(tiny).output.eq(0.5).all()


def test_subnormal_vectors_come_out_with_norm_1() -> None:
    input = torch.tensor([[3.0, 4.0]]) * 2.0**-149
    assert torch.allclose(lp_norm(input).output, torch.tensor([[0.6, 0.8]]))


def test_long_vectors_along_any_axis_lose_nothing() -> None:
    input = _randn(200_000, 3) + 3
    expected = input.double() / torch.linalg.vector_norm(input.double(), dim=0)
    assert ((lp_norm(input, axis=0).output - expected) / expected).abs().max() < 3e-7
    assert ((lp_norm(input.T.contiguous()).output.T - expected) / expected).abs().max() < 3e-7


@pytest.mark.parametrize("p", ORDERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7,), (4, 6), (2, 3, 4), (2, 3, 4, 5), (2, 1, 3, 2, 2)], ids=str)
def test_every_axis_equals_torch(shape: tuple[int, ...], dtype: torch.dtype, p: float) -> None:
    input = _randn(*shape, dtype=dtype)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    for axis in range(-input.ndim, input.ndim):
        result = lp_norm(input, p=p, axis=axis, eps=1e-12)
        assert torch.allclose(result.output, functional.normalize(input, p=p, dim=axis, eps=1e-12), atol=tolerance)
        assert result.norm.shape == input.sum(axis, keepdim=True).shape
        assert torch.allclose(
            result.norm,
            torch.linalg.vector_norm(input.double(), p, axis, keepdim=True).float()
            if dtype != torch.float64
            else torch.linalg.vector_norm(input, p, axis, keepdim=True),
        )


@pytest.mark.parametrize("eps", [0.5, 3.0], ids=str)
@pytest.mark.parametrize("p", ORDERS, ids=str)
def test_eps_bounds_the_divisor_as_in_torch(p: float, eps: float) -> None:
    input = _randn(6, 4, dtype=torch.float64) * 0.5
    input[0] = 1e-200
    result = lp_norm(input, p=p, eps=eps)
    assert torch.allclose(result.output, functional.normalize(input, p=p, eps=eps), rtol=1e-15, atol=0)
    assert result.diagnostics() == {"eps_dominated_vectors": int((result.norm < eps).sum())}


@pytest.mark.parametrize("eps", [0.0, 1e-12], ids=str)
@pytest.mark.parametrize("p", ORDERS, ids=str)
def test_a_zero_vector_gives_zeros_with_gradient_zero(p: float, eps: float) -> None:
    input = torch.tensor([[0.0, 0.0], [0.0, 2.0]], requires_grad=True)
    result = lp_norm(input, torch.ones(2, 2), p=p, eps=eps)
    (by_autograd,) = torch.autograd.grad(result.output.sum(), input)
    assert torch.equal(result.output, torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    assert result.grad_input is not None
    for gradient in (by_autograd, result.grad_input):
        assert torch.equal(gradient[0], torch.zeros(2))
        assert gradient.isfinite().all()
    assert result.diagnostics() == {"zero_vectors": 1}


@pytest.mark.parametrize("eps", [0.0, 2.0], ids=str)
@pytest.mark.parametrize("p", ORDERS, ids=str)
def test_gradients_of_first_and_second_order(p: float, eps: float) -> None:
    def output(input: Tensor) -> Tensor:
        return lp_norm(input, p=p, axis=1, eps=eps).output

    def grad_input(input: Tensor, grad_output: Tensor) -> Tensor:
        gradient = lp_norm(input, grad_output, p=p, axis=1, eps=eps).grad_input
        assert gradient is not None
        return gradient

    input = _randn(4, 3, 2, dtype=torch.float64).requires_grad_()
    grad_output = _randn(4, 3, 2, dtype=torch.float64, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(output, input)
    assert torch.autograd.gradgradcheck(output, input)
    assert torch.autograd.gradcheck(grad_input, (input, grad_output))
    (by_autograd,) = torch.autograd.grad(output(input), input, grad_output)
    assert torch.allclose(grad_input(input, grad_output), by_autograd, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("scale", [1e24, 1e-24], ids=str)
def test_gradient_of_bfloat16_at_extreme_scales_has_both_terms(scale: float) -> None:
    """Along the vector itself nothing is left: the second term takes away all of the first."""
    along = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.bfloat16)
    result = lp_norm(along * scale, along)
    assert result.grad_input is not None
    assert float(result.grad_input.double().abs().max()) < 1e-2 / scale


@pytest.mark.parametrize("scale", [1e30, 1e-30], ids=str)
def test_gradient_at_extreme_scales(scale: float) -> None:
    input, grad_output = _randn(2, 5), _randn(2, 5, seed=1)
    expected = lp_norm(input.double(), grad_output.double()).grad_input
    scaled = lp_norm(input * scale, grad_output).grad_input
    assert expected is not None
    assert scaled is not None
    assert torch.allclose(scaled.double() * scale, expected, rtol=0, atol=1e-6)


def test_largest_magnitudes_share_the_gradient() -> None:
    result = lp_norm(torch.tensor([2.0, -2.0, 1.0]), torch.tensor([1.0, 0.0, 0.0]), p="inf")
    assert torch.allclose(result.grad_input, torch.tensor([0.25, 0.25, 0.0]))  # type: ignore[arg-type]  # it is given


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_gradients_are_rounded_once(dtype: torch.dtype) -> None:
    input, grad_output = _randn(4, 64, dtype=dtype), _randn(4, 64, dtype=dtype, seed=1)
    exact = lp_norm(input.double(), grad_output.double()).grad_input
    gradient = lp_norm(input, grad_output).grad_input
    assert exact is not None
    assert gradient is not None
    assert gradient.dtype == dtype
    assert ((gradient.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps * 0.51 + 1e-7).all()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)], ids=str)
@pytest.mark.parametrize("p", ORDERS, ids=str)
def test_an_empty_input_gives_an_empty_output(shape: tuple[int, ...], p: float) -> None:
    input = torch.empty(shape)
    result = lp_norm(input, torch.empty(shape), p=p)
    assert result.output.shape == input.shape
    assert result.grad_input is not None
    assert result.grad_input.shape == input.shape


def test_non_finite_values_stay_in_their_vector() -> None:
    input = torch.tensor([[1.0, math.inf], [1.0, math.nan], [3.0, 4.0]])
    result = lp_norm(input)
    assert torch.equal(result.output[0].isnan(), torch.tensor([False, True]))
    assert result.output[0, 0] == 0
    assert result.output[1].isnan().all()
    assert torch.allclose(result.output[2], torch.tensor([0.6, 0.8]))
    assert result.diagnostics() == {"non_finite_norms": 2}


def test_no_argument_is_changed_or_shared() -> None:
    input, grad_output = _randn(3, 4), _randn(3, 4, seed=1)
    before = input.clone(), grad_output.clone()
    result = lp_norm(input, grad_output)
    assert result.grad_input is not None
    for tensor in (result.output, result.grad_input):
        tensor.fill_(0)
    assert torch.equal(input, before[0])
    assert torch.equal(grad_output, before[1])


def test_memory_format_is_kept() -> None:
    input = _randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    output = lp_norm(input, axis=1).output
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, lp_norm(input.contiguous(), axis=1).output, rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 300, 300), (3000, 200)], ids=str)
def test_blocks_change_nothing(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    input = _randn(*shape, dtype=dtype)
    input[1] = 0
    input = input.movedim(-1, 1)
    blocked, whole = lp_norm(input, axis=1, eps=0.1), lp_norm(input.clone().requires_grad_(), axis=1, eps=0.1)
    assert torch.allclose(blocked.output, whole.output, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)
    assert torch.allclose(blocked.norm, whole.norm, rtol=1e-6)
    assert blocked.diagnostics() == whole.diagnostics()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: lp_norm(torch.ones(2, dtype=torch.int64)), DtypeError, "input: .* received int64"),
        (lambda: lp_norm(torch.tensor(1.0)), ShapeError, "input: expected at least 1 dimensions"),
        (lambda: lp_norm(torch.ones(2, 3), axis=2), ParameterError, "axis: .* received 2"),
        (lambda: lp_norm(torch.ones(2), p=3), ParameterError, "p: expected one of 1, 2, inf, received 3"),
        (lambda: lp_norm(torch.ones(2), p="two"), ParameterError, "p: .* received 'two'"),
        (lambda: lp_norm(torch.ones(2), p=True), ParameterError, "p: .* received True"),
        (lambda: lp_norm(torch.ones(2), eps=-1.0), ParameterError, "eps: expected a finite number >= 0"),
        (lambda: lp_norm(torch.ones(2), eps=math.nan), ParameterError, "eps"),
        (lambda: lp_norm(torch.ones(2), torch.ones(1, 2)), ShapeError, r"grad_output: expected shape \(2,\)"),
        (lambda: lp_norm(torch.ones(2), torch.ones(2, dtype=torch.bool)), DtypeError, "grad_output"),
    ],
    ids=["integers", "rank", "axis", "p", "p text", "p bool", "eps", "eps nan", "gradient shape", "gradient dtype"],
)
def test_refusals(call: Callable[[], object], error: type[ArgumentError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
