"""The version of the database's schema, and the steps from one version to the next."""

import sqlalchemy as sql

from service.errors import SchemaTooNewError

SCHEMA_VERSION = 3

# What brings a database of the version before to this one; new tables come by themselves.
_STEPS: dict[int, tuple[str, ...]] = {
    2: ("ALTER TABLE models ADD COLUMN options JSON DEFAULT '{}' NOT NULL",),
    3: ("ALTER TABLE models ADD COLUMN shapes JSON",),
}


def migrate(engine: sql.Engine, schema: sql.MetaData) -> None:
    """Make the tables of a new database, or bring an old one forward, in one transaction.

    Raises:
        SchemaTooNewError: a newer program has written it.
    """
    version_table = sql.Table("schema_version", sql.MetaData(), sql.Column("version", sql.Integer, nullable=False))
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":
            # Its driver begins no transaction before a change of the schema.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        found = _found_version(connection, version_table)
        if found is not None and found > SCHEMA_VERSION:
            raise SchemaTooNewError(
                f"the database has schema version {found}, this program knows versions up to {SCHEMA_VERSION}: "
                "start a newer normserve, or another NORMSERVE_DATABASE_URL or NORMSERVE_DATA_DIR"
            )
        for version in range(SCHEMA_VERSION if found is None else found, SCHEMA_VERSION):
            for statement in _STEPS[version + 1]:
                connection.execute(sql.text(statement))
        schema.create_all(connection)
        version_table.create(connection, checkfirst=True)
        connection.execute(version_table.delete())
        connection.execute(version_table.insert().values(version=SCHEMA_VERSION))


def _found_version(connection: sql.Connection, version_table: sql.Table) -> int | None:
    """None for an empty database. The first version wrote no number."""
    tables = sql.inspect(connection).get_table_names()
    if version_table.name in tables:
        return int(connection.execute(sql.select(version_table.c.version)).scalar_one())
    return 1 if "models" in tables else None
