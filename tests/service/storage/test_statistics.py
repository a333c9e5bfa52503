"""The store of statistics: its tables come to old databases, and a post is written whole or not at all."""

from pathlib import Path

import pytest
import sqlalchemy as sql

from service.errors import ConflictError
from service.storage.metadata import Metadata
from service.storage.statistics import Post, StatisticsRecord, StatisticsStore, Stored

RECORD = StatisticsRecord("a", None, 3, 1, 0.1, "torch", "2026-01-01T00:00:00.000+00:00")


def accept(_: StatisticsRecord) -> None: ...


def count(stored: Stored) -> tuple[Stored, dict[str, int]]:
    return Stored(stored.record, stored.state + b"x"), {"length": len(stored.state) + 1}


async def opened(folder: Path) -> tuple[Metadata, StatisticsStore]:
    metadata = Metadata(f"sqlite:///{folder / 'test.db'}")
    await metadata.open()
    store = StatisticsStore(metadata, limit=5)
    await store.open()
    return metadata, store


async def test_a_database_from_before_gets_the_tables(tmp_path: Path) -> None:
    old = Metadata(f"sqlite:///{tmp_path / 'test.db'}")
    await old.open()
    await old.close()
    metadata, store = await opened(tmp_path)
    await store.derive((), lambda _: Stored(RECORD, b""), lambda stored: stored)
    assert await store.records() == [RECORD]
    await metadata.close()


async def test_state_and_key_are_there_after_reopening(tmp_path: Path) -> None:
    metadata, store = await opened(tmp_path)
    await store.derive((), lambda _: Stored(RECORD, b""), lambda stored: stored)
    assert await store.post("a", Post("key", "digest", accept, count, b"".join)) == ({"length": 1}, False)
    await metadata.close()
    metadata, store = await opened(tmp_path)
    assert await store.post("a", Post("key", "digest", accept, count, b"".join)) == ({"length": 1}, True)
    with pytest.raises(ConflictError):
        await store.post("a", Post("key", "other", accept, count, b"".join))
    assert await store.read("a", lambda stored: stored.state) == b"x"
    await metadata.close()


async def test_a_key_that_cannot_be_written_takes_the_state_back_with_it(tmp_path: Path) -> None:
    metadata, store = await opened(tmp_path)
    await store.derive((), lambda _: Stored(RECORD, b""), lambda stored: stored)
    await metadata.transact(lambda connection: connection.execute(sql.text("DROP TABLE statistics_keys")))
    await store.post("a", Post(None, "digest", accept, count, b"".join))
    refusing = sql.text("CREATE TABLE statistics_keys (statistics, key, digest, answer CHECK (answer IS NULL))")
    await metadata.transact(lambda connection: connection.execute(refusing))
    with pytest.raises(sql.exc.IntegrityError):
        await store.post("a", Post("key", "digest", accept, count, b"".join))
    assert await store.read("a", lambda stored: stored.state) == b"x"
    await metadata.close()


async def test_nothing_is_left_of_a_deleted_one(tmp_path: Path) -> None:
    metadata, store = await opened(tmp_path)
    await store.derive((), lambda _: Stored(RECORD, b"", (b"part",)), lambda stored: stored)
    await store.post("a", Post("key", "digest", accept, count, b"".join))
    await store.delete("a", accept)

    def left(connection: sql.Connection) -> list[int]:
        tables = ("statistics", "statistics_keys", "statistics_histograms")
        return [connection.execute(sql.text(f"SELECT count(*) FROM {table}")).scalar_one() for table in tables]

    assert await metadata.transact(left) == [0, 0, 0]
    await metadata.close()
