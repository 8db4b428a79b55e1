"""Group commit: items that arrive while one batch runs are done together in the next, with one statement or one call."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from octollm.errors import OctoError

I = TypeVar("I")  # noqa: E741  an item
R = TypeVar("R")

MAX_BATCH_ITEMS = 200
"""Items that are done together."""
MAX_WAITING = 10_000
"""Items that wait for the batch under way; past that an item is refused."""


class GroupCommit(Generic[I, R]):
    """Runs one batch at a time; what is asked for meanwhile makes the next. An item alone does not wait.

    ``work`` returns a result for each item, in their order, or what its caller is to be raised. What it raises
    itself, all of the batch's callers get. With ``weigh`` a batch weighs at most ``most_weight``, or has one item.
    """

    def __init__(
        self,
        work: Callable[[Sequence[I]], Awaitable[Sequence[R | OctoError]]],
        *,
        name: str,
        weight_of: Callable[[I], int] | None = None,
        max_weight: int = 0,
    ) -> None:
        self._work = work
        self._name = name
        self._weight_of = weight_of
        self._max_weight = max_weight
        self._waiting: deque[tuple[I, asyncio.Future[R]]] = deque()
        self._running: asyncio.Task[None] | None = None

    def put(self, item: I) -> asyncio.Future[R]:
        """Add an item; its result comes with a later batch. Cancelling the future leaves an item out that waits.

        Raises ``overloaded`` when too many wait.
        """
        if len(self._waiting) >= MAX_WAITING:
            raise OctoError(f"Too many {self._name} wait.", code="overloaded", retry_after=1.0)
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._running is None:
            # It belongs to none of those it works for: not to the task or the trace of the first either.
            self._running = asyncio.create_task(self._run(), name=self._name, context=contextvars.Context())
        return future

    async def wait(self, item: I) -> R:
        """Add an item and return its result. Who leaves before does not take the item along."""
        return await asyncio.shield(self.put(item))

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch = self._next_batch()
                if batch:
                    await self._run_batch(batch)
        finally:
            self._running = None
            # Whoever stops the loop stops those that wait as well.
            for _, future in self._waiting:
                future.cancel()

    def _next_batch(self) -> list[tuple[I, asyncio.Future[R]]]:
        batch: list[tuple[I, asyncio.Future[R]]] = []
        weight = 0
        while self._waiting and len(batch) < MAX_BATCH_ITEMS:
            item, future = self._waiting[0]
            if not future.done():
                weight += 0 if self._weight_of is None else self._weight_of(item)
                if batch and weight > self._max_weight and self._weight_of is not None:
                    break
                batch.append((item, future))
            self._waiting.popleft()
        return batch

    async def _run_batch(self, batch: list[tuple[I, asyncio.Future[R]]]) -> None:
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
