"""SQL engines by URL scheme.

SQLite in a file (WAL, one writer, several readers), and PostgreSQL on a server (bounded pools, timeouts, reconnects).
"""

from __future__ import annotations

import asyncio
import importlib.util
import sqlite3
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec
from sqlalchemy import event, exc
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from octollm.clock import Clock
from octollm.errors import OctoError, SettingError, map_exceptions
from octollm.storage.database import WAIT_SECONDS, Database, DirectPool, encode_json
from octollm.storage.errors import is_connection_lost, to_octo_error, translate_errors
from octollm.storage.programs import SqliteRunner

BUSY_SECONDS = 5.0
"""Seconds that SQLite waits for the write lock of another process."""
SQLITE_READERS = 4
"""Connections for reading. In WAL mode they do not block the writer, nor the writer them."""


def _pragmas(*, writer: bool, durable: bool) -> list[str]:
    pragmas = [
        f"PRAGMA busy_timeout={int(BUSY_SECONDS * 1000)}",
        # FULL: a commit waits for the disk and survives a power failure, as one of PostgreSQL does. NORMAL loses the
        # last commits then; `docs/concepts/storage.md` has the cost of both. A temporary file need not survive.
        f"PRAGMA synchronous={'FULL' if durable else 'OFF'}",
        "PRAGMA foreign_keys=ON",
        "PRAGMA journal_size_limit=67108864",
        f"PRAGMA query_only={'OFF' if writer else 'ON'}",
    ]
    if writer:
        pragmas.insert(1, "PRAGMA journal_mode=WAL")
    return pragmas


def _sqlite_options(*, writer: bool, durable: bool) -> dict[str, Any]:
    """Return the arguments of ``sqlite3.connect`` for a connection that no driver begins transactions on by itself.

    The pragmas are part of connecting, which takes one turn of the driver's thread. As statements from the event loop
    they would take several turns each, and a connection whose set-up is cancelled in between would be left open.
    """
    pragmas = _pragmas(writer=writer, durable=durable)

    def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = sqlite3.Connection(*arguments, **options)
        try:
            for pragma in pragmas:
                connection.execute(pragma)
        except BaseException:
            connection.close()
            raise
        return connection

    return {"isolation_level": None, "cached_statements": 256, "factory": connect}


def _connect_sqlite(path: Path, *, writer: bool, durable: bool) -> sqlite3.Connection:
    """Open a connection for a runner. It may be opened and closed in different threads, one at a time."""
    return sqlite3.connect(path, check_same_thread=False, **_sqlite_options(writer=writer, durable=durable))


def _sqlite_engine(path: Path, *, writer: bool, durable: bool) -> AsyncEngine:
    engine = create_async_engine(
        f"sqlite+aiosqlite:///{path}",
        pool_size=1 if writer else SQLITE_READERS,
        max_overflow=0,
        pool_timeout=WAIT_SECONDS,
        json_serializer=encode_json,
        json_deserializer=msgspec.json.decode,
        hide_parameters=True,
        connect_args=_sqlite_options(writer=writer, durable=durable),
    )
    # IMMEDIATE takes the write lock at once. A transaction that began as a reader and then writes would fail with
    # SQLITE_BUSY, without waiting, if another one had written in between.
    begin = "BEGIN IMMEDIATE" if writer else "BEGIN"

    def on_begin(connection: Any) -> None:
        connection.exec_driver_sql(begin)

    def on_invalidate(connection: DBAPIConnection, _record: object, _error: BaseException | None) -> None:
        # A cancelled statement invalidates its connection. SQLite keeps a closed connection, and its write lock, until
        # its last unfinished statement is garbage collected. So the transaction is rolled back first.
        with suppress(sqlite3.Error):  # closed next, whatever its state
            connection.rollback()

    event.listen(engine.sync_engine, "begin", on_begin)
    event.listen(engine.sync_engine, "invalidate", on_invalidate)
    return engine


async def _check_sqlite_file(engine: AsyncEngine, place: str) -> None:
    """Read the file's header and schema, which detects a damaged file, and verify that WAL is in use."""
    with translate_errors():
        async with engine.begin() as raw:
            mode = (await raw.exec_driver_sql("PRAGMA journal_mode")).scalar()
            await raw.exec_driver_sql("SELECT count(*) FROM sqlite_master")
    if mode != "wal":
        raise OctoError(f"{place} needs a file system with shared memory: use a local disk.", code="unavailable")


