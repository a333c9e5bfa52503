"""What the files are: checkpoints and models in a SQL database, SQLite by default."""

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sql
from sqlalchemy.pool import ConnectionPoolEntry

from service.errors import StorageFullError
from service.storage.migrations import migrate

T = TypeVar("T")
JsonObject = dict[str, Any]

_schema = sql.MetaData()

_checkpoints = sql.Table(
    "checkpoints",
    _schema,
    sql.Column("id", sql.String(64), primary_key=True),
    sql.Column("filename", sql.Text, nullable=False),
    sql.Column("format", sql.String(32), nullable=False),
    sql.Column("bytes", sql.BigInteger, nullable=False),
    sql.Column("created_at", sql.String(32), nullable=False),
    sql.Column("summary", sql.JSON, nullable=False),
    sql.Column("normalizations", sql.JSON, nullable=False),
    sql.Column("folded_from", sql.String(64)),
    sql.Column("report", sql.JSON),
)

_models = sql.Table(
    "models",
    _schema,
    sql.Column("name", sql.String(128), primary_key=True),
    sql.Column("version", sql.Integer, primary_key=True),
    sql.Column("checkpoint", sql.String(64), nullable=False),
    sql.Column("served_checkpoint", sql.String(64), nullable=False),
    sql.Column("fold", sql.JSON, nullable=False),
    sql.Column("is_loaded", sql.Boolean, nullable=False),
    sql.Column("created_at", sql.String(32), nullable=False),
    sql.Column("options", sql.JSON, nullable=False, server_default="{}"),
    sql.Column("shapes", sql.JSON),
)


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """A kept checkpoint: its file's id, what the inspection found, and, if we folded it, from what and the report."""

    id: str
    filename: str
    format: str
    bytes: int
    created_at: str
    summary: JsonObject
    normalizations: list[JsonObject]
    folded_from: str | None = None
    report: JsonObject | None = None


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A version of a model: the checkpoint asked for, the one that is served, why they may differ, and how it runs.

    `shapes`, by input, are small ones on which the graph ran; None where none were found.
    """

    name: str
    version: int
    checkpoint: str
    served_checkpoint: str
    fold: JsonObject
    is_loaded: bool
    created_at: str
    options: JsonObject = field(default_factory=dict)
    shapes: JsonObject | None = None


def now() -> str:
    """The present moment in UTC, as records keep it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def database_url(setting: str | None, data_dir: Path) -> str:
    """The database that is set, or the embedded one."""
    return setting or f"sqlite:///{data_dir / 'normserve.db'}"


class Metadata:
    """The database, reached through one thread so that nothing waits on the event loop."""

    def __init__(self, url: str) -> None:
        self._engine = sql.create_engine(url)
        if self._engine.dialect.name == "sqlite":
            sql.event.listen(self._engine, "connect", _make_durable)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metadata")

    async def open(self) -> None:
        await self._run(lambda: migrate(self._engine, _schema))

    async def close(self) -> None:
        await self._run(self._engine.dispose)
        self._thread.shutdown()

    async def add_checkpoint(self, record: CheckpointRecord) -> bool:
        """Whether the record is new; a row with its id is left as it is."""
        try:
            await self._write(_checkpoints.insert().values(**asdict(record)))
        except sql.exc.IntegrityError:
            return False
        return True

    async def set_report(self, checkpoint_id: str, *, folded_from: str | None, report: JsonObject) -> None:
        statement = _checkpoints.update().where(_checkpoints.c.id == checkpoint_id)
        await self._write(statement.values(folded_from=folded_from, report=report))

    async def checkpoint(self, checkpoint_id: str) -> CheckpointRecord | None:
        rows = await self._read(_checkpoints.select().where(_checkpoints.c.id == checkpoint_id))
        return CheckpointRecord(**rows[0]) if rows else None

    async def checkpoints(self) -> list[CheckpointRecord]:
        rows = await self._read(_checkpoints.select().order_by(_checkpoints.c.created_at, _checkpoints.c.id))
        return [CheckpointRecord(**row) for row in rows]

    async def folds_of(self, checkpoint_id: str) -> list[CheckpointRecord]:
        """The kept checkpoints that were folded from this one."""
        rows = await self._read(_checkpoints.select().where(_checkpoints.c.folded_from == checkpoint_id))
        return [CheckpointRecord(**row) for row in rows]

    async def delete_checkpoint(self, checkpoint_id: str) -> list[str]:
        """Delete it unless models use it; the answer names these."""
        is_user = sql.or_(_models.c.checkpoint == checkpoint_id, _models.c.served_checkpoint == checkpoint_id)

        def delete(connection: sql.Connection) -> list[str]:
            rows = connection.execute(_models.select().where(is_user).order_by(_models.c.name, _models.c.version))
            users = [f"{row.name}/{row.version}" for row in rows]
            if not users:
                connection.execute(_checkpoints.delete().where(_checkpoints.c.id == checkpoint_id))
            return users

        return await self.transact(delete)

    async def add_model(self, record: ModelRecord) -> None:
        await self._write(_models.insert().values(**asdict(record)))

    async def replace_models(self, name: str, records: Sequence[ModelRecord]) -> None:
        """Make these the versions of a model, in one transaction."""

        def replace() -> None:
            with self._engine.begin() as connection:
                connection.execute(_models.delete().where(_models.c.name == name))
                connection.execute(_models.insert(), [asdict(record) for record in records])

        await self._run(replace)

    async def models(self) -> list[ModelRecord]:
        rows = await self._read(_models.select().order_by(_models.c.name, _models.c.version))
        return [ModelRecord(**row) for row in rows]

    async def set_loaded(self, name: str, version: int, *, is_loaded: bool) -> None:
        await self._write(_models.update().where(_is_model(name, version)).values(is_loaded=is_loaded))

    async def delete_model(self, name: str, version: int) -> None:
        await self._write(_models.delete().where(_is_model(name, version)))

    async def transact(self, call: Callable[[sql.Connection], T]) -> T:
        """What `call` returns; all it did is durable then, or none of it is done if it raises."""

        def transact() -> T:
            with self._engine.begin() as connection:
                return call(connection)

        return await self._run(transact)

    async def _read(self, statement: sql.Select[Any]) -> list[JsonObject]:
        def read() -> list[JsonObject]:
            with self._engine.connect() as connection:
                return [dict(row) for row in connection.execute(statement).mappings()]

        return await self._run(read)

    async def _write(self, statement: sql.Executable) -> None:
        await self.transact(lambda connection: connection.execute(statement))

    async def _run(self, call: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        except sql.exc.OperationalError as error:
            if getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise StorageFullError("storage: the data directory has no room for this record") from error
            raise


def _is_model(name: str, version: int) -> sql.ColumnElement[bool]:
    return sql.and_(_models.c.name == name, _models.c.version == version)


def _make_durable(connection: Any, _: ConnectionPoolEntry) -> None:
    for pragma in ("journal_mode=WAL", "synchronous=FULL"):
        connection.execute(f"PRAGMA {pragma}")
