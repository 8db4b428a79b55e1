"""Time in tests: a clock that a test sets, and polling in place of sleeping."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable


class ManualClock:
    """A :class:`octollm.clock.Clock` that stands until ``time`` is set; wall clock and monotonic clock are the same."""

    def __init__(self, time: float = 1000.0) -> None:
        self.time = time
        """Seconds, on both clocks."""

    def now(self) -> float:
        """Return :attr:`time` as seconds since the Unix epoch."""
        return self.time

    def monotonic(self) -> float:
        """Return :attr:`time` on the monotonic clock."""
        return self.time


async def wait_until(
    predicate: Callable[[], object | Awaitable[object]],
    *,
    description: str,
    timeout: float = 10.0,
    interval: float = 0.01,
) -> None:
    """Poll ``predicate`` (plain or async) until it is truthy.

    Raises ``AssertionError`` naming ``description`` after ``timeout`` seconds.
    """
    end = time.monotonic() + timeout
    while True:
        value = predicate()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout:g} s: {description}")
        await asyncio.sleep(interval)