def _make_private(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch(mode=0o600)  # SQLite creates the WAL files with the permissions of this one


@asynccontextmanager
async def open_sqlite(path: Path, clock: Clock, *, durable: bool) -> AsyncGenerator[Database]:
    """Open a database file, which is created if it is missing, and close it at the end.

    ``durable`` means that it must outlive the process. Raises ``unavailable`` when it cannot be used or is damaged.
    """
    place = f"the database file {path}"
    with map_exceptions(
        lambda error: OctoError(
            f"Cannot use {place}: {error.strerror}. Check its path and permissions.", code="unavailable"
        ),
        OSError,
    ):
        await asyncio.to_thread(_make_private, path)
    writer = _sqlite_engine(path, writer=True, durable=durable)
    reader = _sqlite_engine(path, writer=False, durable=durable)
    programs = SqliteRunner(partial(_connect_sqlite, path, writer=True, durable=durable))
    reads = SqliteRunner(partial(_connect_sqlite, path, writer=False, durable=durable))
    try:
        try:
            await _check_sqlite_file(writer, place)
        except OctoError as error:
            raise OctoError(f"Cannot use {place}. {error.detail}", code=error.code) from error
        yield Database(writer, reader, clock, location=place, sqlite=(programs, reads))
    finally:
        # The writer last, because the last connection to close merges the write-ahead log into the file.
        await reads.aclose()
        await programs.aclose()
        await reader.dispose()
        await writer.dispose()


POSTGRES_WRITERS = 5
"""Parallel transactions of one process; further ones wait. Pools are small on purpose: with the readers and the direct
connections, each service of a process opens up to 18 connections, and PostgreSQL allows 100 by default."""
POSTGRES_READERS = 5
"""Parallel snapshots of one process."""
CONNECT_SECONDS = 5.0
STATEMENT_SECONDS = 10.0
"""Server-side limit for one statement (``statement_timeout``)."""
LOCK_SECONDS = 5.0
"""Server-side limit for the wait on a locked row (``lock_timeout``)."""
IDLE_SECONDS = 30.0
"""Server-side limit for an idle transaction (``idle_in_transaction_session_timeout``). It frees the locks of a process
that is suspended or unreachable."""
RESPONSE_GRACE_SECONDS = 5.0
"""Added to the statement limit for the wait in this process, in case the server is unreachable."""
RECYCLE_SECONDS = 1800.0
"""Age at which a connection is replaced, so that connections move to a new server after a failover behind a proxy."""


# Repeatable read: all statements of one read see the same snapshot.
_READONLY = {"default_transaction_read_only": "on", "default_transaction_isolation": "repeatable read"}
_KEY_LOOKUP = {"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off"}
"""Planner settings for lookups by key. Without statistics, which a fast-growing table lacks at first, the server would
scan the whole table for a few keys."""


def schema_of(url: str) -> str | None:
    """Return the schema that a ``postgresql://`` URL names in ``search_path``, or ``None``."""
    values = parse_qs(urlsplit(url).query).get("search_path")
    return values[-1] if values else None


@asynccontextmanager
async def open_postgres(url: str, clock: Clock, statement_seconds: float) -> AsyncGenerator[Database]:
    """Open a pool of connections to ``postgresql://user:password@host:5432/database`` and close it at the end.

    asyncpg's options may follow, such as ``?sslmode=verify-full``; any other name is a server setting of the
    connection. The server must be reachable. Raises ``SettingError`` for a malformed URL or a missing driver,
    ``unavailable`` when the server does not accept the connection.
    """
    if importlib.util.find_spec("asyncpg") is None:
        raise SettingError("PostgreSQL needs the driver asyncpg; install it with: pip install 'octollm[postgres]'")
    # To SQLAlchemy each statement of a writer commits by itself: `Database.transaction` begins and commits.
    writer = _postgres_engine(_connector(url, statement_seconds), POSTGRES_WRITERS, isolation_level="AUTOCOMMIT")
    reader = _postgres_engine(_connector(url, statement_seconds, _READONLY), POSTGRES_READERS)
    direct = DirectPool(_connector(url, statement_seconds, _KEY_LOOKUP))
    lazy = DirectPool(_connector(url, statement_seconds, {**_KEY_LOOKUP, "synchronous_commit": "off"}))
    try:
        database = Database(
            writer,
            reader,
            clock,
            location=_postgres_location(url),
            writers=POSTGRES_WRITERS,
            direct_pool=direct,
            lazy_pool=lazy,
        )
        await database.check()
        yield database
    finally:
        await direct.aclose()
        await lazy.aclose()
        await reader.dispose()
        await writer.dispose()


def _postgres_location(url: str) -> str:
    parts = urlsplit(url)
    schema = schema_of(url)
    return (
        f"the database {unquote(parts.path[1:]) or 'of that name'} on {parts.hostname or 'this machine'}"
        f"{f', schema {schema}' if schema else ''}"
    )


def _connector(
    url: str, statement_seconds: float, further: Mapping[str, str] | None = None
) -> Callable[[], Awaitable[Any]]:
    """Return a function that opens a connection, with ``further`` server settings."""
    # The driver is an optional dependency, so it is imported only when PostgreSQL is used.
    import asyncpg  # noqa: PLC0415

    settings = {
        "application_name": "octollm",
        "statement_timeout": f"{statement_seconds:g}s",
        "lock_timeout": f"{LOCK_SECONDS:g}s",
        "idle_in_transaction_session_timeout": f"{IDLE_SECONDS:g}s",
        # JIT compilation of a statement takes longer than running any of ours.
        "jit": "off",
        **(further or {}),
    }

    async def connect() -> Any:
        with (
            map_exceptions(_invalid_url_error, asyncpg.InterfaceError, ValueError),
            map_exceptions(to_octo_error, OSError, asyncpg.PostgresError),
        ):
            return await asyncpg.connect(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
                url,
                timeout=CONNECT_SECONDS,  # pyright: ignore[reportArgumentType]  it takes parts of a second too
                command_timeout=statement_seconds + RESPONSE_GRACE_SECONDS,
                server_settings=settings,
            )

    return connect


def _invalid_url_error(error: Exception) -> OctoError:
    # The driver's message may repeat parts of the URL, with its password.
    return SettingError(
        f"The driver does not accept the database URL ({type(error).__name__}); write"
        " postgresql://user:password@host:5432/database, with special characters percent-encoded."
    )


def _postgres_engine(connect: Callable[[], Awaitable[Any]], size: int, **options: Any) -> AsyncEngine:
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=connect,
        pool_size=size,
        max_overflow=0,
        pool_timeout=WAIT_SECONDS,
        pool_recycle=RECYCLE_SECONDS,
        json_serializer=encode_json,
        json_deserializer=msgspec.json.decode,
        hide_parameters=True,
        **options,
    )

    def on_checkout(_connection: object, record: Any, _proxy: object) -> None:
        # asyncpg notices a closed socket while a connection is idle. Checking that is enough to replace it, and saves
        # the round trip of SQLAlchemy's pre-ping on every checkout.
        if record.driver_connection.is_closed():
            raise exc.DisconnectionError("The server closed the connection.")

    def on_error(context: ExceptionContext) -> BaseException | None:
        """Discard connections that are unusable after an error, and translate the driver's plain errors."""
        error = context.original_exception
        if is_connection_lost(error):
            context.is_disconnect = True  # pyright: ignore[reportAttributeAccessIssue]
        # SQLAlchemy wraps what its dialect knows as an error of the database; an OSError would pass bare.
        return to_octo_error(error) if isinstance(error, OSError) else None

    event.listen(engine.sync_engine, "checkout", on_checkout)
    event.listen(engine.sync_engine, "handle_error", on_error)
    return engine


@asynccontextmanager
async def open_database(
    url: str, *, clock: Clock, statement_seconds: float = STATEMENT_SECONDS
) -> AsyncGenerator[Database]:
    """Open a database by its URL and close it at the end.

    ``sqlite:///relative.db``, ``sqlite:////absolute.db``: a file, created if it is missing, readable only by its owner.
    ``memory://``: a private database that is deleted at the end (SQLite over a temporary file).
    ``postgresql://user:password@host/database?search_path=schema``: a server, with ``statement_seconds`` as the limit
    for one statement.
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
