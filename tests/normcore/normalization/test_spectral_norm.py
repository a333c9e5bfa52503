"""Spectral norm against torch, singular values and its own gradients; state, zero matrices, scales, refusals."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations

from normcore.errors import ArgumentError, DtypeError, ParameterError, ShapeError, StatisticsError
from normcore.normalization import SpectralNormResult, spectral_norm


def _randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _largest(input: Tensor, axis: int = 0) -> float:
    """By numpy's decomposition, in float64."""
    matrix = np.moveaxis(input.detach().double().numpy(), axis, 0).reshape(input.shape[axis], -1)
    return float(np.linalg.svd(matrix, compute_uv=False)[0])


def _power_iteration(matrix: Tensor, v: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """The formula in float64: sigma, u and v."""
    matrix, v = matrix.double(), v.double()
    for _ in range(iterations):
        u = matrix @ v
        u = u / u.square().sum().sqrt()
        v = matrix.T @ u
        v = v / v.square().sum().sqrt()
    return u @ matrix @ v, u, v


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_iterations_equal_the_formula(iterations: int, dtype: torch.dtype) -> None:
    input, v = _randn(6, 9, dtype=dtype), _randn(9, seed=1)
    sigma, u_after, v_after = _power_iteration(input, v, iterations)
    result = spectral_norm(input, None, v, iterations=iterations)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    assert (result.output.dtype, result.sigma.dtype, result.u.dtype, result.v.dtype) == (dtype, *[statistics] * 3)
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    assert abs(float(result.sigma / sigma) - 1) < tolerance
    assert torch.allclose(result.u.double(), u_after, rtol=0, atol=tolerance)
    assert torch.allclose(result.v.double(), v_after, rtol=0, atol=tolerance)
    expected = input.double() / sigma
    rounding = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}.get(dtype, 0.0)
    assert ((result.output.double() - expected).abs() <= expected.abs() * (rounding + tolerance) + 2.0**-25).all()


@pytest.mark.parametrize(
    ("module", "axis"),
    [
        (torch.nn.Linear(7, 5), 0),
        (torch.nn.Conv2d(3, 4, 3), 0),
        (torch.nn.ConvTranspose2d(3, 4, 3), 1),
        (torch.nn.Conv1d(4, 6, 1), 0),
    ],
    ids=["linear", "conv", "transposed conv", "pointwise conv"],
)
def test_steps_of_training_and_inference_equal_torch(module: torch.nn.Module, axis: int) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.copy_(_randn(*weight.shape))
    weight = weight.detach().clone()
    parametrizations.spectral_norm(module, dim=axis)
    state = dict(module.named_buffers())
    u, v = (state[f"parametrizations.weight.0._{name}"].clone() for name in "uv")
    for _ in range(3):
        result = spectral_norm(weight, u, v, axis=axis)
        assert torch.allclose(result.output, module.weight, atol=1e-6)  # type: ignore[arg-type]  # a tensor
        u, v = result.u, result.v
    state = dict(module.named_buffers())
    for name, ours in (("u", u), ("v", v)):
        assert torch.allclose(ours, state[f"parametrizations.weight.0._{name}"], atol=1e-6)
    module.eval()
    inferred = spectral_norm(weight, u, v, axis=axis, iterations=0)
    assert torch.allclose(inferred.output, module.weight, atol=1e-6)  # type: ignore[arg-type]  # a tensor
    assert torch.equal(inferred.u, u)
    assert torch.equal(inferred.v, v)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_exact_takes_the_largest_singular_value(dtype: torch.dtype, axis: int) -> None:
    input = _randn(5, 4, 3, dtype=dtype)
    result = spectral_norm(input, axis=axis, exact=True)
    expected = _largest(input, axis)
    assert float(result.sigma) == pytest.approx(expected, rel=1e-14 if dtype == torch.float64 else 1e-7)
    matrix = input.double().movedim(axis, 0).flatten(1)
    assert float(result.u.double() @ matrix @ result.v.double()) == pytest.approx(expected, rel=1e-6)
    half_ulp = 2.0**-8 if dtype == torch.bfloat16 else 1e-6
    assert _largest(result.output, axis) == pytest.approx(1.0, rel=half_ulp)


def test_iterations_approach_the_exact_value() -> None:
    input = _randn(64, 64, dtype=torch.float64)
    ratios = [float(spectral_norm(input, iterations=n).sigma) / _largest(input) for n in (1, 50, 500)]
    assert ratios[0] < ratios[1] < ratios[2] <= 1 + 1e-12
    assert ratios[0] > 0.98
    assert ratios[2] == pytest.approx(1.0, abs=1e-6)


