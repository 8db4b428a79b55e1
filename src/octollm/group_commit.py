"""Group commit: items that arrive while a batch runs form the next batch.

So many items share one SQL statement or one call, and a lone item does not wait for others.
"""

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
"""Most items of one batch."""
MAX_YIELDS = 4
"""Turns of the event loop in which a batch may still grow before it runs."""
MAX_WAITING = 10_000
"""Most items that may wait for the running batch; more are refused as overload."""


def _retrieve(future: asyncio.Future[R]) -> None:
    if not future.cancelled():
        future.exception()


class GroupCommit(Generic[I, R]):
    """Runs one batch at a time, and collects the next one meanwhile.

    ``work`` returns for each item, in order, a result or an error to raise in its caller. An exception of ``work``
    goes to every caller of the batch. With ``weight_of``, a batch weighs at most ``max_weight`` or has one item.
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
        """Queue an item and return the future of its result. Cancelling the future removes an item that still waits.

        Raises ``overloaded`` when too many items wait.
        """
        if len(self._waiting) >= MAX_WAITING:
            raise OctoError(f"Too many {self._name} are waiting.", code="overloaded", retry_after=1.0)
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._running is None:
            # An empty context: the batch serves many callers, and belongs to the trace of none.
            self._running = asyncio.create_task(self._run(), name=self._name, context=contextvars.Context())
        return future

    async def wait(self, item: I) -> R:
        """Queue an item and return its result. Cancelling the waiter does not cancel the item."""
        # The shield keeps the item in its batch: the effect was asked for, whether or not the caller waits.
        future = self.put(item)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            # Nobody hears of its failure any more: without this the event loop would log it as one that was forgotten.
            future.add_done_callback(_retrieve)
            raise

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._collect()
                batch = self._next_batch()
                if batch:
                    await self._run_batch(batch)
        finally:
            self._running = None
            # Without this a cancelled batch would leave the waiters of the next one waiting for ever.
            for _, future in self._waiting:
                future.cancel()

    async def _collect(self) -> None:
        """Let the tasks that can run add their items; return as soon as a turn of the event loop adds none."""
        # The end of a batch wakes many tasks at once, whose next items come within a few turns. A batch that did not
        # wait for them would hold the first item alone, and the others would wait for its whole round trip.
        for _ in range(MAX_YIELDS):
            before = len(self._waiting)
            await asyncio.sleep(0)
            if len(self._waiting) == before:
                return

    def _next_batch(self) -> list[tuple[I, asyncio.Future[R]]]:
        batch: list[tuple[I, asyncio.Future[R]]] = []
        weight = 0
        while self._waiting and len(batch) < MAX_BATCH_ITEMS:
            item, future = self._waiting[0]
            if not future.done():
                weight += 0 if self._weight_of is None else self._weight_of(item)
                # The item stays in the queue and opens the next batch; alone, it may weigh more than the limit.
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
