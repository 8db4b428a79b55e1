"""Opening a database: its URL's scheme picks the backend."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from octollm.clock import Clock
from octollm.errors import SettingError
from octollm.storage.database import Database
from octollm.storage.postgres import STATEMENT_SECONDS, open_postgres
from octollm.storage.sqlite import open_sqlite


@asynccontextmanager
async def open_database(
    url: str, *, clock: Clock, statement_seconds: float = STATEMENT_SECONDS
) -> AsyncGenerator[Database]:
    """Open a database by its URL and close it at the end.

    ``sqlite:///relative.db``, ``sqlite:////absolute.db``: a file, made if it is not there, readable by its owner
    only. ``memory://``: a database of its own that vanishes at the end; the same engine over a temporary file.
    ``postgresql://user:password@host/database?search_path=schema``: a server, which works
    on one statement for at most ``statement_seconds``.
    Raises ``SettingError`` for another URL, ``unavailable`` when the database cannot be used.
    """
    scheme, separator, rest = url.partition("://")
    if separator and scheme == "memory":
        with tempfile.TemporaryDirectory(prefix="octollm-") as folder:
            async with open_sqlite(Path(folder) / "memory.db", clock, durable=False) as database:
                yield database
    elif separator and scheme == "sqlite" and rest.startswith("/") and len(rest) > 1:
        path = await asyncio.to_thread(lambda: Path(rest[1:]).expanduser().resolve())
        async with open_sqlite(path, clock, durable=True) as database:
            yield database
    elif separator and scheme in ("postgresql", "postgres"):
        async with open_postgres(url, clock, statement_seconds) as database:
            yield database
    else:
        raise SettingError(
            f"The database URL has the scheme {scheme!r}; use postgresql://user:password@host/database,"
            " sqlite:///path/to/file.db or memory://."
        )
