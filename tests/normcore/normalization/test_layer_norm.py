"""Behaviour of layer and RMS norm: shapes, torch's modules, edge cases, masks, gradients and refusals."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from normcore.errors import ArgumentError, DtypeError, ParameterError, ShapeError, StatisticsError
from normcore.normalization import METHODS, layer_norm, rms_norm
from tests.normcore.normalization import group_oracle as oracle

SHAPES = [((5,), (5,)), ((4, 6), (6,)), ((2, 3, 4), (3, 4)), ((2, 3, 4, 5), (5,)), ((2, 2, 3, 2, 3), (2, 3, 2, 3))]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 5e-6, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def _randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "normalized"), SHAPES, ids=str)
def test_layer_norm_equals_torch(shape: tuple[int, ...], normalized: tuple[int, ...], dtype: torch.dtype) -> None:
    input, weight, bias = (
        _randn(*size, dtype=dtype, seed=seed) for seed, size in enumerate((shape, *[normalized] * 2))
    )
    for terms in ((weight, bias), (weight, None), (None, bias), (None, None)):
        result = layer_norm(input, *terms, normalized_shape=normalized)
        expected = functional.layer_norm(input, normalized, *terms)
        assert result.output.dtype == dtype
        assert torch.allclose(result.output, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("eps", [None, 1e-5, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "normalized"), SHAPES, ids=str)
def test_rms_norm_equals_torch(
    shape: tuple[int, ...], normalized: tuple[int, ...], dtype: torch.dtype, eps: float | None
) -> None:
    input, weight = _randn(*shape, dtype=dtype), _randn(*normalized, dtype=dtype, seed=1)
    for term in (weight, None):
        result = rms_norm(input, term, normalized_shape=normalized, eps=eps)
        expected = functional.rms_norm(input, normalized, term, eps)
        assert result.output.dtype == dtype
        assert torch.allclose(result.output, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_rms_norm_without_eps_takes_that_of_the_datatype_computed_in(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    result = rms_norm(torch.zeros(1, 4, dtype=dtype))
    assert result.invstd is not None
    assert result.invstd.dtype == wide
    assert float(result.invstd) == pytest.approx(torch.finfo(wide).eps ** -0.5)


@pytest.mark.parametrize("shape", [(5,), (3, 5)], ids=str)
@pytest.mark.parametrize("text", [None, 5, "5", [5], (5,)], ids=str)
def test_normalized_shape_in_any_form_and_by_default_the_last_axis(
    shape: tuple[int, ...], text: str | int | list[int] | tuple[int, ...] | None
) -> None:
    input = _randn(*shape)
    assert torch.equal(layer_norm(input, normalized_shape=text).output, layer_norm(input, normalized_shape=(5,)).output)


def test_statistics_have_ones_for_the_axes_normalized_over() -> None:
    input = _randn(2, 3, 4, 5) + 3
    result = layer_norm(input, normalized_shape="4,5", eps=1e-3)
    assert result.mean is not None
    assert result.var is not None
    assert result.invstd is not None
    assert torch.allclose(result.mean, input.mean((2, 3), keepdim=True))
    assert torch.allclose(result.var, input.var((2, 3), correction=0, keepdim=True))
    assert torch.allclose(result.invstd, (result.var + 1e-3).rsqrt())
    root = rms_norm(input, normalized_shape="4,5", eps=1e-3)
    assert root.mean_square is not None
    assert root.invstd is not None
    assert torch.allclose(root.mean_square, input.square().mean((2, 3), keepdim=True))
    assert torch.allclose(root.invstd, (root.mean_square + 1e-3).rsqrt())


def test_wide_parameters_of_a_half_input_are_not_rounded() -> None:
    input, weight, bias = _randn(16, 40, dtype=torch.float16), _randn(40, seed=1) / 3, _randn(40, seed=2).double()
    expected = oracle.affine(oracle.over_last(input, 40, eps=1e-5).normalized, weight, bias, shape=(1, 40))
    assert oracle.beyond_rounding(layer_norm(input, weight, bias).output, expected) <= 1e-6
    root = oracle.over_last(input, 40, eps=1e-5, has_mean=False).normalized * oracle.exact(weight)
    assert oracle.beyond_rounding(rms_norm(input, weight, eps=1e-5).output, root) <= 1e-6


def test_one_value_gives_the_bias_and_a_diagnostic() -> None:
    input, bias = _randn(3, 1), torch.tensor([0.3])
    result = layer_norm(input, torch.tensor([2.0]), bias)
    assert torch.equal(result.output, bias.expand(3, 1))
    counts = {"single_value_groups": 3, "constant_groups": 3, "eps_dominated_groups": 3}
    assert result.diagnostics() == counts | {"few_values_per_group": 1}
    assert torch.allclose(rms_norm(input).output, input.sign(), atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (2, 0, 4)], ids=str)
def test_empty_input_gives_an_empty_output_and_gradients_of_zeros(shape: tuple[int, ...]) -> None:
    input, weight, bias = torch.empty(shape), torch.ones(shape[-1]), torch.ones(shape[-1])
    result = layer_norm(input, weight, bias, torch.empty(shape))
    assert result.output.shape == shape
    assert (result.mean, result.var, result.invstd) == (None, None, None)
    assert result.grad_input is not None
    assert result.grad_input.shape == shape
    assert result.grad_weight is not None
    assert torch.equal(result.grad_weight, torch.zeros(shape[-1]))
    assert result.diagnostics() == {}
    assert rms_norm(input, weight).output.shape == shape
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(layer_norm(input, weight).output.sum(), weight)
    assert torch.equal(gradient, torch.zeros(shape[-1]))


def test_rms_norm_of_zeros_and_its_diagnostic() -> None:
    input = _randn(3, 4)
    input[1] = 0
    result = rms_norm(input, eps=1e-6)
    assert torch.equal(result.output[1], torch.zeros(4))
    assert result.diagnostics() == {"zero_groups": 1, "eps_dominated_groups": 1}
    assert bool(rms_norm(input, eps=0.0).output[1].isnan().all())
    assert rms_norm(input, eps=0.0).diagnostics()["non_finite_groups"] == 1


@pytest.mark.parametrize("eps", [0.0, 1e-38])
def test_rms_norm_of_the_smallest_numbers_is_that_of_others(eps: float) -> None:
    input = _randn(4, 64)
    output = rms_norm(input * 2.0**-70, eps=eps * 2.0**-40).output
    assert torch.allclose(output, rms_norm(input, eps=0.0).output, atol=1e-6)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
def test_non_finite_values_stay_in_their_sample(poison: float) -> None:
    input = _randn(4, 8)
    clean, clean_root = layer_norm(input).output, rms_norm(input).output
    input[2, 1] = poison
    result, root = layer_norm(input), rms_norm(input)
    assert bool(result.output[2].isnan().all())
    assert bool(root.output[2].isnan().all())
    kept = torch.tensor([0, 1, 3])
    assert torch.allclose(result.output[kept], clean[kept], atol=5e-7)
    assert torch.allclose(root.output[kept], clean_root[kept], atol=5e-7)
    assert result.diagnostics() == root.diagnostics() == {"non_finite_groups": 1, "non_finite_values": 1}


def test_diagnostics_are_empty_for_good_data() -> None:
    assert layer_norm(_randn(4, 8)).diagnostics() == {}
    assert rms_norm(_randn(4, 8)).diagnostics() == {}


@pytest.mark.parametrize("has_mean", [True, False], ids=["layer", "rms"])
@pytest.mark.parametrize("poison", [1.0, torch.nan], ids=str)
def test_masked_values_shape_no_statistics_and_are_normalized(poison: float, has_mean: bool) -> None:
    input = _randn(3, 5, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True])
    expected = oracle.over_last(input, 5, eps=1e-5, has_mean=has_mean, mask=mask).normalized
    input[0, 2] = input[0, 2] * poison
    norm: Callable[..., object] = layer_norm if has_mean else rms_norm
    output: Tensor = norm(input, mask=mask, eps=1e-5).output  # type: ignore[attr-defined]  # either result
    chosen = np.ones((3, 5), bool) if poison == 1 else mask.expand(3, 5).numpy()
    assert np.abs(oracle.exact(output) - expected)[chosen].max() <= 1e-14


def test_no_argument_is_changed_or_shared() -> None:
    for dtype in DTYPES:
        arguments = [_randn(4, 6, dtype=dtype), torch.ones(6, dtype=dtype), torch.zeros(6, dtype=dtype)]
        arguments.append(_randn(4, 6, dtype=dtype, seed=2))
        before = [argument.clone() for argument in arguments]
        result, root = layer_norm(*arguments), rms_norm(arguments[0], arguments[1], arguments[3])
        for output in (result.output, result.mean, result.var, result.grad_input, result.grad_bias, root.output):
            assert output is not None
            output.fill_(77)
        assert all(map(torch.equal, arguments, before))


@pytest.mark.parametrize("with_mask", [False, True], ids=["all", "masked"])
def test_derivatives_are_right(with_mask: bool) -> None:
    mask = torch.tensor([[True, True, False, True]]) if with_mask else None
    operands = tuple(_randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((3, 4), (4,), (4,)))

    def layer(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm(input, weight, bias, mask=mask).output

    def root(input: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(input, weight, mask=mask).output

    assert torch.autograd.gradcheck(layer, operands)
    assert torch.autograd.gradgradcheck(layer, operands)
    assert torch.autograd.gradcheck(root, operands[:2])
    assert torch.autograd.gradgradcheck(root, operands[:2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_gradients_asked_for_are_those_of_autograd(mean: float, dtype: torch.dtype) -> None:
    input, weight, bias = _randn(6, 3, 8, dtype=dtype) + mean, _randn(3, 8, seed=1), _randn(3, 8, seed=2)
    grad_output = _randn(6, 3, 8, dtype=dtype, seed=3)
    wide = [term.double().requires_grad_() for term in (input, weight, bias)]
    layer = functional.layer_norm(wide[0], (3, 8), wide[1], wide[2])
    root = functional.rms_norm(wide[0], (3, 8), wide[1], 1e-5)
    with torch.inference_mode():
        ours = layer_norm(input, weight, bias, grad_output, normalized_shape=(3, 8))
        our_root = rms_norm(input, weight, grad_output, normalized_shape=(3, 8), eps=1e-5)
    pairs = [
        *zip(
            (ours.grad_input, ours.grad_weight, ours.grad_bias),
            torch.autograd.grad(layer, wide, grad_output.double()),
            strict=True,
        ),
        *zip(
            (our_root.grad_input, our_root.grad_weight),
            torch.autograd.grad(root, wide[:2], grad_output.double()),
            strict=True,
        ),
    ]
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    for found, expected in pairs:
        assert found is not None
        assert found.shape == expected.shape
        relative = 1e-2 if found.dtype == torch.bfloat16 else 1e-5
        assert torch.allclose(found.double(), expected, rtol=relative, atol=tolerance)


def test_output_with_and_without_a_graph_is_the_same() -> None:
    input = _randn(8, 32) * 3 + 50
    graph = layer_norm(input.clone().requires_grad_())
    plain = layer_norm(input)
    assert graph.output.requires_grad
    assert not plain.output.requires_grad
    assert torch.allclose(graph.output, plain.output, atol=1e-6)
    assert graph.mean is not None
    assert not graph.mean.requires_grad


def test_methods_take_parameters_as_text() -> None:
    for name in ("layer_norm", "rms_norm"):
        method = METHODS[name]
        text = {parameter.name: parameter.parse("2,3") for parameter in method.parameters if parameter.kind == "ints"}
        result = method({"input": _randn(4, 2, 3)}, text)
        assert result.outputs["output"].shape == (4, 2, 3)
        assert result.outputs["invstd"].shape == (4, 1, 1)


INPUT = _randn(2, 6)
REFUSALS: dict[str, tuple[Callable[[], object], type[ArgumentError], str]] = {
    "integer input": (lambda: layer_norm(torch.ones(2, 3, dtype=torch.int64)), DtypeError, "input: .* received int64"),
    "no dimensions": (lambda: layer_norm(torch.tensor(1.0)), ShapeError, r"input: .* received shape \(\)"),
    "another last axis": (
        lambda: layer_norm(INPUT, normalized_shape=5),
        ShapeError,
        r"input: expected shape \(\*, 5\) for normalized_shape \(5,\), received shape \(2, 6\)",
    ),
    "more axes than the input": (
        lambda: layer_norm(INPUT, normalized_shape="1,2,6"),
        ShapeError,
        r"input: .* received shape \(2, 6\)",
    ),
    "empty normalized_shape": (lambda: layer_norm(INPUT, normalized_shape=()), ParameterError, "normalized_shape"),
    "no integers": (lambda: rms_norm(INPUT, normalized_shape="6.5"), ParameterError, "normalized_shape"),
    "a bool": (lambda: rms_norm(INPUT, normalized_shape=True), ParameterError, "normalized_shape"),
    "weight": (lambda: layer_norm(INPUT, torch.ones(5)), ShapeError, r"weight: expected shape \(6,\)"),
    "bias": (lambda: layer_norm(INPUT, None, torch.ones(1)), ShapeError, r"bias: expected shape \(6,\)"),
    "integer weight": (lambda: rms_norm(INPUT, torch.ones(6, dtype=torch.int32)), DtypeError, "weight"),
    "eps negative": (lambda: layer_norm(INPUT, eps=-1e-5), ParameterError, "eps: expected a finite number >= 0"),
    "eps NaN": (lambda: rms_norm(INPUT, eps=torch.nan), ParameterError, "eps"),
    "grad_output": (lambda: layer_norm(INPUT, None, None, torch.ones(6)), ShapeError, "grad_output"),
    "mask of floats": (lambda: layer_norm(INPUT, mask=torch.ones(6)), DtypeError, "mask: expected bool"),
    "mask that does not broadcast": (
        lambda: rms_norm(INPUT, mask=torch.ones(3, 6, dtype=torch.bool)),
        ShapeError,
        r"mask: expected a shape that broadcasts to \(2, 6\), the input's, received shape \(3, 6\)",
    ),
    "mask that counts nothing": (
        lambda: layer_norm(INPUT, mask=torch.tensor([[True], [False]])),
        StatisticsError,
        "mask: expected at least one value that counts in every group, received 1 groups without one",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_layer_and_rms_norm_refuse(call: Callable[[], object], error: type[ArgumentError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
