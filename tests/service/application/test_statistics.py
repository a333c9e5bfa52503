"""What a post costs, no more after many posts than after a few; and what older databases hold."""

from collections.abc import AsyncIterator
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import pytest_asyncio
import sqlalchemy as sql
import torch
from safetensors import numpy as safetensors

from normcore.statistics import Histogram, Moments, PopulationStatistics
from service.application.statistics import Batch, NewStatistics, Statistics
from service.application.totals import encode_histogram
from service.errors import ConflictError
from service.storage.metadata import Metadata
from service.storage.statistics import JOINED_POSTS, StatisticsStore
from tests.service.conftest import small_settings

CHANNELS = 8
POSTS = 12 * JOINED_POSTS - 1


class Work:
    """What a database does: instructions of its machine, and bytes that it is given."""

    def __init__(self) -> None:
        self.steps = 0
        self.bytes = 0

    def watch(self, connection: sql.Connection) -> None:
        driver: Any = connection.connection.driver_connection
        driver.set_progress_handler(self._step, 1)
        sql.event.listen(connection.engine, "before_cursor_execute", self._statement)

    def _step(self) -> int:
        self.steps += 1
        return 0

    def _statement(self, *arguments: Any) -> None:
        given = arguments[3]
        values = given.values() if isinstance(given, dict) else given
        self.bytes += sum(len(value) for value in values if isinstance(value, bytes | str))


@pytest_asyncio.fixture
async def metadata(tmp_path: Path) -> AsyncIterator[Metadata]:
    opened = Metadata(f"sqlite:///{tmp_path / 'test.db'}")
    await opened.open()
    yield opened
    await opened.close()


@pytest_asyncio.fixture
async def store(metadata: Metadata) -> StatisticsStore:
    opened = StatisticsStore(metadata, limit=5)
    await opened.open()
    return opened


@pytest.fixture
def statistics(store: StatisticsStore, tmp_path: Path) -> Statistics:
    return Statistics(store=store, settings=small_settings(tmp_path))


@pytest.mark.asyncio
async def test_the_cost_of_a_post_does_not_grow_with_the_posts_before_it(
    metadata: Metadata, store: StatisticsStore, statistics: Statistics
) -> None:
    work = Work()
    await metadata.transact(work.watch)
    resource = (await statistics.create(NewStatistics(CHANNELS))).record.id
    costs = []
    generator = torch.Generator().manual_seed(0)
    for number in range(POSTS):
        values = torch.randn(4, CHANNELS, 16, generator=generator)
        histogram = encode_histogram(Histogram.start(CHANNELS).update(values))
        batch = Batch(Moments.of(values), histogram, "raise", f"key {number:06}", "0" * 64)
        work.steps = work.bytes = 0
        answer, _ = await statistics.post(resource, batch, check=lambda record: None)
        assert answer["sequence"] == number + 1
        costs.append((work.steps, work.bytes))
    few, many = costs[2 * JOINED_POSTS : 6 * JOINED_POSTS], costs[-4 * JOINED_POSTS :]
    for kind in (0, 1):
        assert mean(cost[kind] for cost in many) <= 1.2 * mean(cost[kind] for cost in few), "on average"
        assert max(cost[kind] for cost in many) <= 1.2 * max(cost[kind] for cost in few), "at worst"
    parts = await store.read(resource, lambda stored: stored.parts, has_parts=True)
    assert len(parts) <= JOINED_POSTS, "nor does that of a look at the histogram"
    bins = await statistics.histogram(resource, bins=4, channel=3)
    assert float(bins.counts.sum()) == POSTS * 4 * 16


@pytest.mark.asyncio
async def test_histograms_that_were_kept_with_the_totals_are_carried_over(
    metadata: Metadata, store: StatisticsStore, statistics: Statistics
) -> None:
    old, new = torch.randn(2, 4, CHANNELS, 16, generator=torch.Generator().manual_seed(0))
    resource, before = [(await statistics.create(NewStatistics(CHANNELS))).record.id for _ in range(2)]
    population = PopulationStatistics.start(CHANNELS).update(Moments.of(old))
    tensors = population.to_tensors() | Histogram.start(CHANNELS).update(old).to_tensors()
    state = safetensors.save({name: tensor.numpy() for name, tensor in tensors.items()})

    def make_old(connection: sql.Connection) -> None:
        connection.execute(sql.text("DROP TABLE statistics_histograms"))
        update = sql.text("UPDATE statistics SET state = :state, sequence = 1, batches = 1 WHERE id = :id")
        connection.execute(update, {"state": state, "id": resource})

    await metadata.transact(make_old)
    for _ in range(2):  # the second time there is nothing to carry over
        await store.open()
    batch = Batch(Moments.of(new), encode_histogram(Histogram.start(CHANNELS).update(new)), "raise", None, "")
    for identity in (resource, before):
        await statistics.post(identity, batch, check=lambda record: None)
    for identity, values in ((resource, torch.cat([old, new])), (before, new)):
        found = await statistics.histogram(identity, bins=5, channel=3)
        expected = Histogram.start(CHANNELS).update(values).histogram(5, channel=3)
        assert torch.equal(found.counts, expected.counts)
        assert torch.equal(found.edges, expected.edges)


@pytest.mark.asyncio
async def test_a_frozen_one_takes_no_post_from_anybody(statistics: Statistics) -> None:
    resource = (await statistics.create(NewStatistics(1))).record.id
    batch = Batch(Moments.of(torch.ones(2, 1)), None, "raise", None, "")
    await statistics.post(resource, batch, check=lambda record: None)
    frozen = (await statistics.freeze(resource, check=lambda record: None)).record.id
    with pytest.raises(ConflictError, match="frozen"):
        await statistics.post(frozen, batch, check=lambda record: None)
