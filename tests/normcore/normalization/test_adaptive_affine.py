"""Weights and biases of each sample, position or value, as adaptive norms give them: batch norm's kin, layer and RMS.

The reference is the formula in plain float64 operations.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from normcore.errors import ArgumentError, DtypeError, ShapeError
from normcore.normalization import (
    batch_norm,
    batch_renorm,
    ghost_batch_norm,
    layer_norm,
    rms_norm,
    synchronized_batch_norm,
)

EPS = 1e-5
MEAN, VAR = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64), torch.tensor([1.0, 0.5, 4.0], dtype=torch.float64)
BOUND = {torch.float64: 1e-13, torch.float32: 4e-6}


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _standardized(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    centred = values - values.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True) + EPS).sqrt()


def _running(values: Tensor) -> Tensor:
    view = (1, 3, *[1] * (values.ndim - 2))
    return (values - MEAN.view(view)) / (VAR.view(view) + EPS).sqrt()


def _renormalized(values: Tensor) -> Tensor:
    axes = (0, *range(2, values.ndim))
    mean = values.detach().mean(axes, keepdim=True)
    std = ((values.detach() - mean).square().mean(axes, keepdim=True) + EPS).sqrt()
    kept = (VAR.view(mean.shape) + EPS).sqrt()
    r, d = (std / kept).clamp(1 / 3, 3), ((mean - MEAN.view(mean.shape)) / kept).clamp(-5, 5)
    return _standardized(values, axes) * r + d


def _batches(values: Tensor) -> Tensor:
    return torch.cat([_standardized(part, (0, *range(2, values.ndim))) for part in (values[:2], values[2:])])


BATCH: dict[str, tuple[Callable[..., object], Callable[[Tensor], Tensor]]] = {
    "training": (
        lambda x, w, b, **grads: batch_norm(x, None, None, w, b, training=True, **grads),
        lambda x: _standardized(x, (0, *range(2, x.ndim))),
    ),
    "inference": (lambda x, w, b, **grads: batch_norm(x, MEAN, VAR, w, b, **grads), _running),
    "renorm": (lambda x, w, b, **grads: batch_renorm(x, MEAN, VAR, w, b, training=True, **grads), _renormalized),
    "ghost": (
        lambda x, w, b, **grads: ghost_batch_norm(x, None, None, w, b, virtual_batch_size=2, training=True, **grads),
        _batches,
    ),
    "synchronized": (
        lambda x, w, b, grad_output=None: synchronized_batch_norm(
            torch.split(x, [1, 3]),
            None,
            None,
            w,
            b,
            training=True,
            grad_outputs=None if grad_output is None else torch.split(grad_output, [1, 3]),
        ),
        lambda x: _standardized(x, (0, *range(2, x.ndim))),
    ),
}
batch = pytest.mark.parametrize(("norm", "formula"), BATCH.values(), ids=BATCH.keys())
LAYER: dict[str, tuple[Callable[..., object], Callable[[Tensor], Tensor]]] = {
    "layer": (lambda x, w, b, **grads: layer_norm(x, w, b, eps=EPS, **grads), lambda x: _standardized(x, (-1,))),
    "RMS": (
        lambda x, w, b, **grads: rms_norm(x, w, eps=EPS, **grads),
        lambda x: x / (x.square().mean(-1, keepdim=True) + EPS).sqrt(),
    ),
    "layer over two axes": (
        lambda x, w, b, **grads: layer_norm(x, w, b, normalized_shape=x.shape[-2:], eps=EPS, **grads),
        lambda x: _standardized(x, (-2, -1)),
    ),
}
layer = pytest.mark.parametrize(("norm", "formula"), LAYER.values(), ids=LAYER.keys())


def _check(norm: Callable[..., object], formula: Callable[[Tensor], Tensor], *operands: Tensor) -> None:
    """Output and gradients, asked for and of autograd, in the operands' datatype, against the formula in float64."""
    input, bound = operands[0], BOUND[operands[0].dtype]
    grad_output = _randn(*input.shape, seed=9).to(input.dtype)
    wide = [term.double().detach().requires_grad_() for term in operands]
    expected = formula(wide[0]) * wide[1] + wide[2]
    references = torch.autograd.grad(expected, wide, grad_output.double())
    result = norm(*operands, grad_output=grad_output)
    leaves = [term.clone().requires_grad_() for term in operands]
    own = norm(*leaves).output  # type: ignore[attr-defined]  # all results have one
    found = torch.autograd.grad(own, leaves[:2] if norm is LAYER["RMS"][0] else leaves, grad_output)
    names = ("grad_input", "grad_weight", "grad_bias")[: len(found)]
    pairs = [(result.output, expected.detach()), (own.detach(), expected.detach())]  # type: ignore[attr-defined]
    pairs += [(getattr(result, name), reference) for name, reference in zip(names, references, strict=False)]
    pairs += list(zip(found, references, strict=False))
    for computed, reference in pairs:
        assert computed.shape == reference.shape
        assert float((computed.double() - reference).abs().max()) <= bound * max(1.0, float(reference.abs().max()))


