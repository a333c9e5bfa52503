"""Samples: small tensors whole, large ones evenly, whatever the pieces they come in."""

import numpy as np
import pytest

from service.application.sample import Sample

LIMIT = 1000


@pytest.mark.parametrize("shape", [(64, 3, 100), (4096, 3), (2, 4, 4000), (5, 5, 2, 2), (7, 250, 8), (0, 3), (9, 3, 0)])
@pytest.mark.parametrize("piece", [1, 37, 10**6])
def test_every_channel_is_sampled_alike(shape: tuple[int, ...], piece: int) -> None:
    channels = np.broadcast_to(np.arange(shape[1]).reshape(1, -1, *[1] * (len(shape) - 2)), shape).reshape(-1)
    sample = Sample(shape, channel_axis=1, limit=LIMIT)
    for start in range(0, channels.size, piece):
        sample.take(channels[start : start + piece].astype(np.float64))
    histogram = sample.histogram()
    taken = histogram.counts.sum(1).numpy()
    if channels.size <= LIMIT:
        assert taken.tolist() == [channels.size // shape[1]] * shape[1]
        return
    assert LIMIT / 2 < taken.sum() <= LIMIT
    assert taken.max() - taken.min() <= max(3, 0.02 * taken.max())
    np.testing.assert_array_equal(histogram.smallest, np.arange(shape[1]), "a value is in the channel it came from")
    np.testing.assert_array_equal(histogram.largest, np.arange(shape[1]))


def test_what_is_picked_is_what_was_taken() -> None:
    values = np.random.default_rng(0).normal(size=(50, 3, 40))
    sample = Sample(values.shape, channel_axis=1, limit=LIMIT)
    sample.take(values.reshape(-1))
    counted = sample.pick(values > 0)
    histogram = sample.histogram(counted)
    assert int(histogram.counts.sum()) == counted.sum()
    assert histogram.smallest.min() > 0
