"""Databases of other versions: older ones are brought forward, newer ones are left alone."""

import sqlite3
from pathlib import Path

import pytest
from sqlalchemy.exc import OperationalError

from service.errors import SchemaTooNewError
from service.storage.metadata import Metadata
from service.storage.migrations import SCHEMA_VERSION

# As the first version made them.
VERSION_1 = """
CREATE TABLE checkpoints (id VARCHAR(64) NOT NULL, filename TEXT NOT NULL, format VARCHAR(32) NOT NULL,
    bytes BIGINT NOT NULL, created_at VARCHAR(32) NOT NULL, summary JSON NOT NULL, normalizations JSON NOT NULL,
    folded_from VARCHAR(64), report JSON, PRIMARY KEY (id));
CREATE TABLE models (name VARCHAR(128) NOT NULL, version INTEGER NOT NULL, checkpoint VARCHAR(64) NOT NULL,
    served_checkpoint VARCHAR(64) NOT NULL, fold JSON NOT NULL, is_loaded BOOLEAN NOT NULL,
    created_at VARCHAR(32) NOT NULL, PRIMARY KEY (name, version));
INSERT INTO models VALUES ('m', 3, 'a', 'b', '{"requested": true}', 1, '2026-01-01');
"""
VERSION_2 = f"""{VERSION_1}
ALTER TABLE models ADD COLUMN options JSON DEFAULT '{{}}' NOT NULL;
CREATE TABLE schema_version (version INTEGER NOT NULL);
INSERT INTO schema_version VALUES (2);
"""


def _execute(path: Path, script: str) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(script)
    connection.close()


def _version(path: Path) -> int:
    connection = sqlite3.connect(path)
    (version,) = connection.execute("SELECT version FROM schema_version").fetchone()
    connection.close()
    return int(version)


def _tables(path: Path) -> dict[str, set[tuple[object, ...]]]:
    """Columns by table: name, type, whether it may be null, default, place in the key."""
    connection = sqlite3.connect(path)
    names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found = {name: {row[1:] for row in connection.execute(f"PRAGMA table_info({name})")} for name in names}
    connection.close()
    return found


async def test_a_database_without_a_version_is_the_first_and_is_brought_forward(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    _execute(path, VERSION_1)
    for _ in range(2):
        metadata = Metadata(f"sqlite:///{path}")
        await metadata.open()
        (model,) = await metadata.models()
        await metadata.close()
        assert (model.name, model.version, model.fold, model.options) == ("m", 3, {"requested": True}, {})
        assert model.shapes is None
        assert _version(path) == SCHEMA_VERSION


@pytest.mark.parametrize("script", [VERSION_1, VERSION_2], ids=["1", "2"])
async def test_an_older_database_gets_the_tables_of_a_new_one(tmp_path: Path, script: str) -> None:
    _execute(tmp_path / "old.db", script)
    for name in ("old.db", "new.db"):
        metadata = Metadata(f"sqlite:///{tmp_path / name}")
        await metadata.open()
        await metadata.close()
    assert _tables(tmp_path / "old.db") == _tables(tmp_path / "new.db")


async def test_a_step_that_fails_leaves_the_database_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "odd.db"
    _execute(path, f"{VERSION_1} ALTER TABLE models ADD COLUMN shapes JSON;")  # the step to version 3 meets it
    before = _tables(path)
    metadata = Metadata(f"sqlite:///{path}")
    with pytest.raises(OperationalError, match="shapes"):
        await metadata.open()
    await metadata.close()
    assert _tables(path) == before


async def test_a_new_database_has_the_present_version(tmp_path: Path) -> None:
    metadata = Metadata(f"sqlite:///{tmp_path / 'new.db'}")
    await metadata.open()
    assert await metadata.models() == []
    await metadata.close()
    assert _version(tmp_path / "new.db") == SCHEMA_VERSION


async def test_a_newer_database_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "newer.db"
    _execute(path, f"CREATE TABLE schema_version (version INTEGER); INSERT INTO schema_version VALUES ({10**6});")
    metadata = Metadata(f"sqlite:///{path}")
    with pytest.raises(SchemaTooNewError, match="1000000"):
        await metadata.open()
    await metadata.close()
    assert _version(path) == 10**6
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall() == [("schema_version",)]
    connection.close()
