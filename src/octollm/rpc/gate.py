"""How many calls a service works on at once, and how many may wait for their turn."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType

from octollm.errors import OctoError

MAX_QUEUE_SECONDS = 10.0


class ConcurrencyLimiter:
    """Bounded concurrency with a bounded queue: whoever comes past both is told to come back."""

    def __init__(self, max_concurrent: int, max_queued: int) -> None:
        self._free = max_concurrent
        self._queued = max_queued
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def __aenter__(self) -> None:
        if self._free > 0:
            self._free -= 1
            return
        if len(self._waiting) >= self._queued:
            raise OctoError("The service is at its limit of concurrent calls.", code="overloaded", retry_after=1)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(MAX_QUEUE_SECONDS):
                await turn  # whoever leaves hands the place over
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                self._release()
            elif turn in self._waiting:
                self._waiting.remove(turn)
            if isinstance(error, TimeoutError):
                raise OctoError(
                    f"No place came free in {MAX_QUEUE_SECONDS:g} s.", code="overloaded", retry_after=2
                ) from None
            raise

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._release()

    def _release(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
