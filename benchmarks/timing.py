"""Interleaved timings: A B A B ..., so that a machine whose speed drifts is fair to both."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Comparison:
    """Median milliseconds of both, the median of the pairwise ratios ours / peer, and their quartiles."""

    ours_ms: float
    peer_ms: float
    ratio: float
    low: float
    high: float


def compare(ours: Callable[[], object], peer: Callable[[], object], *, seconds: float) -> Comparison:
    """Run both in turn for about `seconds`, at least 7 times each, after a warm-up."""
    for call in (ours, peer):
        call()
        call()
    pairs: list[tuple[float, float]] = []
    gc.collect()
    end = time.perf_counter() + seconds
    while len(pairs) < 7 or time.perf_counter() < end:
        pairs.append((_milliseconds(ours), _milliseconds(peer)))
    ratios = sorted(mine / theirs for mine, theirs in pairs)
    quarter = len(ratios) // 4
    return Comparison(
        ours_ms=statistics.median(mine for mine, _ in pairs),
        peer_ms=statistics.median(theirs for _, theirs in pairs),
        ratio=statistics.median(ratios),
        low=ratios[quarter],
        high=ratios[-1 - quarter],
    )


def _milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1000
