"""Sums of deviations: digits kept, whatever the values look like to the sample that the shift comes from."""

import numpy as np
import pytest
import torch
from torch import Tensor

from normcore import _slab
from normcore._slab import Slab
from normcore.statistics.deviations import deviations

DTYPES = [torch.float32, torch.float64]


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _check(values: Tensor, *, bound: float, channel_axis: int = 1) -> None:
    sums = deviations(Slab.of(values, channel_axis=channel_axis), dtype=values.dtype)
    exact = values.movedim(channel_axis, 0).flatten(1).double().numpy().astype(np.longdouble)
    mean = exact.mean(1, keepdims=True)
    mean = mean + (exact - mean).mean(1, keepdims=True)
    m2 = ((exact - mean) ** 2).sum(1)
    std = np.sqrt(m2 / exact.shape[1])
    assert sums.count == exact.shape[1]
    assert (np.abs(sums.mean.numpy() - mean[:, 0]) <= bound * std).all()
    assert (np.abs(sums.m2.numpy() / m2 - 1) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mean", [0.0, 0.5, 3.0, 1e4])
@pytest.mark.parametrize("shape", [(300, 6, 1), (40, 6, 70), (1, 6, 5000)], ids=str)
def test_sums_keep_their_digits_at_any_mean(
    shape: tuple[int, ...], mean: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_slab, "_BLOCK_ELEMENTS", 4096)
    _check((_randn(*shape) + mean).to(dtype), bound=3e-7 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_unlike_the_rest_misleads_no_sum(dtype: torch.dtype) -> None:
    values = (_randn(512, 4, 16) + 1e3).to(dtype)
    rows, columns = range(0, 512, 64), range(0, 16, 4)
    for row in rows:
        values[row, :, columns] = 0.0
    _check(values, bound=3e-7 if dtype == torch.float32 else 1e-12)
    values = (_randn(512, 4, 16) * 1e-3).to(dtype)
    for row in rows:
        values[row, :, columns] = 1e4
    _check(values, bound=3e-7 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("scale", [1e15, 1e19, 3e37])
def test_float32_that_overflows_is_summed_in_float64(scale: float) -> None:
    for mean in (0.0, 3.0):
        values = ((_randn(50, 3, 7).clamp(-2, 2) + mean) * scale).float()
        _check(values, bound=3e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_channels_have_no_deviation_at_all(dtype: torch.dtype) -> None:
    constants = _randn(1, 64, 1).to(dtype) / 3
    for shape in ((3, 64, 999), (999, 64, 1)):
        sums = deviations(Slab.of(constants.expand(shape), channel_axis=1), dtype=dtype)
        assert torch.equal(sums.mean, constants.flatten().double())
        assert int(sums.m2.count_nonzero()) == 0


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_values_that_are_not_finite_spoil_their_channel_alone(poison: float) -> None:
    values = _randn(20, 3, 5).float()
    values[4, 1, 2] = poison
    sums = deviations(Slab.of(values, channel_axis=1), dtype=torch.float32)
    assert sums.m2.isfinite().tolist() == [True, False, True]
    expected = values[:, ::2].double().var((0, 2), correction=0)
    assert torch.allclose(sums.m2[::2] / 100, expected)
