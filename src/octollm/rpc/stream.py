"""An NDJSON answer: lines while the work goes on, heartbeats between them, one result or problem last."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec

from octollm.contracts.problems import Problem
from octollm.contracts.stream import HEARTBEAT_SECONDS, StreamEvent

_QUEUE = 256
_HEARTBEAT = msgspec.json.encode(StreamEvent(type="heartbeat")) + b"\n"


class NdjsonEmitter:
    """An emitter whose lines are read on the other side by the response. A slow reader slows the writer."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue(_QUEUE)

    async def token(self, text: str, *, reset: bool = False) -> None:
        """Send text that was written since the last one."""
        await self._put(StreamEvent(type="token", text=text, reset=reset))

    async def progress(self, percent: float, message: str = "") -> None:
        """Send how far the work is."""
        await self._put(StreamEvent(type="progress", progress=percent, message=message))

    async def result(self, encoded: bytes) -> None:
        """Send the answer, the last line."""
        await self._put(StreamEvent(type="result", result=msgspec.Raw(encoded)))
        await self._queue.put(None)

    async def problem(self, problem: Problem) -> None:
        """Send why there is no answer, the last line."""
        await self._put(StreamEvent(type="problem", problem=problem))
        await self._queue.put(None)

    async def _put(self, line: StreamEvent) -> None:
        await self._queue.put(msgspec.json.encode(line) + b"\n")

    async def iter_lines(self) -> AsyncIterator[bytes]:
        """Yield encoded lines until the last; a heartbeat when nothing was said for a while."""
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_SECONDS * 0.8):
                    line = await self._queue.get()
            except TimeoutError:
                yield _HEARTBEAT
                continue
            if line is None:
                return
            yield line
