"""Accuracy of layer, RMS, group and instance norm against long double; -s shows torch's errors beside ours."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from normcore.normalization import group_norm, instance_norm, layer_norm, rms_norm
from tests.normcore.normalization import group_oracle as oracle

EPS = 1e-5
SHAPE = (6, 8, 18, 20)
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FORMATS = [torch.contiguous_format, torch.channels_last]


@dataclass(frozen=True, slots=True)
class Norm:
    """Ours and torch's of one input, with statistics over `count` values in a row."""

    ours: Callable[[Tensor], tuple[Tensor, Tensor | None, Tensor | None, dict[str, object]]]
    torchs: Callable[[Tensor], Tensor]
    count: int
    has_mean: bool = True
    keeps_format: bool = True


def _layer(shape: tuple[int, ...]) -> Norm:
    def ours(input: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, dict[str, object]]:
        result = layer_norm(input, normalized_shape=shape, eps=EPS)
        return result.output, result.mean, result.var, dict(result.diagnostics())

    return Norm(ours, lambda input: functional.layer_norm(input, shape, eps=EPS), math.prod(shape), keeps_format=False)


def _rms(shape: tuple[int, ...]) -> Norm:
    def ours(input: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, dict[str, object]]:
        result = rms_norm(input, normalized_shape=shape, eps=EPS)
        return result.output, None, result.mean_square, dict(result.diagnostics())

    return Norm(ours, lambda input: functional.rms_norm(input, shape, eps=EPS), math.prod(shape), False, False)


def _group(num_groups: int) -> Norm:
    def ours(input: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, dict[str, object]]:
        result = group_norm(input, num_groups=num_groups, eps=EPS)
        return result.output, result.mean, result.var, dict(result.diagnostics())

    count = 8 // num_groups * 18 * 20
    return Norm(ours, lambda input: functional.group_norm(input, num_groups, eps=EPS), count)


def _instance() -> Norm:
    def ours(input: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, dict[str, object]]:
        result = instance_norm(input, eps=EPS)
        return result.output, result.mean, result.var, dict(result.diagnostics())

    return Norm(ours, lambda input: functional.instance_norm(input, eps=EPS), 18 * 20)


NORMS = {
    "layer of 20": _layer((20,)),
    "layer of 2880": _layer((8, 18, 20)),
    "rms of 20": _rms((20,)),
    "rms of 2880": _rms((8, 18, 20)),
    "group": _group(4),
    "instance": _instance(),
}


