"""SQLite in a file: one writer at a time, and readers beside it (write-ahead log)."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import event
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from octollm.clock import Clock
from octollm.errors import OctoError
from octollm.storage.database import WAIT_SECONDS, Database, encode_json
from octollm.storage.failures import translate_errors

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
