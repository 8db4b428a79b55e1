"""SQL engines by URL scheme.

SQLite in a file (WAL, one writer beside its readers) and PostgreSQL on a server (bounded pools, timeouts, reconnects).
"""

from __future__ import annotations

import asyncio
import importlib.util
import sqlite3
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec
from sqlalchemy import event, exc
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from octollm.clock import Clock
from octollm.errors import OctoError, SettingError
from octollm.storage.database import WAIT_SECONDS, Database, DirectPool, encode_json
from octollm.storage.errors import is_connection_lost, to_octo_error, translate_errors, unreachable_error

BUSY_SECONDS = 5.0
"""How long SQLite itself waits for another process's write lock."""
SQLITE_READERS = 4
"""Connections for reading; SQLite in WAL mode lets them go on beside the writer."""


def _sqlite_engine(path: Path, *, writer: bool, durable: bool) -> AsyncEngine:
    engine = create_async_engine(
        f"sqlite+aiosqlite:///{path}",
        pool_size=1 if writer else SQLITE_READERS,
        max_overflow=0,
        pool_timeout=WAIT_SECONDS,
        json_serializer=encode_json,
        json_deserializer=msgspec.json.decode,
        hide_parameters=True,
    )
    pragmas = [
        f"PRAGMA busy_timeout={int(BUSY_SECONDS * 1000)}",
        # A power failure may take the last commits, never the consistency; a temporary file need not survive one.
        f"PRAGMA synchronous={'NORMAL' if durable else 'OFF'}",
        "PRAGMA foreign_keys=ON",
        "PRAGMA journal_size_limit=67108864",
        f"PRAGMA query_only={'OFF' if writer else 'ON'}",
    ]
    if writer:
        pragmas.insert(1, "PRAGMA journal_mode=WAL")
    # A writer takes the write lock at once: a reader that turned writer could fail instead of waiting for it.
    begin = "BEGIN IMMEDIATE" if writer else "BEGIN"

    def connected(connection: DBAPIConnection, _record: object) -> None:
        # The driver would otherwise begin transactions by itself, late and without IMMEDIATE.
        connection.isolation_level = None  # pyright: ignore[reportAttributeAccessIssue]
        cursor = connection.cursor()
        for pragma in pragmas:
            cursor.execute(pragma)
        cursor.close()

    def begun(connection: Any) -> None:
        connection.exec_driver_sql(begin)

    def abandoned(connection: DBAPIConnection, _record: object, _error: BaseException | None) -> None:
        # A cancelled statement ends its connection. SQLite keeps a closed connection, and its write lock, until its
        # last half-read statement is collected as garbage; so the transaction is ended first.
        with suppress(sqlite3.Error):  # it is closed next, whatever its state
            connection.rollback()

    event.listen(engine.sync_engine, "connect", connected)
    event.listen(engine.sync_engine, "begin", begun)
    event.listen(engine.sync_engine, "invalidate", abandoned)
    return engine


async def _check_sqlite_file(engine: AsyncEngine, place: str) -> None:
    """Read the file's header and schema, which finds a damaged one, and make sure of write-ahead logging."""
    with translate_errors():
        async with engine.begin() as raw:
            mode = (await raw.exec_driver_sql("PRAGMA journal_mode")).scalar()
            await raw.exec_driver_sql("SELECT count(*) FROM sqlite_master")
    if mode != "wal":
        raise OctoError(f"{place} needs a file system with shared memory: use a local disk.", code="unavailable")


