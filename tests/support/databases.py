"""The databases that tests run on: SQLite, and a database of its own on a PostgreSQL server."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from octollm.clock import SystemClock
from octollm.config import read_settings
from octollm.storage.migrations import migrate_all

SERVER_URL = os.environ.get("OCTOLLM_TEST_DATABASE_URL", "postgresql://postgres@127.0.0.1:5432/postgres")
BACKENDS = ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)]


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


class PostgresServer:
    """Makes databases with every service's schema, each a copy of one template, and takes all of them away."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._prefix = f"octollm_test_{os.getpid()}_"
        self._count = 0

    def start(self) -> None:
        """Make the template; without a server skip, or fail under CI."""
        try:
            _apart(self._make_template())
        except (OSError, asyncpg.PostgresError) as error:
            reason = f"no PostgreSQL at {urlsplit(self.url).hostname} to make databases on: {error}"
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(reason)

    def stop(self) -> None:
        """Drop the template."""
        _apart(self._run(f"DROP DATABASE IF EXISTS {self._prefix}template WITH (FORCE)"))

    @contextlib.asynccontextmanager
    async def database(self, *, empty: bool = False) -> AsyncGenerator[str]:
        """Make a database, yield its URL, and drop it."""
        self._count += 1
        name = f"{self._prefix}{self._count}"
        await self._run(f"CREATE DATABASE {name} TEMPLATE {'template0' if empty else f'{self._prefix}template'}")
        try:
            yield self.url_of(name)
        finally:
            await self._run(f"DROP DATABASE {name} WITH (FORCE)")

    def url_of(self, name: str) -> str:
        parts = urlsplit(self.url)
        return urlunsplit((parts.scheme, parts.netloc, f"/{name}", "", ""))

    async def _make_template(self) -> None:
        name = f"{self._prefix}template"
        await self._run(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await self._run(f"CREATE DATABASE {name} TEMPLATE template0")
        await migrate_all(read_settings({"OCTOLLM_DATABASE_URL": self.url_of(name)}, ()), SystemClock())

    async def _run(self, statement: str) -> None:
        connection = await asyncpg.connect(self.url, timeout=5, command_timeout=30)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()


def _apart(work: Coroutine[Any, Any, None]) -> None:
    """Run ``work`` to its end in a loop of its own, wherever the caller is."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, work).result()
