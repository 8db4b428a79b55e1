"""Translation of SQLAlchemy's, SQLite's and PostgreSQL's errors into OctoError, in one place."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager

from sqlalchemy import exc

from octollm.errors import OctoError, map_exceptions

_SQLITE = {
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
_CONNECTION_LOST = "The connection to the database server was lost. Try again."
_LOGIN_REFUSED = "The database server refused the user or its password. Check OCTOLLM_DATABASE_URL and pg_hba.conf."
_POSTGRES = {
    # https://www.postgresql.org/docs/current/errcodes-appendix.html: a code, or the class of its first two letters.
    "40001": ("overloaded", "Two transactions conflicted, and this one was rolled back. Try again."),
    "40P01": ("overloaded", "Two transactions deadlocked, and this one was rolled back. Try again."),
    "55P03": ("overloaded", "Another transaction holds a lock that this one needs. Try again."),
    "57014": ("overloaded", "The database server did not finish a statement in time. Try again."),
    "53100": ("unavailable", "The disk of the database server is full. Free space there, then try again."),
    "53200": ("unavailable", "The database server is out of memory. Give it more, or less to do."),
    "53300": (
        "unavailable",
        "The database server has no connection left. Raise its max_connections, or run fewer processes.",
    ),
    "53": ("unavailable", "The database server lacks resources. See its log."),
    "25006": ("unavailable", "The database is read-only here: a standby, or a connection for reading."),
    "25P03": ("unavailable", "A transaction was idle for too long, and the database server ended it. Try again."),
    "28": ("unavailable", _LOGIN_REFUSED),
    "3D000": (
        "unavailable",
        "The database server has no database of that name. Create it (createdb), or check OCTOLLM_DATABASE_URL.",
    ),
    "42501": (
        "unavailable",
        "The database user lacks a permission. Let it own the schemas octollm_*, or grant it the permission.",
    ),
    "57P03": ("unavailable", "The database server is starting or in recovery. It is tried again."),
    "57P": ("unavailable", "The database server is shutting down. It is tried again."),
    "08": ("unavailable", _CONNECTION_LOST),
    "58": ("unavailable", "The disk of the database server failed. See its log."),
    "XX001": ("unavailable", "A page of the database is damaged. Restore it from a backup."),
    "XX002": ("unavailable", "An index of the database is damaged. Rebuild it (REINDEX)."),
    "22001": ("invalid_body", "A text is too long for its database column."),
    "22021": ("invalid_body", "A text contains a character that the database cannot store (U+0000)."),
    "22P05": ("invalid_body", "A text contains a character that the database cannot store (U+0000)."),
    "23": ("state_conflict", "The database rejected a row that violates a constraint."),
}


def _unreachable_error(error: OSError) -> OctoError:
    """Return the ``unavailable`` error for a database server that is unreachable or does not respond."""
    if isinstance(error, TimeoutError):
        detail = "The database server did not answer in time."
    else:
        detail = f"The database server cannot be reached ({type(error).__name__})."
    return OctoError(f"{detail} Check that it runs and OCTOLLM_DATABASE_URL.", code="unavailable", retry_after=1.0)


def is_connection_lost(error: BaseException | None) -> bool:
    """Return whether a connection to a PostgreSQL server is unusable after the driver's ``error``."""
    if isinstance(error, OSError):  # with TimeoutError, when no response came
        return True
    state = _sqlstate(error) or ""
    return state.startswith(("08", "57P")) or state == "25P03"


def is_conflict(error: BaseException) -> bool:
    """Return whether PostgreSQL rolled a transaction back for another one, so that it may simply run again."""
    return _sqlstate(error) in ("40001", "40P01")


def to_octo_error(error: Exception) -> OctoError:
    """Return the ``OctoError`` for a database error.

    Codes: ``unavailable`` (busy, full, damaged or unreachable), ``overloaded`` (no free connection, or a conflict of
    transactions), ``state_conflict`` (a row violates a constraint), ``invalid_body`` (a value that the database cannot
    store), ``internal`` (the statement itself is wrong).
    """
    if isinstance(error, OSError):  # with TimeoutError, when no answer came
        return _unreachable_error(error)
    if isinstance(error, exc.TimeoutError):
        return OctoError("No database connection was available in time.", code="overloaded", retry_after=1.0)
    if isinstance(error, exc.IntegrityError | sqlite3.IntegrityError):
        return OctoError("The database rejected a row that violates a constraint.", code="state_conflict")
    number = _sqlite_code(error)
    if number is not None and number in _SQLITE:
        return OctoError(_SQLITE[number], code="unavailable", retry_after=1.0)
    state = _sqlstate(error)
    if state is not None:
        for sqlstate in (state, state[:3], state[:2]):
            if sqlstate in _POSTGRES:
                code, detail = _POSTGRES[sqlstate]
                return OctoError(detail, code=code, retry_after=1.0 if code in ("unavailable", "overloaded") else None)
    if isinstance(error, exc.DBAPIError) and error.connection_invalidated:
        return OctoError("The connection to the database was lost.", code="unavailable", retry_after=1.0)
    if isinstance(error, exc.DisconnectionError | exc.InvalidatePoolError):
        return OctoError(_CONNECTION_LOST, code="unavailable", retry_after=1.0)
    return OctoError(f"A database statement failed ({type(error).__name__}).", code="internal")


def translate_errors() -> AbstractContextManager[None]:
    """Translate errors of database calls to ``OctoError``; other exceptions pass unchanged."""
    return map_exceptions(_translate_database_error, Exception)


def _translate_database_error(error: Exception) -> OctoError | None:
    # When SQLAlchemy sets up a new connection, asyncpg's errors are not wrapped. They are recognised by their
    # module's name, because asyncpg may not be installed.
    if isinstance(error, exc.SQLAlchemyError | sqlite3.Error) or type(error).__module__.startswith("asyncpg."):
        return to_octo_error(error)
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield ``error``, the driver's error, and its causes, at most eight."""
    if isinstance(error, exc.DBAPIError):
        error = error.orig
    for _ in range(8):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _sqlite_code(error: BaseException) -> int | None:
    """Return the primary SQLite result code of ``error`` or of one of its causes."""
    for each in _causes(error):
        code = getattr(each, "sqlite_errorcode", None)
        if isinstance(code, int):
            return code & 0xFF  # the low byte is the primary code (https://www.sqlite.org/rescode.html)
    return None


def _sqlstate(error: BaseException | None) -> str | None:
    """Return PostgreSQL's SQLSTATE of ``error`` or of one of its causes."""
    for each in _causes(error):
        state = getattr(each, "sqlstate", None)
        if isinstance(state, str):
            return state
    return None
