"""Interleaved timings: A B A B ..., so that a machine whose speed drifts is fair to both."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

# A sample is of as many calls as take about so long: the clock itself costs some tenths of a microsecond.
_SAMPLE_S = 2e-4


@dataclass(frozen=True, slots=True)
class Comparison:
    """Median milliseconds of both, the median of the pairwise ratios ours / peer, and their quartiles."""

    ours_ms: float
    peer_ms: float
    ratio: float
    low: float
    high: float


def compare(
    ours: Callable[[], object], peer: Callable[[], object], *, seconds: float, is_single: bool = False
) -> Comparison:
    """Run both in turn for about `seconds`, at least 5 times each, after a warm-up.

    Where both stay in the calling thread (`is_single`), time is what it has computed, whatever else the machine does;
    else it is the wall's.
    """
    clock = time.thread_time if is_single else time.perf_counter
    counts = []
    for call in (ours, peer):
        call()
        counts.append(max(1, int(_SAMPLE_S / max(_seconds(call, 1, clock), 1e-7))))
    pairs: list[tuple[float, float]] = []
    gc.collect()
    end = time.perf_counter() + seconds
    while len(pairs) < 5 or time.perf_counter() < end:
        pairs.append((_seconds(ours, counts[0], clock), _seconds(peer, counts[1], clock)))
    ratios = sorted(mine / theirs for mine, theirs in pairs)
    quarter = len(ratios) // 4
    return Comparison(
        ours_ms=statistics.median(mine for mine, _ in pairs) * 1000,
        peer_ms=statistics.median(theirs for _, theirs in pairs) * 1000,
        ratio=statistics.median(ratios),
        low=ratios[quarter],
        high=ratios[-1 - quarter],
    )


def _seconds(call: Callable[[], object], count: int, clock: Callable[[], float]) -> float:
    started = clock()
    for _ in range(count):
        call()
    return (clock() - started) / count