def test_returned_state_goes_on_where_it_stopped() -> None:
    input = _randn(8, 5, dtype=torch.float64)
    first = spectral_norm(input, None, _randn(5, seed=1), iterations=3)
    second = spectral_norm(input, first.u, first.v, iterations=4)
    at_once = spectral_norm(input, None, _randn(5, seed=1), iterations=7)
    assert torch.allclose(second.u, at_once.u, rtol=1e-14)
    assert torch.allclose(second.sigma, at_once.sigma, rtol=1e-14)


def test_without_state_the_result_is_always_the_same_and_leaves_the_generator_alone() -> None:
    input = _randn(8, 5)
    torch.manual_seed(1)
    first, before = spectral_norm(input), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    second = spectral_norm(input)
    assert torch.equal(first.output, second.output)
    assert float(first.sigma) == pytest.approx(_largest(input), rel=1e-2)


def test_u_alone_gives_v() -> None:
    input = _randn(8, 5, dtype=torch.float64)
    u = _randn(8, dtype=torch.float64, seed=1)
    u = u / u.norm()
    result = spectral_norm(input, u, iterations=0)
    assert torch.equal(result.u, u)
    assert torch.allclose(result.v, input.T @ u / (input.T @ u).norm(), rtol=1e-14)
    assert float(result.sigma) == pytest.approx(float((input.T @ u).norm()), rel=1e-14)


def test_a_vector_has_its_length_for_sigma() -> None:
    input = torch.tensor([3.0, 0.0, -4.0])
    for exact in (False, True):
        result = spectral_norm(input, exact=exact)
        assert torch.allclose(result.output, input / 5)
        assert (result.u.shape, result.v.shape) == ((3,), (1,))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("exact", [False, True], ids=["constant u v", "exact"])
def test_gradients_of_first_and_second_order(exact: bool, axis: int) -> None:
    input = _randn(4, 3, 2, dtype=torch.float64).requires_grad_()
    grad_output = _randn(4, 3, 2, dtype=torch.float64, seed=1)
    state: list[Tensor] = []
    if not exact:
        # Not yet converged, so that a slope of u and v would show.
        started = spectral_norm(input, None, _randn(24 // input.shape[axis], seed=2), axis=axis)
        state = [started.u, started.v]

    def normalize(input: Tensor, grad_output: Tensor | None = None) -> SpectralNormResult:
        u, v = state or (None, None)
        return spectral_norm(input, u, v, grad_output, axis=axis, iterations=0 if state else 1, exact=exact)

    assert torch.autograd.gradcheck(lambda input: normalize(input).output, input)
    assert torch.autograd.gradgradcheck(lambda input: normalize(input).output, input)
    (expected,) = torch.autograd.grad(normalize(input).output, input, grad_output)
    closed = normalize(input.detach(), grad_output).grad_input
    assert closed is not None
    assert torch.allclose(closed, expected, rtol=1e-12, atol=1e-13)


def test_gradient_of_constant_vectors_can_itself_be_differentiated() -> None:
    started = spectral_norm(_randn(4, 3, dtype=torch.float64), iterations=1)

    def grad_input(input: Tensor, grad_output: Tensor) -> Tensor:
        gradient = spectral_norm(input, started.u, started.v, grad_output, iterations=0).grad_input
        assert gradient is not None
        return gradient

    operands = [_randn(4, 3, dtype=torch.float64, seed=seed).requires_grad_() for seed in (0, 1)]
    assert torch.autograd.gradcheck(grad_input, operands)


def test_gradient_equals_torch_in_training() -> None:
    module = torch.nn.Linear(7, 5)
    weight = module.weight.detach().clone()
    parametrizations.spectral_norm(module)
    state = {name[-1]: buffer.clone() for name, buffer in module.named_buffers()}
    grad_output = _randn(5, 7)
    original = module.parametrizations["weight"].original  # type: ignore[index,union-attr]  # there since the line above
    (expected,) = torch.autograd.grad(module.weight, original, grad_output)
    result = spectral_norm(weight, state["u"], state["v"], grad_output)
    assert result.grad_input is not None
    assert torch.allclose(result.grad_input, expected, atol=1e-6)


@pytest.mark.parametrize(("iterations", "exact"), [(0, False), (3, False), (1, True)])
def test_a_matrix_of_zeros_gives_zeros_with_gradient_zero(iterations: int, exact: bool) -> None:
    input = torch.zeros(3, 4, requires_grad=True)
    u, v = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, 0.0])
    before = (None, None) if exact else (u, v)
    result = spectral_norm(input, before[0], before[1], torch.ones(3, 4), iterations=iterations, exact=exact)
    (by_autograd,) = torch.autograd.grad(result.output.sum(), input)
    assert result.grad_input is not None
    for tensor in (result.output, result.grad_input, by_autograd, result.sigma):
        assert tensor.eq(0).all()
    assert result.diagnostics() == {"zero_matrix": 1}
    if not exact:
        assert torch.equal(result.u, u)
        assert torch.equal(result.v, v)


