"""The databases of the services, as the settings say."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import get_args

from octollm.clock import Clock
from octollm.config import Settings
from octollm.storage.database import Database
from octollm.storage.engine import open_database
from octollm.storage.migrations.runner import MigrationResult, migrate
from octollm.storage.migrations.schema import DatabaseService, require_schema

MIGRATION_STATEMENT_SECONDS = 3600.0
"""How long one statement of a migration may take on a server: an index over a large table takes its time."""


def database_url(settings: Settings, service: DatabaseService) -> str:
    """Return where a service's tables are: a schema of its own on the server, else a file of its own in the home."""
    url = settings.database_url
    if url is None:
        return f"sqlite:///{settings.home / 'data' / service}.db"
    return f"{url}{'&' if '?' in url else '?'}search_path=octollm_{service}"


@asynccontextmanager
async def open_service_database(
    settings: Settings, service: DatabaseService, *, clock: Clock
) -> AsyncGenerator[Database]:
    """Open a service's database with a schema that this version can work with.

    A file is brought to it here: nobody else uses it. A server's schema is only looked at, for other processes work
    with it, of another version perhaps; `octollm migrate` changes it. Raises ``unavailable``, ``schema_mismatch``.
    """
    async with open_database(database_url(settings, service), clock=clock) as db:
        if db.dialect == "sqlite":
            await migrate(db, service)
        else:
            await require_schema(db, service)
        yield db


async def migrate_all(settings: Settings, clock: Clock) -> Sequence[MigrationResult]:
    """Bring the schema of every service to this version, one after the other, and return what was done.

    Raises as :func:`migrate` does; the services before the one that failed have their new schema then.
    """
    done: list[MigrationResult] = []
    for service in get_args(DatabaseService):
        url = database_url(settings, service)
        async with open_database(url, clock=clock, statement_seconds=MIGRATION_STATEMENT_SECONDS) as db:
            done.append(await migrate(db, service))
    return done
