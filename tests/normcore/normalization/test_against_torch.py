"""Torch's own functions and modules on random shapes, in every datatype: the same, or a difference that is meant.

Meant differences, each with a test below or in the method's own module: an empty batch leaves num_batches_tracked,
which torch counts; a row or matrix of zeros gives zeros, where torch gives NaN; a group of one value gives the bias for
any number of samples; instance norm keeps the memory format; rms norm's eps has one default for all datatypes.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from normcore.errors import StatisticsError
from normcore.normalization import (
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    local_response_norm,
    lp_norm,
    rms_norm,
    spectral_norm,
    weight_norm,
)

# Steps of the datatype at the size of the largest value: torch's own rounding, in half precision also of statistics.
STEPS = {torch.float64: 64, torch.float32: 32, torch.float16: 6, torch.bfloat16: 6}
# Their types know no unpacked arguments, or are wrong.
TORCH: Any = functional
TORCH_WEIGHT_NORM: Any = torch._weight_norm
DTYPES = pytest.mark.parametrize("dtype", STEPS, ids=str)

# Large, so that values that happen to be near each other do not blow up torch's rounding.
EPS = 0.1
FEW = settings(max_examples=20, deadline=None, derandomize=True)

sizes = st.integers(1, 6)
seeds = st.integers(0, 2**31)


@st.composite
def shapes(draw: st.DrawFn, *, least: int = 2, most: int = 5) -> tuple[int, ...]:
    return tuple(draw(st.lists(sizes, min_size=least, max_size=most)))


def _randn(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_alike(ours: Tensor | None, theirs: Tensor | None, dtype: torch.dtype) -> None:
    assert ours is not None
    assert theirs is not None
    assert ours.shape == theirs.shape
    own, other = ours.detach().double(), theirs.detach().double()
    if not other.numel():
        return
    scale = max(1.0, float(other.abs().max()))
    assert float((own - other).abs().max()) <= STEPS[dtype] * torch.finfo(dtype).eps * scale


def _grads(output: Tensor, leaves: list[Tensor], grad_output: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(output, leaves, grad_output))


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


@DTYPES
@FEW
@given(shape=shapes(), seed=seeds, training=st.booleans(), momentum=st.sampled_from([0.1, 0.0, 1.0, None]))
def test_batch_norm(
    dtype: torch.dtype, shape: tuple[int, ...], seed: int, training: bool, momentum: float | None
) -> None:
    input, grad_output = _randn(shape, seed, dtype), _randn(shape, seed + 1, dtype)
    channels = shape[1]
    parameters: Any = {"momentum": momentum, "eps": EPS, "dtype": _wide(dtype)}
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    module = kind(channels, **parameters).train(training)
    with torch.no_grad():
        module.weight.copy_(_randn((channels,), seed + 2, _wide(dtype)))
        module.bias.copy_(_randn((channels,), seed + 3, _wide(dtype)))
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    given_options: Any = {"momentum": momentum, "eps": EPS, "grad_output": grad_output, **state}
    if training and input.numel() == channels:
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            module(input)
        with pytest.raises(StatisticsError, match="more than 1 value per channel"):
            batch_norm(input, **given_options, training=training)
        return
    ours = batch_norm(input, **given_options, training=training)
    (leaf,) = _leaves(input)
    theirs = module(leaf)
    assert_alike(ours.output, theirs, dtype)
    grads = _grads(theirs, [leaf, module.weight, module.bias], grad_output)
    for own, other in zip((ours.grad_input, ours.grad_weight, ours.grad_bias), grads, strict=True):
        assert_alike(own, other, dtype)
    if training:
        for name, tensor in module.state_dict().items():
            if name not in ("weight", "bias"):
                assert_alike(getattr(ours, name), tensor, _wide(dtype))


@DTYPES
@FEW
@given(shape=shapes(least=3), seed=seeds, training=st.booleans())
def test_instance_norm(dtype: torch.dtype, shape: tuple[int, ...], seed: int, training: bool) -> None:
    shape = (*shape[:2], shape[2] + 1, *shape[3:])
    input, grad_output = _randn(shape, seed, dtype), _randn(shape, seed + 1, dtype)
    state = [torch.zeros(shape[1], dtype=_wide(dtype)), torch.ones(shape[1], dtype=_wide(dtype))]
    affine = [_randn((shape[1],), seed + index, _wide(dtype)) for index in (2, 3)]
    before = [term.clone() for term in state]
    operands: Any = (input, *before, *affine, grad_output)
    ours = instance_norm(*operands, training=training, eps=EPS)
    leaves = _leaves(input, *affine)
    theirs = TORCH.instance_norm(leaves[0], *state, *leaves[1:], use_input_stats=training, eps=EPS)
    assert_alike(ours.output, theirs, dtype)
    for own, other in zip(
        (ours.grad_input, ours.grad_weight, ours.grad_bias), _grads(theirs, leaves, grad_output), strict=True
    ):
        assert_alike(own, other, dtype)
    if training:
        assert_alike(ours.running_mean, state[0], _wide(dtype))
        assert_alike(ours.running_var, state[1], _wide(dtype))


@DTYPES
@FEW
@given(shape=shapes(), groups=st.integers(1, 3), seed=seeds)
def test_group_norm(dtype: torch.dtype, shape: tuple[int, ...], groups: int, seed: int) -> None:
    # Torch refuses groups of one value where there is one sample.
    shape = (shape[0], shape[1] * groups * 2, *shape[2:])
    input, grad_output = _randn(shape, seed, dtype), _randn(shape, seed + 1, dtype)
    affine = [_randn((shape[1],), seed + index, dtype) for index in (2, 3)]
    ours = group_norm(input, affine[0], affine[1], grad_output, num_groups=groups, eps=EPS)
    leaves = _leaves(input, *affine)
    theirs = TORCH.group_norm(leaves[0], groups, *leaves[1:], eps=EPS)
    found = (ours.output, ours.grad_input, ours.grad_weight, ours.grad_bias)
    for own, other in zip(found, (theirs, *_grads(theirs, leaves, grad_output)), strict=True):
        assert_alike(own, other, dtype)


@DTYPES
@FEW
@given(shape=shapes(least=1), trailing=st.integers(1, 3), seed=seeds, is_rms=st.booleans())
def test_layer_and_rms_norm(dtype: torch.dtype, shape: tuple[int, ...], trailing: int, seed: int, is_rms: bool) -> None:
    normalized = shape[-min(trailing, len(shape)) :]
    input, grad_output = _randn(shape, seed, dtype), _randn(shape, seed + 1, dtype)
    weight, bias = (_randn(normalized, seed + index, dtype) for index in (2, 3))
    options: Any = {"normalized_shape": normalized, "eps": EPS}
    found: tuple[Tensor | None, ...]
    if is_rms:
        root = rms_norm(input, weight, grad_output, **options)
        found = (root.output, root.grad_input, root.grad_weight)
        leaves = _leaves(input, weight)
        theirs = TORCH.rms_norm(leaves[0], list(normalized), leaves[1], EPS)
    else:
        ours = layer_norm(input, weight, bias, grad_output, **options)
        found = (ours.output, ours.grad_input, ours.grad_weight, ours.grad_bias)
        leaves = _leaves(input, weight, bias)
        theirs = TORCH.layer_norm(leaves[0], list(normalized), *leaves[1:], EPS)
    for own, other in zip(found, (theirs, *_grads(theirs, leaves, grad_output)), strict=True):
        assert_alike(own, other, dtype)


@DTYPES
@FEW
@given(shape=shapes(least=1), axis=st.integers(-5, 4), p=st.sampled_from([1, 2, "inf"]), seed=seeds)
def test_lp_norm(dtype: torch.dtype, shape: tuple[int, ...], axis: int, p: str | int, seed: int) -> None:
    axis = axis % len(shape)
    input, grad_output = _randn(shape, seed, dtype), _randn(shape, seed + 1, dtype)
    input += input.sign()  # no gradient of a small vector
    ours = lp_norm(input, grad_output, p=p, axis=axis, eps=1e-5)
    leaves = _leaves(input)
    theirs = TORCH.normalize(leaves[0], float(p), axis, 1e-5)
    assert_alike(ours.output, theirs, dtype)
    # In half precision, torch's gradient has the errors of a norm and of sums that are rounded to it.
    theirs_wide = TORCH.normalize(wide := input.double().requires_grad_(), float(p), axis, 1e-5)
    assert_alike(ours.grad_input, _grads(theirs_wide, [wide], grad_output.double())[0].to(dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)  # torch has no other on CPU
@FEW
@given(shape=shapes(least=3), size=st.integers(1, 7), seed=seeds)
def test_local_response_norm(dtype: torch.dtype, shape: tuple[int, ...], size: int, seed: int) -> None:
    input, grad_output = _randn(shape, seed, dtype), _randn(shape, seed + 1, dtype)
    ours = local_response_norm(input, grad_output, size=size, alpha=0.5, beta=0.6, k=2.0)
    leaves = _leaves(input)
    theirs = TORCH.local_response_norm(leaves[0], size, 0.5, 0.6, 2.0)
    assert_alike(ours.output, theirs, dtype)
    assert_alike(ours.grad_input, _grads(theirs, leaves, grad_output)[0], dtype)


@DTYPES
@FEW
@given(shape=shapes(least=2, most=4), axis=st.sampled_from([0, 1, None]), seed=seeds)
def test_weight_norm(dtype: torch.dtype, shape: tuple[int, ...], axis: int | None, seed: int) -> None:
    input, grad_output = _randn(shape, seed, dtype), _randn(shape, seed + 1, dtype)
    input += input.sign()
    kept = [size if index == axis else 1 for index, size in enumerate(shape)]
    length = _randn(tuple(kept), seed + 2, dtype)
    ours = weight_norm(input, length, grad_output, axis=axis)
    leaves = _leaves(input, length)
    theirs = TORCH_WEIGHT_NORM(*leaves, -1 if axis is None else axis)
    assert_alike(ours.output, theirs, dtype)
    wide = _leaves(input.double(), length.double())
    theirs_wide = TORCH_WEIGHT_NORM(*wide, -1 if axis is None else axis)
    grads = _grads(theirs_wide, wide, grad_output.double())
    for own, other in zip((ours.grad_input, ours.grad_g), grads, strict=True):
        assert_alike(own, other.to(dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@FEW
@given(shape=shapes(least=2, most=4), seed=seeds, steps=st.integers(1, 4))
def test_spectral_norm(dtype: torch.dtype, shape: tuple[int, ...], seed: int, steps: int) -> None:
    module = nn.Linear(1, 1, dtype=dtype)
    module.weight = nn.Parameter(_randn(shape, seed, dtype))
    parametrized: Any = parametrizations.spectral_norm(module, n_power_iterations=steps)
    state = parametrized.parametrizations.weight[0]
    vectors = (state._u.clone(), state._v.clone())
    weight = parametrized.parametrizations.weight.original
    grad_output = _randn(shape, seed + 1, dtype)
    ours = spectral_norm(weight.detach(), *vectors, grad_output, iterations=steps)
    theirs = parametrized.weight
    assert_alike(ours.output, theirs, dtype)
    assert_alike(ours.u, state._u, dtype)
    assert_alike(ours.v, state._v, dtype)
    assert_alike(ours.grad_input, _grads(theirs, [weight], grad_output)[0], dtype)


@DTYPES
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_an_empty_batch_changes_no_statistics_where_torch_counts_it(training: bool, dtype: torch.dtype) -> None:
    module = nn.BatchNorm2d(3, dtype=_wide(dtype)).train(training)
    state: Any = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    input = torch.empty(0, 3, 2, 2, dtype=dtype)
    ours = batch_norm(input, **state, training=training)
    assert_alike(ours.output, module(input), dtype)
    if training:
        assert int(module.num_batches_tracked or 0) == 1
        assert ours.num_batches_tracked is not None
        assert int(ours.num_batches_tracked) == 0
        for own, other in ((ours.running_mean, module.running_mean), (ours.running_var, module.running_var)):
            assert_alike(own, other, dtype)


@DTYPES
def test_empty_inputs_are_empty_as_in_torch(dtype: torch.dtype) -> None:
    input = torch.empty(0, 4, 3, dtype=dtype)
    pairs = [
        (layer_norm(input).output, TORCH.layer_norm(input, [3])),
        (rms_norm(input).output, TORCH.rms_norm(input, [3])),
        (group_norm(input, num_groups=2).output, TORCH.group_norm(input, 2)),
        (lp_norm(input).output, TORCH.normalize(input, dim=-1)),
    ]
    for own, other in pairs:
        assert own.shape == other.shape
        assert own.dtype == other.dtype == dtype
