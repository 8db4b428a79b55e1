"""Migrations: which schema a database has, whether this version can work with it, and the upgrade to the newest."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Column, MetaData, String, Table, delete, func, insert, inspect, literal, select, text
from sqlalchemy import Connection as SyncConnection
from sqlalchemy.schema import CreateSchema

from octollm.clock import Clock
from octollm.config import Settings
from octollm.errors import OctoError
from octollm.storage.database import Database, Transaction
from octollm.storage.engines import open_database
from octollm.storage.errors import translate_errors

DatabaseService = Literal["orchestrator", "memory", "monitor"]
"""A service that has SQL."""

VERSION_TABLE = "schema_version"
compatibility_table = Table("schema_serves", MetaData(), Column("oldest", String(32), nullable=False))
"""One row: the oldest revision whose code can work with the schema. It lets an older version run during a rolling
upgrade, after the newer one has migrated."""


@dataclass(frozen=True, slots=True)
class Revisions:
    """The revisions that this version knows of a service's schema, oldest first."""

    scripts: ScriptDirectory
    names: tuple[str, ...]
    serves: str

    @property
    def head(self) -> str:
        """Return the newest revision, which this version needs."""
        return self.names[-1]


def load_revisions(service: DatabaseService) -> Revisions:
    """Read the revisions of a service from the package."""
    folder = str(Path(__file__).parent / service)
    scripts = ScriptDirectory(folder, version_locations=[folder])
    walked = list(scripts.walk_revisions())
    if not walked:
        raise OctoError(f"The package carries no schema for {service}.", code="internal")
    declared = (getattr(script.module, "serves", None) for script in walked)
    names = tuple(script.revision for script in reversed(walked))
    return Revisions(scripts, names, next((name for name in declared if name is not None), names[0]))


@dataclass(frozen=True, slots=True)
class SchemaVersion:
    """The schema of a database: its revision, and the oldest revision that it serves; ``None`` without a schema."""

    revision: str | None
    serves: str | None


def read_schema(connection: SyncConnection) -> SchemaVersion:
    """Return the version of a database's schema."""
    heads = migration_context(connection).get_current_heads()
    serves = None
    if inspect(connection).has_table(compatibility_table.name):
        serves = connection.execute(select(compatibility_table.c.oldest)).scalar()
    return SchemaVersion(heads[0] if heads else None, serves)


def migration_context(connection: SyncConnection, **options: Any) -> MigrationContext:
    """Return alembic's migration context for a database."""
    return MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, **options})


def check_schema(found: SchemaVersion, revisions: Iterable[str], head: str, place: str) -> None:
    """Raise ``schema_mismatch`` unless code of the revision ``head`` can work with the schema ``found``.

    A newer schema is accepted if it serves one of the ``known`` revisions.
    """
    if found.revision == head:
        return
    if found.revision is None:
        raise _mismatch(f"There is no schema of this program in {place}. Create it with: octollm migrate")
    if found.revision in revisions:
        raise _mismatch(
            f"The schema of {place} is at revision {found.revision}, and this version needs {head}. Upgrade it with:"
            " octollm migrate"
        )
    if found.serves is None or found.serves not in revisions:
        raise _mismatch(
            f"The schema of {place} is at revision {found.revision}, which this version does not know: it is of a newer"
            " version. Install that version, or restore the backup from before it."
        )


def _mismatch(detail: str) -> OctoError:
    return OctoError(detail, code="schema_mismatch")


async def require_schema(db: Database, service: DatabaseService) -> str:
    """Return the revision of a database whose schema this version can work with; raise ``schema_mismatch``."""
    revisions = await asyncio.to_thread(load_revisions, service)
    async with db.read() as connection:
        with translate_errors():
            found = await connection.raw.run_sync(read_schema)
    check_schema(found, revisions.names, revisions.head, db.location)
    return found.revision or revisions.head


LOCK_ATTEMPTS = 12
"""Attempts to get SQLite's write lock, each as long as ``BUSY_SECONDS``: another process may be migrating."""
MIGRATION_LOCK_SECONDS = 60
"""Seconds that a process waits on PostgreSQL while another migrates the same schema."""


class MigrationResult(msgspec.Struct, frozen=True):
    """The revisions ``before`` (``None``: no schema) and ``after`` a migration; equal when there was nothing to do."""

    service: str
    before: str | None
    after: str


