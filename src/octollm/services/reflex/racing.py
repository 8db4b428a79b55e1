"""Waiting for whichever comes first, with nothing left running behind."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


async def run_until_first(*coroutines: Coroutine[Any, Any, object]) -> int:
    """Run all until one ends; cancel the others and return which it was, the first of several.

    Raises what it raised.
    """
    tasks = [asyncio.ensure_future(work) for work in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        ended = next(index for index, task in enumerate(tasks) if task.done())
        tasks[ended].result()
        return ended
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                # Its failure was raised above, or is of no interest any more; either way it was seen.
                task.exception()
