"""Which schema a database has, and whether this version can work with it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Column, MetaData, String, Table, inspect, select
from sqlalchemy import Connection as SyncConnection

from octollm.errors import OctoError
from octollm.storage.database import Database
from octollm.storage.failures import translate_errors

DatabaseService = Literal["orchestrator", "memory", "monitor"]
"""A service that has SQL."""

VERSION_TABLE = "schema_version"
compatibility_table = Table("schema_serves", MetaData(), Column("oldest", String(32), nullable=False))
"""One row beside the version: the oldest revision whose code can work with the schema."""


@dataclass(frozen=True, slots=True)
class Revisions:
    """The revisions that this version knows of a service's schema, oldest first."""

    scripts: ScriptDirectory
    names: tuple[str, ...]
    serves: str

    @property
    def head(self) -> str:
        """Return the one that this version wants."""
        return self.names[-1]


def load_revisions(service: DatabaseService) -> Revisions:
    """Read the revisions of a service from the package."""
    folder = str(Path(__file__).parent / service)
    scripts = ScriptDirectory(folder, version_locations=[folder])
    walked = list(scripts.walk_revisions())
    if not walked:
        raise OctoError(f"The package carries no schema for {service}.", code="internal")
    named = (getattr(script.module, "serves", None) for script in walked)
    names = tuple(script.revision for script in reversed(walked))
    return Revisions(scripts, names, next((name for name in named if name is not None), names[0]))


@dataclass(frozen=True, slots=True)
class SchemaVersion:
    """What a database says of its schema: its revision, and the oldest that it serves; ``None`` for nothing."""

    revision: str | None
    serves: str | None


def read_schema(connection: SyncConnection) -> SchemaVersion:
    """Return what the database says."""
    heads = migration_context(connection).get_current_heads()
    serves = None
    if inspect(connection).has_table(compatibility_table.name):
        serves = connection.execute(select(compatibility_table.c.oldest)).scalar()
    return SchemaVersion(heads[0] if heads else None, serves)


def migration_context(connection: SyncConnection, **options: Any) -> MigrationContext:
    """Return alembic's view of a database."""
    return MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, **options})


def check_schema(found: SchemaVersion, known: Iterable[str], head: str, place: str) -> None:
    """Raise ``schema_mismatch`` unless code of the revision ``head`` can work with the schema ``found``.

    A newer schema is accepted when it says that it still serves a revision of the ``known`` ones.
    """
    if found.revision == head:
        return
    if found.revision is None:
        raise _mismatch(f"There is no schema of this program in {place}. Make it with: octollm migrate")
    if found.revision in known:
        raise _mismatch(
            f"The schema of {place} is at revision {found.revision}, and this version needs {head}. Bring it there"
            " with: octollm migrate"
        )
    if found.serves is None or found.serves not in known:
        raise _mismatch(
            f"The schema of {place} is at revision {found.revision}, which this version does not know: a newer version"
            " made it. Install that version, or restore the backup from before it."
        )


def _mismatch(detail: str) -> OctoError:
    return OctoError(detail, code="schema_mismatch")


async def require_schema(db: Database, service: DatabaseService) -> str:
    """Return the revision of a database whose schema this version can work with; raise ``schema_mismatch``."""
    known = await asyncio.to_thread(load_revisions, service)
    async with db.read() as connection:
        with translate_errors():
            found = await connection.raw.run_sync(read_schema)
    check_schema(found, known.names, known.head, db.location)
    return found.revision or known.head
