"""The compiled kernels against the closed forms in float64 torch, for all layouts, datatypes and numbers of threads."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from normcore import _plan
from normcore.errors import DtypeError, ParameterError, ShapeError
from normcore.normalization import (
    batch_norm,
    batch_renorm,
    closed_forms,
    group_norm,
    instance_norm,
    layer_norm,
    local_response_norm,
    lp_norm,
    mean_variance_norm,
    rms_norm,
)
from normcore.normalization.closed_forms import Statistics, given_statistics
from normcore.normalization.kernel import own_statistics, standardize_own
from normcore.normalization.kernel_backward import GradientSums, backward, gradient_sums, input_gradient

# input, axes reduced, weight
LAYOUTS = {
    "batch": ((4, 3, 7, 5), (0, 2, 3), (3, 1, 1)),
    "batch of rows": ((40, 3), (0,), (3,)),
    "batch, own weights": ((4, 3, 7, 5), (0, 2, 3), (4, 3, 1, 1)),
    "layer": ((33, 40), (1,), (40,)),
    "layer of few": ((70, 5), (1,), (5,)),
    "layer of two axes": ((5, 3, 4, 6), (2, 3), (4, 6)),
    "instance": ((4, 3, 7, 5), (2, 3), (3, 1, 1)),
    "group": ((4, 2, 3, 35), (2, 3), (2, 3, 1)),
    "group, own weights": ((4, 2, 3, 35), (2, 3), (4, 2, 3, 1)),
    "group of many": ((2, 2, 20, 35), (2, 3), (2, 20, 1)),
    "filters": ((6, 30), (1,), (6, 1)),
    "no box": ((2, 3, 4, 3, 5), (1, 3), (2, 1, 4, 1, 1)),
}
layouts = pytest.mark.parametrize(("shape", "axes", "affine"), LAYOUTS.values(), ids=LAYOUTS.keys())
last_or_not = pytest.mark.parametrize("is_last", [False, True], ids=["contiguous", "channels_last"])
DTYPES = {torch.float64: 1e-13, torch.float32: 4e-7, torch.float16: 1.1e-3, torch.bfloat16: 8.5e-3}
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def _tensors(
    shape: tuple[int, ...], affine: tuple[int, ...], dtype: torch.dtype, *, is_last: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    input, grad, weight, bias = (
        torch.randn(size, generator=generator).to(dtype) for size in (shape, shape, affine, affine)
    )
    input = input * 2 + 3
    if is_last:
        # The second axis last in memory, as channels are; of more axes the second and third.
        input, grad = (_with_last(tensor) for tensor in (input, grad))
    return input, grad, weight, bias


def _with_last(tensor: Tensor) -> Tensor:
    order = (0, 3, 1, 2) if tensor.ndim == 4 and tensor.shape[3] == 35 else (0, *range(2, tensor.ndim), 1)
    inverse = sorted(range(tensor.ndim), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(inverse)


def _assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    assert float((found.double() - expected.double()).abs().max()) <= tolerance * max(1.0, float(expected.abs().max()))


@layouts
@last_or_not
@dtypes
@pytest.mark.parametrize("has_mean", [True, False], ids=["mean", "RMS"])
def test_forward_and_backward_are_the_closed_forms(
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    affine: tuple[int, ...],
    is_last: bool,
    dtype: torch.dtype,
    has_mean: bool,
) -> None:
    input, grad, weight, bias = _tensors(shape, affine, dtype, is_last=is_last)
    exact = [tensor.double() for tensor in (input, grad, weight, bias)]
    by = closed_forms.own_statistics(exact[0], axes=axes, eps=1e-5, has_mean=has_mean, mask=None)
    expected = closed_forms.standardize(exact[0], by, *exact[2:])
    output, found = standardize_own(input, weight, bias, axes=axes, eps=1e-5, has_mean=has_mean)
    _assert_close(output, expected, DTYPES[dtype])
    assert output.stride() == input.stride()
    precision = 1e-14 if dtype == torch.float64 else 1e-7
    for name in ("mean", "var", "invstd"):
        _assert_close(getattr(found, name), getattr(by, name), precision)
    sums = closed_forms.gradient_sums(exact[1], exact[0], exact[2], by, affine_shape=affine)
    of_input = closed_forms.input_gradient(exact[1], exact[0], exact[2], by, total=sums[0], dot=sums[1])
    gradients = backward(grad, input, weight, found, affine_shape=affine)
    _assert_close(gradients[0], of_input, DTYPES[dtype])
    for own, other in zip(gradients[1:], sums[2:], strict=True):
        assert own.shape == affine
        _assert_close(own, other, 1e-13 if dtype == torch.float64 else 1e-6)


@layouts
@last_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_groups_too_large_for_the_cache_are_the_same_but_for_a_last_place(
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    affine: tuple[int, ...],
    is_last: bool,
    dtype: torch.dtype,
    limits: Callable[..., None],
) -> None:
    input, grad, weight, bias = _tensors(shape, affine, dtype, is_last=is_last)
    found = []
    for cached in (_plan._CACHED, 0):
        limits(_CACHED=cached, _RUN_BYTES=0)
        output, by = standardize_own(input, weight, bias, axes=axes, eps=1e-5)
        found.append((output, by.mean, by.var, *backward(grad, input, weight, by, affine_shape=affine)))
    for own, other in zip(*found, strict=True):
        _assert_close(own, other, 1e-15 if own.dtype == torch.float64 else 2 * torch.finfo(dtype).eps)


@layouts
@last_or_not
def test_sums_and_gradient_in_two_steps_are_those_in_one(
    shape: tuple[int, ...], axes: tuple[int, ...], affine: tuple[int, ...], is_last: bool
) -> None:
    input, grad, weight, _ = _tensors(shape, affine, torch.float64, is_last=is_last)
    by = own_statistics(input, axes=axes, eps=1e-5)
    whole = backward(grad, input, weight, by, affine_shape=affine)
    sums = gradient_sums(grad, input, weight, by, affine_shape=affine)
    for own, other in zip((input_gradient(grad, input, weight, by, sums), sums.weight, sums.bias), whole, strict=True):
        _assert_close(own, other, 1e-14)
    assert isinstance(sums, GradientSums)


@layouts
@last_or_not
@dtypes
def test_statistics_of_counted_values_are_the_closed_form_s(
    shape: tuple[int, ...], axes: tuple[int, ...], affine: tuple[int, ...], is_last: bool, dtype: torch.dtype
) -> None:
    input, *_ = _tensors(shape, affine, dtype, is_last=is_last)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[:2, ..., :2] = True
    mask[0] = True
    mask[..., 0] = True
    expected = closed_forms.own_statistics(input.double(), axes=axes, eps=1e-5, has_mean=True, mask=mask)
    found = own_statistics(input.masked_fill(~mask, torch.nan), axes=axes, eps=1e-5, mask=mask)
    for name in ("mean", "var", "invstd", "count"):
        _assert_close(getattr(found, name), getattr(expected, name), 1e-13)


@pytest.mark.parametrize("scale", [1e-38, 1e-40, 1e30], ids=str)
def test_masked_statistics_at_the_ends_of_float32_are_finite(scale: float) -> None:
    input = torch.tensor([[1.0, 2.0, 3.0, 9.0]]) * scale
    mask = torch.tensor([[True, True, True, False]])
    output = layer_norm(input, mask=mask, eps=0.0).output
    assert output[0, :3].tolist() == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5], abs=3e-5)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("is_recorded", [False, True], ids=["closed form", "autograd"])
def test_a_value_that_does_not_count_leaves_no_trace_in_gradients(poison: float, is_recorded: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    input, grad = torch.randn(4, 3, 5, generator=generator), torch.randn(4, 3, 5, generator=generator)
    mask = torch.ones(4, 1, dtype=torch.bool).expand(4, 5).clone()
    mask[1, 2] = False
    grad[1, :, 2] = 0.0
    poisoned = input.clone()
    poisoned[1, :, 2] = poison

    def gradients(values: Tensor) -> list[Tensor]:
        weight, bias = torch.ones(3, requires_grad=is_recorded), torch.zeros(3, requires_grad=is_recorded)
        values = values.clone().requires_grad_(is_recorded)
        result = batch_norm(
            values, weight=weight, bias=bias, mask=mask, training=True, grad_output=None if is_recorded else grad
        )
        if is_recorded:
            # What reaches the poisoned value itself is no number times 0: leave it out, as a loss that masks does.
            return list(torch.autograd.grad(result.output, [values, weight, bias], grad))
        found = (result.grad_input, result.grad_weight, result.grad_bias)
        return [own for own in found if own is not None]

    for own, expected in zip(gradients(poisoned), gradients(input), strict=True):
        _assert_close(own, expected, 1e-6)


NORMS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "batch": lambda input: batch_norm(input, training=True).output,
    "batch mean": lambda input: batch_norm(input, training=True).mean,
    "batch var": lambda input: batch_norm(input, training=True).var,
    "batch gradient": lambda input: batch_norm(input, training=True, grad_output=input).grad_input,
    "batch weight's": lambda input: batch_norm(input, training=True, grad_output=input).grad_weight,
    "group": lambda input: group_norm(input, num_groups=8).output,
    "group gradient": lambda input: group_norm(input, grad_output=input * input, num_groups=8).grad_input,
    "group weight's": lambda input: group_norm(input, grad_output=input * input, num_groups=8).grad_weight,
    "instance": lambda input: instance_norm(input).output,
    "inference": lambda input: batch_norm(input, torch.ones(24), torch.ones(24)).output,
}


@pytest.mark.usefixtures("threads_set_back")
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@last_or_not
def test_results_do_not_depend_on_the_number_of_threads(
    norm: Callable[[Tensor], Tensor | None], dtype: torch.dtype, is_last: bool
) -> None:
    input = (torch.randn(8, 24, 50, 60, generator=torch.Generator().manual_seed(4)) + 5).to(dtype)
    input = input.to(memory_format=torch.channels_last if is_last else torch.contiguous_format)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        result = norm(input)
        assert result is not None
        found.append(result)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", ["batch", "group", "instance", "batch mean", "batch var"])
@pytest.mark.parametrize("mean", [0.0, 100.0, 1e4])
def test_layouts_agree_to_the_last_place(name: str, mean: float) -> None:
    input = torch.randn(8, 24, 30, 20, generator=torch.Generator().manual_seed(5)) + mean
    first, second = NORMS[name](input), NORMS[name](input.to(memory_format=torch.channels_last))
    assert first is not None
    assert second is not None
    ulp = torch.nextafter(first.abs(), torch.tensor(torch.inf)) - first.abs()
    # Near 0 the last place is that of the deviations, which are of order 1.
    assert bool(((first - second).abs() <= torch.maximum(ulp, torch.tensor(1e-9))).all())


OUTPUTS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {
    "batch": lambda input, out: batch_norm(input, training=True, out=out).output,
    "inference": lambda input, out: batch_norm(input, torch.zeros(4), torch.ones(4), out=out).output,
    "group": lambda input, out: group_norm(input, num_groups=2, out=out).output,
    "instance": lambda input, out: instance_norm(input, out=out).output,
    "layer": lambda input, out: layer_norm(input, out=out).output,
    "RMS": lambda input, out: rms_norm(input, out=out).output,
    "masked": lambda input, out: layer_norm(input, mask=input < input.amax(), out=out).output,
    "cast first": lambda input, out: rms_norm(input, torch.ones(5), cast_before_scale=True, out=out).output,
    "renorm": lambda input, out: batch_renorm(input, torch.zeros(4), torch.ones(4), training=True, out=out).output,
    "local response": lambda input, out: local_response_norm(input, out=out).output,
    "Lp": lambda input, out: lp_norm(input, out=out).output,
    "Lp of channels": lambda input, out: lp_norm(input, axis=1, out=out).output,
    "mean-variance": lambda input, out: mean_variance_norm(input, out=out).output,
}
outputs = pytest.mark.parametrize("function", OUTPUTS.values(), ids=OUTPUTS.keys())


@outputs
@last_or_not
def test_out_takes_the_output(function: Callable[[Tensor, Tensor], Tensor], is_last: bool) -> None:
    memory_format = torch.channels_last if is_last else torch.contiguous_format
    input = torch.randn(2, 4, 3, 5).contiguous(memory_format=memory_format)
    out = torch.full_like(input, torch.nan)
    result = function(input, out)
    assert result is out
    assert torch.equal(out, function(input, torch.empty_like(input)))
    assert bool(out.isfinite().all())


@outputs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e200], ids=["usual", "huge"])
def test_out_holds_what_a_new_output_would(
    function: Callable[[Tensor, Tensor | None], Tensor], scale: float, dtype: torch.dtype
) -> None:
    # Where sums of squares leave the datatype they are made in, other ways lead to the output.
    scale = min(scale, 1e30) if dtype == torch.float32 else scale
    whole = (torch.randn(2, 4, 3, 10, dtype=torch.float64) * scale).to(dtype)
    for input in (whole[..., :5], whole[..., ::2], whole[..., 5:].contiguous()):
        out = torch.full_like(input, torch.nan)
        assert function(input, out) is out
        torch.testing.assert_close(out, function(input, None), rtol=0, atol=0, equal_nan=True)


@outputs
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda out: out.double(), DtypeError, "out: expected float32 on cpu, received float64 on cpu"),
        (lambda out: out[:1], ShapeError, r"out: expected shape \(2, 4, 3, 5\) in the memory format"),
        (lambda out: out.to(memory_format=torch.channels_last), ShapeError, "out: .* strides"),
        (lambda out: out.requires_grad_(), ParameterError, "out: expected no gradients"),
    ],
    ids=["datatype", "shape", "memory format", "gradient"],
)
def test_out_that_cannot_take_the_output_is_refused(
    function: Callable[[Tensor, Tensor], Tensor],
    spoil: Callable[[Tensor], Tensor],
    error: type[Exception],
    message: str,
) -> None:
    input = torch.randn(2, 4, 3, 5)
    with pytest.raises(error, match=message):
        function(input, spoil(torch.empty_like(input)))


@outputs
def test_out_in_the_memory_of_the_input_is_refused(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    input = torch.randn(2, 4, 3, 5)
    with pytest.raises(ParameterError, match="out: expected memory of its own"):
        function(input, input)
    with pytest.raises(ParameterError, match="out: expected no gradients"):
        function(input.clone().requires_grad_(), torch.empty_like(input))


@pytest.mark.parametrize(
    ("function", "options"),
    [(batch_norm, {"training": True}), (layer_norm, {}), (rms_norm, {}), (group_norm, {"num_groups": 2})],
    ids=["batch", "layer", "rms", "group"],
)
def test_out_takes_no_part_in_gradients_and_in_no_other_argument(
    function: Callable[..., Any], options: dict[str, Any]
) -> None:
    input, weight = torch.randn(4, 4), torch.ones(4, requires_grad=True)
    with pytest.raises(ParameterError, match="out: expected no gradients"):
        function(input, weight=weight, out=torch.empty_like(input), **options)
    grad_output = torch.randn(4, 4)
    with pytest.raises(ParameterError, match="out: expected memory of its own, received that of another argument"):
        function(input, grad_output=grad_output, out=grad_output, **options)
    empty = torch.empty(0, 4)
    assert function(empty, out=torch.empty_like(empty), **options).output.shape == (0, 4)


def test_inverse_takes_no_out() -> None:
    input = torch.randn(2, 4)
    with pytest.raises(ParameterError, match="inverse: expected false with out"):
        batch_norm(input, torch.zeros(4), torch.ones(4), inverse=True, out=torch.empty_like(input))


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (3, 0, 1, 2), (2, 3, 0, 1), (0, 2, 3, 1)], ids=str)
@pytest.mark.parametrize("is_grouped", [False, True], ids=["instance", "group"])
def test_any_order_of_axes_in_memory_gives_the_same(order: tuple[int, ...], is_grouped: bool) -> None:
    def normalize(input: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
        if is_grouped:
            return group_norm(input, weight, bias, num_groups=2, out=out).output
        return instance_norm(input, weight=weight, bias=bias, out=out).output

    plain = torch.randn(4, 6, 5, 3), torch.rand(6), torch.randn(6)
    input = plain[0].permute(order).contiguous().permute(sorted(range(4), key=order.__getitem__))
    assert not input.is_contiguous()
    grad, found = torch.randn(4, 6, 5, 3), []
    for own in (plain[0], input):
        leaves = [leaf.detach().requires_grad_() for leaf in (own, *plain[1:])]
        output = normalize(*leaves)
        found.append((output.detach(), *torch.autograd.grad(output, leaves, grad)))
    out = torch.empty_like(input)
    assert normalize(input, *plain[1:], out=out) is out
    _assert_close(out, found[0][0], DTYPES[torch.float32])
    for expected, own in zip(*found, strict=True):
        _assert_close(own, expected, DTYPES[torch.float32])


def test_views_that_negate_what_is_in_memory_are_seen_as_they_show_it() -> None:
    def negated(*shape: int) -> Tensor:
        return torch._neg_view(torch.rand(*shape) - 0.1)

    input, grad = negated(6, 3, 4), negated(6, 3, 4)
    weight, bias, mean = negated(3), negated(3), negated(3)
    for training in (False, True):
        operands = input, mean, torch.ones(3), weight, bias
        found = batch_norm(*operands, training=training, grad_output=grad)
        plain = (own.resolve_neg() for own in operands)
        expected = batch_norm(*plain, training=training, grad_output=grad.resolve_neg())
        assert torch.equal(found.output, expected.output)
        assert found.gradients is not None
        assert expected.gradients is not None
        for own, plainly in zip(found.gradients, expected.gradients, strict=True):
            assert torch.equal(own, plainly)
    with pytest.raises(ParameterError, match="out: expected values as they stand in memory"):
        layer_norm(torch.rand(6, 3, 4), out=input)


@dtypes
def test_strides_with_gaps_are_no_obstacle(dtype: torch.dtype) -> None:
    whole = torch.randn(4, 12, 10, generator=torch.Generator().manual_seed(6)).to(dtype)
    for input in (whole[:, ::2], whole[:, :, ::2], whole[:, :1].expand(4, 6, 10), whole.permute(2, 0, 1)):
        found = batch_norm(input, training=True, grad_output=input * input)
        expected = batch_norm(input.contiguous(), training=True, grad_output=(input * input).contiguous())
        _assert_close(found.output, expected.output, DTYPES[dtype])
        assert found.grad_input is not None
        assert expected.grad_input is not None
        _assert_close(found.grad_input, expected.grad_input, DTYPES[dtype])


@last_or_not
@dtypes
def test_gradients_by_given_statistics_are_the_closed_forms(is_last: bool, dtype: torch.dtype) -> None:
    shape = (5, 6, 90, 40)
    input, grad, weight, _ = _tensors(shape, (1, 6, 1, 1), dtype, is_last=is_last)
    assert weight is not None
    by = given_statistics(torch.randn(1, 6, 1, 1), torch.full((1, 6, 1, 1), 0.7), eps=0.0)
    exact = [term.double() for term in (grad, input, weight)]
    found = backward(grad, input, weight, by, affine_shape=(1, 6, 1, 1))
    of_bias = exact[0].sum((0, 2, 3), keepdim=True)
    of_weight = (exact[0] * (exact[1] - by.mean) * by.invstd).sum((0, 2, 3), keepdim=True)
    _assert_close(found[0], exact[0] * exact[2] * by.invstd, DTYPES[dtype])
    for own, expected in zip(found[1:], (of_weight, of_bias), strict=True):
        _assert_close(own, expected, 1e-12 if dtype == torch.float64 else 1e-6)


@last_or_not
def test_gradients_by_given_statistics_have_scales_beyond_products_of_float32(is_last: bool) -> None:
    input, grad, _, _ = _tensors((4, 6, 7, 5), (1, 6, 1, 1), torch.float32, is_last=is_last)
    grad, weight = grad * 1e8, torch.full((1, 6, 1, 1), 3e-27)
    by = given_statistics(torch.zeros(1, 6, 1, 1), torch.full((1, 6, 1, 1), 1e28), eps=0.0)
    of_input, *_ = backward(grad, input, weight, by, affine_shape=(1, 6, 1, 1))
    exact = grad.double() * weight.double() * 1e-14
    assert float((of_input.double() - exact).abs().max()) <= 6e-8 * float(exact.abs().max())


@pytest.mark.parametrize("shape", [(2, 2), (2, 2, 3)], ids=str)
def test_given_statistics_keep_gradients_of_what_is_not_finite(shape: tuple[int, ...]) -> None:
    input = torch.full(shape, 2.0)
    input[:, 0] = torch.nan
    input[0, 1] = torch.inf
    terms = torch.zeros(2, *(1,) * (len(shape) - 2))
    by = given_statistics(terms, terms + 1, eps=0.0)
    assert isinstance(by, Statistics)
    of_input, _, of_bias = backward(torch.ones(shape), input, None, by, affine_shape=tuple(terms.shape))
    assert torch.equal(of_input, torch.ones(shape))
    assert of_bias.flatten().tolist() == [input.numel() / 2] * 2


def test_warm_up_compiles_what_calls_need() -> None:
    # In a process where no other test has compiled anything.
    found = subprocess.run([sys.executable, "-c", _CALLS], capture_output=True, text=True, timeout=300, check=False)
    assert (found.returncode, found.stdout) == (0, "[]\n"), found.stderr


_CALLS = """
from itertools import product
import torch
from normcore import _column_gradients, _column_sweeps, _gradient_sweeps, _plan, _sweeps, _vector_gradients
from normcore.normalization import batch_norm, group_norm, instance_norm, layer_norm, rms_norm, warm_up

