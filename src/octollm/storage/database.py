"""The SQL database of one service: short write transactions, snapshot reads, translated errors, the lock order.

On PostgreSQL, single statements by key have their own pool.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from sqlalchemy import func, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.sqlite import Insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.engine import CursorResult, RowMapping
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.sql import Executable
from sqlalchemy.sql.schema import Table

from octollm.clock import Clock
from octollm.errors import OctoError, map_exceptions
from octollm.limiter import ConcurrencyLimiter, ConcurrencyPolicy, Refusal
from octollm.storage.errors import is_connection_lost, to_octo_error, translate_errors

DIRECT_CONNECTIONS = 4
"""Statements of one process at a time; a further one waits for its turn."""
MAX_QUEUED = 4096
"""Callers of one process that wait for a turn; a further one is refused as overload."""
WAIT_SECONDS = 10.0
"""How long a caller waits for its turn, or for a connection, before it is told ``overloaded``."""
Rows = Sequence[Sequence[object]]


class DirectPool:
    """A few connections for single statements that look up rows by key.

    Transactions have other connections, so a slow one cannot delay these statements.
    """

    def __init__(self, connect: Callable[[], Awaitable[Any]]) -> None:
        self._connect = connect
        self._turns = ConcurrencyLimiter(
            "The database", ConcurrencyPolicy(DIRECT_CONNECTIONS, MAX_QUEUED, WAIT_SECONDS)
        )
        self._idle: deque[Any] = deque()
        self._closed = False

    async def fetch(self, statement: str, *parameters: object) -> Rows:
        """Run a statement in PostgreSQL's SQL, with ``$1`` and so on, and return its rows.

        Raises ``overloaded`` when no connection comes free in 10 s, ``unavailable`` when the server is away (what was
        cut off may have taken effect).
        """
        async with self._turns:
            return await self._run(await self._take(), statement, parameters)

    async def _take(self) -> Any:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
        return await self._connect()

    async def _run(self, connection: Any, statement: str, parameters: Sequence[object]) -> Rows:
        good = False
        try:
            with map_exceptions(to_octo_error, Exception):
                rows = await connection.fetch(statement, *parameters)
            good = True
            return rows
        except OctoError as error:
            good = not is_connection_lost(error.__cause__)
            raise
        finally:
            # A call cancelled in the middle leaves a connection whose response is still to come, and which the next
            # statement would read as its own. Such a connection is not reused.
            if good and not self._closed and not connection.is_closed():
                self._idle.append(connection)
            else:
                connection.terminate()

    async def aclose(self) -> None:
        """Close the idle connections; those in use are closed when they are returned."""
        self._closed = True
        while self._idle:
            connection = self._idle.pop()
            with contextlib.suppress(Exception):  # abandoned in any case
                await connection.close(timeout=1)


Parameters = Mapping[str, object] | Sequence[Mapping[str, object]]


def row_to_dict(row: RowMapping) -> dict[str, Any]:
    """Return a row as a dictionary by column name."""
    return {str(name): value for name, value in row.items()}


class DatabaseConnection:
    """A snapshot of the database, for reading. Valid only inside its ``async with``."""

    def __init__(self, raw: AsyncConnection, clock: Clock) -> None:
        self.raw = raw
        self._clock = clock

    @property
    def dialect(self) -> str:
        """Return ``sqlite`` or ``postgresql``."""
        return self.raw.dialect.name

    @property
    def clock(self) -> Clock:
        """Return the clock that the database was opened with."""
        return self._clock

    async def now(self) -> float:
        """Return epoch seconds by the clock that leases in this database are compared with.

        On PostgreSQL that is the server's clock, since the clocks of replicas differ; it is queried on each call. On
        SQLite, which is used on one machine, it is the injected clock.
        """
        if self.dialect == "postgresql":
            return float(await self.scalar(select(func.extract("epoch", func.clock_timestamp()))))
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


class Transaction(DatabaseConnection):
    """A write transaction: all of its statements take effect, or none."""

    def __init__(self, raw: AsyncConnection, clock: Clock) -> None:
        super().__init__(raw, clock)
        self._callbacks: list[Callable[[], None]] = []

    def insert(self, table: Table) -> Insert:
        """Return an ``INSERT`` of the dialect in use, which has ``on_conflict_do_update`` and ``…_do_nothing``."""
        if self.dialect == "postgresql":
            return postgresql.insert(table)  # pyright: ignore[reportReturnType]
        return sqlite_insert(table)

    def after_commit(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` after the commit, once its locks are released; never after a rollback.

        It is for hints only: a process that dies after the commit never calls it. A callback that is registered twice
        is called once.
        """
        if callback not in self._callbacks:
            self._callbacks.append(callback)

    def run_callbacks(self) -> None:
        """Run the callbacks. Called by :class:`Database` only."""
        for callback in self._callbacks:
            callback()


