"""Compilation ahead of the first batch."""

import torch

from normcore.statistics.histogram import Histogram
from normcore.statistics.moments import Moments


def warm_up() -> None:
    """Compile what counts, merges and draws batches: moments of every datatype, streamed or not, and histograms.

    What is true of `normcore.normalization.warm_up` is true of this: ten seconds where nothing is kept, else none.
    """
    # Integers and bool are summed as float64.
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        Moments.of(torch.zeros(2, 1, dtype=dtype))
    counted = Histogram.start(1).update(torch.zeros(2, 1))
    counted.merge(counted).histogram(1)