def _make_private(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch(mode=0o600)  # its log files take their permissions from it


@asynccontextmanager
async def open_sqlite(path: Path, clock: Clock, *, durable: bool) -> AsyncGenerator[Database]:
    """Open a database file, made if it is not there, and close it at the end.

    ``durable`` says whether it outlives the process. Raises ``unavailable`` when it cannot be used or is damaged.
    """
    place = f"the database file {path}"
    try:
        await asyncio.to_thread(_make_private, path)
    except OSError as error:
        raise OctoError(
            f"Cannot use {place}: {error.strerror}. Check its path and permissions.", code="unavailable"
        ) from error
    writer = _sqlite_engine(path, writer=True, durable=durable)
    reader = _sqlite_engine(path, writer=False, durable=durable)
    try:
        try:
            await _check_sqlite_file(writer, place)
        except OctoError as error:
            raise OctoError(f"Cannot use {place}. {error.detail}", code=error.code) from error
        yield Database(writer, reader, clock, location=place)
    finally:
        # The writer last: closing the last connection folds the write-ahead log into the file.
        await reader.dispose()
        await writer.dispose()


POSTGRES_WRITERS = 5
"""Transactions of one process at a time; a further one waits for its turn."""
POSTGRES_READERS = 5
"""Snapshots of one process at a time."""
CONNECT_SECONDS = 5.0
STATEMENT_SECONDS = 10.0
"""How long the server works on one statement."""
LOCK_SECONDS = 5.0
"""How long a statement waits for a row that another transaction has locked."""
IDLE_SECONDS = 30.0
"""How long the server keeps a transaction, and its locks, whose holder says nothing."""
RESPONSE_GRACE_SECONDS = 5.0
"""How much longer than the server may work this process waits for its answer, in case the server is gone."""
RECYCLE_SECONDS = 1800.0
"""The age at which a connection is replaced, so that one through a proxy or a fail-over does not live for ever."""


# Repeatable read: all statements of one read see the same snapshot.
_READONLY = {"default_transaction_read_only": "on", "default_transaction_isolation": "repeatable read"}
_KEY_LOOKUP = {"enable_seqscan": "off", "enable_hashjoin": "off", "enable_mergejoin": "off"}
"""A table that grows has no statistics yet, and without them the server reads all of it for a few keys."""


def schema_of(url: str) -> str | None:
    """Return the one schema that a ``postgresql://`` URL names in ``search_path``, ``None`` for none."""
    found = parse_qs(urlsplit(url).query).get("search_path")
    return found[-1] if found else None


@asynccontextmanager
async def open_postgres(url: str, clock: Clock, statement_seconds: float) -> AsyncGenerator[Database]:
    """Open a pool of connections to ``postgresql://user:password@host:5432/database`` and close it at the end.

    What asyncpg knows may follow, as ``?sslmode=verify-full``; any other name is a setting of the connection. The
    server is asked for at once. Raises ``SettingError`` for a malformed URL or a missing driver, ``unavailable``
    when the server does not take the connection.
    """
    if importlib.util.find_spec("asyncpg") is None:
        raise SettingError("PostgreSQL needs the driver asyncpg; install it with: pip install 'octollm[postgres]'")
    writer = _postgres_engine(_connector(url, statement_seconds), POSTGRES_WRITERS)
    reader = _postgres_engine(_connector(url, statement_seconds, _READONLY), POSTGRES_READERS)
    direct = DirectPool(_connector(url, statement_seconds, _KEY_LOOKUP))
    try:
        database = Database(
            writer, reader, clock, location=_postgres_location(url), writers=POSTGRES_WRITERS, direct_pool=direct
        )
        await database.check()
        yield database
    finally:
        await direct.aclose()
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
    """Return what opens a connection, with ``further`` settings of the server's."""
    # The driver is an extra, so it is imported by whoever uses PostgreSQL.
    import asyncpg  # noqa: PLC0415

    settings = {
        "application_name": "octollm",
        "statement_timeout": f"{statement_seconds:g}s",
        "lock_timeout": f"{LOCK_SECONDS:g}s",
        "idle_in_transaction_session_timeout": f"{IDLE_SECONDS:g}s",
        # Compiling a statement costs more than any of ours takes.
        "jit": "off",
        **(further or {}),
    }

    async def connect() -> Any:
        try:
            return await asyncpg.connect(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
                url,
                timeout=CONNECT_SECONDS,  # pyright: ignore[reportArgumentType]  it takes parts of a second too
                command_timeout=statement_seconds + RESPONSE_GRACE_SECONDS,
                server_settings=settings,
            )
        except OSError as error:
            raise unreachable_error(error) from error
        except asyncpg.PostgresError as error:
            raise to_octo_error(error) from error
        except (asyncpg.InterfaceError, ValueError) as error:
            # The driver's words may repeat parts of the URL.
            raise SettingError(
                f"The database URL is not one that the driver takes ({type(error).__name__}); write"
                " postgresql://user:password@host:5432/database, with special characters percent-encoded."
            ) from error

    return connect


def _postgres_engine(connect: Callable[[], Awaitable[Any]], size: int) -> AsyncEngine:
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
    )

    def checked_out(_connection: object, record: Any, _proxy: object) -> None:
        # The server's going away is noticed while a connection lies unused; the pool then makes another, without
        # a question to the server each time.
        if record.driver_connection.is_closed():
            raise exc.DisconnectionError("The server closed the connection.")

    def failed(context: ExceptionContext) -> BaseException | None:
        """Drop connections that are of no use any more, and give the driver's plain errors a meaning."""
        error = context.original_exception
        if isinstance(error, OSError):  # with TimeoutError, when no answer came
            context.is_disconnect = True  # pyright: ignore[reportAttributeAccessIssue]
            return unreachable_error(error)
        if is_connection_lost(error):
            context.is_disconnect = True  # pyright: ignore[reportAttributeAccessIssue]
        return None

    event.listen(engine.sync_engine, "checkout", checked_out)
    event.listen(engine.sync_engine, "handle_error", failed)
    return engine


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
