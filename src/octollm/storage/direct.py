"""Statements that run often enough to matter, handed to PostgreSQL's driver as they are.

Each is a transaction by itself. Of one that takes the server a few microseconds, what an engine does around it (a
checkout, a transaction, a result) is the larger part.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from octollm.errors import OctoError
from octollm.storage.failures import is_connection_lost, to_octo_error, unreachable_error

DIRECT_CONNECTIONS = 4
"""Statements of one process at a time; a further one waits for its turn."""
DIRECT_WAIT_SECONDS = 10.0
Rows = Sequence[Sequence[object]]


class DirectPool:
    """A few connections for single statements that look rows up by their key, and for nothing else."""

    def __init__(self, connect: Callable[[], Awaitable[Any]]) -> None:
        self._connect = connect
        self._turns = asyncio.Semaphore(DIRECT_CONNECTIONS)
        self._idle: deque[Any] = deque()
        self._closed = False

    async def fetch(self, statement: str, *parameters: object) -> Rows:
        """Run a statement in PostgreSQL's own words, with ``$1`` and so on, and return its rows.

        Raises ``overloaded`` when no connection comes free in 10 s, ``unavailable`` when the server is away (what was
        cut off may have taken effect).
        """
        try:
            async with asyncio.timeout(DIRECT_WAIT_SECONDS):
                await self._turns.acquire()
        except TimeoutError as error:
            raise OctoError(
                f"No turn at the database within {DIRECT_WAIT_SECONDS:g} s.", code="overloaded", retry_after=1.0
            ) from error
        try:
            return await self._run(await self._take(), statement, parameters)
        finally:
            self._turns.release()

    async def _take(self) -> Any:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closed():
                return connection
        return await self._connect()

    async def _run(self, connection: Any, statement: str, parameters: Sequence[object]) -> Rows:
        good = False
        try:
            rows = await connection.fetch(statement, *parameters)
            good = True
            return rows
        except OSError as error:  # with TimeoutError, when no answer came
            raise unreachable_error(error) from error
        except Exception as error:
            good = not is_connection_lost(error)
            raise to_octo_error(error) from error
        finally:
            # Whoever is cancelled in the middle leaves a connection that still waits for its answer.
            if good and not self._closed and not connection.is_closed():
                self._idle.append(connection)
            else:
                connection.terminate()

    async def aclose(self) -> None:
        """Close the connections that nothing uses; those in use are closed when they come back."""
        self._closed = True
        while self._idle:
            connection = self._idle.pop()
            with contextlib.suppress(Exception):  # it is given up in any case
                await connection.close(timeout=1)