class Database:
    """One service's database. Created by :func:`open_database`."""

    def __init__(
        self,
        writer: AsyncEngine,
        reader: AsyncEngine,
        clock: Clock,
        *,
        location: str,
        writers: int = 1,
        direct_pool: DirectPool | None = None,
        lazy_pool: DirectPool | None = None,
    ) -> None:
        self._writer = writer
        self._reader = reader
        self._clock = clock
        self._turns = ConcurrencyLimiter(
            "The database", ConcurrencyPolicy(writers, MAX_QUEUED, WAIT_SECONDS), refusal=_refuse_writer
        )
        self._writing: set[asyncio.Task[Any] | None] = set()
        self.location = location
        """The location of the data, for error messages; contains no secret."""
        self.direct_pool = direct_pool
        """Runs single statements on PostgreSQL; ``None`` on SQLite."""
        self.lazy_pool = lazy_pool
        """As ``direct_pool``, but a crash of the server may take the last second of what was committed here."""

    @property
    def dialect(self) -> str:
        """Return ``sqlite`` or ``postgresql``."""
        return self._writer.dialect.name

    @property
    def clock(self) -> Clock:
        """Return the clock that the database was opened with."""
        return self._clock

    @asynccontextmanager
    async def transaction(self, *, timeout: float = WAIT_SECONDS, single: bool = False) -> AsyncGenerator[Transaction]:
        """Write; commit at the end, roll back on any exception.

        On SQLite it holds the only write lock. On PostgreSQL transactions run in parallel (READ COMMITTED), so lock
        the rows that a decision depends on, in the order given below. Writers of this process wait in order when all
        connections are in use. Keep transactions short, and await nothing but the database inside.

        ``single`` promises exactly one statement, which PostgreSQL makes a transaction by itself: that saves two of
        three round trips (BEGIN and COMMIT).

        Raises ``overloaded`` after ``timeout`` seconds in the queue, and after a conflict with another transaction,
        ``unavailable`` when the database cannot be used (an interrupted commit may have taken effect),
        ``state_conflict`` when a row violates a constraint.
        """
        # Lock order: arms, arm_instances, tasks, budgets, reservations, steps, idempotency, subjects; then relay_state,
        # events, channels; documents, passages. Rows of one table are locked by ascending key. Transactions that follow
        # this order cannot deadlock.

        task = asyncio.current_task()
        if task in self._writing:
            raise RuntimeError("a transaction inside a transaction of the same task would wait for itself")
        await self._turns.acquire(timeout)
        self._writing.add(task)
        try:
            with translate_errors():
                if single and self.dialect == "postgresql":
                    async with self._writer.connect() as raw:
                        await raw.execution_options(isolation_level="AUTOCOMMIT")
                        tx = Transaction(raw, self._clock)
                        yield tx
                else:
                    async with self._writer.begin() as raw:
                        tx = Transaction(raw, self._clock)
                        yield tx
        finally:
            self._writing.discard(task)
            self._turns.release()
        tx.run_callbacks()

    @asynccontextmanager
    async def read(self) -> AsyncGenerator[DatabaseConnection]:
        """Read from a consistent snapshot; a write in it fails.

        Raises ``overloaded`` when no connection is available within 10 s, ``unavailable`` when the database cannot be
        used.
        """
        with translate_errors():
            async with self._reader.connect() as raw:
                yield DatabaseConnection(raw, self._clock)

    async def check(self) -> None:
        """Raise ``unavailable`` unless the database responds."""
        with translate_errors():
            async with self._reader.connect() as raw:
                await raw.exec_driver_sql("SELECT 1")


def _refuse_writer(_refusal: Refusal) -> OctoError:
    # The timeout of a transaction is no deadline of the call: the same call can succeed later.
    return OctoError("No turn to write to the database came in time.", code="overloaded", retry_after=1.0)


def encode_json(value: object) -> str:
    """Return the JSON text of a value for a column."""
    return msgspec.json.encode(value).decode()
