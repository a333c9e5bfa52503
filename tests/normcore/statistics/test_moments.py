"""Moments: exact against rational arithmetic, mergeable in any order, neutral when empty."""

from collections.abc import Sequence
from fractions import Fraction
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normcore.errors import DtypeError, NormcoreError, ParameterError, ShapeError, StatisticsError
from normcore.statistics import Moments

VALUES = st.lists(st.floats(min_value=-1e6, max_value=1e6, width=32), min_size=0, max_size=12)


def _column(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1)


def _exact(tensor: torch.Tensor) -> tuple[Fraction, Fraction]:
    """Mean and sum of squared deviations in rational arithmetic."""
    values = [Fraction(float(value)) for value in tensor.flatten()]
    mean = sum(values, Fraction(0)) / len(values)
    return mean, sum(((value - mean) ** 2 for value in values), Fraction(0))


def _assert_close(actual: Moments, expected: Moments, *, scale: float) -> None:
    assert torch.equal(actual.count, expected.count)
    if bool(expected.count.sum() == 0):
        return
    assert torch.allclose(actual.mean, expected.mean, rtol=1e-14, atol=1e-15 * scale)
    assert torch.allclose(actual.m2, expected.m2, rtol=1e-12, atol=1e-15 * scale**2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [0.0, 100.0, 1e4])
def test_of_equals_exact_arithmetic(dtype: torch.dtype, mean: float) -> None:
    generator = torch.Generator().manual_seed(1)
    tensor = (torch.randn(4, 2, 3, 5, generator=generator, dtype=torch.float64) + mean).to(dtype)
    moments = Moments.of(tensor)
    for channel in range(2):
        expected_mean, expected_m2 = _exact(tensor[:, channel])
        assert abs(Fraction(float(moments.mean[channel])) - expected_mean) <= 4e-16 * max(1.0, abs(mean))
        assert abs(Fraction(float(moments.m2[channel])) - expected_m2) <= 1e-13 * expected_m2
    assert torch.equal(moments.count, torch.full((2,), 60.0, dtype=torch.float64))


def test_of_a_tensor_of_many_blocks_equals_its_float64_variance() -> None:
    generator = torch.Generator().manual_seed(2)
    tensor = torch.randn(6, 8, 120, 130, generator=generator) * 2 + 1000
    tensor[0] += 500
    moments = Moments.of(tensor)
    wide = tensor.double()
    centred = wide - wide.mean((0, 2, 3), keepdim=True)
    assert torch.allclose(moments.mean, wide.mean((0, 2, 3)), rtol=1e-14)
    assert torch.allclose(moments.m2, centred.square().sum((0, 2, 3)), rtol=1e-11)
    assert torch.allclose(Moments.of(tensor.to(memory_format=torch.channels_last)).m2, moments.m2, rtol=1e-11)


def test_of_follows_the_channel_axis() -> None:
    tensor = torch.randn(2, 5, 4, 3, generator=torch.Generator().manual_seed(3))
    expected = Moments.of(tensor.movedim(-1, 1).contiguous())
    for axis in (3, -1):
        actual = Moments.of(tensor, channel_axis=axis)
        assert torch.allclose(actual.mean, expected.mean, rtol=1e-14, atol=1e-16)
        assert torch.allclose(actual.m2, expected.m2, rtol=1e-13)


def test_of_one_element_and_of_a_constant_has_no_spread() -> None:
    assert torch.equal(Moments.of(torch.tensor([[3.5, -1e30]])).m2, torch.zeros(2).double())
    constant = Moments.of(torch.full((7, 1, 11), 0.1))
    assert float(constant.mean) == float(torch.tensor(0.1))
    assert float(constant.m2) == 0.0


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_of_non_finite_data_stays_in_its_channel(poison: float) -> None:
    tensor = torch.tensor([[1.0, 1.0], [2.0, 3.0]])
    tensor[0, 1] = poison
    moments = Moments.of(tensor)
    assert not bool(moments.mean[1].isfinite())
    assert bool(moments.m2[1].isnan())
    assert (float(moments.mean[0]), float(moments.m2[0])) == (1.5, 0.5)


def test_of_does_not_overflow_in_float32() -> None:
    moments = Moments.of(torch.tensor([[3e38], [-3e38]]))
    assert float(moments.var()) == pytest.approx(9e76, rel=1e-6)


