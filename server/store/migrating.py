"""An older database becomes one of today when it is opened; a newer one is left alone.

Alembic is imported where there is something to do, because that takes longer than opening a store.
"""

from pathlib import Path

from sqlalchemy import Connection, Engine, inspect

from ...protocols.errors import OutputError

MIGRATIONS = Path(__file__).parents[1] / "migrations"
HEAD = max(file.stem for file in MIGRATIONS.glob("versions/r*.py"))[1:5]
"""The version of a database that this program writes. Versions are numbers of four digits; files are named by them."""

FIRST = "0001"
UNVERSIONED = {"runs", "rounds", "contributions", "refusals", "ledger", "ledger_head"}
"""Tables of a file from before versions were kept: it is of the first one."""

LOCK = int.from_bytes(b"fedapt")
"""PostgreSQL's name of the lock under which databases are migrated."""


def migrate(engine: Engine, where: str) -> None:
    """Bring the database to HEAD, in one transaction. Raises OutputError where it is newer than that."""
    with engine.connect() as connection:
        version = _version(connection)
    if version == HEAD:
        return
    if version is not None and version > HEAD:
        raise OutputError(
            f"{where}: was written by a newer fedapt (version {version} of the store; this program knows {HEAD}); "
            "update fedapt, or choose another store"
        )
    with engine.connect() as connection:
        _begin_alone(connection)
        _upgrade(connection)
        connection.commit()
    engine.dispose()  # that connection checks no foreign keys: another use gets a new one


def _version(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    version: str | None = connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar()
    return version


def _begin_alone(connection: Connection) -> None:
    """Begin a transaction; another program that opens the same database waits for its end."""
    if connection.dialect.name == "sqlite":
        # A table is changed by a copy that takes its name, and meanwhile rows refer to nothing.
        connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({LOCK})")


def _upgrade(connection: Connection) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    if connection.dialect.name == "sqlite" and not inspect(connection).has_table("alembic_version"):
        tables = set(inspect(connection).get_table_names())
        if tables >= UNVERSIONED:
            command.stamp(config, FIRST)
    command.upgrade(config, "head")
