"""Weight standardization against mpmath, torch and its own gradients; edge cases, refusals and diagnostics."""

from collections.abc import Callable

import mpmath  # type: ignore[import-untyped]  # it ships no types
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from normcore.errors import ArgumentError, DtypeError, ParameterError, ShapeError, StatisticsError
from normcore.normalization import METHODS, weight_standardization

SHAPES = [(5, 12), (5, 4, 3), (5, 4, 3, 3), (5, 2, 3, 3, 2)]
DATATYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def _randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _oracle(weights: Tensor, gain: float, eps: float) -> Tensor:
    """The formula at 50 digits, for the weights of one filter; rounded to float64."""
    with mpmath.workdps(50):
        values = [mpmath.mpf(value) for value in weights.double().flatten().tolist()]
        mean = mpmath.fsum(values) / len(values)
        var = mpmath.fsum((value - mean) ** 2 for value in values) / len(values)
        output = [float((value - mean) / mpmath.sqrt(var + mpmath.mpf(eps)) * gain) for value in values]
    return torch.tensor(output, dtype=torch.float64).reshape(weights.shape)


@pytest.mark.parametrize("gradient", [False, True], ids=["without autograd", "with autograd"])
@pytest.mark.parametrize(
    ("dtype", "mean", "std"),
    [
        (torch.float64, 0.0, 1.0),
        (torch.float64, 1e3, 1.0),
        (torch.float32, 0.0, 0.05),
        (torch.float32, 3.0, 1.0),
        (torch.float32, 1e4, 1.0),
        (torch.float32, 1e6, 1.0),
        (torch.float32, -1e20, 1e19),
        (torch.float16, 0.0, 0.05),
        (torch.float16, 100.0, 1.0),
        (torch.float16, 0.0, 1e4),
        (torch.bfloat16, 10.0, 1.0),
        (torch.bfloat16, 0.0, 1e30),
    ],
    ids=str,
)
def test_output_equals_the_formula_at_50_digits(dtype: torch.dtype, mean: float, std: float, gradient: bool) -> None:
    input = (_randn(3, 8, 5, 5, dtype=torch.float64) * std + mean).to(dtype).requires_grad_(gradient)
    gain = torch.tensor([1.0, -0.5, 0.125])
    output = weight_standardization(input, gain, eps=1e-6).output
    assert output.dtype == dtype
    for row, weights, factor in zip(output, input, gain, strict=True):
        expected = _oracle(weights, float(factor), 1e-6)
        error = (row.detach().double() - expected).abs()
        if dtype in (torch.float16, torch.bfloat16):
            assert bool((error <= expected.abs() * torch.finfo(dtype).eps * 0.5 + 1e-6).all())
        else:
            assert float(error.max()) <= (1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", DATATYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=["linear", "1d", "2d", "3d"])
def test_every_rank_equals_the_batch_norm_of_filters_as_channels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    input, gain = _randn(*shape, dtype=dtype), torch.linspace(0.5, 2, 5, dtype=dtype)
    result = weight_standardization(input, gain, eps=1e-6)
    rows = functional.batch_norm(input.reshape(1, 5, -1), None, None, gain, training=True, eps=1e-6)
    tolerance = {torch.float64: 1e-13, torch.float32: 3e-6}.get(dtype, 8 * torch.finfo(dtype).eps)
    assert torch.allclose(result.output, rows.reshape(shape), rtol=tolerance, atol=tolerance)
    flat = input.double().reshape(5, -1)
    assert torch.allclose(_given(result.mean).double(), flat.mean(1), atol=1e-6)
    assert torch.allclose(_given(result.var).double(), flat.var(1, correction=0), rtol=1e-5)
    assert torch.allclose(_given(result.invstd).double(), (flat.var(1, correction=0) + 1e-6).rsqrt(), rtol=1e-5)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert {_given(term).dtype for term in (result.mean, result.var, result.invstd)} == {expected}


def test_variance_is_biased_and_eps_inside_the_root() -> None:
    output = weight_standardization(torch.tensor([[1.0, 3.0]]), eps=3.0).output
    assert torch.equal(output, torch.tensor([[-0.5, 0.5]]))


def test_scaled_form_is_a_gain() -> None:
    """The output's fan_in weights have a sum of squares of gamma^2 for a gain of gamma / sqrt(fan_in)."""
    output = weight_standardization(_randn(6, 4, 3, 3), torch.full((6,), 1.7 / 6), eps=0.0).output
    assert torch.allclose(output.square().sum((1, 2, 3)), torch.tensor(1.7**2))


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 2, 2)], ids=str)
def test_first_and_second_derivatives(shape: tuple[int, ...]) -> None:
    def output(input: Tensor, gain: Tensor) -> Tensor:
        return weight_standardization(input, gain, eps=0.1).output

    operands = _randn(*shape, dtype=torch.float64).requires_grad_(), _randn(shape[0], dtype=torch.float64, seed=1)
    operands[1].requires_grad_()
    assert torch.autograd.gradcheck(output, operands)
    assert torch.autograd.gradgradcheck(output, operands)
    assert torch.autograd.gradgradcheck(lambda input: weight_standardization(input).output, operands[:1])


@pytest.mark.parametrize("has_gain", [True, False], ids=["gain", "no gain"])
def test_closed_form_equals_autograd(has_gain: bool) -> None:
    input, grad_output = _randn(3, 4, 2, dtype=torch.float64), _randn(3, 4, 2, dtype=torch.float64, seed=1)
    gain = _randn(3, dtype=torch.float64, seed=2) if has_gain else torch.ones(3, dtype=torch.float64)
    leaves = input.clone().requires_grad_(), gain.clone().requires_grad_()
    expected = torch.autograd.grad(weight_standardization(*leaves).output, leaves, grad_output)
    with torch.inference_mode():
        result = weight_standardization(input, gain if has_gain else None, grad_output)
    assert torch.allclose(_given(result.grad_input), expected[0], rtol=1e-12, atol=1e-13)
    assert torch.allclose(_given(result.grad_gain), expected[1], rtol=1e-12)


