"""Four times the load that a model can take: what is still done, and how fast the rest is refused."""

import asyncio
import sys

import numpy as np

from benchmarks.load import Offered, closed_loop, open_loop, percentiles
from benchmarks.networks import TINY_INPUTS, perceptron
from benchmarks.servers import binary_call, service

_ROWS = 64
_QUEUE = 16


def offered(factor: float, seconds: float) -> tuple[float, Offered]:
    """The goodput of a closed loop, and the answers to an open loop of `factor` times that rate."""
    rows = np.random.default_rng(0).standard_normal((_ROWS, TINY_INPUTS)).astype(np.float32)
    with service(threads=1, queue_size=_QUEUE) as ours:
        path = ours.serve("slow", perceptron(hidden=1024, layers=6), max_batch_size=0)
        call = binary_call(ours.port, path, "x", rows)
        closed_loop(call, connections=2, seconds=1)
        peak = closed_loop(call, connections=_QUEUE // 2, seconds=seconds).rate
        return peak, asyncio.run(open_loop(call, rate=factor * peak, seconds=seconds))


def report(rounds: int, seconds: float) -> None:
    """Overload: goodput and refusals at four times the capacity."""
    for _ in range(rounds):
        peak, answers = offered(4, seconds)
        p50, p99 = percentiles(answers.latencies_ms.get(429, []))
        others = {status: count for status, count in answers.counts.items() if status not in (200, 429)}
        sys.stdout.write(
            f"  peak {peak:.0f}/s; offered {answers.counts.total() / answers.seconds:.0f}/s: goodput "
            f"{answers.counts[200] / answers.seconds / peak:.2f} of the peak; {answers.counts[429]} refused with p50 "
            f"{p50:.1f} ms, p99 {p99:.1f} ms, all with Retry-After: {answers.are_refusals_dated}; others: {others}\n"
        )
        sys.stdout.flush()
