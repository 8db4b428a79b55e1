"""The SQL database of one service: short write transactions, snapshot reads, one kind of error."""

from __future__ import annotations

import asyncio
import sqlite3
import tempfile
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import event
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.sqlite import Insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.engine import CursorResult, RowMapping
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.sql import Executable
from sqlalchemy.sql.schema import Table

from octollm.clock import Clock
from octollm.errors import OctoError, SettingError
from octollm.storage.failures import translated

BUSY_SECONDS = 5.0
"""How long SQLite itself waits for another process's write lock."""
WAIT_SECONDS = 10.0
"""How long a caller waits for its turn before it is told ``overloaded``."""
READERS = 4
"""Connections for reading; SQLite in WAL mode lets them go on beside the writer."""

Parameters = Mapping[str, object] | Sequence[Mapping[str, object]]


def plain(row: RowMapping) -> dict[str, Any]:
    """Return a row as a dictionary by column name."""
    return {str(name): value for name, value in row.items()}


class Connection:
    """A snapshot of the database to read from. Used inside ``async with`` only."""

    def __init__(self, raw: AsyncConnection, clock: Clock) -> None:
        self.raw = raw
        self._clock = clock

    @property
    def dialect(self) -> str:
        """Return ``sqlite`` or ``postgresql``."""
        return self.raw.dialect.name

    async def now(self) -> float:
        """Return epoch seconds on the clock that leases in this database are held against.

        SQLite is used on one machine, so that is the injected clock.
        """
        return self._clock.now()

    async def execute(self, statement: Executable, parameters: Parameters | None = None) -> CursorResult[Any]:
        """Run ``statement``; with a sequence of parameters, once for each."""
        return await self.raw.execute(statement, parameters)  # pyright: ignore[reportReturnType, reportUnknownVariableType, reportCallIssue, reportArgumentType]

    async def scalar(self, statement: Executable) -> Any:
        """Return the first column of the first row, or ``None``."""
        return (await self.execute(statement)).scalar()

    async def first(self, statement: Executable) -> RowMapping | None:
        """Return the first row, or ``None``."""
        return (await self.execute(statement)).mappings().first()

    async def all(self, statement: Executable) -> Sequence[RowMapping]:
        """Return every row; the statement has to bound their number."""
        return (await self.execute(statement)).mappings().all()