@pytest.mark.parametrize("dtype", DATATYPES[1:], ids=str)
def test_gradients_are_accurate(dtype: torch.dtype) -> None:
    input, grad_output = _randn(3, 100, dtype=dtype) + 10, _randn(3, 100, dtype=dtype, seed=1)
    exact = weight_standardization(input.double(), None, grad_output.double())
    result = weight_standardization(input, None, grad_output)
    expected, grad_input = _given(exact.grad_input), _given(result.grad_input)
    assert grad_input.dtype == dtype
    tolerance = torch.finfo(dtype).eps / 2 * expected.abs() + 2e-6 * expected.abs().max()
    assert bool(((grad_input.double() - expected).abs() <= tolerance).all())
    assert torch.allclose(_given(result.grad_gain).double(), _given(exact.grad_gain), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_argument_is_changed_or_shared(dtype: torch.dtype) -> None:
    arguments = _randn(3, 4, dtype=dtype), torch.ones(3, dtype=dtype), _randn(3, 4, dtype=dtype, seed=1)
    before = [argument.clone() for argument in arguments]
    result = weight_standardization(*arguments)
    for tensor in (result.output, result.mean, result.var, result.invstd, result.grad_input, result.grad_gain):
        _given(tensor).fill_(77)
    assert all(map(torch.equal, arguments, before))


def test_memory_format_changes_no_value() -> None:
    input = _randn(6, 4, 3, 3)
    output = weight_standardization(input.contiguous(memory_format=torch.channels_last)).output
    assert torch.equal(output, weight_standardization(input).output)
    assert torch.allclose(weight_standardization(input[::2]).output, output[::2], atol=1e-6)


def test_no_filters_give_an_empty_output() -> None:
    empty = torch.empty(0, 4, 3)
    result = weight_standardization(empty, torch.empty(0), empty)
    assert result.output.shape == _given(result.grad_input).shape == empty.shape
    assert _given(result.grad_gain).shape == (0,)
    assert (result.mean, result.var, result.invstd) == (None, None, None)
    assert result.diagnostics() == {}


@pytest.mark.parametrize("dtype", DATATYPES, ids=str)
def test_diagnostics_name_what_is_questionable(dtype: torch.dtype) -> None:
    input = _randn(4, 30, dtype=dtype)
    assert weight_standardization(input).diagnostics() == {}
    input[0] = 7.1
    input[1] *= 1e-4
    result = weight_standardization(input)
    assert torch.equal(result.output[0], torch.zeros(30, dtype=dtype))
    assert result.diagnostics() == {"constant_filters": 1, "eps_dominated_filters": 2}
    input[2, 3] = torch.nan
    result = weight_standardization(input)
    assert result.output.isnan().all(1).tolist() == [False, False, True, False]
    assert result.diagnostics()["non_finite_filters"] == 1
    assert weight_standardization(_randn(4, 3, dtype=dtype)).diagnostics()["few_values_per_filter"] == 3
    loud = weight_standardization(_randn(4, 30, dtype=dtype), torch.full((4,), 9.0)).diagnostics()
    assert loud["share_beyond_4_before"] == 0.0
    assert loud["share_beyond_4_after"] == pytest.approx(0.65, abs=0.1)


def test_diagnostics_name_filters_that_the_datatype_cannot_hold() -> None:
    input = _randn(4, 30, dtype=torch.float64)
    input[2] += 3e3
    assert weight_standardization(input.bfloat16()).diagnostics() == {"unresolved_filters": 1}
    assert weight_standardization(input).diagnostics() == {}


def test_method_row_serves_inference_mode() -> None:
    with torch.inference_mode():
        result = METHODS["weight_standardization"]({"input": _randn(3, 4), "grad_output": _randn(3, 4)}, {"eps": 1e-3})
    assert result.outputs.keys() == {"output", "mean", "var", "invstd", "grad_input", "grad_gain"}


REFUSALS: dict[str, tuple[Callable[[], object], type[ArgumentError], str]] = {
    "fan_in": (
        lambda: weight_standardization(torch.ones(8, 1, 1, 1)),
        StatisticsError,
        r"input: expected more than 1 weight per filter \(fan_in\), received shape \(8, 1, 1, 1\)",
    ),
    "no fan_in": (lambda: weight_standardization(torch.ones(8, 0)), StatisticsError, "input"),
    "rank": (lambda: weight_standardization(torch.ones(8)), ShapeError, "input: expected at least 2 dimensions"),
    "integers": (lambda: weight_standardization(torch.ones(8, 2, dtype=torch.int8)), DtypeError, "input"),
    "gain": (lambda: weight_standardization(torch.ones(8, 2), torch.ones(2)), ShapeError, "gain: .* one value per"),
    "gain's datatype": (
        lambda: weight_standardization(torch.ones(8, 2), torch.ones(8, dtype=torch.int32)),
        DtypeError,
        "gain",
    ),
    "grad_output": (
        lambda: weight_standardization(torch.ones(8, 2), None, torch.ones(2, 8)),
        ShapeError,
        "grad_output",
    ),
    "eps": (lambda: weight_standardization(torch.ones(8, 2), eps=-1.0), ParameterError, "eps: .* received -1.0"),
    "eps NaN": (lambda: weight_standardization(torch.ones(8, 2), eps=torch.nan), ParameterError, "eps"),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusals(call: Callable[[], object], error: type[ArgumentError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
