"""Many clients at once against the real process: batches, refusals, memory. `make bench` has the figures."""

import asyncio
import statistics
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import memory
from benchmarks.load import Call, connected, percentiles
from benchmarks.networks import TINY_INPUTS, perceptron
from benchmarks.overload import offered
from benchmarks.servers import Server, binary_call, service

CLIENTS = 16
REQUESTS = 30
OUTPUTS = 10
MAX_ULPS = 8
TIMES = 3  # that a test of speed is tried, since the machine may have other things to do
MAX_GROWTH_BYTES = 32 * 1024**2

Rows = NDArray[np.float32]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with service(threads=1) as started:
        yield started


async def _answers(calls: Sequence[Call]) -> list[Rows]:
    """One answer each, over one connection."""
    exchange, found = await connected(calls[0].port), []
    for call in calls:
        status, _ = await exchange.ask(call.to_bytes())
        assert status == 200, exchange.body
        found.append(np.frombuffer(exchange.body[-4 * OUTPUTS :], np.float32))
    exchange.close()
    return found


async def _together(calls: Sequence[Call]) -> list[Rows]:
    """The answers to clients that ask at the same time, each its share of the calls."""
    shares = [calls[start : start + REQUESTS] for start in range(0, len(calls), REQUESTS)]
    return [row for rows in await asyncio.gather(*(_answers(share) for share in shares)) for row in rows]


def _counts(server: Server, name: str) -> tuple[int, int]:
    found = server.ask("GET", f"/v2/models/{name}/stats")["model_stats"][0]
    return found["inference_count"], found["execution_count"]


@pytest.mark.parametrize(("hidden", "layers"), [(64, 1), (1024, 4)], ids=["brief", "long"])
def test_requests_of_many_clients_run_together_and_keep_their_answers(server: Server, hidden: int, layers: int) -> None:
    name = f"joined{hidden}"
    path = server.serve(name, perceptron(hidden=hidden, layers=layers))
    rows = np.random.default_rng(1).standard_normal((CLIENTS * REQUESTS, 1, TINY_INPUTS)).astype(np.float32)
    together = asyncio.run(_together([binary_call(server.port, path, "x", row) for row in rows]))
    inferences, executions = _counts(server, name)
    assert inferences == CLIENTS * REQUESTS
    assert executions <= inferences / 3

    exact = [binary_call(server.port, path, "x", row, deterministic=True) for row in rows]
    alone = asyncio.run(_answers(exact[:REQUESTS]))
    for one, other in zip(alone, together, strict=False):
        assert np.abs(one - other).max() <= MAX_ULPS * np.spacing(np.abs(one).max())
    assert _counts(server, name) == (inferences + REQUESTS, executions + REQUESTS)

    crowded = asyncio.run(_together(exact))
    assert [row.tobytes() for row in crowded[:REQUESTS]] == [row.tobytes() for row in alone]
    assert len({row.tobytes() for row in crowded}) == len(crowded)


@pytest.mark.alone
def test_what_is_over_the_capacity_is_refused_at_once_and_the_rest_is_done() -> None:
    for _ in range(TIMES):
        peak, answers = offered(4, 2)
        assert set(answers.counts) == {200, 429}
        assert answers.are_refusals_dated
        done = answers.counts[200] / answers.seconds / peak  # 0.9 where nothing else runs
        refused_p50_ms, _ = percentiles(answers.latencies_ms[429])
        if done > 0.5 and refused_p50_ms < 20:
            break
    assert done > 0.5
    assert refused_p50_ms < 20


def test_memory_stays_over_cycles_of_load_infer_and_unload(server: Server) -> None:
    found = memory.cycles(server, 40)
    assert statistics.median(found[30:]) - statistics.median(found[10:20]) < MAX_GROWTH_BYTES
