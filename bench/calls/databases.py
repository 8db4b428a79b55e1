"""A PostgreSQL database of the bench's own, dropped at its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Generator

import asyncpg

URL = os.environ.get("OCTOLLM_TEST_DATABASE_URL", "postgresql://postgres@127.0.0.1:5432/postgres")


@contextlib.contextmanager
def postgres_database() -> Generator[str | None]:
    """Yield the URL of a new database; ``None`` where no server answers."""
    name = f"bench_{secrets.token_hex(4)}"

    async def run(statement: str) -> None:
        connection = await asyncpg.connect(URL, timeout=5)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    try:
        asyncio.run(run(f"CREATE DATABASE {name}"))
    except (OSError, asyncpg.PostgresError):
        yield None
        return
    try:
        yield URL.rpartition("/")[0] + f"/{name}"
    finally:
        asyncio.run(run(f"DROP DATABASE {name} WITH (FORCE)"))
