"""Polling until something becomes true, in place of sleeping."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable


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
