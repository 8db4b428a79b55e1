"""Bringing a database to the schema of this version."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import msgspec
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection as SyncConnection
from sqlalchemy import delete, func, insert, literal, select, text
from sqlalchemy.schema import CreateSchema

from octollm.errors import OctoError
from octollm.storage.database import Database, Transaction
from octollm.storage.failures import translate_errors
from octollm.storage.migrations.schema import (
    DatabaseService,
    Revisions,
    check_schema,
    compatibility_table,
    load_revisions,
    migration_context,
    read_schema,
)

LOCK_ATTEMPTS = 12
"""Tries to get SQLite's write lock, each waiting as long as SQLite does: another process may be migrating."""
MIGRATION_LOCK_SECONDS = 60
"""How long one waits on PostgreSQL while another process migrates the same schema."""


class MigrationResult(msgspec.Struct, frozen=True):
    """What was done: the revision ``before`` (``None``: no schema) and ``after``, the same where nothing was to do."""

    service: str
    before: str | None
    after: str


async def migrate(db: Database, service: DatabaseService) -> MigrationResult:
    """Bring ``db`` to the newest schema of ``service`` in one transaction.

    Safe when two start at once: the second waits, then finds nothing to do. A newer schema that serves this version
    is left as it is. Raises ``schema_mismatch`` for one that does not, ``unavailable`` when the database cannot be
    written to, ``overloaded`` when a running service holds a table; then nothing has changed.
    """
    known = await asyncio.to_thread(load_revisions, service)
    for attempt in range(1, LOCK_ATTEMPTS + 1):
        try:
            async with db.transaction() as tx:
                if tx.dialect == "postgresql":
                    await _acquire_migration_lock(tx)
                with translate_errors():
                    before, after = await tx.raw.run_sync(_upgrade, known, db.location)
                return MigrationResult(service, before, after)
        except OctoError as error:
            if error.code != "unavailable" or "busy" not in error.detail or attempt == LOCK_ATTEMPTS:
                raise
    raise AssertionError("unreachable")


async def _acquire_migration_lock(tx: Transaction) -> None:
    """Wait until no other process migrates this schema, and make it if it is not there."""
    schema = str(await tx.scalar(select(func.current_setting("search_path"))))
    await tx.execute(text(f"SET LOCAL lock_timeout = '{MIGRATION_LOCK_SECONDS}s'"))
    await tx.execute(select(func.pg_advisory_xact_lock(func.hashtext(literal(f"octollm migrate {schema}")))))
    # A statement that waits for a table stands in the way of all that come after it: it gives up soon.
    await tx.execute(text("SET LOCAL lock_timeout = '5s'"))
    there = select(text("1")).select_from(text("pg_namespace")).where(text("nspname = :name").bindparams(name=schema))
    if await tx.scalar(there) is None:
        await tx.execute(CreateSchema(schema))


def _upgrade(connection: SyncConnection, known: Revisions, place: str) -> tuple[str | None, str]:
    def steps(current: Any, _context: MigrationContext) -> Iterable[Any]:
        # What alembic's own `upgrade` command runs; there is no public name for it.
        return known.scripts._upgrade_revs("head", current)  # pyright: ignore[reportPrivateUsage]

    found = read_schema(connection)
    if found.revision is not None and found.revision not in known.names:
        check_schema(found, known.names, known.head, place)
        return found.revision, found.revision
    # The operations are handed to each revision: alembic's global `op` would be shared by two databases that
    # migrate at the same time.
    context = migration_context(connection, fn=steps, script=known.scripts)
    context.run_migrations(op=Operations(context))
    if found.serves != known.serves:
        compatibility_table.create(connection, checkfirst=True)
        connection.execute(delete(compatibility_table))
        connection.execute(insert(compatibility_table).values(oldest=known.serves))
    return found.revision, known.head
