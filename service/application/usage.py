"""Counters of one model, under the names of the protocol's statistics extension."""

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from service.engine.protocol import InferResult


@dataclass(slots=True)
class Duration:
    """How often, and for how many nanoseconds in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns


@dataclass(slots=True)
class Timing:
    """Nanoseconds of one request's parts."""

    queue_ns: int
    compute_input_ns: int
    compute_infer_ns: int
    compute_output_ns: int

    @property
    def total_ns(self) -> int:
        return self.queue_ns + self.compute_input_ns + self.compute_infer_ns + self.compute_output_ns


@dataclass(slots=True)
class BatchUsage:
    """What executions of one batch size cost, each measured at the first of its requests."""

    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


class Usage:
    """Grows with every request; read as the statistics extension's JSON."""

    def __init__(self) -> None:
        self._last_inference_ms = 0
        self._inference_count = 0
        self._execution_count = 0
        self._success, self._fail, self._queue = Duration(), Duration(), Duration()
        self._input, self._infer, self._output = Duration(), Duration(), Duration()
        self._batches: defaultdict[int, BatchUsage] = defaultdict(BatchUsage)

    def succeeded(self, timing: Timing, result: InferResult) -> None:
        self._last_inference_ms = time.time_ns() // 1_000_000
        self._inference_count += result.rows
        self._success.add(timing.total_ns)
        self._queue.add(timing.queue_ns)
        self._input.add(timing.compute_input_ns)
        self._infer.add(timing.compute_infer_ns)
        self._output.add(timing.compute_output_ns)
        if not result.is_first:
            return
        self._execution_count += 1
        batch = self._batches[result.batch_rows]
        batch.compute_input.add(timing.compute_input_ns)
        batch.compute_infer.add(timing.compute_infer_ns)
        batch.compute_output.add(timing.compute_output_ns)

    def failed(self, ns: int) -> None:
        self._fail.add(ns)

    def to_dict(self) -> dict[str, Any]:
        """The keys of one element of `model_stats`, without name and version."""
        parts = {
            "success": self._success,
            "fail": self._fail,
            "queue": self._queue,
            "compute_input": self._input,
            "compute_infer": self._infer,
            "compute_output": self._output,
            "cache_hit": Duration(),
            "cache_miss": Duration(),
        }
        return {
            "last_inference": self._last_inference_ms,
            "inference_count": self._inference_count,
            "execution_count": self._execution_count,
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


def _duration(duration: Duration) -> dict[str, int]:
    return {"count": duration.count, "ns": duration.ns}
