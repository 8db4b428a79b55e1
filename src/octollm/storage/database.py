"""The SQL database of one service: short write transactions, snapshot reads, translated errors, the lock order.

On PostgreSQL, single statements by key have their own pool.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, overload

import msgspec
from sqlalchemy import ColumnElement, func, or_, select
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
from octollm.storage.programs import Program, R, Row, SqliteRunner, SqlStatement, run_on_postgres, to_sqlite

DIRECT_CONNECTIONS = 4
"""Statements of one process at a time; a further one waits for its turn."""
MAX_QUEUED = 4096
"""Callers of one process that wait for a turn; a further one is refused as overload."""
WAIT_SECONDS = 10.0
"""How long a caller waits for its turn, or for a connection, before it is told ``overloaded``."""
LEASE_TOLERANCE_SECONDS = 60.0
"""How far back the clock may be set without ending the leases of those who hold them."""
ROLLBACK_SECONDS = 2.0
"""How long a rollback may take before its connection is given up."""
Rows = Sequence[Sequence[object]]


@overload
def is_lease_over(until: float, now: float, seconds: float) -> bool: ...


@overload
def is_lease_over(until: ColumnElement[float], now: float, seconds: float) -> ColumnElement[bool]: ...


def is_lease_over(until: float | ColumnElement[float], now: float, seconds: float) -> bool | ColumnElement[bool]:
    """Return whether a lease that is taken for ``seconds`` at a time is over, of a row or, as a condition, in SQL.

    It is over when its end is past, and also when its end is much further away than any lease lasts: then the clock was
    set back, and a holder that died would keep the lease until the clock is there again. A holder that lives renews it;
    if another takes it first, the fence decides. A small step back, as of NTP, ends no lease.
    """
    longest = seconds + LEASE_TOLERANCE_SECONDS
    if isinstance(until, ColumnElement):
        return or_(until < now, until > now + longest)
    return until < now or until > now + longest


def is_due(at: ColumnElement[float], now: float, longest: float) -> ColumnElement[bool]:
    """Return the condition that something is due, which is put off by at most ``longest`` seconds at a time.

    A time further away was written before the clock was set back.
    """
    return or_(at <= now, at > now + longest + LEASE_TOLERANCE_SECONDS)


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
            connection = await self._take()
            return await self._run(connection, connection.fetch(statement, *parameters))

    async def run(self, program: Program[R]) -> R:
        """Run a program in one transaction. Raises as :meth:`fetch`, and what the program raises."""
        async with self._turns:
            connection = await self._take()
            return await self._run(connection, run_on_postgres(connection, program))

    async def _take(self) -> Any:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
        return await self._connect()

    async def _run(self, connection: Any, work: Awaitable[R]) -> R:
        good = False
        try:
            with map_exceptions(_translate_driver_error, Exception):
                result = await work
            good = True
            return result
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


def _translate_driver_error(error: Exception) -> OctoError | None:
    return None if isinstance(error, OctoError) else to_octo_error(error)


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

    def __init__(self, raw: AsyncConnection, clock: Clock, driver: Any = None, *, single: bool = False) -> None:
        super().__init__(raw, clock)
        self._driver = driver
        self._single = single
        self._callbacks: list[Callable[[], None]] = []
        self._before_commit: list[Callable[[Transaction], Awaitable[None]]] = []
        self._at_end: list[Callable[[bool], None]] = []

    async def fetch(self, statement: str, *parameters: object) -> Rows:
        """Run a statement in PostgreSQL's SQL, with ``$1`` and so on, straight at the driver, and return its rows.

        What SQLAlchemy does around a statement takes longer than the server's work on a small one.
        """
        with map_exceptions(to_octo_error, Exception):
            return await self._driver.fetch(statement, *parameters)

    async def run_script(self, statements: str) -> None:
        """Run a statement without parameters and results, or on PostgreSQL several in one round trip."""
        if self._driver is None:
            await self.raw.exec_driver_sql(statements)
            return
        with map_exceptions(to_octo_error, Exception):
            await self._driver.execute(statements)

    def insert(self, table: Table) -> Insert:
        """Return an ``INSERT`` of the dialect in use, which has ``on_conflict_do_update`` and ``…_do_nothing``."""
        if self.dialect == "postgresql":
            return postgresql.insert(table)  # pyright: ignore[reportReturnType]
        return sqlite_insert(table)

    async def run(self, statement: SqlStatement) -> None:
        """Run a statement of a program, for its effect."""
        sql = statement.sql if self.dialect == "postgresql" else to_sqlite(statement.sql)
        for parameters in statement.parameters if statement.many else (statement.parameters,):
            await self.raw.exec_driver_sql(sql, tuple(parameters))

    def after_commit(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` after the commit, once its locks are released; never after a rollback.

        It is for hints only: a process that dies after the commit never calls it. A callback that is registered twice
        is called once.
        """
        if callback not in self._callbacks:
            self._callbacks.append(callback)

    def before_commit(self, work: Callable[[Transaction], Awaitable[None]]) -> None:
        """Await ``work`` when all other statements have run, right before the commit; what it raises rolls back.

        Work that is registered twice is done once. A transaction of a ``single`` statement cannot have any.
        """
        if self._single:
            raise RuntimeError("a transaction of a single statement is committed with it")
        if work not in self._before_commit:
            self._before_commit.append(work)

    def at_end(self, callback: Callable[[bool], None]) -> None:
        """Call ``callback`` with whether the transaction was committed, before the callbacks of a commit.

        After a failed commit that is false, although it may have taken effect.
        """
        self._at_end.append(callback)

    async def prepare_commit(self) -> None:
        """Do what is registered to be done before the commit. Called by :class:`Database` only."""
        for work in self._before_commit:
            await work(self)

    def run_callbacks(self, *, committed: bool) -> None:
        """Run the callbacks. Called by :class:`Database` only."""
        for end in self._at_end:
            end(committed)
        if committed:
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
        sqlite: tuple[SqliteRunner, SqliteRunner] | None = None,
    ) -> None:
        """``sqlite`` are the runners of programs and of single reads on SQLite."""
        self._writer = writer
        self._reader = reader
        self._clock = clock
        self._turns = ConcurrencyLimiter(
            "The database", ConcurrencyPolicy(writers, MAX_QUEUED, WAIT_SECONDS), refusal=_refuse_writer
        )
        self._writing: set[asyncio.Task[Any] | None] = set()
        self._sqlite = sqlite
        self.location = location
        """The location of the data, for error messages; contains no secret."""
        self.direct_pool = direct_pool
        """Runs single statements on PostgreSQL; ``None`` on SQLite."""
        self.lazy_pool = lazy_pool
        """As ``direct_pool``, but a crash of the server may take the last second of what was committed here.

        The order holds: a commit is never lost when a later one, also of another pool, was flushed.
        """

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
        # Lock order: join_nonces, admissions, arm_keys, arms, arm_instances, joins, tasks, budgets, reservations,
        # steps, attempts, approvals, idempotency, subjects; then relay_state, events, channels; documents, passages;
        # subscriptions, subscription_consumers, subscription_partitions, delayed_subjects, dead_letters. Rows of one
        # table are locked by ascending key. Transactions that follow this order cannot deadlock. The subject of a task
        # may be locked right after the task: whoever locks more of the task holds the task's row.

        task = asyncio.current_task()
        if task in self._writing:
            raise RuntimeError("a transaction inside a transaction of the same task would wait for itself")
        await self._turns.acquire(timeout)
        self._writing.add(task)
        tx: Transaction | None = None
        committed = False
        try:
            with translate_errors():
                async with self._begin(single=single) as tx:
                    yield tx
                    await tx.prepare_commit()
            committed = True
        finally:
            self._writing.discard(task)
            self._turns.release()
            if tx is not None:
                tx.run_callbacks(committed=committed)

    @asynccontextmanager
    async def _begin(self, *, single: bool) -> AsyncGenerator[Transaction]:
        if self.dialect != "postgresql":
            async with self._writer.begin() as raw:
                yield Transaction(raw, self._clock, single=single)
            return
        async with self._writer.connect() as raw:
            driver = _driver_of(raw)
            if single:
                yield Transaction(raw, self._clock, driver, single=single)
                return
            # At the driver, since SQLAlchemy would spend a greenlet on each; to it the connection commits by itself.
            tx = Transaction(raw, self._clock, driver)
            try:
                await tx.run_script("BEGIN ISOLATION LEVEL READ COMMITTED")
                yield tx
                await tx.run_script("COMMIT")
            except BaseException:
                await _roll_back(driver)
                raise

    async def run(self, program: Program[R]) -> R:
        """Run a program in one transaction, straight at the driver; return its value. The lock order holds here too.

        Raises as :meth:`transaction`, and what the program raises.
        """
        if self._sqlite is None:
            assert self.direct_pool is not None
            return await self.direct_pool.run(program)
        if asyncio.current_task() in self._writing:
            raise RuntimeError("a program inside a transaction of the same task would wait for it")
        await self._turns.acquire(WAIT_SECONDS)
        try:
            with translate_errors():
                return await self._sqlite[0].run(program)
        finally:
            self._turns.release()

    async def fetch(self, sql: str, *parameters: object) -> Sequence[Row]:
        """Read with one statement, straight at the driver. Raises as :meth:`read`."""
        if self._sqlite is None:
            assert self.direct_pool is not None
            return await self.direct_pool.fetch(sql, *parameters)  # pyright: ignore[reportReturnType]  a Record is read by name
        with translate_errors():
            return await self._sqlite[1].fetch(sql, parameters)

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


def _driver_of(raw: AsyncConnection) -> Any:
    """Return the driver's connection of an open connection."""
    assert raw.sync_connection is not None
    return raw.sync_connection.connection.driver_connection


async def _roll_back(driver: Any) -> None:
    """End a transaction, or else the connection: the pool must not get it back with one."""
    ended = driver.is_closed()
    try:
        if not ended:
            with contextlib.suppress(Exception):  # the failure that led here is the one to raise
                await driver.execute("ROLLBACK", timeout=ROLLBACK_SECONDS)
                ended = True
    finally:
        if not ended:
            driver.terminate()


def _refuse_writer(_refusal: Refusal) -> OctoError:
    # The timeout of a transaction is no deadline of the call: the same call can succeed later.
    return OctoError("No turn to write to the database came in time.", code="overloaded", retry_after=1.0)


def encode_json(value: object) -> str:
    """Return the JSON text of a value for a column."""
    return msgspec.json.encode(value).decode()
