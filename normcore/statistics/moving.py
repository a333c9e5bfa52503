"""The compiled update of running statistics: what costs a dozen small operations otherwise."""

from typing import Any

import numpy as np

from normcore._compiled import compiled
from normcore._values import load, store


@compiled
def move(kept: Any, moved: Any, batch: Any, weight: float, count: float, freedom: float) -> bool:
    """Write (1 - weight) * kept + weight * batch * count / freedom; whether all of the batch is finite.

    Arrays of one value per channel; `kept` and `moved` of any datatype, `batch` float64.
    """
    is_finite = True
    for channel in range(kept.size):
        total = batch[channel] * count
        is_finite &= np.isfinite(total)
        store(moved, channel, np.float64(load(kept, channel)) * (1.0 - weight) + total / freedom * weight)
    return is_finite
