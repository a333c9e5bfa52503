"""Histograms: exact counts whatever the split, bounds that hold, states that survive storage."""

import math
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from normcore.errors import NormcoreError, NotSupportedError, ParameterError, ShapeError, StatisticsError
from normcore.statistics import Histogram

ANY = st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=6)
TAME = st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0001, 3.5, 1e-9, -1e-9, 1e9, 1e6, 1e6 + 1, -7.0]), max_size=6)


def _column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1)


def _assert_equal(actual: Histogram, expected: Histogram) -> None:
    for name in ("smallest", "largest", "counts", "non_finite"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


@given(st.lists(ANY | TAME, min_size=1, max_size=5), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=200)
def test_the_state_is_a_function_of_the_set_of_values(parts: list[list[float]], random: Random) -> None:
    start = Histogram.start(1)
    expected = start.update(_column([value for part in parts for value in part]))
    random.shuffle(parts)
    in_turn = start
    for part in parts:
        in_turn = in_turn.update(_column(part))
    _assert_equal(in_turn, expected)
    first, *rest = (start.update(_column(part)) for part in parts)
    _assert_equal(first.merge(*rest), expected)
    one_by_one = first
    for other in rest:
        one_by_one = other.merge(one_by_one)
    _assert_equal(one_by_one, expected)


@given(ANY | TAME, st.integers(1, 40))
@settings(deadline=None, max_examples=200)
def test_cumulative_shares_are_off_by_no_more_than_the_error(values: list[float], bins: int) -> None:
    if not values:
        return
    result = Histogram.start(1).update(_column(values)).histogram(bins)
    assert float(result.counts.sum()) == pytest.approx(len(values))
    assert bool((result.counts >= 0).all())
    below = result.counts.cumsum(0) / len(values)
    for edge, share in zip(result.edges[1:-1].tolist(), below.tolist(), strict=False):
        least = sum(value < edge for value in values) / len(values)
        most = sum(value <= edge for value in values) / len(values)
        assert least - result.error - 1e-12 <= share <= most + result.error + 1e-12


@pytest.mark.parametrize(("mean", "error"), [(0.0, 0.016), (30.0, 0.007), (1e6, 0.007)])
def test_histogram_of_a_normal_distribution(mean: float, error: float) -> None:
    values = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + mean
    result = Histogram.start(1).update(values).histogram(50)
    counts, edges = np.histogram(values.numpy(), 50)
    assert np.allclose(result.edges.numpy(), edges)
    assert result.error <= error
    assert np.abs(result.counts.numpy() - counts).max() <= 2 * result.error * 200_000
    assert np.abs(np.cumsum(result.counts.numpy() - counts)).max() <= error / 5 * 200_000
    assert float((result.density * result.edges.diff()).sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("axis", [1, -1])
def test_channels_apart_and_together(axis: int) -> None:
    tensor = torch.randn(500, 3, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1.0], [5.0], [0.1]])
    state = Histogram.start(3).update(tensor.movedim(1, axis).contiguous(), channel_axis=axis)
    for channel in range(3):
        alone = Histogram.start(1).update(tensor[:, channel : channel + 1])
        assert torch.equal(state.histogram(9, channel=channel).counts, alone.histogram(9).counts)
    together = Histogram.start(1).update(tensor.reshape(-1, 1))
    assert torch.equal(state.histogram(9).counts, together.histogram(9).counts)


def test_mask_and_non_finite_values_are_left_out() -> None:
    tensor = torch.tensor([[1.0, 9.0], [math.nan, 2.0], [3.0, math.inf], [5.0, 4.0]])
    mask = torch.tensor([True, True, True, False])
    state = Histogram.start(2).update(tensor, mask=mask)
    assert state.counts.sum(1).tolist() == [2, 2]
    assert state.non_finite.tolist() == [1, 1]
    assert (state.largest.tolist(), state.histogram(2).non_finite) == ([3.0, 9.0], 2)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16], ids=str)
def test_other_datatypes_count_as_their_values(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0], [1], [1], [0], [1]]).to(dtype)
    assert Histogram.start(1).update(tensor).histogram(2).counts.tolist() == [2.0, 3.0]


def test_a_single_value_lies_in_the_middle() -> None:
    for value in (0.0, 7.0, -1e300):
        result = Histogram.start(1).update(_column([value] * 4)).histogram(3)
        assert result.counts.tolist() == [0.0, 4.0, 0.0]
        assert bool((result.edges.diff() > 0).all())


def test_many_channels_are_counted_together_in_bounded_memory() -> None:
    state = Histogram.start(5000).update(torch.randn(2, 5000, generator=torch.Generator().manual_seed(2)))
    assert state.counts.shape == (1, 1024)
    assert float(state.histogram(4).counts.sum()) == 10_000
    with pytest.raises(NotSupportedError, match="more than 4096"):
        state.histogram(4, channel=0)


def test_state_survives_storage() -> None:
    state = Histogram.start(3).update(torch.randn(50, 3, generator=torch.Generator().manual_seed(3)))
    for kept in (state, Histogram.start(3), Histogram.start(9999)):
        tensors = kept.to_tensors()
        assert {tensor.dtype for tensor in tensors.values()} <= {torch.float64, torch.int64}
        _assert_equal(Histogram.from_tensors(tensors), kept)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("counts", None, "histogram.counts: expected a tensor of this name"),
        ("counts", torch.tensor([-1]), "histogram.counts: expected numbers >= 0, received -1"),
        ("counts", torch.tensor([1.0]), "histogram.counts: expected int64"),
        ("places", torch.tensor([1024]), "histogram.counts: expected a count for each"),
        ("smallest", torch.zeros(2, dtype=torch.float64), "histogram.smallest: expected shape"),
        ("non_finite", torch.tensor(1), "histogram.non_finite: expected one dimension"),
    ],
    ids=["missing", "negative", "float", "place", "rows", "rank"],
)
def test_impossible_states_are_refused(name: str, value: Tensor | None, message: str) -> None:
    tensors = Histogram.start(1).update(_column([1.0])).to_tensors()
    del tensors[f"histogram.{name}"]
    if value is not None:
        tensors[f"histogram.{name}"] = value
    with pytest.raises(NormcoreError, match=message):
        Histogram.from_tensors(tensors)


def test_impossible_requests_are_refused() -> None:
    state = Histogram.start(2)
    with pytest.raises(ParameterError, match="num_features"):
        Histogram.start(0)
    with pytest.raises(ShapeError, match="input: expected 2 channels, received 3 channels"):
        state.update(torch.zeros(4, 3))
    with pytest.raises(ShapeError, match="others: expected 2 channels, received 3 channels"):
        state.merge(Histogram.start(3))
    with pytest.raises(StatisticsError, match="a finite value to count, received none"):
        state.update(torch.zeros(0, 2)).histogram(3)
    full = state.update(torch.zeros(1, 2))
    for bins in (0, 10_001):
        with pytest.raises(ParameterError, match="bins: expected an integer from 1 to 10000"):
            full.histogram(bins)
    with pytest.raises(ParameterError, match="channel: expected an integer from 0 to 1, received 2"):
        full.histogram(3, channel=2)
