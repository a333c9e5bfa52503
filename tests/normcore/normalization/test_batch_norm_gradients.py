"""Gradients of batch norm: of every order, without autograd, at any mean, in every layout."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from normcore.errors import ShapeError
from normcore.normalization import BatchNormResult, batch_norm
from tests.normcore.normalization import oracle

FORMATS = [torch.contiguous_format, torch.channels_last]
formats = pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
in_both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _gradients(result: BatchNormResult) -> tuple[Tensor, Tensor, Tensor]:
    assert result.grad_input is not None
    assert result.grad_weight is not None
    assert result.grad_bias is not None
    return result.grad_input, result.grad_weight, result.grad_bias


CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, bool]] = {
    "NC": ((5, 3), (3,), 1, False),
    "NCL": ((4, 3, 2), (3,), 1, False),
    "NCHW": ((2, 3, 2, 2), (3,), 1, False),
    "channels last axis": ((4, 2, 3), (3,), -1, False),
    "channels first axis": ((3, 4, 2), (3,), 0, False),
    "adaptive NC": ((4, 3), (4, 3), 1, False),
    "adaptive NCL": ((4, 3, 2), (4, 3), 1, False),
    "adaptive, last axis": ((4, 2, 3), (4, 3), -1, False),
    "mask": ((4, 3, 2), (3,), 1, True),
    "adaptive, mask": ((4, 3, 2), (4, 3), 1, True),
}


@in_both_modes
@pytest.mark.parametrize(("shape", "affine", "axis", "is_masked"), CASES.values(), ids=CASES.keys())
def test_gradients_are_right_to_the_second_order_and_without_autograd(
    shape: tuple[int, ...], affine: tuple[int, ...], axis: int, is_masked: bool, training: bool
) -> None:
    leaves = tuple(_randn(*size, seed=seed).requires_grad_() for seed, size in enumerate((shape, affine, affine)))
    mask = torch.tensor([[True, False], [True, True], [True, True], [False, True]]) if is_masked else None
    mean, var = _randn(3, seed=5), _randn(3, seed=6).square() + 0.5

    def normalize(*leaves: Tensor, grad_output: Tensor | None = None) -> BatchNormResult:
        input, weight, bias = leaves
        return batch_norm(
            input,
            mean,
            var,
            weight,
            bias,
            grad_output=grad_output,
            mask=mask,
            training=training,
            eps=1e-2,
            channel_axis=axis,
        )

    def output(*leaves: Tensor) -> Tensor:
        return normalize(*leaves).output

    assert torch.autograd.gradcheck(output, leaves)
    assert torch.autograd.gradgradcheck(output, leaves)
    grad_output = _randn(*shape, seed=9)
    expected = torch.autograd.grad(output(*leaves), leaves, grad_output)
    with torch.inference_mode():
        found = _gradients(normalize(*(leaf.detach() for leaf in leaves), grad_output=grad_output))
    for gradient, reference in zip(found, expected, strict=True):
        assert torch.allclose(gradient, reference, atol=1e-12)


def test_third_derivative_is_right_where_torch_is_not() -> None:
    input = _randn(5, 2).requires_grad_()

    def third(normalize: Callable[[Tensor], Tensor]) -> float:
        value = normalize(input).pow(3).sum()
        for _ in range(3):
            value = torch.autograd.grad(value, input, create_graph=True)[0].pow(2).sum()
        return float(value.detach())

    def primitive(input: Tensor) -> Tensor:
        deviations = input - input.mean(0)
        return deviations / (deviations.square().mean(0) + 1e-2).sqrt()

    expected = third(primitive)
    assert third(lambda input: batch_norm(input, training=True, eps=1e-2).output) == pytest.approx(expected, rel=1e-9)
    theirs = third(lambda input: torch.nn.functional.batch_norm(input, None, None, training=True, eps=1e-2))
    assert theirs != pytest.approx(expected, rel=1e-2)


def _exact(input: Tensor, grad_output: Tensor, weight: Tensor, *, eps: float) -> tuple[oracle.LongDouble, ...]:
    mean, var = (term.reshape(1, -1, 1, 1) for term in oracle.batch_statistics(input))
    invstd = 1 / np.sqrt(var + np.longdouble(eps))
    normalized = (oracle.exact(input) - mean) * invstd
    grad = oracle.exact(grad_output)
    scaled = grad * oracle.exact(weight).reshape(1, -1, 1, 1)
    axes = (0, 2, 3)
    means = (term.mean(axes, keepdims=True) for term in (scaled, scaled * normalized))
    of_input = invstd * (scaled - next(means) - normalized * next(means))
    return of_input, (grad * normalized).sum(axes), grad.sum(axes)


@formats
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-7), (torch.float64, 2e-14)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("mean", [0.0, 1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(6, 5, 4, 4), (24, 16, 20, 20), (300, 64, 5, 5)], ids=str)
def test_backward_is_accurate_at_any_mean(
    shape: tuple[int, ...], mean: float, dtype: torch.dtype, bound: float, memory_format: torch.memory_format
) -> None:
    input = (_randn(*shape) + mean).to(dtype).to(memory_format=memory_format)
    grad_output = _randn(*shape, seed=1).to(dtype)
    weight = torch.linspace(-1, 2, shape[1], dtype=dtype)
    result = batch_norm(input, None, None, weight, training=True, grad_output=grad_output)
    found = _gradients(result)
    assert found[0].is_contiguous(memory_format=memory_format)
    expected = _exact(input, grad_output, weight, eps=1e-5)
    for gradient, reference, slack in zip(found, expected, (1, 3, 3), strict=True):
        error = np.abs(oracle.exact(gradient) - reference).max() / np.abs(reference).max()
        assert error <= slack * bound


@formats
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)], ids=str)
def test_backward_in_half_precision_is_rounded_once(
    dtype: torch.dtype, bound: float, memory_format: torch.memory_format
) -> None:
    input = (_randn(24, 16, 20, 20) + 3).to(dtype).to(memory_format=memory_format)
    grad_output = _randn(24, 16, 20, 20, seed=1).to(dtype)
    weight = torch.linspace(-1, 2, 16)
    found = _gradients(batch_norm(input, None, None, weight, training=True, grad_output=grad_output))
    assert [gradient.dtype for gradient in found] == [dtype, torch.float32, torch.float32]
    expected = _exact(input, grad_output, weight, eps=1e-5)
    error = np.abs(oracle.exact(found[0]) - expected[0]) / np.maximum(np.abs(expected[0]), 1e-3)
    assert error.max() <= 1.01 * bound
    for gradient, reference in zip(found[1:], expected[1:], strict=True):
        assert np.abs(oracle.exact(gradient) - reference).max() / np.abs(reference).max() <= 2e-6


@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_double_backward_is_accurate_in_float32(mean: float) -> None:
    def second(dtype: torch.dtype) -> Tensor:
        input = (_randn(12, 6, 10, 10) + mean).float().to(dtype).requires_grad_()
        output = batch_norm(input, training=True).output
        (first,) = torch.autograd.grad(output.pow(3).sum(), input, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), input)[0]

    expected = second(torch.float64)
    assert float((second(torch.float32) - expected).abs().max() / expected.abs().max()) <= 3e-6


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e19, 1e30])
def test_backward_on_extreme_scales_is_that_on_a_usual_one(scale: float) -> None:
    input, grad_output = (_randn(6, 3, 40, 40, seed=seed).float() for seed in (0, 1))
    input = (input.double() * scale).float()
    found = _gradients(batch_norm(input, training=True, eps=1e-80, grad_output=grad_output))
    expected = _exact(input, grad_output, torch.ones(3), eps=1e-80)
    for gradient, reference in zip(found, expected, strict=True):
        assert np.abs(oracle.exact(gradient) - reference).max() <= 1e-6 * np.abs(reference).max()


@in_both_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_equal_those_of_torch(dtype: torch.dtype, training: bool) -> None:
    leaves = [_randn(4, 3, 5).to(dtype).requires_grad_(), *(_randn(3, seed=2).to(dtype).requires_grad_() for _ in "wb")]
    mean, var = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=dtype)
    grad_output = _randn(4, 3, 5, seed=3).to(dtype)
    input, weight, bias = leaves
    theirs = torch.nn.functional.batch_norm(input, mean.clone(), var.clone(), weight, bias, training=training)
    expected = torch.autograd.grad(theirs, leaves, grad_output)
    ours = batch_norm(input, mean, var, weight, bias, training=training, grad_output=grad_output)
    of_autograd = torch.autograd.grad(ours.output, leaves, grad_output)
    for references in (_gradients(ours), of_autograd):
        for gradient, reference in zip(references, expected, strict=True):
            assert torch.allclose(gradient, reference, atol=1e-6)


def test_gradients_without_parameters_are_those_of_weight_1_and_bias_0() -> None:
    input, grad_output = _randn(4, 3, 5), _randn(4, 3, 5, seed=1)
    expected = batch_norm(input, None, None, torch.ones(3), torch.zeros(3), training=True, grad_output=grad_output)
    for gradient, reference in zip(
        _gradients(batch_norm(input, training=True, grad_output=grad_output)), _gradients(expected), strict=True
    ):
        assert torch.allclose(gradient, reference, atol=1e-13)
    bias = torch.zeros(4, 3)
    per_sample = batch_norm(input, None, None, None, bias, training=True, grad_output=grad_output)
    assert _gradients(per_sample)[2].shape == (4, 3)


def test_gradient_of_a_constant_channel_is_that_of_the_formula() -> None:
    input, grad_output = torch.full((8, 1, 300), 7.0), _randn(8, 1, 300).float()
    found = _gradients(batch_norm(input, training=True, grad_output=grad_output))
    expected = (grad_output - grad_output.mean()) / 1e-5**0.5
    assert torch.allclose(found[0], expected, rtol=1e-5, atol=1e-4)
    assert float(found[1]) == 0.0


@in_both_modes
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)], ids=str)
def test_gradients_of_an_empty_batch_are_zeros(shape: tuple[int, ...], training: bool) -> None:
    result = batch_norm(
        torch.empty(shape), torch.zeros(3), torch.ones(3), training=training, grad_output=torch.empty(shape)
    )
    of_input, of_weight, of_bias = _gradients(result)
    assert of_input.shape == shape
    assert torch.equal(of_weight, torch.zeros(3))
    assert torch.equal(of_bias, torch.zeros(3))


def test_no_gradient_is_made_unasked() -> None:
    input = _randn(4, 3).requires_grad_()
    with torch.no_grad():
        assert not batch_norm(input, training=True).output.requires_grad
    assert not batch_norm(input.detach(), training=True).output.requires_grad
    result = batch_norm(input, torch.zeros(3), torch.ones(3), training=True)
    assert result.grad_input is None
    for name in ("mean", "var", "invstd", "running_mean", "running_var"):
        assert not getattr(result, name).requires_grad


def test_grad_output_of_another_shape_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"grad_output: expected shape \(4, 3\), .* received shape \(4, 2\)"):
        batch_norm(_randn(4, 3), training=True, grad_output=_randn(4, 2))


@formats
@pytest.mark.parametrize("mean", [0.0, 1e2, 1e6])
def test_gradient_of_weight_is_accurate_where_gradient_of_output_is_nearly_constant(
    mean: float, memory_format: torch.memory_format
) -> None:
    input = (_randn(24, 16, 20, 20) + mean).float().to(memory_format=memory_format)
    grad_output = (1 + 1e-3 * _randn(24, 16, 20, 20, seed=1)).float()
    result = batch_norm(input, None, None, torch.ones(16), training=True, grad_output=grad_output)
    expected = _exact(input, grad_output, torch.ones(16), eps=1e-5)[1]
    assert np.abs(oracle.exact(_gradients(result)[1]) - expected).max() <= 3e-7 * np.abs(expected).max()


def _exact_frozen(grad: Tensor, input: Tensor, mean: Tensor, var: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """dx, dweight and dbias by statistics that are constants, of (N, C) in float64 by numpy."""
    dy, x, mu, gamma = (own.double().numpy() for own in (grad, input, mean, weight))
    scale = 1 / np.sqrt(var.double().numpy() + 1e-5)
    found = gamma * scale * dy, (dy * (x - mu) * scale).sum(0), dy.sum(0)
    return tuple(torch.from_numpy(own) for own in found)


@pytest.mark.parametrize("channels", [3, 70])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_backward_by_given_statistics_is_accurate_in_rows_of_columns(dtype: torch.dtype, channels: int) -> None:
    # More rows than are summed at once, and a rest of them; a mean between the numbers of float32.
    mean, var = _randn(channels, seed=1) + 1e4, _randn(channels, seed=2).square() + 0.5
    input = (_randn(2003, channels, seed=3) + 1e4).to(dtype)
    grad, weight = _randn(2003, channels, seed=4).to(dtype), _randn(channels, seed=5).to(dtype)
    found = _gradients(batch_norm(input, mean, var, weight, grad_output=grad))
    bound = 2e-6 if dtype != torch.float64 else 1e-14
    for own, exact in zip(found, _exact_frozen(grad, input, mean, var, weight), strict=True):
        tolerance = 2**-8 if own.dtype == torch.bfloat16 else bound
        assert float((own.double() - exact).abs().max()) <= tolerance * float(exact.abs().max())


def test_backward_by_given_statistics_sums_beyond_float32() -> None:
    grad = torch.full((37, 5), 2.5e38)
    grad[18:] = -2.5e38
    grad[36] = 0.0
    input, mean, var, weight = torch.ones(37, 5), torch.zeros(5), torch.ones(5), torch.ones(5)
    input[7] = 2.0
    found = _gradients(batch_norm(input, mean, var, weight, grad_output=grad))
    for own, exact in zip(found, _exact_frozen(grad, input, mean, var, weight), strict=True):
        torch.testing.assert_close(own.double(), exact, rtol=1e-6, atol=1e32)


@formats
@in_both_modes
def test_weights_may_make_up_for_a_scale_beyond_float32(training: bool, memory_format: torch.memory_format) -> None:
    # More values than are normalized and checked in one go.
    input = (_randn(8, 2, 150, 150) * 1e-30).float().contiguous(memory_format=memory_format)
    grad = _randn(8, 2, 150, 150, seed=1).float().contiguous(memory_format=memory_format)
    mean, var = torch.zeros(2), torch.full((2,), 1e-60, dtype=torch.float64)
    how = {"weight": torch.full((2,), 1e-16), "eps": 1e-80, "training": training}
    found = _gradients(batch_norm(input, mean, var, grad_output=grad, **how))  # type: ignore[arg-type]  # several types
    wide = batch_norm(input.double(), mean, var, grad_output=grad.double(), **how)  # type: ignore[arg-type]
    for own, exact in zip(found, _gradients(wide), strict=True):
        assert float((own - exact).abs().max()) <= 2e-6 * float(exact.abs().max())


@pytest.mark.usefixtures("threads_set_back")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("affine", [(71,), (8, 71)], ids=["shared", "adaptive"])
def test_channels_that_are_computed_together_have_their_own_gradients(
    affine: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Three or seven channels share a block, some of which the end of a thread's share cuts."""
    at = torch.arange(71.0, dtype=torch.float64).reshape(-1, 1, 1)
    input = ((_randn(8, 71, 24, 24) + at) * (1 + at)).to(dtype)
    grad, weight = _randn(8, 71, 24, 24, seed=1).to(dtype), (_randn(*affine, seed=2) + 2).to(dtype)
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(_gradients(batch_norm(input, weight=weight, training=True, grad_output=grad)))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)
    bound = 2e-6 if dtype == torch.float32 else 1e-14
    for channel in range(71):
        own = slice(channel, channel + 1)
        operands = (tensor[:, own].double() for tensor in (input, grad))
        alone, dy = (tensor.transpose(0, 1).reshape(1, 1, -1) for tensor in operands)
        gamma = weight[..., own].double()
        gamma = gamma.reshape(-1, 1).expand(8, 576).reshape(1, 1, -1) if len(affine) == 2 else gamma
        x = alone.clone().requires_grad_()
        mean, var = x.mean(), x.var(unbiased=False)
        (expected,) = torch.autograd.grad((x - mean) / (var + 1e-5).sqrt() * gamma, x, dy)
        of_input = found[0][0][:, channel].double().reshape(expected.shape)
        assert float((of_input - expected).abs().max()) <= bound * float(expected.abs().max())
