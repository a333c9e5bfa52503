"""An even sample of a batch for its histogram, whose cost then does not depend on the batch's size."""

import math
from collections.abc import Sequence

import numpy as np

from normcore.statistics import Histogram
from service.engine.protocol import Tensor
from service.engine.tensors import to_torch

# With more channels, only all of them together are counted: a histogram of one takes up to 16 KB in the database.
CHANNELS_APART = 256


class Sample:
    """Every n-th value of a tensor that comes in pieces, and the channel it belongs to; all values of a small one.

    Args:
        shape: the tensor's, its last axis varying fastest.
        limit: of the number of values.
    """

    def __init__(self, shape: Sequence[int], *, channel_axis: int, limit: int) -> None:
        self._channels, self._inner = shape[channel_axis], math.prod(shape[channel_axis:][1:])
        self._step = _step(math.prod(shape), limit=limit, period=self._channels * self._inner)
        self._passed = 0
        self._taken: list[Tensor] = []

    def take(self, values: Tensor) -> None:
        """Look at the next values, in one dimension."""
        self._taken.append(values[-self._passed % self._step :: self._step].copy())
        self._passed += values.size

    def pick(self, values: Tensor) -> Tensor:
        """What `take` would take of a whole array of the same shape."""
        picked: Tensor = values.flat[:: self._step]
        return picked

    def histogram(self, counted: Tensor | None = None) -> Histogram:
        """Of what was taken, or of the part of it that is counted."""
        values = np.concatenate(self._taken) if self._taken else np.empty(0, np.float32)
        mask = None if counted is None else to_torch(counted)
        return start(self._channels).update_sample(to_torch(values), step=self._step, inner=self._inner, mask=mask)


def start(num_features: int) -> Histogram:
    """The state before any value."""
    return Histogram.start(num_features if num_features <= CHANNELS_APART else 1)


def _step(elements: int, *, limit: int, period: int) -> int:
    """A step that visits all channels alike, as one does that shares no factor with the period of the layout."""
    step = max(1, -(-elements // limit))
    while math.gcd(step, max(1, period)) > 1:
        step += 1
    return step
