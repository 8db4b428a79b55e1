"""Doing what many ask for at about the same time together: one statement and one commit instead of one for each."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from octollm.errors import OctoError

I = TypeVar("I")  # noqa: E741  an item
R = TypeVar("R")

MOST = 200
"""Items that are done together."""
MAX_WAITING = 10_000
"""Items that wait for the batch under way; past that an item is refused."""


class Batches(Generic[I, R]):
    """Runs one batch at a time; what is asked for meanwhile makes the next. An item alone does not wait.

    ``work`` returns a result for each item, in their order, or what its caller is to be raised. What it raises
    itself, all of the batch's callers get.
    """

    def __init__(self, work: Callable[[Sequence[I]], Awaitable[Sequence[R | OctoError]]], *, name: str) -> None:
        self._work = work
        self._name = name
        self._waiting: deque[tuple[I, asyncio.Future[R]]] = deque()
        self._running: asyncio.Task[None] | None = None

    def put(self, item: I) -> asyncio.Future[R]:
        """Add an item; its result comes with a later batch. Cancelling the future leaves an item out that waits.

        Raises ``overloaded`` when too many wait.
        """
        if len(self._waiting) >= MAX_WAITING:
            raise OctoError("Too much waits for the database.", code="overloaded", retry_after=1.0)
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._running is None:
            self._running = asyncio.create_task(self._run(), name=self._name)
        return future

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch = [self._waiting.popleft() for _ in range(min(MOST, len(self._waiting)))]
                batch = [(item, future) for item, future in batch if not future.done()]
                if batch:
                    await self._do(batch)
        finally:
            self._running = None
            # Whoever stops the loop stops those that wait as well.
            for _, future in self._waiting:
                future.cancel()

    async def _do(self, batch: list[tuple[I, asyncio.Future[R]]]) -> None:
        try:
            results = await self._work([item for item, _ in batch])
        except asyncio.CancelledError:
            for _, future in batch:
                future.cancel()
            raise
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if future.done():
                continue
            if isinstance(result, OctoError):
                future.set_exception(result)
            else:
                future.set_result(result)
