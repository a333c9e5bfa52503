"""Statistics resources: one row of totals each, and one row per idempotency key, written in the same transaction.

A histogram is much larger than what one post adds to it. So posts add parts of it, in rows of their own, which every so
many posts become one.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import sqlalchemy as sql

from service.errors import ConflictError, StatisticsNotFoundError
from service.storage.metadata import Metadata

T = TypeVar("T")

# A schema of its own: opening the store adds these tables to a database that was made before there were any.
_schema = sql.MetaData()

_statistics = sql.Table(
    "statistics",
    _schema,
    sql.Column("id", sql.String(64), primary_key=True),
    sql.Column("name", sql.Text),
    sql.Column("num_features", sql.Integer, nullable=False),
    sql.Column("channel_axis", sql.Integer, nullable=False),
    sql.Column("momentum", sql.Float),
    sql.Column("convention", sql.String(16), nullable=False),
    sql.Column("created_at", sql.String(32), nullable=False),
    sql.Column("sequence", sql.BigInteger, nullable=False),
    sql.Column("batches", sql.BigInteger, nullable=False),
    sql.Column("content_hash", sql.String(64)),
    sql.Column("sources", sql.JSON, nullable=False),
    sql.Column("state", sql.LargeBinary, nullable=False),
)

_keys = sql.Table(
    "statistics_keys",
    _schema,
    sql.Column("statistics", sql.String(64), primary_key=True),
    sql.Column("key", sql.Text, primary_key=True),
    sql.Column("digest", sql.String(64), nullable=False),
    sql.Column("answer", sql.JSON, nullable=False),
)

_parts = sql.Table(
    "statistics_histograms",
    _schema,
    sql.Column("statistics", sql.String(64), primary_key=True),
    sql.Column("sequence", sql.BigInteger, primary_key=True),
    sql.Column("part", sql.LargeBinary, nullable=False),
)

# Posts from one joining of the parts to the next.
JOINED_POSTS = 32


@dataclass(frozen=True, slots=True)
class StatisticsRecord:
    """A statistics resource without its totals.

    Attributes:
        momentum: in the convention's sense; None averages over batches.
        sequence: how many posts it has accepted; it tells one state of the resource from the next.
        batches: those of them that held values.
        content_hash: of the totals, where they are frozen.
        sources: ids of the resources that it was frozen or merged from.
    """

    id: str
    name: str | None
    num_features: int
    channel_axis: int
    momentum: float | None
    convention: str
    created_at: str
    sequence: int = 0
    batches: int = 0
    content_hash: str | None = None
    sources: tuple[str, ...] = ()

    @property
    def is_frozen(self) -> bool:
        return self.content_hash is not None

    @property
    def version(self) -> str:
        """Another one for every state of the resource."""
        return self.content_hash or str(self.sequence)


Check = Callable[[StatisticsRecord], None]


@dataclass(frozen=True, slots=True)
class Stored:
    """A resource with its totals and, where they were asked for, the parts of its histogram."""

    record: StatisticsRecord
    state: bytes
    parts: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Post:
    """One change of a resource: what it becomes and what is answered, or an error that leaves it as it was.

    Attributes:
        key: the caller's idempotency key, None without one.
        digest: of everything the caller sent.
        check: refuses the resource as it is.
        change: the resource after the post, its `parts` those that the post adds, and the answer.
        join: parts of a histogram as one.
    """

    key: str | None
    digest: str
    check: Check
    change: Callable[[Stored], tuple[Stored, dict[str, Any]]]
    join: Callable[[Iterable[bytes]], bytes]


_RECORD_COLUMNS = [_statistics.c[field.name] for field in fields(StatisticsRecord)]

# Those of a post, made once: making one costs as much as running it.
_RECORD = sql.select(*_RECORD_COLUMNS).where(_statistics.c.id == sql.bindparam("of"))
_READ = _statistics.select().where(_statistics.c.id == sql.bindparam("of"))
# The lock matters where services share a server's database; SQLite has one writer and ignores it.
_READ_LOCKED = _READ.with_for_update()
_READ_KEY = _keys.select().where(_keys.c.statistics == sql.bindparam("of"), _keys.c.key == sql.bindparam("named"))
_UPDATE = (
    _statistics.update()
    .where(_statistics.c.id == sql.bindparam("of"))
    .values({name: sql.bindparam(name) for name in ("sequence", "batches", "state")})
)
_ADD_KEY = _keys.insert()
_ADD_PART = _parts.insert()


class StatisticsStore:
    """Every method is one transaction, durable when it returns."""

    def __init__(self, metadata: Metadata, *, limit: int) -> None:
        self._metadata = metadata
        self._limit = limit

    async def open(self) -> None:
        await self._metadata.transact(_make_tables)

    async def read(self, statistics_id: str, view: Callable[[Stored], T], *, has_parts: bool = False) -> T:
        """What `view`, run off the event loop, makes of a resource. Raises StatisticsNotFoundError."""
        return await self._metadata.transact(
            lambda connection: view(_read(connection, statistics_id, has_parts=has_parts))
        )

    async def record(self, statistics_id: str) -> StatisticsRecord:
        """A resource without its totals. Raises StatisticsNotFoundError."""
        return await self._metadata.transact(lambda connection: _record(_row_of(connection, _RECORD, statistics_id)))

    async def records(self) -> list[StatisticsRecord]:
        """All resources, oldest first."""
        statement = sql.select(*_RECORD_COLUMNS).order_by(_statistics.c.created_at, _statistics.c.id)
        return await self._metadata.transact(
            lambda connection: [_record(row) for row in connection.execute(statement).mappings()]
        )

    async def derive(
        self, sources: Collection[str], make: Callable[[Iterator[Stored]], Stored], view: Callable[[Stored], T]
    ) -> T:
        """Add what `make` makes of the sources, all in one transaction. Raises ConflictError if full."""

        def derive(connection: sql.Connection) -> T:
            made = make(_read(connection, source, has_parts=True) for source in sources)
            count = connection.execute(sql.select(sql.func.count()).select_from(_statistics)).scalar_one()
            if count >= self._limit:
                raise ConflictError(
                    f"statistics: {count} resources are kept, which is the limit (NORMSERVE_MAX_STATISTICS); "
                    "delete those no longer needed"
                )
            connection.execute(_statistics.insert().values(_row(made)))
            _add_parts(connection, made)
            return view(made)

        return await self._metadata.transact(derive)

    async def post(self, statistics_id: str, post: Post) -> tuple[dict[str, Any], bool]:
        """The answer to a post, and whether it was given before: a key that was seen counts once.

        Raises:
            StatisticsNotFoundError: no such resource.
            ConflictError: the key was used with something else.
        """

        def apply(connection: sql.Connection) -> tuple[dict[str, Any], bool]:
            stored = _read(connection, statistics_id, is_changing=True)
            known = _answer(connection, statistics_id, post)
            if known is not None:
                return known, True
            post.check(stored.record)
            changed, answer = post.change(stored)
            record = changed.record
            totals = {"of": record.id, "sequence": record.sequence, "batches": record.batches, "state": changed.state}
            connection.execute(_UPDATE, totals)
            _add_parts(connection, changed)
            if changed.record.sequence % JOINED_POSTS == 0:
                _join_parts(connection, changed.record, post.join)
            if post.key is not None:
                row = {"statistics": statistics_id, "key": post.key, "digest": post.digest, "answer": answer}
                connection.execute(_ADD_KEY, row)
            return answer, False

        return await self._metadata.transact(apply)

    async def delete(self, statistics_id: str, check: Check) -> None:
        """Forget a resource, and its keys, unless `check` refuses."""

        def delete(connection: sql.Connection) -> None:
            check(_read(connection, statistics_id, is_changing=True).record)
            for table in (_keys, _parts):
                connection.execute(table.delete().where(table.c.statistics == statistics_id))
            connection.execute(_statistics.delete().where(_statistics.c.id == statistics_id))

        await self._metadata.transact(delete)


def _make_tables(connection: sql.Connection) -> None:
    found = sql.inspect(connection).get_table_names()
    _schema.create_all(connection)
    if _statistics.name in found and _parts.name not in found:
        # Histograms were a part of the totals before they had a table of their own.
        totals = sql.select(*(_statistics.c[name] for name in ("id", "sequence", "state")))
        connection.execute(_parts.insert().from_select(["statistics", "sequence", "part"], totals))


def _read(
    connection: sql.Connection, statistics_id: str, *, is_changing: bool = False, has_parts: bool = False
) -> Stored:
    row = _row_of(connection, _READ_LOCKED if is_changing else _READ, statistics_id)
    return Stored(_record(row), row["state"], _read_parts(connection, statistics_id) if has_parts else ())


def _row_of(connection: sql.Connection, statement: sql.Select[Any], statistics_id: str) -> Any:
    row = connection.execute(statement, {"of": statistics_id}).mappings().first()
    if row is None:
        raise StatisticsNotFoundError(f"statistics: no statistics with the id {statistics_id[:80]!r}")
    return row


def _read_parts(connection: sql.Connection, statistics_id: str) -> tuple[bytes, ...]:
    statement = sql.select(_parts.c.part).where(_parts.c.statistics == statistics_id).order_by(_parts.c.sequence)
    return tuple(connection.execute(statement).scalars())


def _add_parts(connection: sql.Connection, stored: Stored) -> None:
    for part in stored.parts:
        row = {"statistics": stored.record.id, "sequence": stored.record.sequence, "part": part}
        connection.execute(_ADD_PART, row)


def _join_parts(connection: sql.Connection, record: StatisticsRecord, join: Callable[[Iterable[bytes]], bytes]) -> None:
    parts = _read_parts(connection, record.id)
    if len(parts) > 1:
        connection.execute(_parts.delete().where(_parts.c.statistics == record.id))
        _add_parts(connection, Stored(record, b"", (join(parts),)))


def _answer(connection: sql.Connection, statistics_id: str, post: Post) -> dict[str, Any] | None:
    if post.key is None:
        return None
    row = connection.execute(_READ_KEY, {"of": statistics_id, "named": post.key}).mappings().first()
    if row is None:
        return None
    if row["digest"] != post.digest:
        raise ConflictError("Idempotency-Key: expected a new key, received one that came before with another request")
    answer: dict[str, Any] = row["answer"]
    return answer


def _record(row: Any) -> StatisticsRecord:
    values = {field.name: row[field.name] for field in fields(StatisticsRecord)}
    return StatisticsRecord(**(values | {"sources": tuple(row["sources"])}))


def _row(stored: Stored) -> dict[str, Any]:
    record = asdict(stored.record)
    return record | {"sources": list(stored.record.sources), "state": stored.state}
