"""The databases that tests run on: SQLite, and a database of its own on a PostgreSQL server.

Nearly every test begins with an empty SQLite file, and its revisions take longer than most tests. So a test process
runs them once for each service, and copies the result from then on; `test_migrations.py` has the real thing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import tempfile
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest
from sqlalchemy import text

from octollm.clock import SystemClock
from octollm.config import read_settings
from octollm.storage import Database, migrations, open_database
from octollm.storage.migrations import DatabaseService, MigrationResult, migrate, migrate_all, runner

SERVER_URL = os.environ.get("OCTOLLM_TEST_DATABASE_URL", "postgresql://postgres@127.0.0.1:5432/postgres")
BACKENDS = ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)]


run_revisions = migrate
"""The product's own function, whatever :func:`copy_migrated_files` puts in its place."""


class MigratedFiles:
    """A migrated SQLite file of each service, copied into empty ones."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="octollm-migrated-")

    async def migrate(self, db: Database, service: DatabaseService) -> MigrationResult:
        """Do what the product's function does, faster where the database is empty."""
        if db.dialect == "sqlite":
            async with db.read() as snapshot:
                empty = not await snapshot.scalar(text("SELECT count(*) FROM sqlite_master"))
                [found] = await snapshot.all(text("PRAGMA database_list"))
            if empty:
                await asyncio.to_thread(_copy_database, await self._template(service), Path(found["file"]))
        return await run_revisions(db, service)

    async def _template(self, service: DatabaseService) -> Path:
        path = Path(self._folder.name) / f"{service}.db"
        if not path.exists():
            async with open_database(f"sqlite:///{path}.new", clock=SystemClock()) as db:
                await run_revisions(db, service)
            _copy_database(Path(f"{path}.new"), path)
        return path


def copy_migrated_files() -> None:
    """Have every later import of ``migrate`` in this process get :meth:`MigratedFiles.migrate`."""
    runner.migrate = migrations.migrate = MigratedFiles().migrate


def _copy_database(source: Path, target: Path) -> None:
    with contextlib.closing(sqlite3.connect(source)) as origin, contextlib.closing(sqlite3.connect(target)) as copy:
        copy.execute("PRAGMA synchronous=OFF")
        origin.backup(copy)


@dataclass(frozen=True)
class Backend:
    """A database for one test; ``base`` is that of a server, ``None`` stands for SQLite in a temporary file."""

    base: str | None

    def url(self, schema: str) -> str:
        """Return the URL of a schema there, or of a SQLite database of its own."""
        return "memory://" if self.base is None else f"{self.base}?search_path={schema}"

    @property
    def environment(self) -> dict[str, str]:
        """Return the setting that puts services there."""
        return {} if self.base is None else {"OCTOLLM_DATABASE_URL": self.base}


WIPE = """
DO $$
DECLARE found record;
BEGIN
    -- What a test left open, or a process that it killed, holds nobody up.
    PERFORM pg_terminate_backend(pid) FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid();
    FOR found IN SELECT schemaname, tablename FROM pg_tables
        WHERE schemaname LIKE 'octollm\\_%' AND tablename NOT LIKE 'schema\\_%'
    LOOP
        EXECUTE format('DELETE FROM %I.%I', found.schemaname, found.tablename);
    END LOOP;
    FOR found IN SELECT nspname FROM pg_namespace WHERE nspname !~ '^(pg_|octollm_|information_schema$)' LOOP
        EXECUTE format('DROP SCHEMA %I CASCADE', found.nspname);
    END LOOP;
    CREATE SCHEMA public;
END
$$
"""


class PostgresServer:
    """One database with every service's schema, which is emptied after each test: faster than making one."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._name = f"octollm_test_{os.getpid()}"

    def start(self) -> None:
        """Make the database; without a server skip, or fail under CI."""
        try:
            _run_in_thread(self._start())
        except (OSError, asyncpg.PostgresError) as error:
            reason = f"no PostgreSQL at {urlsplit(self.url).hostname} to make databases on: {error}"
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(reason)

    def stop(self) -> None:
        """Drop the database."""
        _run_in_thread(run_sql(self.url, f"DROP DATABASE IF EXISTS {self._name} WITH (FORCE)"))

    @contextlib.asynccontextmanager
    async def database(self) -> AsyncGenerator[str]:
        """Yield the URL of the database, and empty it at the end: what is not of our schemas goes altogether."""
        url = self._url_of(self._name)
        try:
            yield url
        finally:
            await run_sql(url, WIPE)

    @contextlib.asynccontextmanager
    async def empty_database(self) -> AsyncGenerator[str]:
        """Make a database without any schema of ours, yield its URL, and drop it."""
        name = f"{self._name}_empty"
        await run_sql(self.url, f"CREATE DATABASE {name} TEMPLATE template0")
        try:
            yield self._url_of(name)
        finally:
            await run_sql(self.url, f"DROP DATABASE {name} WITH (FORCE)")

    def _url_of(self, name: str) -> str:
        parts = urlsplit(self.url)
        return urlunsplit((parts.scheme, parts.netloc, f"/{name}", "", ""))

    async def _start(self) -> None:
        await run_sql(self.url, f"DROP DATABASE IF EXISTS {self._name} WITH (FORCE)")
        await run_sql(self.url, f"CREATE DATABASE {self._name} TEMPLATE template0")
        await migrate_all(read_settings({"OCTOLLM_DATABASE_URL": self._url_of(self._name)}, ()), SystemClock())


async def run_sql(url: str, statement: str) -> None:
    """Run a statement on a connection of its own."""
    connection = await asyncpg.connect(url, timeout=5, command_timeout=30)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


def _run_in_thread(work: Coroutine[Any, Any, None]) -> None:
    """Run ``work`` to its end in a loop of its own, wherever the caller is."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, work).result()
