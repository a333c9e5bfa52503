"""The standardize family against its primitive form, which torch differentiates itself, to the fourth derivative."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from normcore.errors import NotSupportedError
from normcore.normalization import batch_norm, batch_renorm, layer_norm, lp_norm, weight_norm
from normcore.normalization.gradients import standardize_by, standardize_gradients, standardize_over

EPS = 1e-2
# shape of the input, axes reduced, shape of weight and bias
LAYOUTS = {
    "batch": ((4, 3, 2), (0, 2), (3, 1)),
    "batch NC": ((4, 3), (0,), (3,)),
    "adaptive": ((4, 3, 2), (0, 2), (4, 3, 1)),
    "layer": ((3, 5), (1,), (5,)),
    "layer of two axes": ((2, 3, 4), (1, 2), (3, 4)),
    "instance": ((2, 3, 4), (2,), (3, 1)),
    "group": ((2, 2, 2, 3), (2, 3), (2, 2, 1)),
}
layouts = pytest.mark.parametrize(("shape", "axes", "affine"), LAYOUTS.values(), ids=LAYOUTS.keys())
has_mean_or_not = pytest.mark.parametrize("has_mean", [True, False], ids=["mean", "RMS"])
masked_or_not = pytest.mark.parametrize("is_masked", [False, True], ids=["all", "mask"])


def _tensors(shape: tuple[int, ...], affine: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    input, weight, bias = (torch.randn(size, generator=generator).double() for size in (shape, affine, affine))
    return input.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def _mask(shape: tuple[int, ...]) -> Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[:2, ..., :2] = True
    return mask


def _primitive(
    input: Tensor, weight: Tensor, bias: Tensor, *, axes: tuple[int, ...], has_mean: bool, mask: Tensor | None
) -> Tensor:
    share = torch.ones_like(input) if mask is None else mask.double()
    share = share / share.sum(axes, keepdim=True)
    mean = (share * input).sum(axes, keepdim=True) if has_mean else 0.0
    var = (share * (input - mean) ** 2).sum(axes, keepdim=True)
    return (input - mean) * (var + EPS) ** -0.5 * weight + bias


def _nested(function: Callable[[], Tensor], input: Tensor, *, order: int) -> float:
    """A number that depends on the derivatives up to this order."""
    value = function().pow(3).sum()
    for _ in range(order):
        value = torch.autograd.grad(value, input, create_graph=True)[0].pow(2).sum()
    return float(value.detach())


@layouts
@has_mean_or_not
@masked_or_not
def test_output_and_all_derivatives_equal_the_primitive_form(
    shape: tuple[int, ...], axes: tuple[int, ...], affine: tuple[int, ...], has_mean: bool, is_masked: bool
) -> None:
    tensors = _tensors(shape, affine)
    mask = _mask(shape) if is_masked else None

    def function(*tensors: Tensor) -> Tensor:
        return standardize_over(*tensors, axes=axes, eps=EPS, has_mean=has_mean, mask=mask).output

    def primitive() -> Tensor:
        return _primitive(*tensors, axes=axes, has_mean=has_mean, mask=mask)

    assert torch.allclose(function(*tensors), primitive(), atol=1e-12)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)
    for order in (1, 2, 3, 4):
        found = _nested(lambda: function(*tensors), tensors[0], order=order)
        assert found == pytest.approx(_nested(primitive, tensors[0], order=order), rel=1e-9)


@layouts
def test_given_statistics_are_constants(shape: tuple[int, ...], axes: tuple[int, ...], affine: tuple[int, ...]) -> None:
    tensors = _tensors(shape, affine)
    mean = tensors[0].detach().mean(axes, keepdim=True) + 1

    def function(*tensors: Tensor) -> Tensor:
        return standardize_by(*tensors, mean=mean, var=mean.square(), eps=EPS).output

    expected = (tensors[0] - mean) / (mean.square() + EPS).sqrt() * tensors[1] + tensors[2]
    assert torch.allclose(function(*tensors), expected)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@layouts
@has_mean_or_not
@masked_or_not
def test_gradients_without_autograd_equal_those_with_it(
    shape: tuple[int, ...], axes: tuple[int, ...], affine: tuple[int, ...], has_mean: bool, is_masked: bool
) -> None:
    tensors = _tensors(shape, affine)
    mask = _mask(shape) if is_masked else None
    result = standardize_over(*tensors, axes=axes, eps=EPS, has_mean=has_mean, mask=mask)
    grad_output = torch.randn(shape, dtype=torch.float64)
    expected = torch.autograd.grad(result.output, tensors, grad_output)
    with torch.inference_mode():
        found = standardize_gradients(
            grad_output, tensors[0].detach(), tensors[1].detach(), result.statistics, affine_shape=affine
        )
    for gradient, reference in zip((found.input, found.weight, found.bias), expected, strict=True):
        assert torch.allclose(gradient, reference, atol=1e-12)


def test_input_alone_is_differentiable() -> None:
    input = _tensors((4, 3), (3,))[0]

    def function(input: Tensor) -> Tensor:
        return standardize_over(input, axes=(0,), eps=EPS).output

    assert torch.autograd.gradcheck(function, (input,))
    assert torch.autograd.gradgradcheck(function, (input,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gradients_have_the_datatypes_of_what_they_belong_to(dtype: torch.dtype) -> None:
    input = torch.randn(8, 3, dtype=dtype, requires_grad=True)
    weight = torch.ones(3, dtype=torch.float32, requires_grad=True)
    output = standardize_over(input, weight, axes=(0,), eps=EPS).output
    grad_input, grad_weight = torch.autograd.grad(output.float().pow(3).sum(), (input, weight), create_graph=True)
    assert (output.dtype, grad_input.dtype, grad_weight.dtype) == (dtype, dtype, torch.float32)
    (second,) = torch.autograd.grad(grad_input.float().pow(2).sum() + grad_weight.sum(), input)
    assert second.dtype == dtype


@has_mean_or_not
def test_gradient_of_the_input_keeps_the_identities(has_mean: bool) -> None:
    input, weight, bias = _tensors((6, 4, 3), (4, 1))
    result = standardize_over(input, weight, bias, axes=(0, 2), eps=EPS, has_mean=has_mean)
    grad_output = torch.randn(6, 4, 3, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(result.output, input, grad_output)
    statistics = result.statistics
    normalized = (input - statistics.mean) * statistics.invstd
    if has_mean:
        assert torch.allclose(gradient.mean((0, 2)), torch.zeros(4, dtype=torch.float64), atol=1e-14)
    along = (grad_output * weight * normalized).mean((0, 2), keepdim=True)
    expected = statistics.invstd**3 * along * EPS
    assert torch.allclose((gradient * normalized).mean((0, 2), keepdim=True), expected, atol=1e-12)


@pytest.mark.parametrize("training", [True, False], ids=["own statistics", "given statistics"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_gradient_wider_than_the_input_is_not_rounded_to_it(dtype: torch.dtype, training: bool) -> None:
    """Nor does one that is beyond float16, as that of a scaled loss, become infinite."""
    input, weight, _ = _tensors((4, 3, 2), (3,))
    input, grad_output = input.detach().to(dtype), torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(2))
    running = (torch.zeros(3), torch.ones(3), weight.detach())
    expected = batch_norm(input.double(), *running, grad_output=grad_output, training=training)
    found = batch_norm(input, *running, grad_output=grad_output, training=training)
    scaled = batch_norm(input, *running, grad_output=grad_output * 2**20, training=training)
    for name in ("grad_weight", "grad_bias"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(expected, name), rtol=1e-6, atol=1e-6)
        assert getattr(scaled, name).equal(getattr(found, name) * 2**20)
    assert found.grad_input is not None
    assert expected.grad_input is not None
    torch.testing.assert_close(found.grad_input, expected.grad_input.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("training", [True, False], ids=["own statistics", "given statistics"])
def test_a_gradient_of_the_other_half_precision_is_rounded_once(training: bool) -> None:
    input = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).half()
    grad_output = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).bfloat16()
    running = torch.zeros(3), torch.full((3,), 0.7)
    found = batch_norm(input, *running, grad_output=grad_output, training=training).grad_input
    expected = batch_norm(input.double(), *running, grad_output=grad_output, training=training).grad_input
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found, expected.half(), rtol=2**-11, atol=0)


@pytest.mark.parametrize("mean", [math.inf, math.nan, 1e300], ids=str)
def test_gradients_of_half_values_by_a_mean_that_float32_has_not_come_without_a_warning(mean: float) -> None:
    input, running_mean = torch.ones(2, 2, dtype=torch.float16), torch.tensor([mean, 0.0], dtype=torch.float64)
    result = batch_norm(input, running_mean, torch.ones(2), grad_output=torch.ones_like(input), eps=0.0)
    assert result.grad_input is not None
    assert result.grad_weight is not None
    assert result.grad_input[:, 1].tolist() == [1.0, 1.0]
    assert result.grad_weight.isfinite().tolist() == [False, True]


# Of torch itself, where it makes the first dual tensor.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize(
    "function",
    [
        lambda dual: batch_norm(torch.ones(2, 4, dtype=torch.float64), dual, dual.exp(), weight=dual),
        lambda dual: layer_norm(dual),
        lambda dual: layer_norm(torch.ones(4), bias=dual),
        lambda dual: batch_renorm(dual[:, None], torch.zeros(1), torch.ones(1), training=True),
        lambda dual: lp_norm(dual),
        lambda dual: weight_norm(torch.eye(4), dual),
    ],
    ids=["batch", "layer", "bias", "renorm", "lp", "g"],
)
def test_tangents_are_refused_rather_than_lost(function: Callable[[Tensor], object]) -> None:
    values = torch.arange(4.0, dtype=torch.float64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(values, torch.ones_like(values))  # type: ignore[no-untyped-call]  # torch's has none
        with pytest.raises(NotSupportedError, match="forward-mode derivatives"):
            function(dual)
    with forward_ad.dual_level():
        function(values)


def test_gradients_of_vectors_whose_sums_are_beyond_float32_are_finite() -> None:
    generator = torch.Generator().manual_seed(7)
    input = torch.randn(3, 1024, generator=generator)
    grad_output = torch.full_like(input, 1e36) * torch.rand(3, 1024, generator=generator)
    found = layer_norm(input, grad_output=grad_output).grad_input
    expected = layer_norm(input.double(), grad_output=grad_output.double()).grad_input
    assert found is not None
    assert expected is not None
    assert float((found.double() - expected).abs().max()) <= 2e-6 * float(expected.abs().max())
