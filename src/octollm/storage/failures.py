"""What a failed database call means: one place where SQLAlchemy's and SQLite's errors become ours."""

from __future__ import annotations

import sqlite3
from collections.abc import Generator
from contextlib import contextmanager

from sqlalchemy import exc

from octollm.errors import OctoError

_UNAVAILABLE = {
    sqlite3.SQLITE_BUSY: "The database is busy: another process holds its write lock. Try again.",
    sqlite3.SQLITE_LOCKED: "The database is busy: a table is locked. Try again.",
    sqlite3.SQLITE_FULL: "The disk of the database is full. Free space there, then try again.",
    sqlite3.SQLITE_CORRUPT: "The database file is damaged. Stop the service and restore it from a backup.",
    sqlite3.SQLITE_NOTADB: (
        "The database file is damaged or is no SQLite database. Restore it from a backup or move it away."
    ),
    sqlite3.SQLITE_IOERR: "The disk of the database failed to read or write. Check it, then restart.",
    sqlite3.SQLITE_CANTOPEN: "The database file cannot be opened. Check its path and permissions.",
    sqlite3.SQLITE_READONLY: "The database file is read-only. Check its permissions and its file system.",
    sqlite3.SQLITE_PERM: "The database file may not be used. Check its permissions.",
}


def _sqlite_code(error: BaseException | None) -> int | None:
    """Return the primary SQLite result code of ``error`` or of what caused it."""
    seen = 0
    while error is not None and seen < 8:
        code = getattr(error, "sqlite_errorcode", None)
        if isinstance(code, int):
            return code & 0xFF  # the low byte is the primary code, the rest says more about it
        error, seen = error.__cause__ or error.__context__, seen + 1
    return None


def translate(error: Exception) -> OctoError:
    """Return the ``OctoError`` that ``error`` stands for.

    Codes: ``unavailable`` (busy, full, damaged or unreachable), ``overloaded`` (no connection came free),
    ``state_conflict`` (a constraint refused the row), ``internal`` (the statement itself is wrong).
    """
    if isinstance(error, exc.TimeoutError):
        return OctoError("No database connection came free in time.", code="overloaded", retry_after=1.0)
    if isinstance(error, exc.IntegrityError | sqlite3.IntegrityError):
        return OctoError("The database refused a row that breaks one of its constraints.", code="state_conflict")
    code = _sqlite_code(error.orig if isinstance(error, exc.DBAPIError) else error)
    if code is not None and code in _UNAVAILABLE:
        return OctoError(_UNAVAILABLE[code], code="unavailable", retry_after=1.0)
    if isinstance(error, exc.DBAPIError) and error.connection_invalidated:
        return OctoError("The connection to the database was lost.", code="unavailable", retry_after=1.0)
    return OctoError(f"A database statement failed ({type(error).__name__}).", code="internal")


@contextmanager
def translated() -> Generator[None]:
    """Raise what a database call raises as an ``OctoError``; the caller's own exceptions pass unchanged."""
    try:
        yield
    except (exc.SQLAlchemyError, sqlite3.Error) as error:
        raise translate(error) from error
