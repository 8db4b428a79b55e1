"""The event log as it grows, from the server-sent stream (HTML standard, section 9.2)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import msgspec

from octollm.client.door import Door, not_understood
from octollm.client.errors import DeadlineExceeded, DoorError, Unavailable
from octollm.client.patience import PATIENCE_SECONDS, Patience
from octollm.contracts.events import Event

_STREAM_SECONDS = 3600.0
_MAX_EVENT = 4 * 1024 * 1024


async def log_events(door: Door, *, after: int = 0, patience: float = PATIENCE_SECONDS) -> AsyncGenerator[Event]:
    """Yield events behind the position ``after``, and go on for ever, also over a broken connection.

    Raises what the door refuses with, and :class:`Unavailable` when no door is back after ``patience`` seconds.
    """
    bearing = Patience(door, patience)
    while True:
        try:
            async with contextlib.aclosing(_once(door, after)) as events:
                async for event in events:
                    bearing.back()
                    if event is not None and event.seq > after:
                        after = event.seq
                        yield event
            error: DoorError = _ended(door)
        except DeadlineExceeded:
            # The stream was open for as long as one may be.
            error = _ended(door)
        except DoorError as broken:
            error = broken
        await asyncio.sleep(bearing.wait(error, f"Go on with after={after} once it is back."))


async def _once(door: Door, after: int) -> AsyncGenerator[Event | None]:
    """Yield the events of one connection, and ``None`` for each sign of life."""
    async with door.stream(f"/events?after={after}", "text/event-stream", _STREAM_SECONDS) as streamed:
        rest = b""
        async for chunk in streamed.chunks:
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > _MAX_EVENT:
                raise not_understood(door.url)
            for line in lines:
                if line.startswith(b"data:"):
                    yield _decoded(line[5:], door)
                elif line.startswith(b":"):
                    yield None


def _ended(door: Door) -> DoorError:
    return Unavailable(f"{door.url} ended the stream of events.", code="connection_lost")


def _decoded(data: bytes, door: Door) -> Event:
    try:
        return msgspec.json.decode(data, type=Event)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise not_understood(door.url) from error