class Transaction(Connection):
    """A write transaction: everything in it happens, or nothing."""

    def __init__(self, raw: AsyncConnection, clock: Clock) -> None:
        super().__init__(raw, clock)
        self._callbacks: list[Callable[[], None]] = []

    def insert(self, table: Table) -> Insert:
        """Return an ``INSERT`` of the dialect in use, which has ``on_conflict_do_update`` and ``…_do_nothing``."""
        if self.dialect == "postgresql":
            return postgresql.insert(table)  # pyright: ignore[reportReturnType]
        return sqlite_insert(table)

    def after_commit(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` once the transaction is committed and the lock released; never if it rolls back.

        A process that dies in between never calls it: it is for hints. One callback is called once.
        """
        if callback not in self._callbacks:
            self._callbacks.append(callback)

    def committed(self) -> None:
        """Run the callbacks. For the database alone."""
        for callback in self._callbacks:
            callback()


class Database:
    """One service's database. Made by :func:`open_database`."""

    def __init__(self, writer: AsyncEngine, reader: AsyncEngine, clock: Clock, *, place: str) -> None:
        self._writer = writer
        self._reader = reader
        self._clock = clock
        self._lock = asyncio.Lock()
        self._owner: asyncio.Task[Any] | None = None
        self.place = place
        """Where the data lies, in words for error messages; holds no secret."""

    @property
    def clock(self) -> Clock:
        """Return the clock that the database was opened with."""
        return self._clock

    @asynccontextmanager
    async def transaction(self, *, timeout: float = WAIT_SECONDS) -> AsyncGenerator[Transaction]:
        """Hold the write lock of the database; commit at the end, roll back on any exception.

        Writers of this process queue up in order, so that SQLite never sees two. Keep it short and await
        nothing but the database inside. Raises ``overloaded`` after ``timeout`` seconds in the queue,
        ``unavailable`` when the database cannot be used, ``state_conflict`` when a constraint refuses a row.
        """
        task = asyncio.current_task()
        if self._owner is not None and self._owner is task:
            raise RuntimeError("a transaction inside a transaction of the same task would wait for itself")
        try:
            async with asyncio.timeout(timeout):
                await self._lock.acquire()
        except TimeoutError as error:
            raise OctoError(
                f"No turn to write to the database within {timeout:g} s.", code="overloaded", retry_after=1.0
            ) from error
        self._owner = task
        try:
            with translated():
                async with self._writer.begin() as raw:
                    tx = Transaction(raw, self._clock)
                    yield tx
        finally:
            self._owner = None
            self._lock.release()
        tx.committed()

    @asynccontextmanager
    async def read(self) -> AsyncGenerator[Connection]:
        """Hold a consistent snapshot for reading; a write in it is refused.

        Raises ``overloaded`` when no connection comes free in 10 seconds, ``unavailable`` when the database
        cannot be used.
        """
        with translated():
            async with self._reader.connect() as raw:
                yield Connection(raw, self._clock)

    async def check(self) -> None:
        """Make sure that the database answers. Raises ``unavailable`` when it does not."""
        with translated():
            async with self._reader.connect() as raw:
                await raw.exec_driver_sql("SELECT 1")


def _encode(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _sqlite_engine(path: Path, *, writer: bool, durable: bool) -> AsyncEngine:
    engine = create_async_engine(
        f"sqlite+aiosqlite:///{path}",
        pool_size=1 if writer else READERS,
        max_overflow=0,
        pool_timeout=WAIT_SECONDS,
        json_serializer=_encode,
        json_deserializer=msgspec.json.decode,
        hide_parameters=True,
    )
    pragmas = [
        f"PRAGMA busy_timeout={int(BUSY_SECONDS * 1000)}",
        f"PRAGMA synchronous={'NORMAL' if durable else 'OFF'}",
        "PRAGMA foreign_keys=ON",
        "PRAGMA journal_size_limit=67108864",
        f"PRAGMA query_only={'OFF' if writer else 'ON'}",
    ]
    if writer:
        pragmas.insert(1, "PRAGMA journal_mode=WAL")
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


async def _check_file(engine: AsyncEngine, place: str) -> None:
    """Read the file's header and schema, which finds a damaged one, and make sure of write-ahead logging."""
    with translated():
        async with engine.begin() as raw:
            mode = (await raw.exec_driver_sql("PRAGMA journal_mode")).scalar()
            await raw.exec_driver_sql("SELECT count(*) FROM sqlite_master")
    if mode != "wal":
        raise OctoError(f"{place} needs a file system with shared memory: use a local disk.", code="unavailable")


def _make_private(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch(mode=0o600)  # its log files take their permissions from it


@asynccontextmanager
async def _open_sqlite(path: Path, clock: Clock, *, durable: bool) -> AsyncGenerator[Database]:
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
            await _check_file(writer, place)
        except OctoError as error:
            raise OctoError(f"Cannot use {place}. {error.detail}", code=error.code) from error
        yield Database(writer, reader, clock, place=place)
    finally:
        # The writer last: closing the last connection folds the write-ahead log into the file.
        await reader.dispose()
        await writer.dispose()


@asynccontextmanager
async def open_database(url: str, *, clock: Clock) -> AsyncGenerator[Database]:
    """Open a database by its URL and close it at the end.

    ``sqlite:///relative.db``, ``sqlite:////absolute.db``: a file, made if it is not there, readable by its owner
    only. ``memory://``: a database of its own that vanishes at the end; the same engine over a temporary file.
    Raises ``SettingError`` for another URL, ``unavailable`` when the file cannot be used or is damaged.
    """
    scheme, separator, rest = url.partition("://")
    if separator and scheme == "memory":
        with tempfile.TemporaryDirectory(prefix="octollm-") as folder:
            async with _open_sqlite(Path(folder) / "memory.db", clock, durable=False) as database:
                yield database
    elif separator and scheme == "sqlite" and rest.startswith("/") and len(rest) > 1:
        path = await asyncio.to_thread(lambda: Path(rest[1:]).expanduser().resolve())
        async with _open_sqlite(path, clock, durable=True) as database:
            yield database
    else:
        raise SettingError(f"The database URL has the scheme {scheme!r}; use sqlite:///path/to/file.db or memory://.")