def _data(mean: float, std: float, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    wide = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * std + mean
    return wide.to(dtype).to(memory_format=memory_format)


def _tolerates(dtype: torch.dtype, mean: float, std: float) -> bool:
    """Whether a cell of the grid promises accuracy; the others only promise an answer."""
    if dtype == torch.float16 and abs(mean) + 6 * std > 65504:
        return False
    ratio = {torch.float64: 1e3, torch.float32: 1e6, torch.float16: 2e3, torch.bfloat16: 250}[dtype]
    # 20 values in a row, and 10 of every 60 of a group, may be alike in half precision, and eps then outweighs.
    return abs(mean) / std <= ratio and std**2 >= 9 * EPS


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_norm_is_accurate_at_every_mean(
    name: str, dtype: torch.dtype, memory_format: torch.memory_format, threads: int
) -> None:
    norm = NORMS[name]
    bound = 1e-14 if dtype == torch.float64 else 1.0e-6
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for mean in (0.0, 1.0, 1e2, 1e4, 1e6):
            for std in (1e-2, 1.0, 1e3):
                input = _data(mean, std, dtype, memory_format)
                output, ours_mean, var, diagnostics = norm.ours(input)
                assert output.dtype == dtype
                assert output.shape == input.shape
                assert output.is_contiguous(memory_format=memory_format) or not norm.keeps_format
                if not _tolerates(dtype, mean, std):
                    assert bool(output.isfinite().all()) or "non_finite_groups" in diagnostics
                    continue
                expected = oracle.over_last(input, norm.count, eps=EPS, has_mean=norm.has_mean)
                error = oracle.beyond_rounding(output, expected.normalized)
                theirs = oracle.beyond_rounding(norm.torchs(input), expected.normalized)
                print(f"{name} {dtype} mean {mean:g} std {std:g}: {error:.1e}, torch {theirs:.1e}")  # noqa: T201
                assert error <= bound
                _check_statistics(expected, ours_mean, var)
    finally:
        torch.set_num_threads(before)


def _check_statistics(expected: oracle.Groups, mean: Tensor | None, var: Tensor | None) -> None:
    """The mean may be what torch's kernels find, where it is at most twice the deviation."""
    if mean is not None:
        error = np.abs(oracle.exact(mean).ravel() - expected.mean)
        assert (error <= 2.5e-7 * np.maximum(np.abs(expected.mean), np.sqrt(expected.var))).all()
    assert var is not None
    assert (np.abs(oracle.exact(var).ravel() - expected.var) <= 1e-6 * expected.var).all()


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(
    ("dtype", "std"),
    [(torch.float32, 1e15), (torch.float32, 1e19), (torch.float32, 5e37), (torch.float64, 1e150)],
)
def test_huge_scale_is_like_a_small_one(
    dtype: torch.dtype, std: float, name: str, memory_format: torch.memory_format
) -> None:
    input = _data(0.0, std, dtype, memory_format)
    norm = NORMS[name]
    expected = oracle.over_last(input, norm.count, eps=EPS, has_mean=norm.has_mean)
    assert oracle.beyond_rounding(norm.ours(input)[0], expected.normalized) <= (1e-14 if std == 1e150 else 1e-6)


@pytest.mark.parametrize("name", NORMS)
def test_float64_beyond_its_squares_says_so(name: str) -> None:
    output, _, _, diagnostics = NORMS[name].ours(_data(0.0, 1e200, torch.float64, torch.contiguous_format))
    assert bool(output.isnan().all())
    assert "non_finite_groups" in diagnostics


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 7.0, 0.1, 1e-3, math.pi * 1e4])
@pytest.mark.parametrize("name", [name for name, norm in NORMS.items() if norm.has_mean])
def test_constant_groups_among_others_are_exactly_zero(
    name: str, value: float, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    input = _data(0.0, 1.0, dtype, memory_format)
    input[1] = value
    output, _, var, diagnostics = NORMS[name].ours(input)
    assert int(output[1].count_nonzero()) == 0
    assert bool(output[0].ne(0).any())
    assert var is not None
    assert diagnostics["constant_groups"] == var[1].numel()


@pytest.mark.parametrize("name", NORMS)
def test_groups_of_different_means_and_scales_stand_beside_each_other(name: str) -> None:
    input = _data(0.0, 1.0, torch.float32, torch.contiguous_format)
    for sample, (shift, scale) in enumerate([(0, 1), (1e6, 1), (1e4, 1e-2), (0, 1e18), (0, 1e-3), (-30, 5)]):
        input[sample] = input[sample] * scale + shift
    norm = NORMS[name]
    expected = oracle.over_last(input, norm.count, eps=EPS, has_mean=norm.has_mean)
    output, mean, var, _ = norm.ours(input)
    assert oracle.beyond_rounding(output, expected.normalized) <= 1e-6
    _check_statistics(expected, mean, var)


@pytest.mark.parametrize("num_groups", [2, 4])
def test_channels_whose_first_values_mislead_are_accurate(num_groups: int) -> None:
    input = torch.randn(2, 4, 500, 64, generator=torch.Generator().manual_seed(0))
    input = input.to(memory_format=torch.channels_last)
    input[:, :, 0] += 1e4
    result = group_norm(input, num_groups=num_groups, eps=EPS)
    expected = oracle.groups(input, num_groups, eps=EPS)
    assert result.var is not None
    assert np.abs(oracle.exact(result.var).ravel() / expected.var - 1).max() <= 2e-7
    error = np.abs(oracle.exact(result.output) - expected.normalized)
    assert (error <= 5e-7 * np.maximum(1, np.abs(expected.normalized))).all()


@pytest.mark.parametrize("value", [0.1, 1 / 3, math.pi * 1e4])
def test_constant_rows_of_any_length_have_no_variance(value: float) -> None:
    for length in range(2, 200):
        result = layer_norm(torch.full((2, length), value))
        assert result.var is not None
        assert int(result.var.count_nonzero()) == 0
        assert int(result.output.count_nonzero()) == 0


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("name", NORMS)
def test_blocks_of_samples_are_like_one(
    name: str, mean: float, dtype: torch.dtype, memory_format: torch.memory_format, limits: Callable[..., None]
) -> None:
    limits(_PART=2 * math.prod(SHAPE[1:]))
    input = _data(mean, 3.0, dtype, memory_format)
    expected = oracle.over_last(input, NORMS[name].count, eps=EPS, has_mean=NORMS[name].has_mean)
    output, ours_mean, var, _ = NORMS[name].ours(input)
    assert oracle.beyond_rounding(output, expected.normalized) <= 1e-6
    _check_statistics(expected, ours_mean, var)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("samples_per_block", [1, 2, 6])
def test_parameters_of_each_sample_follow_their_blocks(
    samples_per_block: int, mean: float, memory_format: torch.memory_format, limits: Callable[..., None]
) -> None:
    limits(_PART=samples_per_block * math.prod(SHAPE[1:]))
    input = _data(mean, 1.0, torch.float32, memory_format)
    input[4, 3] = 7.0
    weight, bias = torch.linspace(0.5, 2, 48).view(6, 8), torch.linspace(-1, 1, 48).view(6, 8)
    running_mean, running_var = torch.full((8,), mean), torch.full((8,), 4.0)
    normalized = {
        "group": oracle.groups(input, 4, eps=EPS).normalized,
        "instance": oracle.groups(input, 8, eps=EPS).normalized,
        "running": (oracle.exact(input) - mean) / np.sqrt(np.longdouble(4) + np.longdouble(EPS)),
    }
    outputs = {
        "group": group_norm(input, weight, bias, num_groups=4, eps=EPS).output,
        "instance": instance_norm(input, None, None, weight, bias, eps=EPS).output,
        "running": instance_norm(input, running_mean, running_var, weight, bias, eps=EPS).output,
    }
    for name, output in outputs.items():
        expected = oracle.affine(normalized[name], weight, bias, shape=(6, 8, 1, 1))
        scale = max(1.0, float(np.abs(expected).max()) / 5)
        assert oracle.beyond_rounding(output, expected) <= 2e-6 * scale