@batch
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_batch_norms_take_weights_of_each_value(
    norm: Callable[..., object],
    formula: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> None:
    input = (_randn(4, 3, 5, 6) * 2 + 3).to(dtype).to(memory_format=memory_format)
    _check(norm, formula, input, _randn(4, 3, 5, 6, seed=1).to(dtype), _randn(4, 3, 5, 6, seed=2).to(dtype))


@batch
def test_derivatives_of_batch_norms_are_right(norm: Callable[..., object], formula: Callable[[Tensor], Tensor]) -> None:
    operands = tuple(_randn(4, 3, 2, seed=seed).requires_grad_() for seed in range(3))

    def output(*operands: Tensor) -> Tensor:
        found = norm(*operands).output  # type: ignore[attr-defined]  # all results have one
        assert isinstance(found, Tensor)
        return found

    if norm is not BATCH["renorm"][0]:  # whose r and d are constants to the derivatives
        assert torch.autograd.gradcheck(output, operands)
    assert torch.allclose(output(*operands), formula(operands[0]) * operands[1] + operands[2])


@pytest.mark.parametrize("channel_axis", [0, 1, 2, -1])
@pytest.mark.parametrize("rank", [2, 3])
def test_weights_of_each_value_follow_the_channel_axis(rank: int, channel_axis: int) -> None:
    if channel_axis >= rank:
        pytest.skip("no such axis")
    input, weight, bias = (_randn(4, 5, 6, seed=seed)[:, :, : 6 if rank == 3 else 1] for seed in range(3))
    if rank == 2:
        input, weight, bias = input[..., 0], weight[..., 0], bias[..., 0]
    axes = tuple(axis for axis in range(rank) if axis != channel_axis % rank)
    channels = input.shape[channel_axis]
    running = torch.zeros(channels), torch.ones(channels)
    expected = _standardized(input, axes) * weight + bias
    plain = batch_norm(input, *running, weight, bias, training=True, channel_axis=channel_axis)
    torch.testing.assert_close(plain.output, expected)
    renormalized = batch_renorm(
        input, *running, weight, bias, training=True, channel_axis=channel_axis, rmax=1.0, dmax=0.0
    )
    torch.testing.assert_close(renormalized.output, expected)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_a_bias_of_each_sample_or_value_needs_no_weight(training: bool) -> None:
    input = _randn(4, 3, 5)
    for shape in ((4, 3), (4, 3, 5)):
        bias = _randn(*shape, seed=1)
        whole = bias.view(4, 3, -1)
        plain = batch_renorm(input, MEAN, VAR, training=training, grad_output=input)
        shifted = batch_renorm(input, MEAN, VAR, bias=bias, training=training, grad_output=input)
        torch.testing.assert_close(shifted.output, plain.output + whole)
        assert shifted.grad_bias is not None
        assert shifted.grad_bias.shape == shape
        torch.testing.assert_close(shifted.grad_input, plain.grad_input)


def test_inverse_takes_weights_of_each_value() -> None:
    input, weight, bias = _randn(4, 3, 5), _randn(4, 3, 5, seed=1).exp(), _randn(4, 3, 5, seed=2)
    output = batch_norm(input, MEAN, VAR, weight, bias).output
    torch.testing.assert_close(batch_norm(output, MEAN, VAR, weight, bias, inverse=True).output, input)


@layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("affine", [(4, 1, 8), (4, 5, 8), (1, 5, 8), (4, 5, 1), (1, 1, 1)], ids=str)
def test_layer_and_rms_norm_take_weights_that_broadcast(
    norm: Callable[..., object], formula: Callable[[Tensor], Tensor], affine: tuple[int, ...], dtype: torch.dtype
) -> None:
    bias = torch.zeros(affine) if norm is LAYER["RMS"][0] else _randn(*affine, seed=2)
    _check(norm, formula, (_randn(4, 5, 8) * 2 + 3).to(dtype), _randn(*affine, seed=1).to(dtype), bias.to(dtype))


@layer
def test_derivatives_of_layer_and_rms_norm_are_right(
    norm: Callable[..., object], formula: Callable[[Tensor], Tensor]
) -> None:
    operands = tuple(_randn(*shape, seed=seed).requires_grad_() for seed, shape in enumerate([(2, 3, 4), (2, 1, 4)]))

    def output(input: Tensor, weight: Tensor) -> Tensor:
        found = norm(input, weight, None).output  # type: ignore[attr-defined]  # all results have one
        assert isinstance(found, Tensor)
        return found

    assert torch.autograd.gradcheck(output, operands)
    assert torch.autograd.gradgradcheck(output, operands)
    assert torch.allclose(output(*operands), formula(operands[0]) * operands[1])


def test_masks_go_with_weights_that_broadcast() -> None:
    input, weight = _randn(4, 5, 8), _randn(4, 1, 8, seed=1)
    mask = torch.arange(8) % 3 > 0
    found = layer_norm(input, weight, mask=mask)
    expected = layer_norm(input, mask=mask)
    torch.testing.assert_close(found.output, expected.output * weight)
    assert found.mean is not None
    assert found.mean.shape == (4, 5, 1)


def test_empty_inputs_take_them_too() -> None:
    empty = torch.empty(0, 5, 8)
    found = layer_norm(empty, torch.ones(0, 1, 8), grad_output=empty)
    assert found.output.shape == (0, 5, 8)
    assert found.grad_weight is not None
    assert found.grad_weight.shape == (0, 1, 8)
    batch = batch_norm(empty, weight=torch.ones(0, 5, 8), training=True, grad_output=empty)
    assert batch.grad_weight is not None
    assert batch.grad_weight.shape == (0, 5, 8)


INPUT = torch.ones(4, 3, 5)
REFUSALS: dict[str, tuple[Callable[[], object], type[ArgumentError], str]] = {
    "batch, another size": (
        lambda: batch_norm(INPUT, weight=torch.ones(4, 3, 4), training=True),
        ShapeError,
        r"weight: expected shape \(4, 3, 5\), one value for each of the input, received shape \(4, 3, 4\)",
    ),
    "batch, broadcast": (
        lambda: batch_norm(INPUT, weight=torch.ones(1, 3, 1), training=True),
        ShapeError,
        r"weight: expected shape \(4, 3, 5\)",
    ),
    "batch, two shapes": (
        lambda: batch_norm(INPUT, weight=INPUT, bias=torch.ones(3), training=True),
        ShapeError,
        r"bias: expected the weight's shape \(4, 3, 5\), received shape \(3,\)",
    ),
    "batch, integers": (lambda: batch_norm(INPUT, weight=INPUT.int(), training=True), DtypeError, "weight"),
    "layer, no broadcast": (
        lambda: layer_norm(INPUT, torch.ones(2, 1, 5)),
        ShapeError,
        r"weight: expected shape \(5,\), .* 3 axes that broadcast against \(4, 3, 5\), received shape \(2, 1, 5\)",
    ),
    "layer, fewer axes": (lambda: layer_norm(INPUT, torch.ones(3, 5)), ShapeError, "weight"),
    "layer, two shapes": (
        lambda: layer_norm(INPUT, torch.ones(4, 1, 5), torch.ones(5)),
        ShapeError,
        r"bias: expected the weight's shape \(4, 1, 5\), received shape \(5,\)",
    ),
    "RMS, integers": (lambda: rms_norm(INPUT, INPUT.int()), DtypeError, "weight"),
}


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refuses(call: Callable[[], object], error: type[ArgumentError], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
