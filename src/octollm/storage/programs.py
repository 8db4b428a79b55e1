"""Programs: short transactions whose statements go straight to the driver, for the few writes that every task makes.

A program is a generator that yields statements and is sent their rows, so it decides without awaiting. What an engine
does around a statement takes longer than the server's work on it. On SQLite the whole program runs in one turn of the
driver's thread, where statements from the event loop take one turn each.
"""

from __future__ import annotations

import asyncio
import functools
import sqlite3
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

R = TypeVar("R")

Row = Mapping[str, Any]


class SqlStatement(NamedTuple):
    """SQL with PostgreSQL's placeholders (``$1``), and its parameters; JSON is passed as text.

    With ``many``, ``parameters`` has one sequence for each run of the statement, in one round trip. No rows come back,
    or with ``returns`` those of all runs in order.
    """

    sql: str
    parameters: Sequence[Any] = ()
    many: bool = False
    returns: bool = False


Program = Generator[SqlStatement, Sequence[Row], R]
"""Yields statements; its return value is that of the transaction. An exception that it raises rolls back."""


async def run_on_postgres(connection: Any, program: Program[R]) -> R:
    """Run a program in one transaction of an asyncpg connection."""
    async with connection.transaction():
        try:
            statement = next(program)
            while True:
                rows: Sequence[Row] = ()
                if statement.many and statement.returns:
                    rows = await connection.fetchmany(statement.sql, statement.parameters)
                elif statement.many:
                    await connection.executemany(statement.sql, statement.parameters)
                else:
                    rows = await connection.fetch(statement.sql, *statement.parameters)
                statement = program.send(rows)
        except StopIteration as end:
            return end.value
        finally:
            program.close()


class SqliteRunner:
    """One connection to a SQLite file with a thread of its own, which runs programs and single reads."""

    def __init__(self, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connect = connect
        self._connection: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite")

    async def run(self, program: Program[R]) -> R:
        """Run a program in one transaction. A caller that is cancelled leaves it to its end."""
        return await self._submit(functools.partial(self._run, program))

    async def fetch(self, sql: str, parameters: Sequence[Any]) -> Sequence[Row]:
        """Run one statement and return its rows."""
        return await self._submit(functools.partial(self._fetch, sql, parameters))

    async def aclose(self) -> None:
        """Close the connection once what runs has ended."""
        # In its turn, after what still runs.
        await self._submit(self._close)
        self._thread.shutdown(wait=False)

    def _submit(self, work: Callable[[], R]) -> asyncio.Future[R]:
        return asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = self._connect()
            self._connection.row_factory = sqlite3.Row
        return self._connection

    def _run(self, program: Program[R]) -> R:
        connection = self._open()
        connection.execute("BEGIN IMMEDIATE")
        try:
            statement = next(program)
            while True:
                sql = to_sqlite(statement.sql)
                rows: Sequence[Row] = ()
                if statement.many and statement.returns:
                    rows = [row for each in statement.parameters for row in connection.execute(sql, each)]
                elif statement.many:
                    connection.executemany(sql, statement.parameters)
                else:
                    rows = connection.execute(sql, statement.parameters).fetchall()
                statement = program.send(rows)
        except StopIteration as end:
            connection.execute("COMMIT")
            return end.value
        finally:
            program.close()
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    def _fetch(self, sql: str, parameters: Sequence[Any]) -> Sequence[Row]:
        return self._open().execute(to_sqlite(sql), parameters).fetchall()

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


@functools.lru_cache(maxsize=512)
def to_sqlite(sql: str) -> str:
    """Return a statement with SQLite's placeholders."""
    # Our statements have no other dollar sign.
    return sql.replace("$", "?")


@functools.lru_cache(maxsize=256)
def update_statement(table: str, columns: tuple[str, ...], keys: tuple[str, ...]) -> str:
    """Return an ``UPDATE`` of ``columns`` by ``keys``; the parameters are the values of both, in this order."""
    placed = [f"{name} = ${number}" for number, name in enumerate((*columns, *keys), 1)]
    # Names of our tables and columns, never input.
    return f"UPDATE {table} SET {', '.join(placed[: len(columns)])} WHERE {' AND '.join(placed[len(columns) :])}"  # noqa: S608


@functools.lru_cache(maxsize=64)
def insert_statement(table: str, columns: tuple[str, ...], suffix: str = "") -> str:
    """Return an ``INSERT`` of ``columns``."""
    values = ", ".join(f"${number}" for number in range(1, len(columns) + 1))
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({values}){suffix}"  # noqa: S608
