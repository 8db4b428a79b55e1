"""Bringing a database to the schema of this version."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection as SyncConnection

from octollm.errors import OctoError, SettingError
from octollm.storage.engine import Database
from octollm.storage.failures import translated

Service = Literal["orchestrator", "memory", "monitor"]

VERSION_TABLE = "schema_version"
ATTEMPTS = 12
"""Tries to get the write lock, each waiting as long as SQLite does: another process may be migrating."""


async def migrate(db: Database, service: Service) -> str:
    """Bring ``db`` to the newest schema of ``service`` in one transaction, and return its revision.

    Safe when two start at once: the second waits, then finds nothing to do. Raises ``SettingError`` for a schema
    that a newer version made, ``unavailable`` when the database cannot be written to; then nothing has changed.
    """
    scripts = await asyncio.to_thread(_scripts, service)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            async with db.transaction() as tx:
                with translated():
                    return await tx.raw.run_sync(_upgrade, scripts, service, db.place)
        except OctoError as error:
            if error.code != "unavailable" or "busy" not in error.detail or attempt == ATTEMPTS:
                raise
    raise AssertionError("unreachable")


def _scripts(service: Service) -> ScriptDirectory:
    folder = str(Path(__file__).parent / service)
    return ScriptDirectory(folder, version_locations=[folder])


def _upgrade(connection: SyncConnection, scripts: ScriptDirectory, service: str, place: str) -> str:
    head = scripts.get_current_head()
    if head is None:
        raise OctoError(f"The package carries no schema for {service}.", code="internal")

    def steps(current: Any, _context: MigrationContext) -> Iterable[Any]:
        # What alembic's own `upgrade` command runs; there is no public name for it.
        return scripts._upgrade_revs("head", current)  # pyright: ignore[reportPrivateUsage]

    context = MigrationContext.configure(
        connection, opts={"fn": steps, "version_table": VERSION_TABLE, "script": scripts}
    )
    _refuse_newer(context.get_current_heads(), scripts, service, place)
    # The operations are handed to each revision: alembic's global `op` would be shared by two databases that
    # migrate at the same time.
    context.run_migrations(op=Operations(context))
    return head


def _refuse_newer(heads: Iterable[str], scripts: ScriptDirectory, service: str, place: str) -> None:
    for head in heads:
        try:
            scripts.get_revision(head)
        except CommandError as error:
            raise SettingError(
                f"The schema of {place} ({service}) is at revision {head!r}, which this version does not know: a "
                "newer version made it. Install that version, or restore the backup from before it."
            ) from error
