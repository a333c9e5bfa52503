"""Merging of moments to 1e-12 x max(1, |mean| / (1e3 std)), and chains of merges that do not drift."""

from fractions import Fraction
from itertools import pairwise

import mpmath  # type: ignore[import-untyped]  # it ships no types
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from normcore.statistics import Moments


def _exact(values: Tensor) -> tuple[Fraction, Fraction]:
    fractions = [Fraction(value) for value in values.tolist()]
    mean = sum(fractions, Fraction(0)) / len(fractions)
    return mean, sum(((value - mean) ** 2 for value in fractions), Fraction(0))


def _assert_within_bound(actual: Moments, mean: Fraction, m2: Fraction, *, count: int) -> None:
    assert float(actual.count) == count
    with mpmath.workdps(60):
        center, squares = (mpmath.mpf(value.numerator) / value.denominator for value in (mean, m2))
        std = mpmath.sqrt(squares / count)
        assert std > 0
        bound = 1e-12 * max(1, abs(center) / (1000 * std))
        assert abs(mpmath.mpf(float(actual.mean)) - center) <= bound * max(abs(center), std)
        assert abs(mpmath.mpf(float(actual.m2)) / squares - 1) <= bound


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=7),
    st.sampled_from([0.0, 1.0, -1e3, 1e6, 1e9]),
    st.sampled_from([1e-3, 1.0, 1e3, 1e150]),
    st.integers(0, 2**31),
    st.permutations(range(7)),
)
@settings(deadline=None, max_examples=150)
def test_any_split_in_any_order_is_within_the_bound(
    sizes: list[int], mean: float, scale: float, seed: int, order: list[int]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(sum(sizes) + 2, generator=generator, dtype=torch.float64) + mean) * scale
    parts = [Moments.of(part.view(-1, 1)) for part in torch.split(values, [2, *sizes])]
    expected = _exact(values)
    chosen = [parts[index] for index in order if index < len(parts)]
    chosen += [part for index, part in enumerate(parts) if index not in order]
    one_by_one = chosen[0]
    for part in chosen[1:]:
        one_by_one = one_by_one.merge(part)
    pairs = [left.merge(right) for left, right in pairwise([*chosen, Moments.none(1)])][::2]
    for merged in (one_by_one, chosen[0].merge(*chosen[1:]), pairs[0].merge(*pairs[1:])):
        _assert_within_bound(merged, *expected, count=len(values))


def test_ten_thousand_merges_do_not_drift() -> None:
    values = torch.randn(10_000, 3, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e6
    merged = Moments.none(1)
    for batch in values:
        merged = merged.merge(Moments.of(batch.unsqueeze(1), channel_axis=1))
    wide = values.flatten().numpy().astype(np.longdouble)
    mean = wide.mean()
    m2 = ((wide - mean) ** 2).sum()
    assert abs(np.longdouble(float(merged.mean)) - mean) <= 2e-10  # half an ulp of 1e6, and what the batches' have
    assert abs(np.longdouble(float(merged.m2)) / m2 - 1) <= 1e-12


def test_many_merges_of_one_batch_keep_its_statistics() -> None:
    batch = Moments.of(torch.tensor([[0.1], [0.3], [1.1]], dtype=torch.float64) + 1e6)
    merged = Moments.none(1)
    for _ in range(3000):
        merged = merged.merge(batch)
    assert torch.equal(merged.mean, batch.mean)
    assert float(merged.m2) == pytest.approx(3000 * float(batch.m2), rel=4e-16)


def test_a_huge_count_does_not_make_the_mean_stall() -> None:
    one = torch.ones(1, dtype=torch.float64)
    merged = Moments(one * 2**50, one * 1e6, one * 2**50)
    batch = Moments(one * 32, one * (1e6 + 1000), one * 32)
    for _ in range(2000):
        merged = merged.merge(batch)
    # Each moves the mean by far less than its last digit.
    assert merged.mean_low is not None
    expected = Fraction(1000) * 64_000 / (2**50 + 64_000)
    actual = Fraction(float(merged.mean)) - 10**6 + Fraction(float(merged.mean_low))
    assert abs(actual / expected - 1) <= 1e-10
