"""Moments from a stream of bytes: those of the whole tensor, wherever the chunks are cut."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from normcore.errors import DtypeError, ParameterError, ShapeError, StatisticsError
from normcore.statistics import Moments, MomentsStream

DATATYPES = [
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool),
    *(torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64),
]


def _content(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _streamed(tensor: Tensor, cuts: list[int], *, channel_axis: int) -> Moments:
    accumulator = MomentsStream(tensor.dtype, tuple(tensor.shape), channel_axis=channel_axis)
    content = _content(tensor)
    for start, stop in pairwise([0, *sorted(cuts), len(content)]):
        accumulator.update(content[start:stop])
    return accumulator.finish()


def _assert_same(actual: Moments, expected: Moments) -> None:
    assert torch.equal(actual.count, expected.count)
    assert torch.allclose(actual.mean, expected.mean, rtol=1e-14, atol=1e-15)
    assert torch.allclose(actual.m2, expected.m2, rtol=1e-12, atol=1e-15)


@given(
    st.lists(st.integers(0, 7), min_size=2, max_size=4),
    st.data(),
    st.sampled_from(DATATYPES),
    st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=60)
def test_any_cut_of_the_bytes_gives_the_moments_of_the_whole(
    shape: list[int], data: st.DataObject, dtype: torch.dtype, seed: int
) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    tensor = (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 100).to(dtype)
    cuts = data.draw(st.lists(st.integers(0, tensor.nbytes), max_size=6))
    _assert_same(_streamed(tensor, cuts, channel_axis=axis), Moments.of(tensor, channel_axis=axis))


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((800, 30, 7, 7), 1),
        ((2, 5, 300_000), 1),
        ((2, 2, 1_100_000), 1),
        ((65, 20_000), 1),
        ((3, 100_000, 2), 1),
        ((600, 50, 41), 2),
    ],
    ids=["samples", "channels apart", "parts of a channel", "many channels", "short channels", "channels last"],
)
def test_every_kind_of_block(shape: tuple[int, ...], axis: int) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 100
    expected = Moments.of(tensor, channel_axis=axis)
    _assert_same(_streamed(tensor, list(range(0, tensor.nbytes, 777_777)), channel_axis=axis), expected)


def test_a_stream_of_many_blocks_is_accurate_far_from_zero() -> None:
    tensor = torch.randn(2_100_000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1e6
    wide = tensor.numpy().astype(np.longdouble)
    m2 = ((wide - wide.mean()) ** 2).sum()
    moments = _streamed(tensor, list(range(0, tensor.nbytes, 1_000_003)), channel_axis=1)
    assert abs(moments.mean.numpy()[0] / wide.mean() - 1) <= 1e-12
    assert abs(moments.m2.numpy()[0] / m2 - 1) <= 1e-9  # 1e-12 x |mean| / (1e3 std)


def test_fortran_order_reads_the_first_axis_fastest() -> None:
    array = np.asfortranarray(np.random.default_rng(2).standard_normal((4, 3, 5)).astype(np.float32))
    accumulator = MomentsStream(torch.float32, (4, 3, 5), channel_axis=1, fortran_order=True)
    accumulator.update(array.tobytes(order="F"))
    _assert_same(accumulator.finish(), Moments.of(torch.from_numpy(np.ascontiguousarray(array))))


def test_the_buffer_does_not_grow_with_the_tensor() -> None:
    small, large = (MomentsStream(torch.float32, (samples, 64, 56, 56)) for samples in (1_000, 1_000_000))
    assert small.buffer_bytes == large.buffer_bytes <= 2**22


def test_non_finite_values_come_through_in_their_channel() -> None:
    moments = _streamed(torch.tensor([[1.0, torch.nan], [3.0, 1.0]]), [], channel_axis=1)
    assert float(moments.mean[0]) == 2.0
    assert bool(moments.mean[1].isnan())


def test_missing_and_excess_bytes_are_refused() -> None:
    accumulator = MomentsStream(torch.float32, (2, 1))
    accumulator.update(bytes(7))
    with pytest.raises(ShapeError, match="buffer: expected 8 bytes, received 7"):
        accumulator.finish()
    with pytest.raises(ShapeError, match="buffer: expected 8 bytes in all, received at least 9"):
        accumulator.update(bytes(2))
    accumulator.update(memoryview(bytes(1)))
    assert float(accumulator.finish().count) == 2.0
    with pytest.raises(ShapeError, match="buffer"):
        accumulator.update(bytes(1))


def test_impossible_layouts_are_refused() -> None:
    with pytest.raises(DtypeError, match=r"datatype: .* received complex64"):
        MomentsStream(torch.complex64, (2, 1))
    with pytest.raises(ShapeError, match="shape: expected at least 2 dimensions"):
        MomentsStream(torch.float32, (2,))
    with pytest.raises(ParameterError, match="shape: expected integers >= 0"):
        MomentsStream(torch.float32, (2, -1))
    with pytest.raises(ParameterError, match="channel_axis"):
        MomentsStream(torch.float32, (2, 1), channel_axis=2)
    with pytest.raises(StatisticsError, match=r"2\^53"):
        _streamed(torch.tensor([[2**60]]), [], channel_axis=1)
