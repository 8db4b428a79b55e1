"""Reading a database that somebody sent, by a query that a model wrote: both are bounded, and nothing is written."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octollm import OctoError

MAX_ROWS = 1000
MAX_SECONDS = 10.0
MAX_VALUE_BYTES = 1_000_000
MAX_SCHEMA = 8_000
_STEPS = 10_000
"""Steps of SQLite's machine between two looks at the clock."""
_ALLOWED = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE})
_REFUSED_FUNCTIONS = frozenset({"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"})


@dataclass(frozen=True)
class Rows:
    """What a query found; ``cut`` when there was more than :data:`MAX_ROWS`."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    cut: bool


async def answer(path: Path, query: str, seconds: float) -> Rows:
    """Run one query within ``seconds``; raise ``model_output_invalid`` with what SQLite says when it cannot be run.

    It runs in a thread; who is cancelled meanwhile stops it.
    """
    with closing(_open(path)) as database:
        _bound(database, min(seconds, MAX_SECONDS))
        running = asyncio.get_running_loop().run_in_executor(None, _run, database, query)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            database.interrupt()
            await asyncio.wait({running})
            raise
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            raise OctoError(f"SQLite says: {error}", code="model_output_invalid") from error


def schema_of(path: Path) -> str:
    """Return the statements that made the tables; raise ``file_invalid`` for what is no database."""
    try:
        with closing(_open(path)) as database:
            _bound(database, MAX_SECONDS)
            found = database.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY name").fetchmany(200)
    except sqlite3.Error as error:
        raise OctoError(f"The file is no SQLite database: {error}", code="file_invalid") from error
    return "\n".join(str(sql) for (sql,) in found)[:MAX_SCHEMA]


def _open(path: Path) -> sqlite3.Connection:
    # Immutable: no journal, no lock file, and no way to write whatever the query says.
    return sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False)


def _bound(database: sqlite3.Connection, seconds: float) -> None:
    end = time.monotonic() + seconds
    database.execute("PRAGMA trusted_schema = OFF")
    database.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE_BYTES)
    database.set_progress_handler(lambda: time.monotonic() > end, _STEPS)
    database.set_authorizer(_authorize)


def _authorize(action: int, _first: str | None, second: str | None, _database: str | None, _trigger: str | None) -> int:
    """Let reading through and nothing else. For a function, ``second`` is its name."""
    if action in _ALLOWED or (action == sqlite3.SQLITE_FUNCTION and second not in _REFUSED_FUNCTIONS):
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


def _run(database: sqlite3.Connection, query: str) -> Rows:
    found = database.execute(query)
    if found.description is None:
        raise ValueError("the statement finds nothing; write a SELECT")
    rows = found.fetchmany(MAX_ROWS + 1)
    return Rows(tuple(column[0] for column in found.description), rows[:MAX_ROWS], len(rows) > MAX_ROWS)
