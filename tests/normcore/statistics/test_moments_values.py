"""What enters moments: integers and booleans as their values, and positions that a mask counts."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from normcore.errors import DtypeError, ShapeError, StatisticsError
from normcore.statistics import Moments

INTEGERS = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
]


def _assert_moments_of(moments: Moments, channel: int, values: list[float]) -> None:
    assert float(moments.count[channel]) == len(values)
    if not values:
        return
    mean = sum(map(Fraction, values), Fraction(0)) / len(values)
    m2 = sum(((Fraction(value) - mean) ** 2 for value in values), Fraction(0))
    assert float(moments.mean[channel]) == pytest.approx(float(mean), rel=1e-13, abs=1e-13)
    assert float(moments.m2[channel]) == pytest.approx(float(m2), rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("is_masked", [False, True], ids=["whole", "masked"])
def test_integers_and_booleans_are_their_values(dtype: torch.dtype, is_masked: bool) -> None:
    tensor = torch.tensor([[0, 100], [1, 3], [1, 0], [0, 77]]).to(dtype)
    mask = torch.tensor([True, True, True, False]) if is_masked else None
    moments = Moments.of(tensor, mask=mask)
    for channel in range(2):
        _assert_moments_of(moments, channel, tensor[: 3 if is_masked else 4, channel].double().tolist())


def test_integers_up_to_what_float64_holds() -> None:
    largest = 2**53
    assert float(Moments.of(torch.tensor([[largest], [-largest]])).m2) == 2.0 * largest**2
    for beyond in (largest + 1, -largest - 1, -(2**63)):
        with pytest.raises(StatisticsError, match=r"input: expected int64 within .*2\^53"):
            Moments.of(torch.tensor([[beyond]]))
    with pytest.raises(StatisticsError, match="uint64"):
        Moments.of(torch.tensor([[2**64 - 1]], dtype=torch.uint64))


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.data(), st.integers(0, 2**31))
@settings(deadline=None)
def test_a_mask_counts_what_it_says_wherever_it_broadcasts(shape: list[int], data: st.DataObject, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    axis = data.draw(st.integers(0, len(shape) - 1))
    tensor = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 50
    sizes = [data.draw(st.sampled_from([1, size])) for size in shape]
    mask = torch.rand(sizes, generator=generator) < 0.6
    whole = mask.expand(shape)
    poisoned = tensor.masked_fill(~whole, torch.nan)
    moments = Moments.of(poisoned, channel_axis=axis, mask=mask)
    for channel in range(shape[axis]):
        values, counted = tensor.select(axis, channel), whole.select(axis, channel)
        _assert_moments_of(moments, channel, values[counted].tolist())
    if sizes[axis] == 1:
        of_positions = Moments.of(poisoned, channel_axis=axis, mask=mask.squeeze(axis))
        assert torch.equal(of_positions.m2, moments.m2)


def test_a_mask_over_many_blocks_equals_what_it_leaves() -> None:
    generator = torch.Generator().manual_seed(2)
    tensor = torch.randn(400_000, 2, generator=generator) + 1000
    mask = torch.rand(400_000, generator=generator) < 0.5
    left = Moments.of(tensor[mask])
    moments = Moments.of(tensor, mask=mask)
    assert torch.equal(moments.count, left.count)
    assert torch.allclose(moments.mean, left.mean, rtol=1e-14)
    assert torch.allclose(moments.m2, left.m2, rtol=1e-12)


def test_a_counted_value_that_is_not_finite_comes_through() -> None:
    tensor = torch.tensor([[torch.nan, torch.inf], [1.0, 2.0]])
    moments = Moments.of(tensor, mask=torch.tensor([[False, True], [True, True]]))
    assert moments.mean.isfinite().tolist() == [True, False]
    assert moments.m2.isfinite().tolist() == [True, False]


@pytest.mark.parametrize("shape", [(2,), (5, 3), (3, 2), (3, 4, 5, 1)], ids=str)
def test_masks_that_do_not_broadcast_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"mask: .* broadcasts to \(3, 5\), the input's \(3, 4, 5\) without"):
        Moments.of(torch.zeros(3, 4, 5), mask=torch.ones(shape, dtype=torch.bool))


def test_a_mask_of_another_datatype_is_refused() -> None:
    with pytest.raises(DtypeError, match="mask: expected bool, received float32"):
        Moments.of(torch.zeros(3, 4), mask=torch.ones(3))


@pytest.mark.parametrize("count", [0.5, -1.0, torch.inf, 2.0**54], ids=str)
def test_counts_that_count_nothing_are_refused(count: float) -> None:
    one: Tensor = torch.ones(1, dtype=torch.float64)
    with pytest.raises(StatisticsError, match=r"count: expected whole numbers from 0 to 2\^53"):
        Moments(one * count, one, one)
