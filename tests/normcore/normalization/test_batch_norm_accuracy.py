"""Accuracy of batch norm against the long double oracle, over means, deviations, datatypes and memory formats.

With -s, torch's errors are shown beside ours.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional

from normcore.normalization import batch_norm
from tests.normcore.normalization import oracle

EPS = 1e-5
SHAPE = (8, 6, 20, 20)
MANTISSA_BITS = {torch.float16: 10, torch.bfloat16: 7}
SMALLEST_EXPONENT = {torch.float16: -14, torch.bfloat16: -126}
FORMATS = [torch.contiguous_format, torch.channels_last]


def _data(mean: float, std: float, dtype: torch.dtype, memory_format: torch.memory_format) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(SHAPE, generator=generator, dtype=torch.float64) * std + mean
    return wide.to(dtype).to(memory_format=memory_format)


def _error_in_ulp(output: torch.Tensor, expected: oracle.LongDouble) -> float:
    _, exponent = np.frexp(np.abs(expected).astype(np.float64))
    exponent = np.maximum(exponent - 1, SMALLEST_EXPONENT[output.dtype])
    ulp = np.ldexp(1.0, exponent - MANTISSA_BITS[output.dtype])
    return float((np.abs(oracle.exact(output) - expected) / ulp).max())


def _error(output: torch.Tensor, expected: oracle.LongDouble) -> float:
    return float(np.abs(oracle.exact(output) - expected).max())


def _tolerates(dtype: torch.dtype, mean: float, std: float) -> bool:
    """Whether a cell of the grid promises accuracy; the others only promise an answer."""
    if dtype == torch.float16 and abs(mean) + 6 * std > 65504:
        return False
    ratio = {torch.float64: 1e3, torch.float32: 1e6, torch.float16: 2e3, torch.bfloat16: 250}[dtype]
    return abs(mean) / std <= ratio and std**2 >= 9 * EPS


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("std", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4, 1e6])
def test_training_is_accurate(mean: float, std: float, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    input = _data(mean, std, dtype, memory_format)
    result = batch_norm(input, training=True, eps=EPS)
    assert result.output.dtype == dtype
    assert result.output.is_contiguous(memory_format=memory_format)
    if not _tolerates(dtype, mean, std):
        # A datatype that cannot hold the data is named; float64 holds them, to fewer digits than promised.
        findings = result.diagnostics()
        assert bool(result.output.isfinite().all()) or "non_finite_channels" in findings
        why = {"non_finite_channels", "unresolved_channels", "constant_channels"}
        assert dtype == torch.float64 or why & findings.keys()
        return
    expected = oracle.batch_norm(input, eps=EPS)
    measure, bound = (_error_in_ulp, 1.0) if dtype in MANTISSA_BITS else (_error, 1.0e-6)
    error = measure(result.output, expected.output)
    theirs = measure(functional.batch_norm(input, None, None, training=True, eps=EPS), expected.output)
    print(f"{dtype} {memory_format} mean {mean:g} std {std:g}: {error:.1e}, torch {theirs:.1e}")  # noqa: T201
    assert error <= (1e-14 if dtype == torch.float64 else bound)
    assert result.mean is not None
    assert result.var is not None
    mean_error = np.abs(oracle.exact(result.mean) - expected.mean)
    assert (mean_error <= 1e-7 * np.maximum(np.abs(expected.mean), np.sqrt(expected.var))).all()
    assert (np.abs(oracle.exact(result.var) / expected.var - 1) <= 1e-6).all()


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-6)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4, 1e6])
def test_inference_is_accurate(
    mean: float, dtype: torch.dtype, bound: float, memory_format: torch.memory_format
) -> None:
    input = _data(mean, 1.0, dtype, memory_format)
    running_mean, running_var = torch.full((6,), mean, dtype=dtype) + 0.25, torch.linspace(0.5, 2, 6, dtype=dtype)
    weight, bias = torch.linspace(-1, 1, 6, dtype=dtype), torch.linspace(0, 1, 6, dtype=dtype)
    result = batch_norm(input, running_mean, running_var, weight, bias, eps=0.0)
    parameters = (oracle.exact(term) for term in (running_mean, running_var, weight, bias))
    expected = oracle.normalized(input, *parameters, eps=0.0)
    assert np.abs(oracle.exact(result.output) - expected).max() <= bound
    assert result.output.is_contiguous(memory_format=memory_format)


def test_inference_keeps_the_digits_of_a_float64_running_mean() -> None:
    input = torch.full((4, 1), 1e6)
    result = batch_norm(input, torch.tensor([1e6 - 0.01], dtype=torch.float64), torch.ones(1), eps=0.0)
    assert result.output.double().sub(0.01).abs().max() < 1e-8


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("dtype", "std"),
    [
        (torch.float32, 1e15),
        (torch.float32, 1e19),
        (torch.float32, 5e37),
        (torch.float64, 1e150),
        (torch.bfloat16, 1e37),
    ],
)
def test_training_on_a_huge_scale_is_that_on_a_small_one(
    dtype: torch.dtype, std: float, memory_format: torch.memory_format
) -> None:
    input = _data(0.0, std, dtype, memory_format)
    expected = oracle.batch_norm(input, eps=EPS)
    output = batch_norm(input, training=True, eps=EPS).output
    bound = 1e-14 if dtype == torch.float64 else (2e-2 if dtype == torch.bfloat16 else 1e-6)
    assert np.abs(oracle.exact(output) - expected.output).max() <= bound


@pytest.mark.parametrize(
    "input",
    [_data(0.0, 1e200, torch.float64, torch.contiguous_format), torch.tensor([[2e154], [-2e154]], dtype=torch.float64)],
    ids=["variance NaN", "variance infinite"],
)
def test_training_on_float64_beyond_its_squares_says_so(input: torch.Tensor) -> None:
    result = batch_norm(input, training=True)
    assert bool(result.output.isnan().all())
    assert result.diagnostics()["non_finite_channels"] == input.shape[1]


def test_training_on_data_with_an_outlying_first_block_is_accurate(limits: Callable[..., None]) -> None:
    limits(_PART=16)
    input = torch.randn(2000, 4, 4, generator=torch.Generator().manual_seed(1))
    input[0] += 1e4
    expected = oracle.batch_norm(input, eps=EPS)
    result = batch_norm(input, training=True, eps=EPS)
    assert result.var is not None
    assert np.abs(oracle.exact(result.var) / expected.var - 1).max() <= 1e-7
    assert (np.abs(oracle.exact(result.output) - expected.output) <= 3e-7 * np.maximum(1, expected.output)).all()


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
def test_counted_values_are_summed_without_losing_digits_to_their_number(memory_format: torch.memory_format) -> None:
    """Squares of many small values, each rounded away in the same direction when added to a large sum."""
    generator = torch.Generator().manual_seed(0)
    input = (torch.rand(3, 1, 200, 500, generator=generator) < 1e-3).double().to(memory_format=memory_format)
    mask = torch.rand(3, 200, 500, generator=generator) < 0.9
    counted = mask.numpy()[:, None]
    values = oracle.exact(input)[counted]
    mean = values.mean()
    var = ((values - mean) ** 2).mean()
    expected = (oracle.exact(input) - mean) / np.sqrt(var + np.longdouble(1e-12))
    output = batch_norm(input, mask=mask, training=True, eps=1e-12).output
    # Values of up to 30 deviations.
    assert (np.abs(oracle.exact(output) - expected) <= 1e-14 * np.maximum(1, np.abs(expected) / 6)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("deviations", [1.4, 2.0, 9.5, 12.0, 1e3])
@pytest.mark.parametrize("mean", [0.0, 200.0])
def test_training_is_accurate_around_first_values_that_are_off(
    mean: float, deviations: float, dtype: torch.dtype
) -> None:
    input = torch.randn(20000, 5, generator=torch.Generator().manual_seed(1)) * 4 + mean
    input[:16] += 4 * deviations
    input = input.to(dtype)
    expected = oracle.batch_norm(input, eps=EPS)
    result = batch_norm(input, training=True, eps=EPS)
    assert result.mean is not None
    assert result.var is not None
    far = np.maximum(np.abs(expected.mean), np.sqrt(expected.var))
    assert (np.abs(oracle.exact(result.mean) - expected.mean) <= 1e-7 * far).all()
    assert np.abs(oracle.exact(result.var) / expected.var - 1).max() <= (1e-7 if dtype == torch.float32 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [0.0, 7.0, 0.1, -1e-3, math.pi * 1e4])
def test_constant_channel_gives_exactly_the_bias(value: float, dtype: torch.dtype) -> None:
    input = torch.randn(17, 3, 41, 43, generator=torch.Generator().manual_seed(2)).to(dtype)
    input[:, 1] = value
    bias = torch.tensor([0.3, 0.7, -0.1], dtype=dtype)
    for memory_format in FORMATS:
        result = batch_norm(input.to(memory_format=memory_format), None, None, torch.ones(3), bias, training=True)
        assert torch.equal(result.output[:, 1], bias[1].expand(17, 41, 43))
        unbiased = batch_norm(input.to(memory_format=memory_format), None, None, torch.full((3,), 1.7), training=True)
        assert int(unbiased.output[:, 1].count_nonzero()) == 0
        assert result.diagnostics()["constant_channels"] == 1


def test_output_is_that_of_any_number_of_threads_and_of_any_layout_but_for_two_last_places() -> None:
    input = torch.randn(16, 32, 40, 40, generator=torch.Generator().manual_seed(3)) + 10
    threads = torch.get_num_threads()
    outputs: dict[torch.memory_format, list[torch.Tensor]] = {memory_format: [] for memory_format in FORMATS}
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for memory_format in FORMATS:
                output = batch_norm(input.to(memory_format=memory_format), training=True).output
                outputs[memory_format].append(output)
    finally:
        torch.set_num_threads(threads)
    for first, *others in outputs.values():
        assert all(torch.equal(output, first) for output in others)
    contiguous, channels_last = (found[0] for found in outputs.values())
    # The last place of values from 4 to 8 is 2^-21.
    assert float((contiguous - channels_last).abs().max()) <= 2 * 2.0**-21