warm_up()
kernels = {
    kernel
    for module in (_sweeps, _gradient_sweeps, _vector_gradients, _column_sweeps, _column_gradients)
    for kernel in vars(module).values()
    if hasattr(kernel, "signatures")
}
before = {kernel: len(kernel.signatures) for kernel in kernels}
assert sum(count > 0 for count in before.values()) >= 10
_plan._RUN_BYTES = 0
for dtype, cached in product((torch.float32, torch.float16, torch.bfloat16, torch.float64), (_plan._CACHED, 0)):
    _plan._CACHED = cached
    _plan._cached.cache_clear()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        input = torch.randn(2, 6, 4, 4).to(dtype).contiguous(memory_format=memory_format)
        batch_norm(input, training=True, grad_output=input)
        batch_norm(input, torch.zeros(6), torch.ones(6), grad_output=input)
        group_norm(input, torch.ones(6), num_groups=2, grad_output=input)
        instance_norm(input, grad_output=input, mask=torch.ones(4, dtype=torch.bool))
        layer_norm(input, grad_output=input)
        rms_norm(input, grad_output=input)
        leaves = [torch.ones(shape, dtype=dtype, requires_grad=True) for shape in (input.shape, (6,), (6,))]
        for output in (
            batch_norm(leaves[0], None, None, *leaves[1:], training=True).output,
            group_norm(*leaves, num_groups=2).output,
        ):
            torch.autograd.grad(output, leaves, input)