@given(st.lists(VALUES, min_size=1, max_size=5), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_merge_equals_concatenation_in_any_order(parts: list[list[float]], random: Random) -> None:
    everything = [value for part in parts for value in part]
    scale = max((abs(value) for value in everything), default=1.0)
    expected = Moments.of(_column(everything))
    shuffled = list(parts)
    random.shuffle(shuffled)
    for order in (parts, shuffled, parts[::-1]):
        first, *rest = (Moments.of(_column(part)) for part in order)
        _assert_close(first.merge(*rest), expected, scale=scale)
        one_by_one = first
        for part in rest:
            one_by_one = one_by_one.merge(part)
        _assert_close(one_by_one, expected, scale=scale)


@pytest.mark.parametrize("ratio", [1e3, 1e6], ids=["1e3", "1e6"])
def test_merge_keeps_the_digits_of_a_small_spread(ratio: float) -> None:
    generator = torch.Generator().manual_seed(4)
    tensor = torch.randn(4000, 3, generator=generator, dtype=torch.float64) + ratio
    first, *rest = (Moments.of(part) for part in torch.split(tensor, [1, 700, 299, 3000]))
    merged = first.merge(*rest)
    _, m2 = _exact(tensor[:, 0])
    assert abs(Fraction(float(merged.m2[0])) / m2 - 1) <= 1e-12 * max(1.0, ratio / 1e3)


def test_merge_with_empty_changes_nothing_whatever_its_mean() -> None:
    moments = Moments.of(torch.randn(5, 2, generator=torch.Generator().manual_seed(5)))
    nothing = torch.zeros(2, dtype=torch.float64)
    for empty in (Moments.of(torch.empty(0, 2)), Moments(nothing, nothing * torch.nan, nothing)):
        for merged in (moments.merge(empty), empty.merge(moments), empty.merge(moments, empty)):
            assert torch.equal(merged.count, moments.count)
            assert torch.equal(merged.mean, moments.mean)
            assert torch.equal(merged.m2, moments.m2)
    assert torch.equal(Moments.of(torch.empty(0, 2)).merge(Moments.of(torch.empty(3, 2, 0))).count, nothing)


def test_merge_takes_counts_that_differ_by_channel() -> None:
    left = Moments(*(torch.tensor(values, dtype=torch.float64) for values in ([2, 0], [1, 9], [2, 0])))
    right = Moments(*(torch.tensor(values, dtype=torch.float64) for values in ([2, 3], [3, 5], [2, 6])))
    merged = left.merge(right)
    assert merged.count.equal(torch.tensor([4.0, 3.0]).double())
    assert merged.mean.equal(torch.tensor([2.0, 5.0]).double())
    assert merged.m2.equal(torch.tensor([8.0, 6.0]).double())


def test_var_is_torch_var_and_nan_without_freedom() -> None:
    tensor = torch.randn(9, 2, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    for correction in (0, 1):
        assert torch.allclose(Moments.of(tensor).var(correction=correction), tensor.var(0, correction=correction))
    one = Moments.of(torch.ones(1, 2))
    assert float(one.var()[0]) == 0.0
    assert bool(one.var(correction=1).isnan().all())
    assert bool(Moments.of(torch.empty(0, 2)).var().isnan().all())


@pytest.mark.parametrize(
    ("count", "mean", "m2", "error", "message"),
    [
        ([1.0], [0.0], [-1.0], StatisticsError, "m2: expected values >= 0, received -1"),
        ([-1.0], [0.0], [1.0], StatisticsError, r"count: expected whole numbers from 0 to 2\^53, received -1"),
        ([torch.nan], [0.0], [1.0], StatisticsError, "count"),
        ([1.0], [0.0, 0.0], [1.0], ShapeError, r"mean: .* received shape \(2,\)"),
        ([[1.0]], [0.0], [1.0], ShapeError, r"count: .* received shape \(1, 1\)"),
    ],
    ids=["m2 negative", "count negative", "count NaN", "lengths", "rank"],
)
def test_moments_refuse_impossible_values(
    count: list[float], mean: list[float], m2: list[float], error: type[NormcoreError], message: str
) -> None:
    with pytest.raises(error, match=message):
        Moments(*(torch.tensor(values, dtype=torch.float64) for values in (count, mean, m2)))


def test_no_values_leave_a_mean_whose_square_overflows() -> None:
    far = Moments(*(torch.tensor(values, dtype=torch.float64) for values in ([3.0], [1e300], [2.0])))
    for merged in (far.merge(Moments.none(1)), Moments.none(1).merge(far, Moments.none(1))):
        assert (merged.count.item(), merged.mean.item(), merged.m2.item()) == (3.0, 1e300, 2.0)


def test_moments_refuse_another_datatype() -> None:
    with pytest.raises(DtypeError, match="count: expected float64, received float32"):
        Moments(torch.ones(1), torch.ones(1), torch.ones(1))


def test_of_and_merge_refuse_what_does_not_fit() -> None:
    with pytest.raises(ShapeError, match="input: expected at least 2 dimensions"):
        Moments.of(torch.zeros(3))
    with pytest.raises(DtypeError, match=r"input: .* received complex64"):
        Moments.of(torch.zeros(3, 2, dtype=torch.complex64))
    with pytest.raises(ParameterError, match="channel_axis"):
        Moments.of(torch.zeros(3, 2), channel_axis=2)
    with pytest.raises(ShapeError, match="others: expected 2 channels, received 3 channels"):
        Moments.of(torch.zeros(3, 2)).merge(Moments.of(torch.zeros(3, 3)))


@pytest.mark.parametrize("inner", [1, 2**16], ids=["columns", "runs"])
def test_a_first_value_far_from_the_others_costs_no_digits(inner: int) -> None:
    values = torch.randn(2**16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    values[0] = 1e6
    wide = values.numpy().astype(np.longdouble)
    m2 = ((wide - wide.mean()) ** 2).sum()
    found = Moments.of(values.view(-1, 1, inner))
    assert abs(np.longdouble(float(found.m2)) / m2 - 1) <= 1e-12


def test_the_low_part_is_what_rounding_left_over() -> None:
    found = Moments.of(torch.tensor([[0.0], [1.0], [1.0]], dtype=torch.float64) + 10**9)
    assert found.mean_low is not None
    exact = 10**9 + Fraction(2, 3)
    assert abs(Fraction(float(found.mean)) + Fraction(float(found.mean_low)) - exact) < Fraction(1, 10**15)


@pytest.mark.parametrize("values", [[torch.inf, 1.0], [1.0, torch.inf]], ids=["first", "last"])
def test_the_place_of_an_infinity_does_not_matter(values: list[float]) -> None:
    assert float(Moments.of(torch.tensor(values).view(-1, 1)).mean) == torch.inf


def test_squares_that_overflow_beside_no_values_are_infinite() -> None:
    one = torch.ones(1, dtype=torch.float64)
    parts = [Moments(one, one * mean, one * 0) for mean in (1e200, -1e200)]
    assert float(parts[0].merge(parts[1], Moments.none(1)).m2) == torch.inf
