"""Counters of one model: the protocol's statistics extension and what the metrics show."""

import time
from bisect import bisect_left
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from service.engine.protocol import InferResult

FailureReason = Literal["REJECTED", "CANCELED", "BACKEND", "OTHER"]

# Upper bounds of the buckets: 50 us to 30 s, and powers of two.
_DURATIONS_NS = tuple(
    round(seconds * 1e9)
    for seconds in (
        *(5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2),
        *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
    )
)
_PARTS = ("request", "queue", "decode", "compute", "encode")  # the whole, and then as Timing has them
_BATCH_SIZES = tuple(2**power for power in range(11))


@dataclass(slots=True)
class Duration:
    """How often, and for how many nanoseconds in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns


class Timing(NamedTuple):
    """Nanoseconds of one request's parts."""

    queue_ns: int
    compute_input_ns: int
    compute_infer_ns: int
    compute_output_ns: int


class Histogram:
    """Counts of integers by bucket, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[int, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0

    def add(self, value: int) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(slots=True)
class BatchUsage:
    """What executions of one batch size cost, each measured at the first of its requests."""

    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


class Usage:
    """Grows with every request.

    Attributes:
        durations: histograms in nanoseconds: of whole requests, the queue, decoding, computing, encoding.
        batch_sizes: of executions, in rows.
        failures: requests that failed, by Triton's reasons.
    """

    def __init__(self) -> None:
        self._last_inference_ms = 0
        self.inference_count = 0
        self.execution_count = 0
        self._success_count = 0
        self._fail = Duration()
        self._batches: defaultdict[int, BatchUsage] = defaultdict(BatchUsage)
        self.durations = {part: Histogram(_DURATIONS_NS) for part in _PARTS}
        self.batch_sizes = Histogram(_BATCH_SIZES)
        self.failures: Counter[FailureReason] = Counter()
        self.request_bytes = 0
        self.response_bytes = 0

    def succeeded(self, timing: Timing, result: InferResult, *, request_bytes: int, response_bytes: int) -> None:
        self._last_inference_ms = time.time_ns() // 1_000_000
        self.inference_count += result.rows
        self.request_bytes += request_bytes
        self.response_bytes += response_bytes
        self._success_count += 1
        for histogram, ns in zip(self.durations.values(), (sum(timing), *timing), strict=True):
            histogram.add(ns)
        if not result.is_first:
            return
        self.execution_count += 1
        self.batch_sizes.add(result.batch_rows)
        batch = self._batches[result.batch_rows]
        batch.compute_input.add(timing.compute_input_ns)
        batch.compute_infer.add(timing.compute_infer_ns)
        batch.compute_output.add(timing.compute_output_ns)

    def failed(self, ns: int, reason: FailureReason) -> None:
        self._fail.add(ns)
        self.failures[reason] += 1

    def to_dict(self) -> dict[str, Any]:
        """The keys of one element of `model_stats`, without name and version."""
        parts = {
            "success": self._summed("request"),
            "fail": self._fail,
            "queue": self._summed("queue"),
            "compute_input": self._summed("decode"),
            "compute_infer": self._summed("compute"),
            "compute_output": self._summed("encode"),
            "cache_hit": Duration(),
            "cache_miss": Duration(),
        }
        return {
            "last_inference": self._last_inference_ms,
            "inference_count": self.inference_count,
            "execution_count": self.execution_count,
            "inference_stats": {name: _duration(part) for name, part in parts.items()},
            "response_stats": {},
            "batch_stats": [
                {
                    "batch_size": size,
                    "compute_input": _duration(batch.compute_input),
                    "compute_infer": _duration(batch.compute_infer),
                    "compute_output": _duration(batch.compute_output),
                }
                for size, batch in sorted(self._batches.items())
            ],
            "memory_usage": [],
        }

    def _summed(self, part: str) -> Duration:
        return Duration(self._success_count, self.durations[part].total)


def _duration(duration: Duration) -> dict[str, int]:
    return {"count": duration.count, "ns": duration.ns}