print([kernel.py_func.__name__ for kernel in kernels if len(kernel.signatures) != before[kernel]])
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_samples_of_a_tensor_beyond_the_caches_come_out_as_alone(dtype: torch.dtype) -> None:
    # Such a tensor is read and written in turn, page by page; 37 positions leave a rest of every page.
    input = torch.randn(65, 48, 37, 37).to(dtype).contiguous(memory_format=torch.channels_last) + 3
    weight, bias, grad = torch.rand(48), torch.randn(48), torch.randn_like(input)
    assert input.nbytes > 2**23
    whole = group_norm(input, weight, bias, num_groups=12)
    apart = [group_norm(sample[None], weight, bias, num_groups=12) for sample in input]
    assert torch.equal(whole.output, torch.cat([own.output for own in apart]))
    assert whole.var is not None
    assert torch.equal(whole.var, torch.cat([own.var for own in apart if own.var is not None]))
    running = torch.randn(48), torch.rand(48) + 0.5
    frozen = batch_norm(input, *running, weight, bias, grad_output=grad)
    parts = [
        batch_norm(input[rows], *running, weight, bias, grad_output=grad[rows]) for rows in (slice(9), slice(9, None))
    ]
    grads = [(own.grad_input, own.grad_weight) for own in (frozen, *parts)]
    of_input, of_weight = zip(
        *[(own, other) for own, other in grads if own is not None and other is not None], strict=True
    )
    assert torch.equal(of_input[0], torch.cat(of_input[1:]))
    _assert_close(of_weight[0], torch.stack(of_weight[1:]).sum(0), 1e-6)
