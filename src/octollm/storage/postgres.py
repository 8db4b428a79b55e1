"""PostgreSQL on a server: several processes share it, each with a bounded pool of connections."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec
from sqlalchemy import event, exc
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from octollm.clock import Clock
from octollm.errors import SettingError
from octollm.storage.database import WAIT_SECONDS, Database, encode_json
from octollm.storage.direct import DirectPool
from octollm.storage.failures import is_connection_lost, to_octo_error, unreachable_error

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