def test_torch_gives_nan_for_a_matrix_of_zeros() -> None:
    module = torch.nn.Linear(4, 3)
    torch.nn.init.zeros_(module.weight)
    parametrizations.spectral_norm(module)
    assert module.weight.isnan().all()
    assert spectral_norm(torch.zeros(3, 4)).output.eq(0).all()


def test_state_survives_a_direction_that_the_matrix_maps_to_zero() -> None:
    input = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    result = spectral_norm(input, torch.tensor([0.6, 0.8]), torch.tensor([0.0, 1.0]))
    assert torch.allclose(result.v, torch.tensor([1.0, 0.0]))
    assert float(result.sigma) == pytest.approx(1.2)
    assert float(spectral_norm(input, result.u, result.v).sigma) == pytest.approx(2.0)


@pytest.mark.parametrize("exact", [False, True], ids=["iterations", "exact"])
@pytest.mark.parametrize("scale", [1e25, 1e-25, 2.0**-120], ids=str)
def test_scale_does_not_matter(scale: float, exact: bool) -> None:
    input, grad_output = _randn(6, 4), _randn(6, 4, seed=1)
    expected = spectral_norm(input, grad_output=grad_output, exact=exact)
    result = spectral_norm(input * scale, grad_output=grad_output, exact=exact)
    assert torch.allclose(result.output, expected.output, atol=1e-6)
    assert float(result.sigma) / scale == pytest.approx(float(expected.sigma), rel=1e-6)
    assert result.grad_input is not None
    assert expected.grad_input is not None
    assert torch.allclose(result.grad_input.double() * scale, expected.grad_input.double(), atol=1e-6)


def test_non_finite_values_do_not_poison_the_state() -> None:
    input, u, v = _randn(3, 4), torch.tensor([0.0, 0.6, 0.8]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    input[0, 0] = math.nan
    result = spectral_norm(input, u, v, iterations=2)
    assert result.diagnostics() == {"non_finite_sigma": 1}
    assert result.u.isfinite().all()
    assert result.v.isfinite().all()


def test_no_argument_is_changed_or_shared() -> None:
    arguments = [_randn(3, 4), _randn(3, seed=1), _randn(4, seed=2), _randn(3, 4, seed=3)]
    before = [argument.clone() for argument in arguments]
    for iterations in (0, 2):
        result = spectral_norm(*arguments, iterations=iterations)
        for name in ("output", "sigma", "u", "v", "grad_input"):
            getattr(result, name).fill_(9)
        for argument, original in zip(arguments, before, strict=True):
            assert torch.equal(argument, original)


_EYE = torch.eye(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: spectral_norm(_EYE.int()), DtypeError, "input: .* received int32"),
        (lambda: spectral_norm(torch.tensor(1.0)), ShapeError, "input: expected at least 1 dimensions"),
        (lambda: spectral_norm(torch.empty(0, 3)), ShapeError, r"input: .* not empty, received shape \(0, 3\)"),
        (lambda: spectral_norm(_EYE, axis=2), ParameterError, "axis: .* received 2"),
        (lambda: spectral_norm(_EYE, iterations=-1), ParameterError, "iterations: .* >= 0 and <= 1000, received -1"),
        (lambda: spectral_norm(_EYE, iterations=1001), ParameterError, "iterations"),
        (lambda: spectral_norm(_EYE, torch.ones(3)), ShapeError, r"u: expected shape \(2,\)"),
        (lambda: spectral_norm(_EYE, None, torch.ones(2)), ShapeError, r"v: expected shape \(3,\)"),
        (lambda: spectral_norm(_EYE, torch.ones(2).int()), DtypeError, "u: .* received int32"),
        (lambda: spectral_norm(_EYE, iterations=0), StatisticsError, "u: expected u or v with iterations 0"),
        (lambda: spectral_norm(_EYE, torch.ones(2), exact=True), StatisticsError, "u: expected none with exact"),
        (lambda: spectral_norm(_EYE, None, torch.ones(3), exact=True), StatisticsError, "v: expected none with exact"),
        (lambda: spectral_norm(_EYE * math.inf, exact=True), StatisticsError, "input: expected finite values"),
        (
            lambda: spectral_norm(_EYE, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]), iterations=0),
            StatisticsError,
            "v: expected u and v with u.T W v other than 0, received vectors orthogonal to W",
        ),
        (lambda: spectral_norm(_EYE, grad_output=torch.ones(3)), ShapeError, r"grad_output: .* \(2, 3\)"),
        (lambda: spectral_norm(_EYE, grad_output=_EYE.bool()), DtypeError, "grad_output"),
    ],
)
def test_refusals(call: Callable[[], object], error: type[ArgumentError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_autocast_rounds_no_product() -> None:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    expected = spectral_norm(weight)
    with torch.autocast("cpu", torch.bfloat16):
        found = spectral_norm(weight)
    assert found.output.equal(expected.output)
    assert found.u.equal(expected.u)
