"""Gradients of weight and bias of layer and RMS norm where a few samples add up to more than float32 holds."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from normcore.normalization import PerSampleResult, layer_norm, rms_norm
from tests.normcore.normalization import group_oracle as oracle

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SAMPLES, CHANNELS = 40, 24


def _tensors(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    input, grad = (torch.randn(SAMPLES, CHANNELS, generator=generator).to(dtype) for _ in range(2))
    # Every four rows are alike: what one of them adds, another can take away.
    return input[: SAMPLES // 4].repeat_interleave(4, 0), grad


def _gradients(norm: Callable[..., PerSampleResult], input: Tensor, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    terms = {"weight": torch.ones(CHANNELS)} | ({"bias": torch.zeros(CHANNELS)} if norm is layer_norm else {})
    found = norm(input, **terms, normalized_shape=(CHANNELS,), eps=1e-5, grad_output=grad)
    assert found.grad_weight is not None
    return found.grad_weight, found.grad_bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [layer_norm, rms_norm], ids=["layer", "rms"])
def test_sums_that_leave_float32_on_their_way_are_right(
    norm: Callable[..., PerSampleResult], dtype: torch.dtype
) -> None:
    input, grad = _tensors(dtype)
    usual = _gradients(norm, input, grad)
    large = torch.finfo(dtype).max * 0.6
    # Of two signs: beyond float32 after two samples, and back within it at the end.
    grad[:, 3] = torch.tensor([large, large, -large, -large]).repeat(SAMPLES // 4).to(dtype)
    grad[17, 3] *= 0.5
    weight, bias = _gradients(norm, input, grad)
    expected = oracle.over_last(input, CHANNELS, eps=1e-5, has_mean=norm is layer_norm).normalized
    terms = oracle.exact(grad) * expected
    bound = 1e-6 * np.abs(terms).sum(0)
    assert (np.abs(oracle.exact(weight) - terms.sum(0)) <= bound).all()
    others = [channel for channel in range(CHANNELS) if channel != 3]
    assert torch.equal(weight[others], usual[0][others])
    if bias is not None:
        assert usual[1] is not None
        assert float(bias[3]) == pytest.approx(float(oracle.exact(grad)[:, 3].sum()), rel=1e-6)
        assert torch.equal(bias[others], usual[1][others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", [0, 20, SAMPLES - 1])
def test_what_is_not_finite_stays_so_and_where_it_is(row: int, dtype: torch.dtype) -> None:
    input, grad = _tensors(dtype)
    usual = _gradients(layer_norm, input, grad)
    grad[row, 1], grad[row, 2], grad[row, 3], grad[row - 1, 3] = torch.inf, torch.nan, torch.inf, -torch.inf
    for found, before in zip(_gradients(layer_norm, input, grad), usual, strict=True):
        assert found is not None
        assert before is not None
        assert bool(found[1].isinf())
        assert bool(found[2].isnan())
        assert torch.equal(found[[0, *range(4, CHANNELS)]], before[[0, *range(4, CHANNELS)]])
    bias = _gradients(layer_norm, input, grad)[1]
    assert bias is not None
    assert bool(bias[3].isnan())