async def migrate(db: Database, service: DatabaseService) -> MigrationResult:
    """Upgrade ``db`` to the newest schema of ``service``, in one transaction.

    Safe when two processes start it: the second waits, then finds nothing to do. A newer schema that serves this
    version is left unchanged. Raises ``schema_mismatch`` for one that does not, ``unavailable`` when the database
    cannot be written, ``overloaded`` when a running service locks a table; then nothing has changed.
    """
    revisions = await asyncio.to_thread(load_revisions, service)
    for attempt in range(1, LOCK_ATTEMPTS + 1):
        try:
            async with db.transaction() as tx:
                if tx.dialect == "postgresql":
                    await _acquire_migration_lock(tx)
                with translate_errors():
                    before, after = await tx.raw.run_sync(_upgrade, revisions, db.location)
                return MigrationResult(service, before, after)
        except OctoError as error:
            if error.code != "unavailable" or "busy" not in error.detail or attempt == LOCK_ATTEMPTS:
                raise
    raise AssertionError("unreachable")


async def _acquire_migration_lock(tx: Transaction) -> None:
    """Wait until no other process migrates this schema, and create the schema if it is missing."""
    schema = str(await tx.scalar(select(func.current_setting("search_path"))))
    await tx.execute(text(f"SET LOCAL lock_timeout = '{MIGRATION_LOCK_SECONDS}s'"))
    await tx.execute(select(func.pg_advisory_xact_lock(func.hashtext(literal(f"octollm migrate {schema}")))))
    # While DDL waits for a table's lock, every later statement on that table queues behind it. So it gives up soon.
    await tx.execute(text("SET LOCAL lock_timeout = '5s'"))
    schema_exists = (
        select(text("1")).select_from(text("pg_namespace")).where(text("nspname = :name").bindparams(name=schema))
    )
    if await tx.scalar(schema_exists) is None:
        await tx.execute(CreateSchema(schema))


def _upgrade(connection: SyncConnection, revisions: Revisions, place: str) -> tuple[str | None, str]:
    def steps(current: Any, _context: MigrationContext) -> Iterable[Any]:
        # What alembic's own `upgrade` command calls; it has no public name.
        return revisions.scripts._upgrade_revs("head", current)  # pyright: ignore[reportPrivateUsage]

    found = read_schema(connection)
    if found.revision is not None and found.revision not in revisions.names:
        check_schema(found, revisions.names, revisions.head, place)
        return found.revision, found.revision
    # The operations are passed to each revision, because two databases that migrate at the same time would share
    # alembic's global `op`.
    context = migration_context(connection, fn=steps, script=revisions.scripts)
    context.run_migrations(op=Operations(context))
    if found.serves != revisions.serves:
        compatibility_table.create(connection, checkfirst=True)
        connection.execute(delete(compatibility_table))
        connection.execute(insert(compatibility_table).values(oldest=revisions.serves))
    return found.revision, revisions.head


MIGRATION_STATEMENT_SECONDS = 3600.0
"""Limit for one statement of a migration on a server: an index on a large table takes long."""


def database_url(settings: Settings, service: DatabaseService) -> str:
    """Return the URL of a service's database: its own schema on the server, otherwise its own file in the home."""
    url = settings.database_url
    if url is None:
        return f"sqlite:///{settings.home / 'data' / service}.db"
    return f"{url}{'&' if '?' in url else '?'}search_path=octollm_{service}"


@asynccontextmanager
async def open_service_database(
    settings: Settings, service: DatabaseService, *, clock: Clock
) -> AsyncGenerator[Database]:
    """Open a service's database with a schema that this version can work with.

    A file is upgraded here, since only this process uses it. A server's schema is only checked, because processes of
    another version may be using it; `octollm migrate` upgrades it. Raises ``unavailable``, ``schema_mismatch``.
    """
    async with open_database(database_url(settings, service), clock=clock) as db:
        if db.dialect == "sqlite":
            await migrate(db, service)
        else:
            await require_schema(db, service)
        yield db


async def migrate_all(settings: Settings, clock: Clock) -> Sequence[MigrationResult]:
    """Upgrade the schema of every service, one after the other, and return the results.

    Raises as :func:`migrate` does; the services before the failed one have been upgraded then.
    """
    results: list[MigrationResult] = []
    for service in get_args(DatabaseService):
        url = database_url(settings, service)
        async with open_database(url, clock=clock, statement_seconds=MIGRATION_STATEMENT_SECONDS) as db:
            results.append(await migrate(db, service))
    return results
